"""Tests of vllm_longmamba/checkpoint/time_step_limit.py."""

from typing import Any

import pytest

from vllm_longmamba.checkpoint.time_step_limit import check_time_step_limit

INFINITY = {"__float__": "Infinity"}


@pytest.mark.parametrize("limit", [None, [0.0, float("inf")], (0, float("inf")), [0, INFINITY], [0.0, "inf"]], ids=repr)
def test_no_bounds(limit: Any) -> None:
    check_time_step_limit(limit, "time_step_limit")


@pytest.mark.parametrize(
    "limit",
    [[0.0, 0.1], (1e-3, float("inf")), [0.0, float("nan")], [0.0], [], 5, "x", INFINITY, [None, None], [0, 10**400]],
    ids=lambda limit: str(limit)[:20],
)
def test_bounds_are_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"^config.json: time_step_limit must be \[0, infinity\], because"):
        check_time_step_limit(limit, "time_step_limit")
