"""Tests of vllm_longmamba/decimamba_options.py."""

import json
from typing import Any

import pytest

from vllm_longmamba.decimamba_options import KEY, DeciMambaOptions, options_from_config


@pytest.mark.parametrize(
    ("additional_config", "expected"),
    [
        (None, DeciMambaOptions()),
        ({"longmamba": {"table": "x"}}, DeciMambaOptions()),
        ({KEY: {"layers": [3], "L_base": 10}}, DeciMambaOptions((3,), 10)),
        (
            {
                KEY: {
                    "layers": [1, 5],
                    "L_base": 99,
                    "beta": 0.5,
                    "min_tokens": 0,
                    "score": "norm",
                    "cut_prompts": True,
                }
            },
            DeciMambaOptions((1, 5), 99, 0.5, 0, "norm", True),
        ),
    ],
    ids=["none", "another-method", "one-layer", "all"],
)
def test_options(additional_config: Any, expected: DeciMambaOptions) -> None:
    options = options_from_config(additional_config)
    assert options == expected
    assert options_from_config(json.loads(json.dumps({KEY: options.to_dict()}))) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 3}, "unknown option layer; known are layers, L_base, beta, min_tokens, score"),
        ([3], r"must be a mapping of options, but is \[3\]"),
        ({"layers": []}, r"layers must be layer numbers from 0, ascending, at least one, but is \[\]"),
        ({"layers": 3}, "layers must be layer numbers .* but is 3"),
        ({"layers": [2, 1]}, r"layers must be .* but is \[2, 1\]"),
        ({"layers": [1, 1]}, "layers must be"),
        ({"layers": [-1]}, "layers must be"),
        ({"layers": [True]}, "layers must be"),
        ({"L_base": 0}, "L_base must be a positive number of tokens, but is 0"),
        ({"L_base": 1.5}, "L_base must be"),
        ({"beta": 0}, "beta must be a number above 0 and up to 1, but is 0"),
        ({"beta": 1.1}, "beta must be"),
        ({"min_tokens": -1}, "min_tokens must be a number of tokens, 0 or more, but is -1"),
        ({"score": "max"}, """score must be "mean" or "norm", but is 'max'"""),
        ({"cut_prompts": 1}, "cut_prompts must be true or false, but is 1"),
    ],
    ids=str,
)
def test_wrong_options(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^additional_config\['decimamba'\].*{message}"):
        options_from_config({KEY: given})


def test_published_settings_fill_what_is_missing() -> None:
    published = {"layers": (12,), "L_base": 4000}
    assert DeciMambaOptions(beta=0.5).with_defaults(published) == DeciMambaOptions((12,), 4000, 0.5)
    assert DeciMambaOptions((3,)).with_defaults(published) == DeciMambaOptions((3,), 4000)
    assert DeciMambaOptions((3,), 5).with_defaults(published) == DeciMambaOptions((3,), 5)


def test_tokens_kept() -> None:
    assert DeciMambaOptions((3, 5, 6, 9), 100, beta=0.5).tokens_kept() == [100, 50, 25, 20]
    assert DeciMambaOptions((3,), 5, min_tokens=50).tokens_kept() == [50]


def test_which_prompts_are_decimated() -> None:
    options = DeciMambaOptions((3, 5), 100, beta=0.5)
    # The last token is kept beside L_base others.
    assert [options.is_decimated(length) for length in (60, 101, 102)] == [False, False, True]
