"""The torch reference as a contestant, and DeciMamba's settings: given, read from a file, or searched for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contestants import ByteTokenizer
from engine.harness import TRAIN_LENGTH, write_table
from rich.console import Console
from tiny_models import random_token_ids, write_mamba1_original, write_zamba2
from torch_models import DeciMamba, TorchModel, settings_search
from torch_models.contestant import TorchRunner
from torch_models.settings import decimamba_from, read_decimamba
from torch_models.settings_search import QuestionsTask, WindowsTask, search_settings

from vllm_longmamba.evaluate.methods import METHODS, Contestant, ModelSettings
from vllm_longmamba.evaluate.needles import passkey_questions
from vllm_longmamba.evaluate.store import Store
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.tables import load_table

# Two of the three layers; few enough tokens to change every prompt here.
SETTINGS = {"layers": [0, 2], "L_base": 40}
PROMPTS = [random_token_ids(length, seed=number) for number, length in enumerate([70, 70, 110, 70, *[90] * 11])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba1_original(tmp_path_factory.mktemp("models") / "mamba1")


@pytest.fixture(scope="module")
def table(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "table.safetensors"
    write_table(folder, path)
    return path


def prepare(folder: Path, method: str, decimamba: Mapping[str, Any] | None = None, **options: Any) -> Contestant:
    return METHODS[method](settings_of(folder, decimamba, **options))


def settings_of(folder: Path, decimamba: Mapping[str, Any] | None = None, **options: Any) -> ModelSettings:
    model = {"model": str(folder), "max_model_len": 512}
    plain = model | {"additional_config": {"longmamba": {"filter": False}}}
    return ModelSettings(plain, model | {"additional_config": {"longmamba": options}}, decimamba=decimamba)


def test_runner_completes_in_any_order_of_lengths(folder: Path) -> None:
    model = TorchModel(folder, device="cpu")
    expected = [model.generate([prompt], 2 + number % 2)[0] for number, prompt in enumerate(PROMPTS)]
    encoder = Encoder(ByteTokenizer())
    jobs = ((number, prompt, 2 + number % 2) for number, prompt in enumerate(PROMPTS))
    # Tokens beyond a byte have no text here.
    encoder.decode = lambda tokens: str(tokens)  # type: ignore[method-assign]
    runner = TorchRunner(model, encoder)
    assert dict(runner.complete(jobs)) == {number: str(answer) for number, answer in enumerate(expected)}
    encoder.end_of_text = expected[0][1]
    assert dict(runner.complete([("first", PROMPTS[0], 2)])) == {"first": str(expected[0][:1])}


def test_runner_scores_the_tail(folder: Path) -> None:
    model = TorchModel(folder, DeciMamba(**SETTINGS), device="cpu")
    runner = TorchRunner(model, Encoder(ByteTokenizer()))
    scored = dict(runner.tail_logprobs(enumerate(PROMPTS[:3]), 20))
    for number, prompt in enumerate(PROMPTS[:3]):
        assert scored[number].dtype == np.float64
        np.testing.assert_array_equal(scored[number], model.last_logprobs(prompt, 20).double().numpy())


def test_descriptions_tell_what_determines_the_output(folder: Path, table: Path) -> None:
    plain = prepare(folder, "torch-plain").description
    longmamba = prepare(folder, "torch-longmamba", table=str(table))
    assert longmamba.description["train_length"] == TRAIN_LENGTH
    assert longmamba.description["table"] == load_table(table).digest()
    assert longmamba.description["min_retention"] == 1e-2
    other_theta = prepare(folder, "torch-longmamba", table=str(table), min_retention=0.5).description
    ends = [prepare(folder, "torch-longmamba", table=str(table), unfiltered_end=end).description for end in (0, 20, 21)]
    assert ends[0] == longmamba.description
    assert ends[1] == longmamba.description | {"unfiltered_end": 20}
    first = prepare(folder, "decimamba", SETTINGS).description
    second = prepare(folder, "decimamba", {**SETTINGS, "beta": 0.5}).description
    assert first["decimamba"] == DeciMamba(**SETTINGS).to_dict()
    engine = prepare(folder, "plain").description
    assert plain["weights"] == engine["weights"]
    different = [plain, longmamba.description, other_theta, *ends[1:], first, second, engine]
    assert len({json.dumps(description, sort_keys=True) for description in different}) == len(different)


def test_started_contestants_run_their_methods(folder: Path, table: Path) -> None:
    prompt = random_token_ids(300, seed=1)
    results = {}
    for method, options in (("torch-plain", {}), ("torch-longmamba", {"table": str(table)}), ("decimamba", {})):
        with prepare(folder, method, SETTINGS, **options).start() as runner:
            [(_, results[method])] = runner.tail_logprobs([(None, prompt)], 20)
    plain = TorchModel(folder, device="cpu").last_logprobs(prompt, 20).double().numpy()
    # A GPU, where there is one, rounds in its own way.
    np.testing.assert_allclose(results["torch-plain"], plain, rtol=0, atol=1e-3)
    for method in ("torch-longmamba", "decimamba"):
        assert np.abs(results[method] - plain).max() > 0.1
    # With all of the prompt in the end, it is the plain model.
    with prepare(folder, "torch-longmamba", table=str(table), unfiltered_end=300).start() as runner:
        [(_, unfiltered)] = runner.tail_logprobs([(None, prompt)], 20)
    np.testing.assert_array_equal(unfiltered, results["torch-plain"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "the first two are needed; got None"),
        ({"layers": [1]}, "layers, L_base, beta, min_tokens, score, the first two are needed"),
        ({"layers": [1], "L_base": 50, "base": 4}, "the first two are needed; got .*'base': 4"),
        ({"layers": [3], "L_base": 50}, r"the model has the layers \[0, 1, 2\], but not \[3\]"),
        ({"layers": [1], "L_base": 50, "beta": 2}, r"beta must lie in \(0, 1\]"),
        ({"layers": 1, "L_base": 50}, "--decimamba: .*not iterable"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    settings: dict[str, Any] | None, message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(folder, "decimamba", settings)


def test_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decimamba runs in the torch reference: .* runs mamba, mamba2, falcon_mamba"):
        prepare(write_zamba2(tmp_path / "zamba2"), "decimamba", SETTINGS)
    with pytest.raises(ValueError, match="takes the folder of a checkpoint, but there is no folder some/model"):
        prepare(Path("some/model"), "torch-plain")


def test_reading_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs settings: .* or --decimamba search"):
        read_decimamba(None)
    assert read_decimamba(json.dumps(SETTINGS)) == DeciMamba(**SETTINGS).to_dict()
    file = tmp_path / "found.json"
    for content in (SETTINGS, {"settings": SETTINGS, "trials": []}):
        file.write_text(json.dumps(content))
        assert read_decimamba(str(file)) == DeciMamba(**SETTINGS).to_dict()
    for wrong, message in (("serach", "a file of it, or search"), ("{1}", "no JSON"), ("{}", "first two are needed")):
        with pytest.raises(ValueError, match=message):
            read_decimamba(wrong)


def test_search(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(folder)
    task, console = WindowsTask([96, 128], number=1, scored=10), Console(quiet=True)
    store = Store(tmp_path)
    found = search_settings(settings, task, store, console)
    report = json.loads((tmp_path / "decimamba.json").read_text())
    scores = [trial["score"] for trial in report["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 5
    assert report["trials"][0]["settings"] == found == read_decimamba(str(tmp_path / "decimamba.json"))
    # 128 // 2 to 128 // 16, with each single layer.
    assert {tuple(trial["settings"]["layers"]) for trial in report["trials"]} >= {(0,), (1,), (2,)}
    assert {trial["settings"]["L_base"] for trial in report["trials"]} == {8, 16, 32, 64}

    # The score is that of the settings.
    encoder = prepare(folder, "torch-plain").encoder
    text = encoder.encode("".join(settings_search.sample_corpus().texts))
    model = TorchModel(folder, decimamba_from(found), device="cpu")
    # One window of each length, which ends where the longest does.
    means = [model.last_logprobs(window, 10).mean() for window in (text[32:128], text[:128])]
    assert scores[0] == pytest.approx(float(torch.stack(means).mean()), abs=1e-3)

    def no_search(*arguments: Any, **options: Any) -> None:
        raise AssertionError("searched a second time")

    monkeypatch.setattr("torch_models.settings_search.search_decimamba", no_search)
    assert search_settings(settings, task, store, console) == found
    with pytest.raises(AssertionError, match="searched a second time"):
        search_settings(settings, WindowsTask([96], number=1, scored=10), store, console)
    with pytest.raises(ValueError, match=r"has .* tokens, but the longest prompt 9999999"):
        search_settings(settings, WindowsTask([9_999_999], number=1, scored=10), store, console)


def test_questions_are_scored_by_numbers_found() -> None:
    from contestants import HalfBlind

    # Found are keys in the first half of the text.
    task = QuestionsTask(list(passkey_questions([400, 600], [0.1, 0.3, 0.9, 0.2], [3])))
    runner = HalfBlind("half")
    assert task.longest == 600
    assert task.score(runner, runner.encoder, list(b"Nothing to be seen here. " * 40)) == 0.75
