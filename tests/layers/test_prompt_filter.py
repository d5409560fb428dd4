"""Tests of vllm_longmamba/layers/prompt_filter.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tables import ROW_LENGTHS, TRAIN_LENGTH, small_table

from vllm_longmamba.layers.prompt_filter import PromptFilter, StepRows, step_rows_from_metadata
from vllm_longmamba.options import LongMambaOptions

# (prompt length, tokens already computed, tokens of this step): what a request looks like in one step.
Request = tuple[int, int, int]

CASES: dict[str, tuple[list[Request], list[int], list[int]]] = {
    "no-request": ([], [], []),
    "one-token": ([(1, 0, 1)], [0], [1]),
    "not-above-training-length": ([(8, 0, 8), (9, 0, 9), (10, 0, 10), (11, 0, 11)], [0, 0, 0, 1], [8, 9, 10, 11]),
    "whole-prompts": ([(12, 0, 12), (17, 0, 17), (999, 0, 999)], [1, 2, 3], [12, 17, 999]),
    "first-chunk": ([(20, 0, 7)], [3], [7]),
    "middle-chunk": ([(20, 7, 7)], [3], [7]),
    "last-chunk": ([(20, 14, 6)], [3], [6]),
    "tail-of-one-token": ([(20, 19, 1)], [3], [1]),
    "first-generated-token": ([(20, 20, 1)], [0], [0]),
    "generated-token": ([(20, 33, 1)], [0], [0]),
    "resumed-at-once": ([(20, 0, 33)], [3], [20]),
    "resumed-chunk-over-the-end": ([(20, 15, 10)], [3], [5]),
    "resumed-chunk-behind-the-prompt": ([(20, 25, 10)], [0], [0]),
    "padding": ([(20, 19, 1), (0, 0, 0), (0, 0, 1)], [3, 0, 0], [1, 0, 0]),
    "mixed": ([(20, 40, 1), (12, 11, 1), (16, 3, 9), (5, 0, 5)], [0, 1, 2, 0], [0, 1, 9, 5]),
}


# The same with the last 6 tokens of each prompt unfiltered.
END = 6
END_CASES: dict[str, tuple[list[Request], list[int], list[int]]] = {
    "no-request": ([], [], []),
    "not-above-training-length": ([(8, 0, 8), (5, 0, 5)], [0, 0], [2, 0]),
    "row-of-the-whole-prompt": ([(12, 0, 12), (17, 0, 17), (999, 0, 999)], [1, 2, 3], [6, 11, 993]),
    "chunk-before": ([(20, 4, 10)], [3], [10]),
    "chunk-across": ([(20, 10, 7)], [3], [4]),
    "chunk-of-one-token-before": ([(20, 13, 1)], [3], [1]),
    "chunk-inside": ([(20, 14, 3)], [0], [0]),
    "tail-of-one-token": ([(20, 19, 1)], [0], [0]),
    "generated-token": ([(20, 33, 1)], [0], [0]),
    "resumed-at-once": ([(20, 0, 33)], [3], [14]),
    "resumed-chunk-over-both-ends": ([(20, 12, 13)], [3], [2]),
    "padding": ([(20, 3, 1), (0, 0, 0), (0, 0, 1)], [3, 0, 0], [1, 0, 0]),
    "mixed": ([(20, 40, 1), (12, 11, 1), (16, 3, 9), (5, 0, 5), (20, 13, 1)], [0, 0, 2, 0, 3], [0, 0, 7, 0, 1]),
}


def step_rows_of(requests: list[Request], unfiltered_end: int | None = None) -> StepRows:
    prompt, computed, query = np.array(requests, np.int32).reshape(-1, 3).T
    return PromptFilter(small_table(), unfiltered_end=unfiltered_end).step_rows(prompt, computed + query, query)


def naive_per_token(requests: list[Request], unfiltered_end: int = 0) -> list[int]:
    """The row of each token of a step, token by token, from the table's definition."""
    rows = []
    for prompt, computed, query in requests:
        for position in range(computed, computed + query):
            is_filtered = prompt > TRAIN_LENGTH and position < prompt - unfiltered_end
            nearest = min(range(len(ROW_LENGTHS)), key=lambda row: (abs(ROW_LENGTHS[row] - prompt), row))
            rows.append(nearest if is_filtered else 0)
    return rows


@pytest.mark.parametrize(("requests", "rows", "prompt_tokens"), CASES.values(), ids=CASES)
def test_step_rows(requests: list[Request], rows: list[int], prompt_tokens: list[int]) -> None:
    step = step_rows_of(requests)
    assert step.rows.tolist() == rows
    assert step.prompt_tokens.tolist() == prompt_tokens
    assert step.query_lengths.tolist() == [query for _, _, query in requests]
    assert {array.dtype for array in (step.rows, step.prompt_tokens, step.query_lengths)} == {np.dtype(np.int32)}


@pytest.mark.parametrize(("requests", "rows", "prompt_tokens"), END_CASES.values(), ids=END_CASES)
def test_step_rows_with_an_unfiltered_end(requests: list[Request], rows: list[int], prompt_tokens: list[int]) -> None:
    step = step_rows_of(requests, END)
    assert step.rows.tolist() == rows
    assert step.prompt_tokens.tolist() == prompt_tokens
    assert step.query_lengths.tolist() == [query for _, _, query in requests]
    assert {array.dtype for array in (step.rows, step.prompt_tokens, step.query_lengths)} == {np.dtype(np.int32)}
    assert step.per_token().tolist() == naive_per_token(requests, END)
    assert step.filters is any(rows)


@pytest.mark.parametrize("end", [12, 13, 999])
def test_an_unfiltered_end_as_long_as_the_prompt(end: int) -> None:
    step = step_rows_of([(12, 0, 12), (12, 3, 20), (20, 7, 1)], end)
    assert step.rows.tolist() == [0, 0, 3 if end == 12 else 0]
    assert step.prompt_tokens.tolist() == [0, 0, 1 if end == 12 else 0]


def test_the_unfiltered_end_is_the_tables_unless_given() -> None:
    table = small_table(unfiltered_end=END)
    options = {None: END, 0: 0, 4: 4}
    for given_end, expected in options.items():
        for made in (
            PromptFilter(table, unfiltered_end=given_end),
            PromptFilter.from_options(table, LongMambaOptions(unfiltered_end=given_end)),
        ):
            assert made.unfiltered_end == expected
            step = made.step_rows(np.array([20]), np.array([20]), np.array([20]))
            assert step.prompt_tokens.tolist() == [20 - expected]
    with pytest.raises(ValueError, match="unfiltered_end must be a number of tokens, 0 to 1073741824, got -1"):
        PromptFilter(table, unfiltered_end=-1)


def test_from_options_takes_all_of_them() -> None:
    made = PromptFilter.from_options(small_table(), LongMambaOptions(min_retention=0.25, filter_generated=True))
    assert (made.min_retention, made.filters_generated, made.unfiltered_end) == (0.25, True, 0)


def test_generated_tokens_are_not_filtered_behind_an_unfiltered_end() -> None:
    message = f"the last {END} tokens of prompts are not to be filtered .*--unfiltered-end 0`"
    with pytest.raises(ValueError, match=message):
        PromptFilter(small_table(), filters_generated=True, unfiltered_end=END)
    table = small_table(unfiltered_end=END)
    options = LongMambaOptions(filter_generated=True)
    with pytest.raises(ValueError, match=message):
        PromptFilter.from_options(table, options)
    assert PromptFilter(table, filters_generated=True, unfiltered_end=0).filters_generated


def test_step_rows_with_an_upper_bound_behind_the_prompt() -> None:
    """vLLM knows only an upper bound of the length of a request that generates."""
    step = PromptFilter(small_table()).step_rows(np.array([20]), np.array([50]), np.array([1]))
    assert (step.rows.tolist(), step.prompt_tokens.tolist()) == ([0], [0])


@pytest.mark.parametrize(
    ("request_", "row", "tokens"),
    [((20, 19, 1), 3, 1), ((20, 33, 1), 3, 1), ((20, 15, 10), 3, 10), ((20, 25, 10), 3, 10), ((8, 30, 1), 0, 1),
     ((0, 0, 1), 0, 0)],
)  # fmt: skip
def test_generated_tokens_filtered_by_the_row_of_their_prompt(request_: Request, row: int, tokens: int) -> None:
    prompt, computed, query = np.array([request_], np.int32).T
    step = PromptFilter(small_table(), filters_generated=True).step_rows(prompt, computed + query, query)
    assert (step.rows.tolist(), step.prompt_tokens.tolist()) == ([row], [tokens])


@pytest.mark.parametrize(("requests", "rows", "prompt_tokens"), CASES.values(), ids=CASES)
def test_per_token(requests: list[Request], rows: list[int], prompt_tokens: list[int]) -> None:
    per_token = step_rows_of(requests).per_token()
    assert per_token.dtype == np.int32
    assert per_token.tolist() == naive_per_token(requests)
    assert int((per_token > 0).sum()) == sum(count for row, count in zip(rows, prompt_tokens, strict=True) if row)


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 12)),
        max_size=6,
    ),
    st.integers(0, 40),
)
def test_per_token_against_a_loop(requests: list[Request], end: int) -> None:
    assert step_rows_of(requests, end).per_token().tolist() == naive_per_token(requests, end)


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 40), st.lists(st.integers(1, 25), max_size=8))
def test_the_cut_of_a_prompt_does_not_change_its_rows(prompt: int, generated: int, end: int, cuts: list[int]) -> None:
    total = prompt + generated
    whole = step_rows_of([(prompt, 0, total)], end).per_token().tolist()
    pieces: list[int] = []
    for length in [*cuts, total]:
        length = min(length, total - len(pieces))
        pieces += step_rows_of([(prompt, len(pieces), length)], end).per_token().tolist()
    assert pieces == whole


@pytest.mark.parametrize(
    ("requests", "expected"),
    [([], False), ([(8, 0, 8)], False), ([(20, 20, 1)], False), ([(8, 0, 8), (20, 19, 1)], True)],
    ids=["empty", "short", "generated", "tail"],
)
def test_any(requests: list[Request], expected: bool) -> None:
    assert step_rows_of(requests).filters is expected


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(4, 4)], ids=["first", "last", "empty"])
def test_slices(part: slice) -> None:
    requests = CASES["mixed"][0]
    step, expected = step_rows_of(requests)[part], step_rows_of(requests[part])
    assert step.rows.tolist() == expected.rows.tolist()
    assert step.prompt_tokens.tolist() == expected.prompt_tokens.tolist()
    assert step.per_token().tolist() == expected.per_token().tolist()


def common_metadata(requests: list[Request], *, padding: int = 0, **changes: Any) -> Any:
    """What `step_rows_from_metadata` reads of vLLM's `CommonAttentionMetadata`, with rows of padding at the end."""
    prompt, computed, query = np.array(requests, np.int32).reshape(-1, 3).T
    starts = np.concatenate([[0], np.cumsum(query), *([[query.sum()]] * padding)]).astype(np.int32)
    values = {
        "num_reqs": len(requests) + padding,
        "query_start_loc_cpu": torch.from_numpy(starts),
        "rswa_prefix_lens": torch.from_numpy(prompt.copy()),
        "seq_lens_cpu_upper_bound": torch.from_numpy(np.pad(computed + query, (0, padding))),
        "is_prefilling": torch.from_numpy(np.pad(computed < prompt, (0, padding))),
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("padding", [0, 3])
def test_step_rows_from_metadata(padding: int) -> None:
    requests = CASES["mixed"][0]
    step = step_rows_from_metadata(PromptFilter(small_table()), common_metadata(requests, padding=padding))
    assert step.rows.tolist() == CASES["mixed"][1] + [0] * padding
    assert step.prompt_tokens.tolist() == CASES["mixed"][2] + [0] * padding
    assert step.per_token().tolist() == naive_per_token(requests)


def test_step_rows_from_metadata_of_longer_buffers() -> None:
    """vLLM's arrays may be longer than the batch."""
    requests = CASES["mixed"][0]
    common = common_metadata([*requests, (20, 0, 20)], num_reqs=len(requests))
    step = step_rows_from_metadata(PromptFilter(small_table()), common)
    assert step.rows.tolist() == CASES["mixed"][1]


@pytest.mark.parametrize("missing", ["rswa_prefix_lens", "seq_lens_cpu_upper_bound"])
def test_step_rows_from_metadata_without_lengths(missing: str) -> None:
    common = common_metadata(CASES["mixed"][0], **{missing: None})
    with pytest.raises(RuntimeError, match=r"did not pass the prompt lengths on.* please report it"):
        step_rows_from_metadata(PromptFilter(small_table()), common)


def test_lengths_are_missed_where_nobody_says_who_reads_a_prompt() -> None:
    """Otherwise a vLLM that has changed would serve the plain model without a word."""
    common = common_metadata([(20, 0, 20)], rswa_prefix_lens=None, is_prefilling=None)
    with pytest.raises(RuntimeError, match="did not pass the prompt lengths on"):
        step_rows_from_metadata(PromptFilter(small_table()), common)


def test_generated_tokens_are_not_filtered_without_prompt_lengths() -> None:
    common = common_metadata([(20, 20, 1)], rswa_prefix_lens=None)
    with pytest.raises(RuntimeError, match="did not pass the prompt lengths on"):
        step_rows_from_metadata(PromptFilter(small_table(), filters_generated=True), common)


def test_step_rows_from_metadata_of_a_step_that_only_decodes() -> None:
    requests = [(20, 20, 1), (12, 40, 1)]
    common = common_metadata(requests, padding=2, rswa_prefix_lens=None)
    step = step_rows_from_metadata(PromptFilter(small_table()), common)
    assert step.rows.tolist() == step.prompt_tokens.tolist() == [0] * 4
    assert step.query_lengths.tolist() == [1, 1, 0, 0]
    assert not step.filters
