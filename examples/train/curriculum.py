"""Which stage a training is in, by what it has learnt and by the clock."""

import time
from collections.abc import Callable

from .settings import Settings, Stage


class Curriculum:
    """Moves through the stages.

    Attributes:
        index: of the present stage.
    """

    def __init__(self, settings: Settings) -> None:
        self._stages, self.index = settings.stages, 0

    @property
    def stage(self) -> Stage:
        """The present one."""
        return self._stages[self.index]

    def move_on(self, progress: float, digits_right: float | None) -> bool:
        """Goes to the next stage if the present one has done its work or its time is over.

        Args:
            progress: share of the training done, 0 to 1.
            digits_right: share of the digits that were predicted in this stage of late; None: not measured.

        Returns:
            Whether it has moved.
        """
        if self.index == len(self._stages) - 1:
            return False
        has_learnt = digits_right is not None and digits_right >= self.stage.digits_right
        if moved := has_learnt or progress >= self.stage.until:
            self.index += 1
        return moved


class Schedule:
    """How much of a training is done, by steps and by the clock.

    The clock's share begins with the end of the first step, which compiles; it ends with the settings' minutes since
    the start of the program, less what is kept for the export.
    """

    def __init__(self, settings: Settings, started: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._clock, self._begun = settings.steps, clock, started
        self._end = None if settings.minutes is None else started + settings.minutes * 60 - settings.reserve_seconds

    def begin(self) -> None:
        """The first step is done."""
        self._begun = self._clock()

    def progress(self, step: int) -> float:
        """The share after so many steps, 1 or more at the end."""
        by_steps = 0.0 if self._steps is None else step / self._steps
        if self._end is None:
            return by_steps
        left = self._end - self._begun
        by_clock = (self._clock() - self._begun) / left if left > 0 else 1.0
        return max(by_steps, by_clock)
