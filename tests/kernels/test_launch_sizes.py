import pytest

from vllm_longmamba.kernels.launch_sizes import cdiv, next_power_of_2


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (131072, 32, 4096)])
def test_cdiv(a: int, b: int, expected: int):
    assert cdiv(a, b) == expected


@pytest.mark.parametrize(("n", "expected"), [(0, 0), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (4096, 4096)])
def test_next_power_of_2(n: int, expected: int):
    assert next_power_of_2(n) == expected
