"""Tests of vllm_longmamba/options.py."""

from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.options import KEY, LongMambaOptions, expand_home, options_from_config


@pytest.mark.parametrize(
    ("additional_config", "expected"),
    [
        (None, LongMambaOptions()),
        ({}, LongMambaOptions()),
        ({"another_plugin": {"table": 3}}, LongMambaOptions()),
        ({KEY: {}}, LongMambaOptions(table=None, min_retention=None, train_length=None, filter=True)),
        ({KEY: {"filter": False}}, LongMambaOptions(filter=False)),
        ({KEY: {"table": "t.safetensors", "train_length": 512}}, LongMambaOptions("t.safetensors", None, 512)),
        ({KEY: {"min_retention": 1e-30, "table": None}}, LongMambaOptions(min_retention=1e-30)),
        ({KEY: {"filter_generated": True}}, LongMambaOptions(filter_generated=True)),
        ({KEY: {"unfiltered_end": 64}}, LongMambaOptions(unfiltered_end=64)),
        ({KEY: {"unfiltered_end": 0, "filter_generated": True}}, LongMambaOptions(None, None, None, True, True, 0)),
        ({KEY: {"calibrate": False}}, LongMambaOptions(calibrate=False)),
        ({KEY: {"calibrate": "off"}}, LongMambaOptions(calibrate=False)),
        ({KEY: {"calibrate": "on", "calibration_text": "a.txt"}}, LongMambaOptions(calibration_text="a.txt")),
    ],
    ids=[
        "none",
        "empty",
        "another-plugin",
        "all-defaults",
        "filter",
        "table-and-length",
        "min-retention",
        "filter-generated",
        "unfiltered-end",
        "no-unfiltered-end",
        "no",
        "off",
        "on",
    ],
)
def test_options_from_config(additional_config: Any, expected: LongMambaOptions) -> None:
    assert options_from_config(additional_config) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"tabel": "x"},
            r"unknown option tabel; known are table, min_retention, train_length, filter, filter_generated, unf",
        ),
        ({"b": 1, "a": 2}, r"unknown option a, b; known are"),
        ({3: 1}, r"unknown option 3; known are"),
        (["table"], r"must be a mapping of options, but is \['table'\]"),
        (None, r"must be a mapping of options, but is None"),
        ({"table": 3}, r"table must be the path of a \.safetensors file, but is 3"),
        ({"min_retention": "0.1"}, r"min_retention must be a number between 0 and 1, but is '0\.1'"),
        ({"min_retention": True}, r"min_retention must be a number between 0 and 1, but is True"),
        ({"min_retention": 0.0}, r"min_retention must be a number between 0 and 1, but is 0\.0"),
        ({"min_retention": 1}, r"min_retention must be a number between 0 and 1, but is 1"),
        ({"min_retention": float("nan")}, r"min_retention must be a number between 0 and 1, but is nan"),
        ({"filter_generated": 1}, r"filter_generated must be true or false, but is 1"),
        ({"unfiltered_end": -1}, r"unfiltered_end must be a number of tokens, 0 to 1073741824, but is -1"),
        ({"unfiltered_end": 1.5}, r"unfiltered_end must be a number of tokens, 0 to 1073741824, but is 1\.5"),
        ({"unfiltered_end": True}, r"unfiltered_end must be a number of tokens, 0 to 1073741824, but is True"),
        ({"unfiltered_end": "64"}, r"unfiltered_end must be a number of tokens, 0 to 1073741824, but is '64'"),
        (
            {"unfiltered_end": 64, "filter_generated": True},
            r"unfiltered_end must be 0 or left out where filter_generated is on, but is 64",
        ),
        ({"train_length": 1}, r"train_length must be a number of tokens, 2 to 1073741824, but is 1"),
        ({"train_length": 512.0}, r"train_length must be a number of tokens, 2 to 1073741824, but is 512\.0"),
        ({"train_length": True}, r"train_length must be a number of tokens, 2 to 1073741824, but is True"),
        ({"train_length": 10**30}, r"train_length must be a number of tokens, 2 to 1073741824, but is 1(0{30})"),
        ({"train_length": 10**9999}, r"train_length must be a number .*, but is an integer of 33216 bits"),
        ({"unfiltered_end": 10**9999}, r"unfiltered_end must be a number .*, but is an integer of 33216 bits"),
        ({"min_retention": 10**9999}, r"min_retention must be a number .*, but is an integer of 33216 bits"),
        ({"filter": "false"}, r"filter must be true or false, but is 'false'"),
        ({"filter": None}, r"filter must be true or false, but is None"),
        ({"filter": 0}, r"filter must be true or false, but is 0"),
        ({"calibrate": "no"}, r'calibrate must be true or false \("on" or "off"\), but is \'no\''),
        ({"calibrate": None}, r"calibrate must be true or false .*, but is None"),
        ({"calibrate": 1}, r"calibrate must be true or false .*, but is 1"),
        ({"calibration_text": 3}, r"calibration_text must be the path of a \.txt, \.jsonl or \.parquet file, but is 3"),
    ],
)
def test_options_from_config_refuses(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        options_from_config({KEY: given})
    assert str(error.value).startswith("additional_config['longmamba']")


def test_expand_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert expand_home("~/t.safetensors", "table") == Path("/home/ada/t.safetensors")
    assert expand_home("a/~t", "table") == Path("a/~t")
    with pytest.raises(ValueError, match=r"table must be a path in a home folder that exists; .*but is '~nouser/x'"):
        expand_home("~nouser/x", "table")


def test_to_dict_is_read_back() -> None:
    options = LongMambaOptions(
        "t.safetensors", 1e-3, 2048, filter=False, unfiltered_end=64, calibrate=False, calibration_text="t"
    )
    assert options_from_config({KEY: options.to_dict()}) == options
