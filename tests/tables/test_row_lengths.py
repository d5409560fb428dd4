"""Which prompt lengths have a row."""

import pytest

from vllm_longmamba.tables import default_row_lengths


@pytest.mark.parametrize(
    ("train_length", "max_length", "expected"),
    [
        pytest.param(2048, 6000, [2048, 3000, 4000, 5000, 6000], id="paper's resolution"),
        pytest.param(2048, 6001, [2048, 3000, 4000, 5000, 6000, 7000], id="last row reaches past max_length"),
        pytest.param(512, 1100, [512, 768, 1024, 1280], id="short training length"),
        pytest.param(7, 10, [7, 9, 12], id="odd training length"),
        pytest.param(2, 5, [2, 3, 4, 5], id="shortest training length"),
        pytest.param(2000, 2000, [2000, 3000], id="max_length is the training length"),
        pytest.param(2048, 1, [2048, 3000], id="max_length below the training length"),
        pytest.param(2**30 - 1000, 1, [2**30 - 1000, 2**30 - 824], id="longest training length"),
    ],
)
def test_default_row_lengths(train_length: int, max_length: int, expected: list[int]) -> None:
    lengths = default_row_lengths(train_length, max_length)
    assert lengths.tolist() == expected
    assert lengths.dtype == "int64"


@pytest.mark.parametrize(
    ("train_length", "max_length", "message"),
    [
        (1, 100, "train_length must be a number of tokens, 2 to 1073741824, got 1"),
        (10**30, 100, "train_length must be a number of tokens, 2 to 1073741824, got an integer of 100 bits"),
        (512, 0, "max_length must be at least 1"),
        (
            2,
            10**9,
            r"at most 131072 rows, got a row every 1 tokens .* of 2, .* up to a max_length of 1000000000; check",
        ),
        (2, 131074, "at most 131072 rows"),
        (2048, 10**30, "at most 131072 rows"),
    ],
)
def test_default_row_lengths_refuses(train_length: int, max_length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        default_row_lengths(train_length, max_length)


def test_the_most_rows() -> None:
    """Every training length goes with vLLM's longest default length."""
    assert len(default_row_lengths(2, 131073)) == 131072
