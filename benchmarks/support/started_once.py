"""Several tasks with one start of a contestant."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from vllm_longmamba.evaluate.methods import Contestant, Runner


@contextmanager
def started_once(contestant: Contestant) -> Iterator[Contestant]:
    """The contestant, started when it is needed first, and then kept until the end."""
    with ExitStack() as stack:
        yield _StartedOnce(contestant, stack)


class _StartedOnce:
    def __init__(self, contestant: Contestant, stack: ExitStack) -> None:
        self._contestant, self._stack = contestant, stack
        self._runner: Runner | None = None
        self.description: Any = contestant.description
        self.encoder = contestant.encoder
        self.train_length = contestant.train_length

    @contextmanager
    def start(self) -> Iterator[Runner]:
        """Start it, or go on with what was started."""
        if self._runner is None:
            self._runner = self._stack.enter_context(self._contestant.start())
        yield self._runner
