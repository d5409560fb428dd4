"""What `longmamba tune` searches, and on what."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.texts import Book
from vllm_longmamba.tables import CLOSED_LOOP, PAPER, check_unfiltered_end

# The grids where none is given. The paper searches theta between 1e-40 and 1e-1. In the closed loop every theta takes a
# calibration; these span the best of the models tried (docs/closed_loop.md).
THETAS = {
    PAPER: (1e-40, 1e-20, 1e-10, 1e-5, 1e-3, 1e-2, 0.05, 0.2, 0.5, 0.7),
    CLOSED_LOOP: (0.01, 0.05, 0.2, 0.5, 0.7),
}
CLAMP_PERCENTS = (0.0, 5.0, 10.0, 20.0)
BUDGETS = (1.0,)
UNFILTERED_ENDS = (0,)
REFINE = {PAPER: 1, CLOSED_LOOP: 0}
# Multiples of the training length to score at where no lengths are given. What theta does to text and the clamp to keys
# shows from 16 times on (docs/closed_loop.md).
MULTIPLES = (8, 16)


@dataclass(frozen=True)
class Grid:
    """The settings to be tried; see `make_grid`.

    Attributes:
        thetas: `min_retention`, each between 0 and 1.
        clamp_percents: the paper's C, each a calibration; none in the closed loop.
        budgets: each a calibration: in the closed loop with each theta, otherwise for C = 0, where nothing is clamped.
        refine: finer grids of theta after the first; 0 in the closed loop.
        unfiltered_ends: each with every table, as many of a prompt's last tokens are not filtered.

    Raises:
        ValueError: a value outside its range, or twice.
    """

    thetas: Sequence[float]
    clamp_percents: Sequence[float]
    budgets: Sequence[float]
    refine: int
    unfiltered_ends: Sequence[int] = UNFILTERED_ENDS

    def __post_init__(self) -> None:
        _check("--thetas", self.thetas, "between 0 and 1", all(0 < theta < 1 for theta in self.thetas))
        clamps = self.clamp_percents
        _check("--clamp-percents", clamps, "between 0 and 100", all(0 <= clamp < 100 for clamp in clamps))
        _check("--budgets", self.budgets, "above 0", all(0 < budget < float("inf") for budget in self.budgets))
        ends = self.unfiltered_ends
        _check("--unfiltered-ends", ends, "of tokens, 0 or more", all(end >= 0 for end in ends))
        for end in ends:
            check_unfiltered_end(end, "--unfiltered-ends")

    def budgets_of(self, clamp_percent: float) -> Sequence[float]:
        """The budgets to be tried with a C: with a clamp the paper's alone."""
        return BUDGETS if clamp_percent else self.budgets


def make_grid(
    method: str,
    thetas: Sequence[float] | None = None,
    clamp_percents: Sequence[float] | None = None,
    budgets: Sequence[float] | None = None,
    refine: int | None = None,
    unfiltered_ends: Sequence[int] | None = None,
) -> Grid:
    """The grid of a method, its default where nothing is given.

    Args:
        method: "paper" or "closed-loop".
        thetas, clamp_percents, budgets, refine, unfiltered_ends: see `Grid`.

    Raises:
        ValueError: as `Grid`, or something given that has no part in the method.
    """
    if method not in THETAS:
        raise ValueError(
            f"--method must be {' or '.join(THETAS)}, got {method!r}; {PAPER} tries tables without a clamp, too"
        )
    closed = method == CLOSED_LOOP
    if closed and clamp_percents is not None:
        raise ValueError(f"--clamp-percents: C has no part in the method {CLOSED_LOOP}; leave it out")
    if closed and refine:
        raise ValueError(
            f"--refine: with the method {CLOSED_LOOP} every theta takes a calibration; give more --thetas in a second "
            "run with the same --output, which goes on from the first"
        )
    clamps = () if closed else CLAMP_PERCENTS if clamp_percents is None else clamp_percents
    if not closed and budgets is not None and 0 not in clamps:
        raise ValueError("--budgets: a clamp allows for no budget but 1; leave it out, or add 0 to --clamp-percents")
    return Grid(
        thetas=THETAS[method] if thetas is None else thetas,
        clamp_percents=clamps,
        budgets=BUDGETS if budgets is None else budgets,
        refine=REFINE[method] if refine is None else refine,
        unfiltered_ends=UNFILTERED_ENDS if unfiltered_ends is None else unfiltered_ends,
    )


@dataclass(frozen=True)
class TuningSettings:
    """What is searched, and on what.

    Attributes:
        grid: the settings to be tried.
        held_out: texts to score on and to hide keys in.
        calibration_texts: files to calibrate on; the package's sample where there are none.
        calibration: settings of every calibration, but for what the grid has; its method is that of the search. Where
            its measure_to is None, the closed loop measures up to the longest of `lengths`.
        passkeys: whether keys are asked for.
        needles: where above 0, one of so many numbers of different names is asked for as well, as often as the key.
        search_unfiltered: whether global channels are searched whose filter costs text, to leave them unfiltered.
        perplexity: whether text is scored.
        lengths: tokens of prompts and windows; by default `MULTIPLES` of the training length.
        depths: places of the key.
        seeds: of the questions.
        windows: at most so many of each length in each text.
        scored_tokens: at the end of each window.

    Raises:
        ValueError: measure_to is given with the paper's method, needles without passkeys, or a search for unfiltered
            channels without text.
    """

    grid: Grid
    held_out: Sequence[Book]
    calibration_texts: Sequence[Path]
    calibration: CalibrationSettings
    passkeys: bool
    perplexity: bool
    lengths: Sequence[int] | None
    depths: int
    seeds: Sequence[int]
    windows: int
    scored_tokens: int
    needles: int = 0
    search_unfiltered: bool = False

    def __post_init__(self) -> None:
        if self.needles and not self.passkeys:
            raise ValueError("--needles asks for more than the pass key; leave out --score perplexity, or --needles")
        if self.search_unfiltered and not self.perplexity:
            raise ValueError("--search-unfiltered goes by the loss of text; leave out --score passkey")
        if self.calibration.method != CLOSED_LOOP and self.calibration.measure_to is not None:
            raise ValueError(
                f"--measure-to has a part in the method {CLOSED_LOOP} only; "
                f"leave it out, or give --method {CLOSED_LOOP}"
            )

    def lengths_for(self, train_length: int) -> list[int]:
        """Tokens of prompts and windows."""
        return list(self.lengths or [factor * train_length for factor in MULTIPLES])


def _check(name: str, values: Sequence[float], rule: str, holds: bool) -> None:
    if not holds or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different numbers {rule}, got {', '.join(map(str, values))}")
