"""LongMamba (arXiv 2504.16053): in a global channel a prompt token with dt <= g(S) gets dt = 0."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vllm_longmamba.checkpoint.table_lookup import Weights, find_table
from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import ThresholdTable, load_table

from ..checkpoint import weight_files
from .plain import LayerPlan, LayerView, Prompt


class LongMamba:
    """Filters with a table, in the row that the engine would take, or with thresholds of one's own.

    Args:
        thresholds: layer index -> (rows, channels) float32, -1.0 where nothing is filtered.
        row_of: from a prompt's length to its row.
        unfiltered_end: as many of a prompt's last tokens are not filtered.
    """

    name = "longmamba"
    needs_whole_prompt = False

    def __init__(
        self, thresholds: Mapping[int, torch.Tensor], row_of: Callable[[int], int], unfiltered_end: int = 0
    ) -> None:
        self._thresholds = thresholds
        self._row_of = row_of
        self._unfiltered_end = unfiltered_end

    @classmethod
    def from_table(
        cls, table: ThresholdTable, min_retention: float | None = None, unfiltered_end: int | None = None
    ) -> "LongMamba":
        """Filter with a table.

        Args:
            table: of this model.
            min_retention: theta; None takes the table's own.
            unfiltered_end: in tokens; None takes the table's own.
        """
        thresholds = {layer: table.thresholds(layer, min_retention) for layer in table.layers}
        return cls(thresholds, table.row_of, table.unfiltered_end(unfiltered_end))

    @classmethod
    def for_folder(cls, folder: Path, options: LongMambaOptions | None = None) -> "LongMamba":
        """Filter with the table that the engine would find for a checkpoint.

        Args:
            folder: the checkpoint.
            options: `table`, `min_retention` and `unfiltered_end` count.

        Raises:
            ValueError: there is none, or the one named belongs to other weights.
        """
        options = options or LongMambaOptions()
        weights = Weights(folder, [str(file) for file in weight_files(folder)])
        table = load_table(find_table(str(folder), weights, options))
        return cls.from_table(table, options.min_retention, options.unfiltered_end)

    @classmethod
    def from_thresholds(cls, thresholds: Mapping[int, torch.Tensor]) -> "LongMamba":
        """Filter prompts of all lengths alike.

        Args:
            thresholds: layer index -> (channels,); -1.0 for a local channel. Layers left out are not filtered.
        """
        return cls({layer: threshold[None].float() for layer, threshold in thresholds.items()}, lambda length: 0)

    def check(self, channels: Mapping[int, int]) -> None:
        """See `ReadingMethod`."""
        for layer, thresholds in self._thresholds.items():
            if channels.get(layer) != thresholds.shape[1]:
                raise ValueError(
                    f"LongMamba: the thresholds of layer {layer} are for {thresholds.shape[1]} channels, but the model "
                    f"has {channels.get(layer, 'no such layer')}; take those of this model"
                )

    def plan(self, layer: LayerView, prompt: Prompt) -> LayerPlan:
        """See `ReadingMethod`."""
        if layer.index not in self._thresholds:
            return LayerPlan()
        threshold = self._thresholds[layer.index][self._row_of(prompt.length)]
        if not bool((threshold >= 0).any()):
            return LayerPlan()
        threshold = threshold.to(layer.A.device)
        return LayerPlan(lambda dt: dt.masked_fill(dt <= threshold, 0.0), self._unfiltered_end)
