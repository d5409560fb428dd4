"""What `longmamba tune` tries: the grid of settings, and the tables that are calibrated for it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.calibration.offline import calibrate_all
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.comparison import Progress
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.store import settings_key
from vllm_longmamba.options import KEY
from vllm_longmamba.tables import CLOSED_LOOP, PAPER, ThresholdTable, check_range, load_table, save_table

# The grids where none is given. The paper searches theta between 1e-40 and 1e-1. In the closed loop every theta takes a
# calibration; these span the best of the models tried (docs/closed_loop.md).
THETAS = {
    PAPER: (1e-40, 1e-20, 1e-10, 1e-5, 1e-3, 1e-2, 0.05, 0.2, 0.5, 0.7),
    CLOSED_LOOP: (0.01, 0.05, 0.2, 0.5, 0.7),
}
CLAMP_PERCENTS = (0.0, 5.0, 10.0, 20.0)
FURTHER = {PAPER: 2, CLOSED_LOOP: 0}
# What `calibrate` decides itself.
_OF_CALIBRATION = (
    "model", "model_impl", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enable_prefix_caching"
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The settings to be tried; None takes the method's defaults.

    Attributes:
        method: "paper" or "closed-loop".
        thetas: `min_retention`, each between 0 and 1; in the closed loop each takes a calibration.
        clamp_percents: the paper's C, each a calibration; none in the closed loop.
        budgets: each a calibration: in the closed loop with each theta, otherwise for C = 0, where nothing is clamped.
        further: settings that are proposed and tried after the grid; none in the closed loop.
        unfiltered_ends: each with all else, as many of a prompt's last tokens are not filtered.

    Raises:
        ValueError: a value outside its range, or twice; something given that has no part in the method.
    """

    method: str
    thetas: Sequence[float] | None = None
    clamp_percents: Sequence[float] | None = None
    budgets: Sequence[float] | None = None
    further: int | None = None
    unfiltered_ends: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if self.method not in THETAS:
            raise ValueError(
                f"--method must be {' or '.join(THETAS)}, got {self.method!r}; {PAPER} tries tables without a "
                "clamp, too"
            )
        closed = self.method == CLOSED_LOOP
        if closed and self.clamp_percents is not None:
            raise ValueError(f"--clamp-percents: C has no part in the method {CLOSED_LOOP}; leave it out")
        if closed and self.further:
            raise ValueError(
                f"--further: with the method {CLOSED_LOOP} every theta takes a calibration; give more --thetas in a "
                "second run with the same --output, which goes on from the first"
            )
        clamps = () if closed else CLAMP_PERCENTS if self.clamp_percents is None else self.clamp_percents
        if not closed and self.budgets is not None and 0 not in clamps:
            raise ValueError(
                "--budgets: a clamp allows for no budget but 1; leave it out, or add 0 to --clamp-percents"
            )
        thetas = THETAS[self.method] if self.thetas is None else self.thetas
        budgets = (1.0,) if self.budgets is None else self.budgets
        _check("--thetas", thetas, "between 0 and 1", all(0 < theta < 1 for theta in thetas))
        _check("--clamp-percents", clamps, "between 0 and 100", all(0 <= clamp < 100 for clamp in clamps))
        _check("--budgets", budgets, "above 0", all(0 < budget < float("inf") for budget in budgets))
        ends = self.unfiltered_ends
        _check("--unfiltered-ends", ends, "of tokens, 0 or more", all(end >= 0 for end in ends))
        for end in ends:
            check_range("unfiltered_end", end, "--unfiltered-ends")
        further = FURTHER[self.method] if self.further is None else self.further
        filled = {"thetas": thetas, "clamp_percents": clamps, "budgets": budgets, "further": further}
        for name, value in filled.items():
            object.__setattr__(self, name, value)

    def calibrations(self, settings: CalibrationSettings) -> dict[str, tuple[CalibrationSettings, Sequence[float]]]:
        """Name of each table -> how it is made, and the thetas to try with it.

        Args:
            settings: of every calibration, but for what the grid has.
        """
        assert self.thetas is not None
        assert self.clamp_percents is not None
        assert self.budgets is not None
        if self.method == CLOSED_LOOP:
            return {
                f"budget{budget:g}-theta{theta:g}": (replace(settings, budget=budget, min_retention=theta), [theta])
                for budget in self.budgets
                for theta in self.thetas
            }
        # Method and combination follow from the clamp: without one the table is made as "unclamped".
        without: dict[str, Any] = {"method": None, "combine": None, "clamp_percent": None}
        made = {}
        for clamp in self.clamp_percents:
            for budget in [1.0] if clamp else self.budgets:
                name = f"C{clamp:g}" if budget == 1 else f"C{clamp:g}-budget{budget:g}"
                changes = without | {"clamp_percent": clamp or None}
                made[name] = (replace(settings, budget=budget, **changes), self.thetas)
        return made


@dataclass(frozen=True)
class TriedTable:
    """A table to be tried.

    Attributes:
        path: its file.
        table: its contents.
        thetas: to be tried with it.
    """

    path: Path
    table: ThresholdTable
    thetas: Sequence[float]


def make_tables(
    model: ModelSettings,
    grid: Grid,
    settings: CalibrationSettings,
    texts: Sequence[Path],
    description: Mapping[str, Any],
    folder: Path,
    progress: Progress,
) -> list[TriedTable]:
    """Calibrate all tables of a grid, or take those that an earlier run has left in the folder.

    Args:
        model: the model and the arguments of its engine.
        grid: see `Grid`.
        settings: of every calibration, but for what the grid has.
        texts: files to calibrate on; the package's sample where there are none.
        description: of the model; with all settings of a calibration it tells its table from others.
        folder: keeps the tables; made where it is missing.
        progress: shows the progress.

    Raises:
        ValueError: too little text to calibrate on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digests = {path.name: blake3(path.read_bytes()).hexdigest() for path in texts}
    paths, missing = {}, {}
    for name, (calibration, thetas) in grid.calibrations(settings).items():
        key = settings_key({**description, **asdict(calibration), "texts": digests})
        path = folder / f"table-{name}-{key}.safetensors"
        paths[path] = thetas
        if not path.exists():
            missing[path] = replace(calibration, texts=tuple(map(str, texts)))
    # One engine for all; in the closed loop, where each takes long, an interrupted search keeps those that are made.
    for batch in [[path] for path in missing] if grid.method == CLOSED_LOOP else [list(missing)] if missing else []:
        advance = progress(f"calibrating, {', '.join(path.stem.split('-', 1)[1] for path in batch)}", 1)
        with model.starting():
            tables = calibrate_all(model.model, [missing[path] for path in batch], **calibration_arguments(model))
        for path, table in zip(batch, tables, strict=True):
            save_table(table, path)
        advance()
    return [TriedTable(path, load_table(path), thetas) for path, thetas in paths.items()]


def calibration_arguments(model: ModelSettings) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` without those that `calibrate` decides itself."""
    arguments = {name: value for name, value in model.plain.items() if name not in _OF_CALIBRATION}
    config = {name: value for name, value in model.plain.get("additional_config", {}).items() if name != KEY}
    return arguments | {"additional_config": config}


def _check(name: str, values: Sequence[float], rule: str, holds: bool) -> None:
    if not holds or len(set(values)) < len(values):
        raise ValueError(f"{name} must be different numbers {rule}, got {', '.join(map(str, values))}")
