"""The packed form of thresholds."""

import zlib

import numpy as np
import pytest

from vllm_longmamba.tables.packing import pack_thresholds, unpack_thresholds

# Half of the step of 1e-3 in ln(g), and float32 rounding.
RELATIVE_ERROR = 5.005e-4


def _thresholds(rows: int, channels: int) -> np.ndarray:
    generator = np.random.default_rng(5)
    values = np.exp(generator.normal(-3, 4, (rows, channels))).astype(np.float32)
    values[0] = -1.0
    return values


@pytest.mark.parametrize(("rows", "channels"), [(1, 3), (2, 1), (3, 7), (190, 33)])
def test_pack_thresholds(rows: int, channels: int) -> None:
    values = _thresholds(rows, channels)
    unpacked = unpack_thresholds(pack_thresholds(values), rows, channels)
    assert unpacked.dtype == np.float32
    np.testing.assert_allclose(unpacked, values, rtol=RELATIVE_ERROR)
    assert (unpacked[0] == -1.0).all()


def test_pack_thresholds_extremes() -> None:
    largest = np.finfo(np.float32).max
    values = np.array([[-1] * 6, [-1, 0, 1e-38, 1e-30, 1, largest], [largest, -1, 3, 1e-30, -1, 0]], dtype=np.float32)
    expected = np.maximum(values, np.where(values == -1, -1, np.float32(1e-30)))
    unpacked = unpack_thresholds(pack_thresholds(values), 3, 6)
    np.testing.assert_allclose(unpacked, expected, rtol=RELATIVE_ERROR)
    assert ((unpacked == -1) == (values == -1)).all()


def test_pack_thresholds_again_changes_nothing() -> None:
    once = unpack_thresholds(pack_thresholds(_thresholds(20, 9)), 20, 9)
    assert (unpack_thresholds(pack_thresholds(once), 20, 9) == once).all()


def _bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        pytest.param(_bytes(b"no zlib"), "damaged", id="no zlib"),
        pytest.param(pack_thresholds(_thresholds(4, 3))[:-3], "must unfold to", id="truncated"),
        pytest.param(pack_thresholds(_thresholds(4, 4)), "must unfold to 27 bytes", id="other channels"),
        pytest.param(pack_thresholds(_thresholds(3, 3)), "must unfold to 27 bytes", id="other rows"),
        pytest.param(_bytes(zlib.compress(bytes([255] * 27))), "code out of range", id="codes"),
    ],
)
def test_unpack_thresholds_refuses(packed: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_thresholds(packed, rows=4, channels=3)
