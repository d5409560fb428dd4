"""LongBench-E through the real lm-eval and the real engine, with data made here; reports."""

import importlib.util
import json
import random
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contestants import ByteTokenizer
from example_modules import EXAMPLES
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.evaluate.comparison import Run
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.harness import tasks
from vllm_longmamba.evaluate.harness.benchmarks import LONGBENCH_E, RULER, Benchmark
from vllm_longmamba.evaluate.harness.lm import StoredLM
from vllm_longmamba.evaluate.harness.reporting import (
    average_of,
    draw_harness,
    harness_markdown,
    summarize_harness,
)
from vllm_longmamba.evaluate.harness.tasks import longbench_overrides
from vllm_longmamba.evaluate.store import FILE_NAME, Store, settings_key
from vllm_longmamba.evaluate.texts import Encoder

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = EXAMPLES / "texts" / "haystack.txt"
# Several engines of a test run may share one device. Eager: the compiled engine is in test_eval_commands.py, and starts
# in three times as long.
ENGINE = ["--dtype", "float32", "--engine-args", '{"enforce_eager": true, "gpu_memory_utilization": 0.3}']


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
    with pytest.raises(ValueError, match="may be given once"):
        RULER.chosen("S1,niah_single_1")


def load(names: list[str], overrides: Any) -> Any:
    return tasks.load_cells(LONGBENCH_E, names, [None], MODEL, 0, 3, overrides)


def test_a_download_that_fails_names_the_local_copy() -> None:
    # conftest.py sets HF_HUB_OFFLINE.
    with pytest.raises(ValueError, match=r"longbench_qasper_e: its data could not be had .*--data FOLDER"):
        load(["qasper"], {})


def test_local_longbench(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    document = {"input": "Who came?", "context": "Ann came.", "answers": ["Ann"], "length": 2}
    write_longbench(tmp_path / "data", "qasper", [document] * 5)
    [cell] = load(["qasper"], longbench_overrides(tmp_path, {"qasper": "longbench_qasper_e"}))
    assert (cell.length, cell.metric, len(cell.prompts)) == (None, "score", 3)
    assert cell.longest(Encoder(ByteTokenizer())) == len(cell.prompts[0].encode()) + 128
    assert "Article: Ann came." in cell.prompts[0]
    assert cell.prompts[0].endswith("Question: Who came?\n\nAnswer:")
    with pytest.raises(ValueError, match=r"trec_e.jsonl missing there; unpack LongBench's data.zip"):
        longbench_overrides(tmp_path, {"trec": "longbench_trec_e", "qasper": "longbench_qasper_e"})
    write_longbench(tmp_path / "data", "lcc", [{"context": "x"}])
    with pytest.raises(
        ValueError, match=r"longbench_lcc_e: no file of LongBench: the fields answers, length, question"
    ):
        load(["lcc"], longbench_overrides(tmp_path, {"lcc": "longbench_lcc_e"}))


@pytest.mark.parametrize("missing", ["lm_eval", "nltk"])
def test_a_missing_package_is_said(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    result = CliRunner().invoke(app, ["eval", "ruler", MODEL, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{missing} not installed; run pip install 'vllm-longmamba[lm-eval]'" in result.output.replace("\n", " ")


class Parrot:
    """A contestant that repeats the end of the prompt; `fail_after` makes it stop there."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.description = {"name": "parrot"}
        self.encoder = Encoder(ByteTokenizer())
        self.starts = 0
        self.asked: list[tuple[str, int]] = []
        self._fail_after = fail_after

    @contextmanager
    def start(self) -> Iterator["Parrot"]:
        self.starts += 1
        yield self

    def complete(self, jobs: Iterable[tuple[Any, list[int], int]]) -> Iterator[tuple[Any, str]]:
        for key, prompt, room in jobs:
            if len(self.asked) == self._fail_after:
                raise KeyboardInterrupt
            self.asked.append((bytes(prompt).decode(), room))
            yield key, bytes(prompt[-5:]).decode()


def request(prompt: str, until: Any = ()) -> SimpleNamespace:
    return SimpleNamespace(args=(prompt, {"max_gen_toks": 7, "until": until}), task_name="task")


def answers_of(parrot: Parrot, folder: Path, requests: list[SimpleNamespace]) -> list[str]:
    with Store(folder) as store, ExitStack() as engine:
        run = Run(store, "plain", settings_key(parrot.description))
        lm = StoredLM(parrot, run, lambda *_: lambda: None, engine)
        return lm.generate_until(requests)


def test_answers_end_where_the_task_says(tmp_path: Path) -> None:
    parrot = Parrot()
    requests = [request("one two"), request("on\ne t", ["\n", "t"]), request("a stop", "st")]
    assert answers_of(parrot, tmp_path, requests) == ["e two", "n", " "]
    assert parrot.asked == [("one two", 7), ("on\ne t", 7), ("a stop", 7)]
    parrot.encoder.end_of_text = ord("w")
    assert answers_of(parrot, tmp_path / "end", requests[:1]) == ["e t"]


def test_an_interrupted_benchmark_goes_on(tmp_path: Path) -> None:
    requests = [request(f"prompt {number}") for number in range(5)]
    with pytest.raises(KeyboardInterrupt):
        answers_of(Parrot(fail_after=2), tmp_path, requests)
    second, third = Parrot(), Parrot()
    assert answers_of(second, tmp_path, requests) == [f"mpt {number}" for number in range(5)]
    assert [prompt for prompt, _ in second.asked] == [f"prompt {number}" for number in (2, 3, 4)]
    assert answers_of(third, tmp_path, requests[::-1]) == [f"mpt {number}" for number in range(5)][::-1]
    assert (second.starts, third.starts) == (1, 0)
    # Other settings of an answer are another answer, and so is another model's.
    other = Parrot()
    other.description["table"] = "another"
    answers_of(other, tmp_path, requests)
    assert len(other.asked) == 5
    answers_of(third, tmp_path, [request("prompt 0", ["x"])])
    assert third.starts == 1


def scored(task: str, length: int | None, scores: list[float], **more: Any) -> list[Any]:
    return [(SimpleNamespace(task=task, length=length), {"score": score, **more}) for score in scores]


def test_report_by_task_and_average() -> None:
    plain = scored("S1", 16384, [1, 0, 0, 0]) + scored("S2", 16384, [0.5, 0.5])
    own = scored("S1", 16384, [1, 1, 1, 0]) + scored("S2", 16384, [1, 1])
    report = {"model": "m", "command": "c", "hardware": "h", "methods": {"plain": {}, "longmamba": {}}, "settings": {}}
    report |= summarize_harness({"plain": plain, "longmamba": own})
    assert [row["share"] for row in report["average"]] == [0.375, 0.875]
    [s1, average] = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in "\n".join(harness_markdown(report)).splitlines()
        if line.startswith(("| S1", "| average"))
    ]
    assert s1[:2] == ["S1", "4"]
    assert s1[2].startswith("25.0% (")
    assert s1[3].startswith("75.0% (")
    assert average[3].startswith("87.5% (")
    assert "average of the tasks" in draw_harness(report, "T")["by-length.svg"].decode()


def test_average_of_weighs_tasks_alike() -> None:
    average = average_of([("few", 1.0), *[("many", 0.0), ("many", 1.0)] * 50])
    assert (average["tasks"], average["share"]) == (2, 0.75)
    # Only "many" varies: half of its mean's 0.5 +- 1.96 * 0.05.
    assert average["low"] == pytest.approx(0.70, abs=0.01)
    assert average["high"] == pytest.approx(0.80, abs=0.01)


def test_longbench_report_by_words() -> None:
    results = {"plain": scored("qasper", None, [1.0], words=3999) + scored("trec", None, [0.0], words=8000)}
    report = summarize_harness(results)
    assert [(row["words"], row["share"]) for row in report["by_words"]] == [("0-4k", 1.0), ("8k+", 0.0)]
    assert draw_harness(report, "T") == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ruler", MODEL, "--tasks", "S9"], "--tasks: unknown are S9"),
        (["ruler", MODEL, "--lengths", "long"], "whole numbers separated by commas"),
        (
            ["ruler", MODEL, "--tasks", "FWE", "--method", "decimamba"],
            "unknown are decimamba; known are plain, longmamba",
        ),
        (["longbench-e", MODEL, "--data", str(EXAMPLES)], "qasper_e.jsonl"),
    ],
    ids=["task", "lengths", "method", "data"],
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
    output = tmp_path / "out"
    arguments = ["longbench-e", MODEL, "--tasks", "triviaqa", "--data", str(tmp_path), *ENGINE, "-o", str(output)]
    assert "triviaqa" in run(*arguments)

    report = json.loads((output / "report.json").read_text())
    shares = {row["method"]: row["share"] for row in report["by_task"]}
    assert shares["plain"] <= 0.75
    assert shares["longmamba"] >= shares["plain"] + 0.25
    assert report["methods"]["longmamba"]["filter"]
    assert not report["methods"]["plain"]["filter"]
    assert [row["words"] for row in report["by_words"]] == ["0-4k", "0-4k"]

    with sqlite3.connect(output / FILE_NAME) as database:
        results = list(database.execute("SELECT identity, result FROM results"))
    given = [(json.loads(identity)["method"], json.loads(result)["answer"]) for identity, result in results]
    assert len(given) == 2 * len(documents)
    # A key counts where it is the whole of an answer's first line.
    keys = {document["answers"][0] for document in documents}
    for method, share in shares.items():
        found = sum(answer.strip(" .") in keys for own, answer in given if own == method)
        assert found >= share * len(documents)

    # Everything is in the store, so that nothing starts.
    def refuse(*_: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(EngineContestant, "start", refuse)
    run(*arguments)
    assert json.loads((output / "report.json").read_text())["by_task"] == report["by_task"]
