"""RULER through the real lm-eval and the real engine, with data made here in the formats of the originals."""

import json
import random
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from contestants import ByteTokenizer
from example_modules import EXAMPLES
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.evaluate.harness.benchmarks import RULER
from vllm_longmamba.evaluate.harness.tasks import load_cells, ruler_overrides
from vllm_longmamba.evaluate.store import FILE_NAME
from vllm_longmamba.evaluate.texts import Encoder

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = EXAMPLES / "texts" / "haystack.txt"
# Eager, and a small share of the memory, as in test_lm_eval.py.
ENGINE = ["--dtype", "float32", "--engine-args", '{"enforce_eager": true, "gpu_memory_utilization": 0.3}']
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {article}{part} lies by a river. " * 6,
                    "qas": [
                        {
                            "question": f"Where lies town {article}{part}?",
                            "answers": [{"text": "by a river"}],
                            "is_impossible": False,
                        },
                        {"question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
                for part in range(3)
            ]
        }
        for article in range(167)
    ]
}
HOTPOT = [
    {
        "question": f"Question {entry}?",
        "answer": "yes",
        "context": [[f"Title {entry}{part}", ["First. ", "Second."]] for part in range(2)],
    }
    for entry in range(500)
]


def squad_file(folder: Path, content: Any = SQUAD) -> Path:
    (folder / "squad.json").write_text(json.dumps(content))
    return folder / "squad.json"


def load(tasks: list[str], lengths: list[int], overrides: Any, limit: int = 3) -> Any:
    return load_cells(RULER, tasks, lengths, MODEL, 0, limit, overrides)


@pytest.mark.parametrize(("task", "content"), [("QA1", SQUAD), ("QA2", HOTPOT)])
def test_local_squad_and_hotpot_are_read_by_lm_eval_itself(
    task: str, content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks.ruler import qa_utils

    path = squad_file(tmp_path, content)
    [cell] = load([task], [1400], ruler_overrides(None, path, path))
    # As if it had been downloaded.
    monkeypatch.setattr(qa_utils, "download_json", lambda url: content)
    for read in (qa_utils.read_squad, qa_utils.read_hotpotqa):
        read.cache_clear()
    theirs = getattr(qa_utils, "get_squad" if task == "QA1" else "get_hotpotqa")
    random.seed(0)
    expected = theirs(tokenizer=MODEL, max_seq_lengths=[1400])["test"]
    assert [document["input"] for document in cell.loaded.dataset["test"]] == list(expected["input"])
    for read in (qa_utils.read_squad, qa_utils.read_hotpotqa):
        read.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": 1}, "another format"),
        ({"data": SQUAD["data"][:2]}, "at least 500 questions"),
        (None, "no JSON file"),
    ],
)
def test_another_local_file_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = squad_file(tmp_path, content)
    if content is None:
        path.write_text("{")
    with pytest.raises(ValueError, match=rf"ruler_qa_squad at 1400 tokens: .*{message}"):
        load(["QA1"], [1400], ruler_overrides(None, path, None))


def test_a_ruler_task_of_local_documents(tmp_path: Path) -> None:
    [short, long] = load(["QA1"], [1400, 2600], ruler_overrides(None, squad_file(tmp_path), None))
    assert (short.length, long.length, short.metric) == (1400, 2600, "1400")
    for cell in (short, long):
        assert len(cell.prompts) == 3
        assert all(prompt.endswith("Answer:") for prompt in cell.prompts)
        assert max(map(len, cell.prompts)) + 32 <= cell.length + len(" Answer:")
    assert short.prompts[0].count("Document") < long.prompts[0].count("Document")
    assert len(set(short.prompts)) == 3
    # Which other tasks and lengths are loaded does not change them.
    assert load(["QA1"], [1400], ruler_overrides(None, squad_file(tmp_path), None))[0].prompts == short.prompts


def test_the_engine_gets_room_for_prompts_that_are_longer_than_their_length() -> None:
    [cell] = load(["FWE"], [1024], {})
    # ruler_fwe fills the whole length with the prompt, and its answer comes on top.
    longest = cell.longest(Encoder(ByteTokenizer()))
    assert longest > 1024
    assert longest == max(map(len, cell.prompts)) + 50


def test_downloads_that_fail_name_the_local_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(ValueError, match=r"ruler_qa_hotpot: its data could not be had .*--hotpot hotpot_dev"):
        load(["QA2"], [1400], {})


def test_lengths_that_lm_evals_generators_would_try_for_ever() -> None:
    with pytest.raises(ValueError, match="its example must fit 500 tokens"):
        load(["VT"], [4096], {})
    with pytest.raises(ValueError, match="a length of 600 tokens is too short"):
        load(["CWE"], [600], {})
    assert len(load(["CWE"], [1600], {})[0].prompts) == 3


def test_a_max_model_len_that_would_cut_prompts_is_refused(tmp_path: Path) -> None:
    arguments = ["eval", "ruler", MODEL, "--tasks", "FWE", "--lengths", "1024", "--max-model-len", "1024"]
    result = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "and prompts are not cut here" in result.output


@pytest.mark.slow
@pytest.mark.engine
def test_ruler(tmp_path: Path) -> None:
    """S1's needle words are beyond this model; that prompts, answers and scores find each other is what is shown."""
    arguments = ["ruler", MODEL, "--tasks", "S1,FWE", "--lengths", "700,1000", "--limit", "2", "--method", "longmamba"]
    result = CliRunner().invoke(app, ["eval", *arguments, *ENGINE, "-o", str(tmp_path)])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["length"], row["task"], row["questions"]) for row in report["by_task"]] == [
        (700, "S1", 2),
        (700, "FWE", 2),
        (1000, "S1", 2),
        (1000, "FWE", 2),
    ]
    assert report["settings"]["longest prompt and answer"] > 1000
    assert (tmp_path / "by-length.png").stat().st_size > 0
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        answers = [json.loads(result)["answer"] for (result,) in database.execute("SELECT result FROM results")]
    assert len(answers) == 8
    assert all(answers)


@pytest.mark.slow
def test_local_essays_give_lm_evals_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    # A sentence splitter that knows nothing, in NLTK's format.
    english = tmp_path / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).write_text("")
    overrides = ruler_overrides([HAYSTACK], None, None)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="NLTK's sentence splitter is missing"):
        load(["S2"], [6000], overrides)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    cells = load(["S2", "MV"], [6000], overrides)
    for cell, needles in zip(cells, (1, 4), strict=True):
        for prompt in cell.prompts:
            assert prompt.count("One of the special magic numbers for") == needles
            assert prompt.count(" the ") > 20
            assert len(prompt) + 128 <= 6000 + 100
