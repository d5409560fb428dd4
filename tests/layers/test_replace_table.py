"""Tests of vllm_longmamba/layers/replace_table.py: layers and metadata builders never hold different tables."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_tables import small_table

import vllm_longmamba.layers.replace_table as replacing
from vllm_longmamba.layers.filtered_mixer import FilteredMixer
from vllm_longmamba.layers.prompt_filter import PromptFilter
from vllm_longmamba.layers.replace_table import replace_table
from vllm_longmamba.layers.step_metadata import LongMamba2MetadataBuilder


class Mixer(FilteredMixer, torch.nn.Module):
    """A layer of two of a table's four channels."""

    def __init__(self, layer_index: int) -> None:
        torch.nn.Module.__init__(self)
        self.layer_index = layer_index
        self.prefix = f"layers.{layer_index}.mixer"
        self.A = torch.nn.Parameter(torch.ones(2))


def builder_of(mixer: Mixer) -> Any:
    builder = object.__new__(LongMamba2MetadataBuilder)
    builder._mixer = mixer
    return builder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The second of two tensor-parallel ranks, without a table."""
    monkeypatch.setattr(replacing, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(replacing, "get_tensor_model_parallel_world_size", lambda: 2)
    return torch.nn.ModuleList([Mixer(0), Mixer(3)])


def test_layers_and_builders_hold_the_same(model: Any) -> None:
    builders = [builder_of(mixer) for mixer in model]
    assert [builder.prompt_filter for builder in builders] == [None, None]
    buffers = []
    for end, theta in ((0, None), (4, 1e-7)):
        given = PromptFilter(small_table(layers=(0, 3), channels=4, unfiltered_end=end), theta)
        replace_table(model, given)
        for mixer, builder in zip(model, builders, strict=True):
            assert mixer.prompt_filter is builder.prompt_filter is given
            assert torch.equal(mixer.dt_threshold, given.table.thresholds(mixer.layer_index, theta)[:, 2:])
        buffers.append([mixer.dt_threshold.data_ptr() for mixer in model])
    # Captured graphs go on to read the same memory.
    assert buffers[0] == buffers[1]
    assert list(model.state_dict()) == ["0.A", "1.A"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": (0, 1)}, "has no layer 3"),
        ({"channels": 5}, "has 5 channels in layer 0, but the model has 4; it was made for another model"),
        ({"train_length": 9}, "its rows are for other prompt lengths"),
    ],
)
def test_a_table_that_does_not_fit_changes_nothing(other: dict[str, Any], message: str, model: Any) -> None:
    given = PromptFilter(small_table(layers=(0, 3), channels=4))
    replace_table(model, given)
    before = [mixer.dt_threshold.clone() for mixer in model]
    content: dict[str, Any] = {"layers": (0, 3), "channels": 4}
    with pytest.raises(ValueError, match=message):
        replace_table(model, PromptFilter(small_table(**(content | other)), 1.0))
    for mixer, thresholds in zip(model, before, strict=True):
        assert mixer.prompt_filter is given
        assert torch.equal(mixer.dt_threshold, thresholds)


def test_a_stage_without_mamba_layers(model: Any) -> None:
    replace_table(torch.nn.Linear(2, 2), SimpleNamespace(table=small_table()))  # type: ignore[arg-type]
