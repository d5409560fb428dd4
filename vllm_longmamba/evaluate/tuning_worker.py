"""The worker's part of tuning: other thresholds in the running engine."""

from collections.abc import Sequence
from typing import Any


class TuningWorkerExtension:
    """A method that `longmamba tune` calls in every worker (vLLM's `worker_extension_cls`)."""

    get_model: Any

    def longmamba_set_filter(self, table: str, min_retention: float, unfiltered: Sequence[str] = ()) -> None:
        """Filter by another table or another theta from now on.

        Args:
            table: path of a table of the same rows as the present one.
            min_retention: theta; 1 filters nothing, as no channel has a retention above it.
            unfiltered: what else is not filtered, see `leave_unfiltered`.

        Raises:
            ValueError: a table of other rows, layers or channels.
        """
        from vllm.distributed.parallel_state import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
        )

        from vllm_longmamba.layers.filtered_mixer import filtered_mixers
        from vllm_longmamba.tables import leave_unfiltered, load_table

        mixers = filtered_mixers(self.get_model())
        if not mixers:
            return
        # One object for all layers and for the metadata builders, which must go on to see the same.
        prompt_filter = mixers[0].prompt_filter
        assert prompt_filter is not None, "longmamba tune starts the engine with the filter"
        new = leave_unfiltered(load_table(table), unfiltered)
        if new.row_lengths.tolist() != prompt_filter.table.row_lengths.tolist():
            raise ValueError(f"{table}: its rows are for other prompt lengths than those of the engine's table")
        prompt_filter.table, prompt_filter.min_retention = new, min_retention
        prompt_filter.unfiltered_end = new.unfiltered_end()
        for mixer in mixers:
            mixer.set_filter(prompt_filter, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
