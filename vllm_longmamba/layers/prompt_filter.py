"""Which tokens of a step are to be filtered, and by which row of the table: one answer for all layers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import ThresholdTable

Int32Array = npt.NDArray[np.int32]


class PromptFilter:
    """The threshold table of a model as its layers and metadata builders share it.

    Attributes:
        table: thresholds of all layers.
        min_retention: retention above which a channel is global; None means the table's default.
        filters_generated: generated tokens count as prompt tokens, except that they do not change the row.
        unfiltered_end: as many of a prompt's last tokens are not filtered, though they count for its row.

    Raises:
        ValueError: generated tokens are to be filtered, and the end of the prompt before them is not.
    """

    def __init__(
        self,
        table: ThresholdTable,
        min_retention: float | None = None,
        filters_generated: bool = False,
        unfiltered_end: int | None = None,
    ) -> None:
        self.table = table
        self.min_retention = min_retention
        self.filters_generated = filters_generated
        self.unfiltered_end = table.unfiltered_end(unfiltered_end)
        if filters_generated and self.unfiltered_end:
            raise ValueError(
                f"the last {self.unfiltered_end} tokens of prompts are not to be filtered (unfiltered_end, of the "
                "options or of the table), but generated tokens are (filter_generated); leave one of them out, or make "
                "a table with `longmamba calibrate --unfiltered-end 0`"
            )

    @classmethod
    def from_options(cls, table: ThresholdTable, options: LongMambaOptions) -> "PromptFilter":
        """The filter that a user asks for."""
        return cls(table, options.min_retention, options.filter_generated, options.unfiltered_end)

    def step_rows(
        self, prompt_lengths: Int32Array, sequence_lengths: Int32Array, query_lengths: Int32Array
    ) -> "StepRows":
        """Find the prompt tokens that may be filtered among the tokens of one step.

        Args:
            prompt_lengths: (num_reqs,) tokens of each request's prompt (S); 0 for padding.
            sequence_lengths: (num_reqs,) tokens of each request after this step; an upper bound will do for requests
                that have left their prompt behind.
            query_lengths: (num_reqs,) tokens of each request in this step.

        Returns:
            Rows and numbers of those tokens, in the order of the requests.
        """
        query_lengths = query_lengths.astype(np.int32, copy=False)
        computed = sequence_lengths - query_lengths
        if self.filters_generated:
            prompt_tokens = np.where(prompt_lengths > 0, query_lengths, 0).astype(np.int32)
        else:
            left = prompt_lengths - self.unfiltered_end - computed
            if not (left > 0).any():
                return StepRows.without_prompts(query_lengths)
            prompt_tokens = np.clip(left, 0, query_lengths).astype(np.int32)
        rows = np.where(prompt_tokens > 0, self.table.rows_of(prompt_lengths), 0).astype(np.int32)
        return StepRows(rows, prompt_tokens, query_lengths)


@dataclass(frozen=True)
class StepRows:
    """Rows of the table for the requests of one step.

    Attributes:
        rows: (num_reqs,) row of the table; 0 filters nothing.
        prompt_tokens: (num_reqs,) how many of the request's tokens in this step, from the first, are prompt tokens that
            may be filtered.
        query_lengths: (num_reqs,) tokens of each request in this step.
    """

    rows: Int32Array
    prompt_tokens: Int32Array
    query_lengths: Int32Array

    @classmethod
    def without_prompts(cls, query_lengths: Int32Array) -> "StepRows":
        """Of a step that holds no prompt token."""
        nothing = np.zeros(len(query_lengths), np.int32)
        return cls(nothing, nothing, query_lengths)

    def __getitem__(self, requests: slice) -> "StepRows":
        """The same for some of the requests."""
        return StepRows(self.rows[requests], self.prompt_tokens[requests], self.query_lengths[requests])

    @cached_property
    def filters(self) -> bool:
        """Whether any token of these requests can be filtered."""
        return bool(self.rows.any())

    def per_token(self) -> Int32Array:
        """(tokens,) row of each token; 0 for generated tokens and the unfiltered end of a prompt."""
        starts = np.cumsum(self.query_lengths) - self.query_lengths
        token_rows = np.repeat(self.rows, self.query_lengths)
        position = np.arange(token_rows.shape[0]) - np.repeat(starts, self.query_lengths)
        token_rows[position >= np.repeat(self.prompt_tokens, self.query_lengths)] = 0
        return token_rows


def step_rows_from_metadata(prompt_filter: PromptFilter, common: Any) -> StepRows:
    """Read one step's rows from what vLLM tells every metadata builder; host data only, no device synchronisation.

    Args:
        prompt_filter: the model's filter.
        common: vLLM's `CommonAttentionMetadata`; `rswa_prefix_lens` must hold the prompt lengths, unless
            `is_prefilling` says that no request has tokens of its prompt left.

    Raises:
        RuntimeError: the model runner did not pass the prompt lengths on.
    """
    if has_no_prompt_lengths(common) and not prompt_filter.filters_generated:
        return StepRows.without_prompts(_query_lengths(common))
    return prompt_filter.step_rows(*step_lengths(common))


def has_no_prompt_lengths(common: Any) -> bool:
    """Whether a step came without them because no request has tokens of its prompt left.

    While vLLM captures CUDA graphs, such a step can have several tokens a request.
    """
    is_decoding = common.is_prefilling is not None and not common.is_prefilling.numpy().any()
    return bool(common.rswa_prefix_lens is None and is_decoding)


def step_lengths(common: Any) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Read a step's lengths from what vLLM tells every metadata builder; host data only, no device synchronisation.

    Returns:
        (num_reqs,) tokens of each request's prompt, of the request after this step, and of the request in this step, as
        `PromptFilter.step_rows` takes them.

    Raises:
        RuntimeError: the model runner did not pass the prompt lengths on.
    """
    if common.rswa_prefix_lens is None or common.seq_lens_cpu_upper_bound is None:
        raise RuntimeError(
            "vllm_longmamba: vLLM's model runner did not pass the prompt lengths on, without which prompts cannot be "
            "filtered; this vLLM has changed, please report it"
        )
    num_reqs = common.num_reqs
    prompt_lengths = np.zeros(num_reqs, np.int32)
    given = common.rswa_prefix_lens.cpu().numpy()[:num_reqs]
    prompt_lengths[: given.shape[0]] = given
    return prompt_lengths, common.seq_lens_cpu_upper_bound.numpy()[:num_reqs], _query_lengths(common)


def _query_lengths(common: Any) -> Int32Array:
    starts = common.query_start_loc_cpu.numpy()
    lengths: Int32Array = starts[1 : common.num_reqs + 1] - starts[: common.num_reqs]
    return lengths
