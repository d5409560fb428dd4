"""The metadata of a step that only decodes are vLLM's own, though they are made without its copies."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_tables import small_table
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.mamba1_attn import Mamba1AttentionMetadata, Mamba1AttentionMetadataBuilder
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadata, Mamba2AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_longmamba.layers.prompt_filter import PromptFilter, StepRows
from vllm_longmamba.layers.step_metadata import (
    FilterRows,
    LongMamba1Metadata,
    LongMamba1MetadataBuilder,
    LongMamba2Backend,
    LongMamba2Metadata,
    LongMamba2MetadataBuilder,
)

FAMILIES = [
    (LongMamba1MetadataBuilder, LongMamba1Metadata, Mamba1AttentionMetadataBuilder, Mamba1AttentionMetadata),
    (LongMamba2MetadataBuilder, LongMamba2Metadata, Mamba2AttentionMetadataBuilder, Mamba2AttentionMetadata),
]
LARGEST = 8  # decodes in a graph
BLOCK = 16


def make_builder(cls: type, cache_mode: str, **others: Any) -> Any:
    """A builder of one group of layers, with what the methods under test read."""
    builder = object.__new__(cls)
    builder.decode_cudagraph_max_bs = LARGEST
    builder.compilation_config = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL)
    builder.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=cache_mode))
    builder.kv_cache_spec = MambaSpec(shapes=((4,),), dtypes=(torch.float32,), block_size=BLOCK)
    builder.use_spec_decode = builder.use_replayssm = builder.use_flashinfer_replayssm = False
    builder.num_spec_tokens = 0
    builder.state_indices_tensor_d = torch.full((LARGEST, 1), -7, dtype=torch.int32)
    builder._slot_views, builder._graph_views = {}, {}
    builder._graph_rows, builder._graph_rows_are_zero = torch.zeros(LARGEST, dtype=torch.int32), True
    for name, value in others.items():
        setattr(builder, name, value)
    return builder


def make_metadata(cls: type, decodes: int, prefills: int, requests: int) -> Any:
    """Of a step in which every field that the methods do not touch holds something of its own."""
    fields = {field.name: f"value of {field.name}" for field in dataclasses.fields(cls)}
    fields |= dict.fromkeys(("query_start_loc_d", "num_accepted_tokens", "write_pos_d", "is_flush_d"))
    fields |= dict.fromkeys(("bc_pre_scratch", "replayssm_scratch", "replayssm_state_indices_d", "filter_rows"))
    if "checkpoint_meta" in fields:
        fields["checkpoint_meta"] = None
    fields |= {"num_decodes": decodes, "num_decode_tokens": decodes, "num_prefills": prefills, "num_reqs": requests}
    fields["seq_lens"] = torch.arange(1, decodes + prefills + 1, dtype=torch.int32) * (BLOCK - 3)
    fields["state_indices_tensor_d"] = torch.arange(decodes, dtype=torch.int32)[:, None] + 100
    return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


def assert_equal(ours: Any, theirs: Any, builders: tuple[Any, Any]) -> None:
    for field in dataclasses.fields(theirs):
        mine, its = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "state_indices_tensor_p" and theirs.num_prefills == 0:
            continue  # of no prefills; nobody reads it
        if isinstance(its, torch.Tensor):
            assert torch.equal(mine, its), field.name
        else:
            assert mine == its, field.name
    assert torch.equal(*(builder.state_indices_tensor_d for builder in builders))


@pytest.mark.parametrize("family", FAMILIES, ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("cache_mode", ["none", "align"])
@pytest.mark.parametrize(("decodes", "prefills", "requests"), [(5, 0, 5), (3, 0, 8), (8, 0, 8), (9, 0, 9), (2, 1, 3)])
def test_another_group_gets_what_vllm_makes(
    family: Any, cache_mode: str, decodes: int, prefills: int, requests: int
) -> None:
    own_builder, own_metadata, builder, metadata = family
    builders = make_builder(own_builder, cache_mode), make_builder(builder, cache_mode)
    table = torch.randperm((decodes + prefills) * 8).view(-1, 8).int()
    given = make_metadata(own_metadata, decodes, prefills, requests)
    before = dict(vars(given))
    ours = builders[0].update_block_table(given, table, None)
    theirs = builders[1].update_block_table(make_metadata(metadata, decodes, prefills, requests), table, None)
    assert_equal(ours, theirs, builders)
    assert vars(given) == before


@pytest.mark.parametrize("family", FAMILIES, ids=["mamba1", "mamba2"])
@pytest.mark.parametrize(("decodes", "prefills", "requests"), [(5, 0, 5), (3, 0, 8), (9, 0, 9), (2, 1, 3)])
def test_captured_graphs_read_what_vllm_writes(family: Any, decodes: int, prefills: int, requests: int) -> None:
    own_builder, own_metadata, builder, metadata = family
    builders = make_builder(own_builder, "none"), make_builder(builder, "none")
    for _ in range(2):  # the second time from views that were kept
        ours, theirs = (
            maker._update_metadata_for_cudagraph_capture(make_metadata(kind, decodes, prefills, requests))
            for maker, kind in zip(builders, (own_metadata, metadata), strict=True)
        )
        assert_equal(ours, theirs, builders)
    is_replayed = prefills == 0 and decodes <= LARGEST
    assert (ours.state_indices_tensor_d.data_ptr() == builders[0].state_indices_tensor_d.data_ptr()) == is_replayed


@pytest.mark.parametrize("flag", ["use_spec_decode", "use_replayssm", "use_flashinfer_replayssm"])
def test_steps_that_hold_more_are_left_to_vllm(flag: str) -> None:
    builder = make_builder(LongMamba2MetadataBuilder, "none", **{flag: True})
    assert not builder._writes_slots_only(make_metadata(LongMamba2Metadata, 3, 0, 3))
    builder, metadata = make_builder(LongMamba2MetadataBuilder, "none"), make_metadata(LongMamba2Metadata, 3, 0, 3)
    assert builder._writes_slots_only(metadata)
    metadata.checkpoint_meta = object()
    assert not builder._writes_slots_only(metadata)


@pytest.mark.parametrize("own_kernels", [False, True])
def test_decodes_and_prefills_of_a_step_get_their_own_rows(own_kernels: bool) -> None:
    """A generated token, the tail of a prompt; then a chunk, a preempted request and a short prompt."""
    builder = make_builder(LongMamba2MetadataBuilder, "none")
    builder._mixer = SimpleNamespace(runs_own_kernels=lambda: own_kernels)
    step = PromptFilter(small_table()).step_rows(
        np.array([20, 12, 16, 20, 5]), np.array([41, 12, 12, 25, 5]), np.array([1, 1, 9, 10, 5])
    )
    rows = builder._filter_rows(SimpleNamespace(num_decodes=2, num_decode_tokens=2, num_prefills=3), step)
    assert rows.decode.tolist() == [0, 1]
    assert rows.prefill_rows.tolist() == [2, 3, 0]
    assert rows.prefill_prompt_tokens.tolist() == [9, 5, 5]
    tokens = None if rows.prefill_tokens is None else rows.prefill_tokens.tolist()
    assert tokens == (None if own_kernels else [2] * 9 + [3] * 5 + [0] * 10)


def test_with_decode_changes_nothing_else() -> None:
    rows = FilterRows(*(torch.tensor([value]) for value in range(4)), StepRows.without_prompts(np.ones(1, np.int32)))
    decode = torch.tensor([7])
    assert vars(rows.with_decode(decode)) == vars(rows) | {"decode": decode}


@pytest.mark.parametrize("family", FAMILIES, ids=["mamba1", "mamba2"])
def test_each_group_reads_rows_from_its_own_buffer(family: Any) -> None:
    """The captured graph of another group of layers does not read the first group's."""
    first, second = make_builder(family[0], "none"), make_builder(family[0], "none")
    given = make_metadata(family[1], 3, 0, 3)
    step = PromptFilter(small_table()).step_rows(np.array([20, 12, 20]), np.array([20, 40, 16]), np.array([1, 1, 1]))
    given.filter_rows = first._filter_rows(given, step)
    updated = second.update_block_table(given, torch.arange(24).view(3, 8).int(), None)
    for rows, builder in ((given.filter_rows, first), (updated.filter_rows, second)):
        assert rows.decode.tolist() == [3, 0, 3]
        assert rows.decode.data_ptr() == builder._graph_rows.data_ptr()


@pytest.mark.parametrize("decodes", [LARGEST, LARGEST + 1])
def test_the_largest_graph_reads_the_rows_of_its_step(decodes: int) -> None:
    """Tails of prompts; more decodes than vLLM has captured run without a graph."""
    builder = make_builder(LongMamba1MetadataBuilder, "none")
    lengths = np.full(decodes, 20)
    step = PromptFilter(small_table()).step_rows(lengths, lengths, np.ones_like(lengths))
    rows = builder._decode_rows(SimpleNamespace(num_prefills=0, num_decodes=decodes, num_decode_tokens=decodes), step)
    assert rows.tolist() == [3] * decodes
    assert (rows.data_ptr() == builder._graph_rows.data_ptr()) is (decodes == LARGEST)


def test_no_row_outlives_its_step() -> None:
    """Neither the rows of a step that filters, nor those behind a smaller step."""
    builder = make_builder(LongMamba1MetadataBuilder, "none")
    prompt_filter = PromptFilter(small_table())
    found = []
    # Three tails of prompts, then one request that generates, then three.
    for prompts, lengths in (([20, 12, 20], [20, 12, 20]), ([20], [21]), ([20, 12, 20], [22, 14, 22])):
        step = prompt_filter.step_rows(np.array(prompts), np.array(lengths), np.ones(len(prompts), np.int32))
        metadata = SimpleNamespace(num_prefills=0, num_decodes=len(prompts), num_decode_tokens=len(prompts))
        found.append(builder._decode_rows(metadata, step).tolist())
    assert found == [[3, 1, 3], [0], [0, 0, 0]]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("family", FAMILIES, ids=["mamba1", "mamba2"])
def test_the_buffer_of_graphs_has_room_for_all_draft_tokens(
    family: Any, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(self: Any, *_: Any) -> None:
        self.decode_cudagraph_max_bs, self.num_spec_tokens = LARGEST, drafts

    monkeypatch.setattr(family[2], "__init__", init)
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layer": object()}),
        scheduler_config=SimpleNamespace(max_num_seqs=LARGEST),
    )
    assert family[0](None, ["layer"], config, torch.device("cpu"))._graph_rows.tolist() == [0] * LARGEST * (1 + drafts)


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_prefills_with_a_checkpoint_are_numbered(has_checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = make_builder(LongMamba2MetadataBuilder, "none")
    builder._mixer, builder._numbers = SimpleNamespace(prompt_filter=None), torch.arange(5)
    made = make_metadata(LongMamba2Metadata, 3, 2, 5)
    made.checkpoint_chunk_idx, made.prefill_numbers = torch.zeros(2) if has_checkpoint else None, None
    monkeypatch.setattr(Mamba2AttentionMetadataBuilder, "build", lambda *_, **__: made)
    numbers = builder.build(0, None).prefill_numbers
    assert (None if numbers is None else numbers.tolist()) == ([0, 1] if has_checkpoint else None)


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("filters_generated", [False, True])
def test_draft_tokens_have_rows_of_their_own(replays: bool, filters_generated: bool) -> None:
    """Behind the prompt; at a prompt's last token, which vLLM pads with drafts; and one token without drafts."""
    drafts = 3
    mode = CUDAGraphMode.FULL if replays else CUDAGraphMode.NONE
    builder = make_builder(LongMamba2MetadataBuilder, "none", use_spec_decode=True, num_spec_tokens=drafts)
    builder.compilation_config = SimpleNamespace(cudagraph_mode=mode)
    builder._graph_rows = torch.zeros(LARGEST * (1 + drafts), dtype=torch.int32)
    # Row 3 for prompts of 20 tokens, row 1 for those of 12.
    step = PromptFilter(small_table(), filters_generated=filters_generated).step_rows(
        np.array([20, 20, 12], np.int32), np.array([60, 23, 12], np.int32), np.array([4, 4, 1], np.int32)
    )
    metadata = SimpleNamespace(num_prefills=0, num_decodes=3, num_decode_tokens=12 if replays else 9)
    rows = builder._decode_rows(metadata, step)
    expected = [3, 3, 3, 3, 3, 3, 3, 3, 1] if filters_generated else [0, 0, 0, 0, 3, 0, 0, 0, 1]
    assert rows.tolist() == expected + [0, 0, 0] * replays
    if not filters_generated:
        nothing = StepRows.without_prompts(np.array([4, 4, 4], np.int32))
        later = builder._decode_rows(metadata, nothing)
        assert later.tolist() == [0] * 12 if replays else later is None


def test_draft_tokens_are_counted_on_the_host() -> None:
    """Of vLLM's own backend, vLLM 0.33 says the opposite."""
    assert not LongMamba2Backend.supports_device_cpu_query_lens_mismatch()
