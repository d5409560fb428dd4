"""The worker's part of tuning: other thresholds in the running engine."""

from collections.abc import Sequence
from typing import Any


class TuningWorkerExtension:
    """A method that `longmamba tune` calls in every worker (vLLM's `worker_extension_cls`)."""

    get_model: Any
    vllm_config: Any

    def longmamba_set_filter(self, table: str, min_retention: float, unfiltered: Sequence[str] = ()) -> None:
        """Filter by another table or another theta from now on.

        Args:
            table: path of a table of the same rows as the present one.
            min_retention: theta; 1 filters nothing, as no channel has a retention above it.
            unfiltered: what else is not filtered, see `leave_unfiltered`.

        Raises:
            ValueError: a table of other rows, layers or channels.
        """
        from vllm_longmamba.layers.prompt_filter import PromptFilter
        from vllm_longmamba.layers.replace_table import replace_table
        from vllm_longmamba.options import options_from_config
        from vllm_longmamba.tables import leave_unfiltered, load_table

        new = leave_unfiltered(load_table(table), unfiltered)
        filters_generated = options_from_config(self.vllm_config.additional_config).filter_generated
        replace_table(self.get_model(), PromptFilter(new, min_retention, filters_generated))
