"""The scripts of benchmarks/ that compare variants and write the page of results, on a tiny model."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from engine.harness import TRAIN_LENGTH, write_table
from references.reference_lm import reference_dt
from tiny_models import random_token_ids, write_mamba1_original, write_mamba2_original

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HAYSTACK = BENCHMARKS.parent / "examples" / "texts" / "haystack.txt"

Script = Callable[..., None]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """script("name", *arguments) runs benchmarks/name.py in this process."""
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        module: ModuleType = importlib.import_module(name)
        module.main()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its table beside the weights."""
    folder = write_mamba1_original(tmp_path_factory.mktemp("models") / "tiny")
    write_table(folder, folder / "longmamba.safetensors")
    return folder


def test_ablations_go_on_and_appear_on_the_page(script: Script, folder: Path, tmp_path: Path) -> None:
    def ablate(*names: str) -> None:
        script(
            "ablations", *names, "--model", folder, "--text", HAYSTACK, "--lengths", "300,400", "--depths", 1,
            "--windows", 1, "--scored", 20, "--thetas", "1e-9,1e-2", "--clamps", "5,20", "--groups", 2,
            "--records", tmp_path / "records", "-o", tmp_path / "results",
        )  # fmt: skip

    ablate("theta", "clamp", "groups", "rows", "decode")
    reports = {
        path.parent.name.removeprefix("ablation-"): json.loads(path.read_text())
        for path in (tmp_path / "results" / "tiny").glob("*/report.json")
    }
    assert set(reports) == {"theta", "clamp", "groups", "rows", "decode"}
    assert list(reports["theta"]["methods"]) == ["plain", "1e-09", "0.01"]
    losses = {
        name: {row["method"]: row["loss"] for row in report["perplexity"] if row["length"] == 400}
        for name, report in reports.items()
        if name != "rows"
    }
    for name, of_variants in losses.items():
        assert len(set(of_variants.values())) == len(of_variants), name
    # Equal prompts, whether their second half counts as generated or not.
    assert losses["decode"]["plain"] == pytest.approx(losses["theta"]["plain"], abs=1e-4)
    lengths = {row["length"] for row in reports["rows"]["perplexity"]}
    # The last two of harness.ROW_LENGTHS are 400 apart.
    assert lengths == {300 * 3 // 4 + 200, 400 * 3 // 4 + 200}

    records = tmp_path / "records" / "tiny" / "theta" / "records.jsonl"
    before = records.read_text()
    ablate("theta")
    assert records.read_text() == before

    page = tmp_path / "docs" / "results.md"
    gap = {"largest": 1.5e-5, "mean": 2e-6}
    document = {
        "environment": {"device": "a CPU", "versions": {"torch": "2"}, "date": "today", "command": "it"},
        "settings": {"scored": 100, "prompts": 20, "shortest": 120, "longest": 4096, "seed": 0},
        "models": {"tiny": {"plain": gap}},
    }
    (tmp_path / "results" / "engine_vs_torch.json").write_text(json.dumps(document))
    script("results_page", "--results", tmp_path / "results", "-o", page)
    text = page.read_text()
    for heading in (
        "## tiny",
        "### Theta (min_retention)",
        "### Filtering generated text",
        "## What this does not show",
    ):
        assert f"\n{heading}\n" in text
    assert "| tiny | plain | 1.5e-05 | 2.0e-06 |" in text
    assert f"{losses['theta']['0.01']:.3f}" in text


def test_candidates_need_no_table(script: Script, tmp_path: Path) -> None:
    folder = write_mamba2_original(tmp_path / "tiny")
    script(
        "candidates", folder, "--train-length", TRAIN_LENGTH, "--text", HAYSTACK, "--lengths", 300, 400,
        "--questions", 9, "--windows", 1, "--device", "cpu", "--output", tmp_path / "found.json",
    )  # fmt: skip
    rows = json.loads((tmp_path / "found.json").read_text())
    assert [(row["method"], row["length"]) for row in rows[:3]] == [("plain", 300), ("plain", 400), ("paper", 300)]
    assert {row["method"] for row in rows} == {"plain", "paper", "budget 1", "budget 2", "unfiltered end"}
    assert len({row["text"] for row in rows}) == len(rows) == 10
    # Random weights know nothing.
    assert all(row["needles"] == row["passkey"] == 0 for row in rows)


def test_search_for_budgets_of_channels(script: Script, tmp_path: Path) -> None:
    folder = write_mamba2_original(tmp_path / "tiny")
    write_table(folder, folder / "longmamba.safetensors")
    script(
        "channel_budgets", folder, "--text", HAYSTACK, "--lengths", 300, "--questions", 9, "--budgets", 2,
        "--unfiltered-end", 16, "--device", "cpu", "--seconds", 1000, "--output", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tried"][0]["channels"] == []
    assert found["best"]["score"] >= max(trial["score"] for trial in found["tried"]) - 0.004
    changed = [trial for trial in found["tried"] if trial["above plain"] != found["tried"][0]["above plain"]]
    assert changed


def test_what_is_left_out_of_texts(script: Script, folder: Path, tmp_path: Path) -> None:
    script(
        "left_out_text", folder, "--text", HAYSTACK, "--length", 400, "--windows", 1, "--device", "cpu",
        "--output", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["loss"])[:2] == [f"plain, the last {TRAIN_LENGTH} alone", "plain"]
    assert list(found["loss"])[-1] == f"nothing before the last {TRAIN_LENGTH}"
    losses = [next(iter(of_texts.values())) for of_texts in found["loss"].values()]
    assert len(set(losses)) == len(losses) == 6


def test_calibration_in_the_reference(script: Script, folder: Path, tmp_path: Path) -> None:
    script  # noqa: B018 - puts benchmarks/ on the path
    from support.variants import Subject

    from vllm_longmamba.calibration.sequences import draw_sequences
    from vllm_longmamba.tables import LayerCalibration

    text = "".join(chr(token % 96 + 32) for token in random_token_ids(2000, seed=1))
    (tmp_path / "text.txt").write_text(text)
    subject = Subject(folder, None, 512)
    rows = [TRAIN_LENGTH, 200, 400]
    table = subject.calibrated([tmp_path / "text.txt"], rows, 10.0, seed=5)
    [sequence] = draw_sequences([list(text.encode())], TRAIN_LENGTH, 1, 5)
    for layer, dt in reference_dt(folder, sequence).items():
        calibration = LayerCalibration(subject.model.layers[layer].mixer.A, TRAIN_LENGTH, rows, 10.0)
        calibration.add(dt.float())
        expected = calibration.result()
        np.testing.assert_allclose(table.layers[layer].dt_threshold, expected.dt_threshold, rtol=1e-3)
        torch.testing.assert_close(table.layers[layer].retention, expected.retention, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("generated", ["not filtered", "filtered", "growing"])
def test_texts_that_are_half_generated_may_be_read_together(script: Script, folder: Path, generated: str) -> None:
    script  # noqa: B018 - puts benchmarks/ on the path
    from support.variants import HalfGenerated, Subject

    from vllm_longmamba.torch_reference import LongMamba

    subject = Subject(folder, None, 512, "cpu", segment_tokens=900)
    model = subject.model.with_method(LongMamba.from_table(subject.table))
    together = HalfGenerated(model, subject.encoder, generated)
    alone = HalfGenerated(model, subject.encoder, generated)
    alone.together = lambda length: 1  # type: ignore[method-assign]
    subject.encoder.decode = lambda tokens: str(tokens)  # type: ignore[method-assign]
    prompts = [random_token_ids(length, seed=number) for number, length in enumerate([300, 300, 300, 300, 410, 300])]
    jobs = [(number, prompt, 3) for number, prompt in enumerate(prompts)]
    assert together.together(300) == 3
    assert list(together.complete(jobs)) == list(alone.complete(jobs))
    texts = list(enumerate(prompts))
    expected = dict(alone.tail_logprobs(texts, 20))
    for number, logprobs in together.tail_logprobs(texts, 20):
        np.testing.assert_allclose(logprobs, expected[number], atol=1e-5)


def _report(task: str, shares: dict[str, float], **changes: object) -> dict[str, object]:
    value = "share" if task == "passkey" else "loss"
    rows = [{"method": method, "length": 512, value: share} for method, share in shares.items()]
    compared = {} if task == "passkey" else {"compared_with": next(iter(shares))}
    methods = {method: {"weights": "these"} for method in shares}
    report = {"task": task, "settings": {"seeds": [0]}, "hardware": "it", "command": "do", "methods": methods}
    return report | {"by_length": rows} | compared | changes


@pytest.mark.parametrize(("task", "added"), [("passkey", ["torch-plain", "decimamba"]), ("perplexity", ["decimamba"])])
def test_other_methods_are_put_beside(script: Script, tmp_path: Path, task: str, added: list[str]) -> None:
    def write(name: str, report: dict[str, object]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        return tmp_path / name

    ours = write("ours", _report(task, {"plain": 0.5, "longmamba": 0.9}))
    other = write("other", _report(task, {"torch-plain": 0.5001, "decimamba": 0.6}))
    script("join_reports", ours, "--beside", other, "-o", tmp_path / "joined")
    joined = json.loads((tmp_path / "joined" / "report.json").read_text())
    assert list(joined["methods"]) == ["plain", "longmamba", *added]
    assert [row["method"] for row in joined["by_length"]] == ["plain", "longmamba", *added]
    assert joined["command"] == "do ; do"
    if task == "perplexity":
        assert joined["compared_with"] == "plain"
    wrong = {
        "settings": _report(task, {"torch-plain": 0.5}, settings={"seeds": [1]}),
        "weights": _report(task, {"torch-plain": 0.5}, methods={"torch-plain": {"weights": "others"}}),
        "a method plain already": _report(task, {"plain": 0.5}),
    }
    if task == "perplexity":
        wrong["the plain model has 0.7"] = _report(task, {"torch-plain": 0.7, "decimamba": 0.6})
    for number, (message, report) in enumerate(wrong.items()):
        with pytest.raises(SystemExit, match=message):
            script("join_reports", ours, "--beside", write(f"wrong{number}", report), "-o", tmp_path / "joined")


def test_evidence_goes_on_after_a_failure(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a `longmamba eval` that fails until a file exists, and tells which GPU it was given."""
    reports = {task: _report(task, {"plain": 0.5, "longmamba": 0.9}) for task in ("passkey", "needles", "perplexity")}
    (tmp_path / "reports.json").write_text(json.dumps(reports))
    fake = tmp_path / "bin" / "longmamba"
    fake.parent.mkdir()
    fake.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "task, output = sys.argv[2], Path(sys.argv[sys.argv.index('-o') + 1])\n"
        f"home = Path({str(tmp_path)!r})\n"
        "with (home / 'calls').open('a') as calls:\n"
        "    calls.write(output.name + ' on ' + os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n"
        "if task == 'needles' and not (home / 'mended').exists():\n"
        "    sys.exit('no needles today')\n"
        "(output / 'report.json').write_text(json.dumps(json.loads((home / 'reports.json').read_text())[task]))\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    arguments = [
        "evidence", "some/tiny", "--text", HAYSTACK, "--table", "paper=one", "--table", "my own=two",
        "--gpus", 0, 1, "--work", tmp_path / "work", "--output", tmp_path / "results",
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="some runs failed"):
        script(*arguments)
    assert f"needles-paper: failed, see {tmp_path}" in capsys.readouterr().out
    assert "no needles today" in (tmp_path / "work" / "needles-my-own" / "log.txt").read_text()
    first = (tmp_path / "calls").read_text().splitlines()
    assert len(first) == 6
    assert {call[-1] for call in first} == {"0", "1"}

    (tmp_path / "mended").touch()
    script(*arguments)
    again = (tmp_path / "calls").read_text().splitlines()[6:]
    assert sorted(call.split()[0] for call in again) == ["needles-my-own", "needles-paper"]
    for task in reports:
        joined = json.loads((tmp_path / "results" / "tiny" / task / "report.json").read_text())
        assert list(joined["methods"]) == ["plain", "LongMamba, paper", "LongMamba, my own"]
