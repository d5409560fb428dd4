"""Budgets of single channels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_longmamba.tables import LayerCalibration, TableMetadata, layer_budgets, read_channel_budgets

LENGTH, CHANNELS, ROWS = 60, 4, [60, 90, 120, 480]


def thresholds(budget: Any) -> torch.Tensor:
    A = -torch.linspace(0.001, 0.004, CHANNELS)
    calibration = LayerCalibration(A, LENGTH, ROWS, 0.0, "clipped", budget)
    for seed in range(3):
        calibration.add(torch.rand(LENGTH, CHANNELS, generator=torch.Generator().manual_seed(seed)) ** 4)
    return calibration.result().dt_threshold


def test_names_are_read() -> None:
    assert read_channel_budgets(["3.2=4", "0.11=0.125"]) == {(3, 2): 4.0, (0, 11): 0.125}
    assert read_channel_budgets([]) == {}


@pytest.mark.parametrize(
    "name", ["", "3.2", "3=4", "3.2=", "3.2=x", "3.2.1=4", "a.2=4", "-1.2=4", "3.2=0", "3.2=-1", "3.2=nan"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="channel_budgets"):
        read_channel_budgets([name])


def test_a_channel_has_one_budget() -> None:
    with pytest.raises(ValueError, match=r"'3\.2=2' is no channel, LAYER\.CHANNEL, or named twice"):
        read_channel_budgets(["3.2=4", "3.2=2"])


def test_a_rank_takes_its_part_of_a_layer() -> None:
    names = ["1.0=2", "1.5=3", "2.5=4"]
    assert layer_budgets(names, 1, range(8), 0.5).tolist() == [2, 0.5, 0.5, 0.5, 0.5, 3, 0.5, 0.5]
    assert layer_budgets(names, 1, range(4, 8), 0.5).tolist() == [0.5, 3, 0.5, 0.5]
    assert layer_budgets(names, 0, range(2), 0.5).tolist() == [0.5, 0.5]


def test_each_channel_is_calibrated_with_its_own() -> None:
    mixed = thresholds(torch.tensor([1.0, 0.25, 3.0, 1.0]))
    for channel, budget in enumerate([1.0, 0.25, 3.0, 1.0]):
        torch.testing.assert_close(mixed[:, channel], thresholds(budget)[:, channel], rtol=0, atol=0)
    assert bool((thresholds(0.25)[1:] > thresholds(1.0)[1:]).all())


def test_a_budget_that_no_short_prompt_exceeds_filters_nothing() -> None:
    assert thresholds(3.0)[1:3].tolist() == [[-1.0] * CHANNELS] * 2
    assert bool((thresholds(3.0)[3] > 0).all())


def test_metadata_name_them(make_metadata: Callable[..., TableMetadata]) -> None:
    unclamped = {"method": "unclamped", "clamp_percent": 0}
    made = make_metadata(**unclamped, channel_budgets=["3.2=4"])
    assert TableMetadata.from_dict(made.to_dict()) == made
    assert made.channel_budgets == ("3.2=4",)
    with pytest.raises(ValueError, match="channel_budgets must be none with the method 'paper'"):
        make_metadata(channel_budgets=["3.2=4"])
    with pytest.raises(ValueError, match="channel_budgets must be names"):
        make_metadata(**unclamped, channel_budgets=[3.2])
