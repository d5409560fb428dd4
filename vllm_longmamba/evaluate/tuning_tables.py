"""The tables that `longmamba tune` tries: one for each C, or budget, and unfiltered end; see `make_grid`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.comparison import Progress
from vllm_longmamba.evaluate.records import settings_key
from vllm_longmamba.evaluate.tuning import TriedTable
from vllm_longmamba.evaluate.tuning_settings import TuningSettings
from vllm_longmamba.tables import CLOSED_LOOP, ThresholdTable, load_table, save_table

# What `calibrate` decides itself.
_OF_CALIBRATION = ("max_model_len", "max_num_batched_tokens", "max_num_seqs", "enable_prefix_caching", "enforce_eager")


def calibration_arguments(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of vLLM's `LLM` without those that `calibrate` decides itself."""
    return {name: value for name, value in engine_args.items() if name not in _OF_CALIBRATION}


@dataclass(frozen=True)
class TableMaker:
    """Calibrates a model, or takes the table that an earlier run has left in the folder.

    Attributes:
        model: name or folder, as for `vllm serve`.
        settings: what is searched, and on what.
        engine_args: further arguments of vLLM's `LLM`.
        description: of the model; with all settings of a calibration it tells its table from others.
        folder: keeps the tables; made where it is missing.
        progress: shows the progress.
    """

    model: str
    settings: TuningSettings
    engine_args: Mapping[str, Any]
    description: Mapping[str, Any]
    folder: Path
    progress: Progress

    def make(self, measure_to: int) -> list[TriedTable]:
        """All tables of the grid.

        Args:
            measure_to: tokens of the longest sequences of the closed loop, unless the settings say it.

        Raises:
            ValueError: too little text to calibrate on.
        """
        calibration, grid = self.settings.calibration, self.settings.grid
        if calibration.method != CLOSED_LOOP:
            made = [self._of_clamp(clamp, budget) for clamp in grid.clamp_percents for budget in grid.budgets_of(clamp)]
        else:
            calibration = replace(calibration, measure_to=calibration.measure_to or measure_to)
            made = [one for budget in grid.budgets for one in self._closed_loop(replace(calibration, budget=budget))]
        return [_with_unfiltered_end(one, end) for one in made for end in grid.unfiltered_ends]

    def _of_clamp(self, clamp_percent: float, budget: float) -> TriedTable:
        # Method and combination follow from the clamp: without one the table is made as "unclamped".
        changes: dict[str, Any] = {"method": None, "combine": None, "clamp_percent": clamp_percent or None}
        name = f"C{clamp_percent:g}" if budget == 1 else f"C{clamp_percent:g}-budget{budget:g}"
        calibration = replace(self.settings.calibration, budget=budget, **changes)
        return self._made(name, calibration, self.settings.grid.thetas)

    def _closed_loop(self, calibration: CalibrationSettings) -> list[TriedTable]:
        """The tables of a budget: thetas of the same global channels share one."""
        made: list[TriedTable] = []
        for theta in self.settings.grid.thetas:
            same = next((one for one in made if _same_channels(one.table, one.thetas[0], theta)), None)
            if same is None:
                name = f"budget{calibration.budget:g}-theta{theta:g}"
                made.append(self._made(name, replace(calibration, min_retention=theta), [theta]))
            else:
                made[made.index(same)] = replace(same, thetas=[*same.thetas, theta])
        return made

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Digests of the files to calibrate on, by name; they are read once for all tables."""
        return {path.name: blake3(path.read_bytes()).hexdigest() for path in self.settings.calibration_texts}

    def _made(self, name: str, calibration: CalibrationSettings, thetas: Iterable[float]) -> TriedTable:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = settings_key({**self.description, **asdict(calibration), "texts": self._texts})
        path = self.folder / f"table-{name}-{key}.safetensors"
        if not path.exists():
            advance = self.progress(f"calibrating, {name}", 1)
            texts = tuple(map(str, self.settings.calibration_texts))
            arguments = calibration_arguments(self.engine_args)
            save_table(calibrate(self.model, replace(calibration, texts=texts), **arguments), path)
            advance()
        return TriedTable(path, load_table(path), list(thetas))


def _with_unfiltered_end(tried: TriedTable, tokens: int) -> TriedTable:
    """The same thresholds with an unfiltered end: in a file of their own, unless the table has this end already."""
    if tokens == tried.table.metadata.unfiltered_end:
        return tried
    path = tried.path.with_stem(f"{tried.path.stem}-end{tokens}")
    table = replace(tried.table, metadata=replace(tried.table.metadata, unfiltered_end=tokens))
    save_table(table, path)
    return TriedTable(path, table, tried.thetas)


def _same_channels(table: ThresholdTable, theta: float, other: float) -> bool:
    """Whether two thetas make the same channels global: retention comes from the training length, whatever theta is."""
    return all(
        # NumPy: further engines are forked from this process, see tables/table.py.
        np.array_equal(table.is_global(layer, theta).numpy(), table.is_global(layer, other).numpy())
        for layer in table.layers
    )
