"""Rows, masks, digests, and what the constructors refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_longmamba.tables import FORMAT_VERSION, LayerThresholds, TableMetadata, ThresholdTable

MakeTable = Callable[..., ThresholdTable]


def _table_with_rows(row_lengths: list[int]) -> ThresholdTable:
    metadata = TableMetadata(
        model_id="org/model",
        weights_fingerprint="",
        train_length=row_lengths[0],
        corpus="",
        clamp_percent=5,
        min_retention=0.01,
        num_sequences=1,
        seed=0,
        tool_version="0",
    )
    rows = torch.zeros(len(row_lengths), 1)
    rows[0] = -1.0
    layer = LayerThresholds(retention=torch.ones(1, dtype=torch.float64), dt_threshold=rows)
    return ThresholdTable(metadata=metadata, row_lengths=np.array(row_lengths), layers={0: layer})


@pytest.mark.parametrize(
    ("prompt_length", "row"),
    [(1, 0), (2048, 0), (2049, 0), (2524, 0), (2525, 1), (3000, 1), (3500, 1), (3501, 2), (4000, 2), (10**12, 2)],
)
def test_row_of(prompt_length: int, row: int) -> None:
    assert _table_with_rows([2048, 3000, 4000]).row_of(prompt_length) == row


_ASCENDING = st.sets(st.integers(2, 3000), min_size=1, max_size=12).map(sorted)


@given(_ASCENDING, st.integers(1, 4000))
def test_row_of_is_nearest(row_lengths: list[int], prompt_length: int) -> None:
    distances = [abs(length - prompt_length) for length in row_lengths]
    expected = 0 if prompt_length <= row_lengths[0] else distances.index(min(distances))
    assert _table_with_rows(row_lengths).row_of(prompt_length) == expected


@given(_ASCENDING, st.lists(st.integers(1, 4000), max_size=20))
def test_rows_of(row_lengths: list[int], prompt_lengths: list[int]) -> None:
    table = _table_with_rows(row_lengths)
    # int32, as vLLM holds lengths; the doubling inside must not overflow.
    rows = table.rows_of(np.array(prompt_lengths, dtype=np.int32))
    assert rows.dtype == np.int32
    assert rows.tolist() == [table.row_of(length) for length in prompt_lengths]


def test_rows_of_large_int32(make_table: MakeTable) -> None:
    assert make_table().rows_of(np.array([[8, 2**31 - 1]], dtype=np.int32)).tolist() == [[0, 3]]


def test_is_global(make_table: MakeTable) -> None:
    # The retentions are 1e-6, 10^-4.5, 1e-3, 10^-1.5 and 1.
    table = make_table()
    assert table.is_global(0).tolist() == [False, False, False, True, True]
    assert table.is_global(3, 1e-5).tolist() == [False, True, True, True, True]
    assert table.is_global(3, 1.0).tolist() == [False] * 5, "a retention equal to theta is local"


def test_count_global(make_table: MakeTable) -> None:
    table = make_table()
    assert (table.count_global(), table.count_global(1e-5), table.count_global(1.0)) == (4, 8, 0)


def test_the_row_lengths_of_the_caller_stay_his_own(make_table: MakeTable) -> None:
    table, given = make_table(), np.array([8, 12, 16, 20], dtype=np.int64)
    made = ThresholdTable(metadata=table.metadata, row_lengths=given, layers=table.layers)
    given[3] = 999
    assert made.row_lengths.tolist() == [8, 12, 16, 20]
    with pytest.raises(ValueError, match="read-only"):
        made.row_lengths[3] = 999


def test_thresholds(make_table: MakeTable) -> None:
    table = make_table()
    stored = table.layers[3].dt_threshold.clone()
    masked = table.thresholds(3)
    assert masked.shape == (4, 5)
    assert masked.dtype == torch.float32
    assert (masked[:, :3] == -1.0).all()
    assert (masked[0] == -1.0).all()
    assert torch.equal(masked[1:, 3:], stored[1:, 3:])
    assert torch.equal(table.thresholds(3, 0.0), stored)
    masked.fill_(0.0)
    assert torch.equal(table.layers[3].dt_threshold, stored), "the table's own tensor must not be handed out"


def test_thresholds_refuses(make_table: MakeTable) -> None:
    with pytest.raises(ValueError, match=r"holds layers \[0, 3\], got layer 1"):
        make_table().thresholds(1)
    with pytest.raises(ValueError, match=r"min_retention must lie in \[0, 1\], got nan"):
        make_table().thresholds(0, float("nan"))


def test_digest(make_table: MakeTable) -> None:
    table = make_table()
    assert len(table.digest()) == 32
    assert table.digest() == make_table().digest() == table.digest(1e-2)
    assert table.digest() == make_table(model_id="another", seed=8).digest()
    others = [
        table.digest(1e-3),
        make_table(num_rows=5).digest(),
        make_table(channels=6).digest(),
        make_table(layers=(0, 4)).digest(),
        make_table(train_length=9).digest(),
    ]
    assert len({table.digest(), *others}) == 6


def test_digest_sees_every_value(make_table: MakeTable) -> None:
    table = make_table()
    layer = table.layers[3]
    changed = layer.dt_threshold.clone()
    changed[3, 4] = torch.nextafter(changed[3, 4], torch.tensor(9.0))
    replaced = LayerThresholds(retention=layer.retention, dt_threshold=changed)
    other = ThresholdTable(
        metadata=table.metadata, row_lengths=table.row_lengths, layers={0: table.layers[0], 3: replaced}
    )
    assert other.digest() != table.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_length": 1}, "train_length must be a number of tokens, 2 to 1073741824, got 1"),
        ({"train_length": 8.0}, "train_length must be a number of tokens, 2 to 1073741824, got 8.0"),
        ({"seed": True}, "seed must be an integer, -9223372036854775808 to 9223372036854775807, got True"),
        ({"corpus": None}, "corpus must be str, got None"),
        ({"clamp_percent": 100}, r"clamp_percent must lie in \[0, 100\)"),
        ({"clamp_percent": float("nan")}, r"clamp_percent must lie in \[0, 100\)"),
        ({"min_retention": 1.5}, r"min_retention must lie in \[0, 1\]"),
        ({"num_sequences": 0}, "num_sequences must be an integer, 1 to"),
        ({"format_version": FORMAT_VERSION + 1}, "format_version must be 3, got 4"),
    ],
)
def test_table_metadata_refuses(make_metadata: MakeTable, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_metadata(**changes)


_RETENTION = torch.ones(3, dtype=torch.float64)
_NAN = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("retention", "dt_threshold", "message"),
    [
        pytest.param(_RETENTION.float(), torch.zeros(2, 3), "retention must be a 1-dimensional", id="dtype"),
        pytest.param(_RETENTION, torch.zeros(3), "dt_threshold must be a 2-dimensional", id="dimensions"),
        pytest.param(_RETENTION, torch.zeros(2, 4), r"got \(2, 4\) with retention \(3,\)", id="channels"),
        pytest.param(_RETENTION, torch.zeros(0, 3), "at least one row", id="no row"),
        pytest.param(_RETENTION * 1.1, torch.zeros(2, 3), r"retention must lie in \[0, 1\]", id="retention above 1"),
        pytest.param(_RETENTION * _NAN, torch.zeros(2, 3), r"retention must lie in \[0, 1\]", id="retention NaN"),
        pytest.param(_RETENTION, torch.zeros(2, 3) * _NAN, "finite and >= 0", id="threshold NaN"),
        pytest.param(_RETENTION, torch.full((2, 3), float("inf")), "finite and >= 0", id="threshold infinite"),
        pytest.param(_RETENTION, torch.full((2, 3), -0.5), "finite and >= 0", id="threshold negative"),
    ],
)
def test_layer_thresholds_refuses(retention: torch.Tensor, dt_threshold: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerThresholds(retention=retention, dt_threshold=dt_threshold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"row_lengths": np.array([9, 12, 16, 20])}, "must begin with train_length 8", id="first row"),
        pytest.param({"row_lengths": np.array([8, 12, 12, 20])}, "and ascend", id="not ascending"),
        pytest.param({"row_lengths": np.array([8, 12, 16, 2**30 + 1])}, "at most 1073741824 tokens", id="too long"),
        pytest.param({"row_lengths": np.array([8, 12, 16, 2**63 - 1])}, "at most 1073741824 tokens", id="overflowing"),
        pytest.param({"row_lengths": np.array([-8, 8, 12, 16])}, "at most 1073741824 tokens, got -8", id="negative"),
        pytest.param({"row_lengths": np.array([8.0, 12.0])}, "must be .rows,. integers", id="not integers"),
        pytest.param({"row_lengths": np.array([8, 12])}, r"one row for each of the 2 row_lengths, got 4", id="rows"),
        pytest.param({"layers": {}}, "at least one layer", id="no layer"),
        pytest.param({"layers": {"0": None}}, "keys must be indices", id="layer name"),
    ],
)
def test_threshold_table_refuses(make_table: MakeTable, changes: dict[str, Any], message: str) -> None:
    table = make_table()
    content = {"metadata": table.metadata, "row_lengths": table.row_lengths, "layers": table.layers}
    with pytest.raises(ValueError, match=message):
        ThresholdTable(**(content | changes))


def test_threshold_table_refuses_a_filtering_row_0(make_table: MakeTable) -> None:
    table = make_table()
    layer = LayerThresholds(retention=_RETENTION, dt_threshold=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="row 0 means no filter"):
        ThresholdTable(metadata=table.metadata, row_lengths=table.row_lengths, layers={0: layer})
