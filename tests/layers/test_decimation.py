"""Tests of layers/decimation.py and of the metadata that layers/decimated_metadata.py makes of it."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longmamba.decimamba_options import DeciMambaOptions
from vllm_longmamba.layers.decimated_metadata import (
    DeciMamba1Metadata,
    DeciMamba1MetadataBuilder,
    DeciMamba2Metadata,
    DeciMamba2MetadataBuilder,
    droppable_tokens,
)
from vllm_longmamba.layers.decimation import (
    Choice,
    StepDecimation,
    choice_arrays,
    keep_largest,
    stage_lengths,
    token_scores,
)

# (tokens of a sequence, last ones that always stay)
Sequence = tuple[int, int]


def int32(values: Any) -> Any:
    return np.array(values, np.int32)


def choice_of(before: Any, after: Any, always: Any) -> Choice:
    return Choice(*map(torch.from_numpy, choice_arrays(int32(before), int32(after), int32(always))))


def slowly_kept(scores: list[float], sequences: list[Sequence], count: int) -> list[int]:
    """Sorts one sequence after the other; of equal scores the earlier comes first."""
    kept, start = [], 0
    for tokens, always in sequences:
        first = range(start, start + tokens - always)
        largest = sorted(first, key=lambda place: (-scores[place], place))[:count]
        kept += sorted(largest) + list(range(start + tokens - always, start + tokens))
        start += tokens
    return kept


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Sequence], int, list[float]]:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    sequences = [(length, draw(st.integers(1, length))) for length in lengths]
    # Few different scores, so that many are equal.
    scores = draw(st.lists(st.integers(0, 4).map(float), min_size=sum(lengths), max_size=sum(lengths)))
    return sequences, draw(st.integers(0, 12)), scores


@given(steps())
def test_keep_largest(step: tuple[list[Sequence], int, list[float]]) -> None:
    sequences, count, scores = step
    before, always = np.array(sequences, np.int32).T
    after = stage_lengths(before, np.zeros_like(before), before - always, [count])[1]
    kept = keep_largest(torch.tensor(scores), choice_of(before, after, always))
    assert kept.tolist() == slowly_kept(scores, sequences, count)


@pytest.mark.parametrize(
    ("queries", "before", "droppable", "counts", "expected"),
    [
        ([10], [0], [9], [5], [[10], [6]]),
        ([10], [0], [9], [9, 3], [[10], [10], [4]]),
        ([10, 4, 7], [0, 0, 0], [7, 0, 6], [5, 2], [[10, 4, 7], [8, 4, 6], [5, 4, 3]]),
        ([], [], [], [5], [[], []]),
        # 9 and 20 of 29 tokens of which 12 and then 5 stay, and the last: 4 of 12 and 2 of 5 in the first part.
        ([9], [0], [29], [12, 5], [[9], [4], [2]]),
        ([21], [9], [29], [12, 5], [[21], [9], [4]]),
        ([1, 2], [6, 9], [29, 29], [12, 5], [[1, 2], [1, 1], [1, 1]]),
        ([3], [29], [29], [12], [[3], [3]]),
    ],
    ids=["one", "later-layer-only", "three-of-which-one-is-whole", "no-sequence", "begin", "end", "middles", "behind"],
)
def test_stage_lengths(
    queries: list[int], before: list[int], droppable: list[int], counts: list[int], expected: list[list[int]]
) -> None:
    lengths = stage_lengths(int32(queries), int32(before), int32(droppable), counts)
    assert [stage.tolist() for stage in lengths] == expected


@given(st.integers(2, 60), st.lists(st.integers(1, 59), max_size=6), st.lists(st.integers(0, 60), max_size=3))
def test_parts_keep_what_the_whole_prompt_keeps(prompt: int, cuts: list[int], counts: list[int]) -> None:
    ends = sorted({*(cut for cut in cuts if cut < prompt), prompt})
    counts = sorted(counts, reverse=True)
    begins, droppable = int32([0, *ends[:-1]]), int32([prompt - 1] * len(ends))
    parts = stage_lengths(int32(ends) - begins, begins, droppable, counts)
    whole = stage_lengths(int32([prompt]), int32([0]), int32([prompt - 1]), counts)
    for earlier, later in pairwise(parts):
        assert ((later >= 1) & (later <= earlier)).all()
    for of_parts, [of_whole] in zip(parts, whole, strict=True):
        # A part has a token more than its share where that is 0.
        assert of_whole <= of_parts.sum() <= of_whole + (of_parts == 1).sum()


@pytest.mark.parametrize("score", ["mean", "norm"])
@pytest.mark.parametrize("tokens", [0, 1, 16384, 16399])
def test_token_scores(score: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dt, bias = torch.randn(tokens, 3, generator=generator), torch.randn(3, generator=generator)
    step = torch.nn.functional.softplus(dt.double() + bias.double())
    expected = step.sum(-1) if score == "mean" else step.square().sum(-1)
    torch.testing.assert_close(token_scores(dt, bias, score).double(), expected, rtol=1e-6, atol=0)


def test_rows_through_two_layers_behind_decode_tokens() -> None:
    # Two decode tokens, then prompts of 5 and 4 tokens, of which 3 and then 1 are kept beside the last.
    lengths = [[5, 4], [4, 4], [2, 2]]
    choices = [choice_of(before, after, [1, 1]) for before, after in pairwise(lengths)]
    step = StepDecimation([SimpleNamespace(num_decode_tokens=2)] * 3, choices)
    assert step.rows_of(0) is None
    rows = step.keep(0, torch.tensor([4.0, 1.0, 3.0, 2.0, 0.0, 1.0, 2.0, 3.0, 0.0]))
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    # Rows 2 and 6 of the first prompt's tokens [2, 4, 5, 6]; 8 and 10 of the second's.
    rows = step.keep(1, torch.tensor([9.0, 1.0, 2.0, 0.0, 3.0, 7.0, 5.0, 0.0]))
    assert rows.tolist() == [0, 1, 2, 5, 7, 9]
    assert step.rows_of(2).tolist() == [0, 1, 2, 6, 8, 10]  # type: ignore[union-attr]
    # Once more, as a captured graph's warm-up does.
    assert torch.equal(step.keep(1, torch.tensor([9.0, 1.0, 2.0, 0.0, 3.0, 7.0, 5.0, 0.0])), rows)
    assert len(step.rows) == 2


OPTIONS = DeciMambaOptions(layers=(1, 3), L_base=8, beta=0.5, min_tokens=2)


@pytest.mark.parametrize(
    ("prompt", "sequence", "query", "expected"),
    [(9, 9, 9, 0), (10, 10, 10, 9), (10, 14, 14, 9), (9, 14, 14, 0), (0, 20, 20, 0), (9, 9, 4, 0)],
    ids=["up-to-L_base", "decimated", "resumed", "short-resumed", "padding", "cut-but-short"],
)
def test_droppable_tokens(prompt: int, sequence: int, query: int, expected: int) -> None:
    assert droppable_tokens(OPTIONS, int32([prompt]), int32([sequence]), int32([query])).tolist() == [expected]


@pytest.mark.parametrize(("sequence", "query"), [(5, 5), (10, 5)], ids=["first-chunk", "last-chunk"])
def test_a_cut_prompt_is_noticed(sequence: int, query: int) -> None:
    lengths = int32([10]), int32([sequence]), int32([query])
    with pytest.raises(RuntimeError, match="cut a prompt into several steps"):
        droppable_tokens(OPTIONS, *lengths)
    assert droppable_tokens(replace(OPTIONS, cut_prompts=True), *lengths).tolist() == [9]


def built(
    builder_cls: type, metadata_cls: type, requests: list[tuple[int, int]], own_kernels: bool, is_captured: bool = False
) -> Any:
    """What a builder makes of a step with two decode tokens and these prompts: (prompt length, tokens)."""
    builder = object.__new__(builder_cls)
    builder._mixer = SimpleNamespace(options=OPTIONS, runs_own_kernels=lambda: own_kernels)
    builder._graph_rows = torch.zeros(1, dtype=torch.int32)
    builder.chunk_size = 4
    lengths = [1, 1, *(tokens for _, tokens in requests)]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    common = SimpleNamespace(
        num_reqs=len(lengths),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens_cpu_upper_bound=torch.tensor([50, 60, *lengths[2:]], dtype=torch.int32),
        rswa_prefix_lens=torch.tensor([40, 50, *(prompt for prompt, _ in requests)], dtype=torch.int32),
        is_prefilling=torch.tensor([False, False, *(True for _ in requests)]),
    )
    if is_captured:
        common.rswa_prefix_lens, common.is_prefilling = None, torch.zeros(len(lengths), dtype=torch.bool)
    metadata = object.__new__(metadata_cls)
    metadata.num_decodes, metadata.num_decode_tokens = 2, 2
    metadata.num_prefills, metadata.num_prefill_tokens = len(requests), sum(lengths) - 2
    metadata.state_indices_tensor_p = torch.arange(len(requests))
    return metadata, builder._decimation(metadata, common)


BUILDERS = [(DeciMamba1MetadataBuilder, DeciMamba1Metadata), (DeciMamba2MetadataBuilder, DeciMamba2Metadata)]


@pytest.mark.parametrize(("builder_cls", "metadata_cls"), BUILDERS, ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("own_kernels", [False, True])
def test_metadata_of_the_stages(builder_cls: type, metadata_cls: type, own_kernels: bool) -> None:
    requests = [(7, 7), (30, 30), (12, 15)]
    metadata, step = built(builder_cls, metadata_cls, requests, own_kernels)
    assert step.metadata[0] is metadata
    assert not hasattr(metadata, "query_start_loc_p")
    starts = [[0, 7, 16, 28], [0, 7, 12, 20]]
    assert [stage.query_start_loc_p.tolist() for stage in step.metadata[1:]] == starts
    assert [stage.num_prefill_tokens for stage in step.metadata] == [52, 28, 20]
    assert all(stage.num_decode_tokens == 2 for stage in step.metadata)
    assert all(stage.state_indices_tensor_p is metadata.state_indices_tensor_p for stage in step.metadata)
    assert [len(choice.sequences) for choice in step.choices] == [52, 28]
    assert [len(choice.taken) for choice in step.choices] == [28, 20]
    if not own_kernels:
        assert step.metadata[2].nums_dict[8]["nums"].tolist() == [1, 1, 1]
    if metadata_cls is DeciMamba2Metadata:
        last = step.metadata[2]
        assert last.cu_chunk_seqlen_p.tolist() == [0, 4, 7, 11, 12, 16, 20]
        assert last.seq_idx_p.tolist() == [0, 0, 1, 1, 2, 2]
        assert last.last_chunk_indices_p.tolist() == [1, 3, 5]


def test_a_step_of_short_prompts_is_the_plain_model() -> None:
    assert built(*BUILDERS[0], [(9, 9), (5, 20)], True)[1] is None


def test_steps_that_vllm_captures_as_a_graph_lose_nothing() -> None:
    """Several tokens a request, none of which belong to a prompt: with more sizes of graphs than requests at once."""
    assert built(*BUILDERS[1], [(20, 20)], True, is_captured=True)[1] is None
