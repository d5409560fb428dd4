"""RULER through the real lm-eval and the real engine, with data made here in the formats of the originals."""

import json
from pathlib import Path
from typing import Any

import pytest
from example_modules import EXAMPLES
from typer.testing import CliRunner

from vllm_longmamba.cli import app
from vllm_longmamba.evaluate.harness import loading
from vllm_longmamba.evaluate.harness.benchmarks import RULER
from vllm_longmamba.evaluate.harness.local_data import ESSAY_NEEDLES, read_hotpot, read_squad, ruler_overrides

MODEL = str(EXAMPLES / "passkey-mamba2-4m")
HAYSTACK = EXAMPLES / "texts" / "haystack.txt"
ENGINE = ["--dtype", "float32", "--engine-arg", "enforce_eager=true", "--engine-arg", "gpu_memory_utilization=0.3"]
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
        for article in range(4)
    ]
}
HOTPOT = [
    {
        "question": f"Question {entry}?",
        "answer": "yes",
        "context": [[f"Title {entry}{part}", ["First. ", "Second."]] for part in range(2)],
    }
    for entry in range(4)
]


def squad_file(folder: Path, content: Any = SQUAD) -> Path:
    (folder / "squad.json").write_text(json.dumps(content))
    return folder / "squad.json"


def load(tasks: list[str], lengths: list[int], overrides: Any, limit: int = 3) -> Any:
    return loading.load_cells(RULER, tasks, lengths, MODEL, 0, limit, overrides)


def test_local_squad_and_hotpot_are_read_as_lm_eval_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.ruler import qa_utils

    for own, theirs, content in (
        (read_squad, qa_utils.read_squad, SQUAD),
        (read_hotpot, qa_utils.read_hotpotqa, HOTPOT),
    ):
        monkeypatch.setattr(qa_utils, "download_json", lambda url, content=content: content)
        theirs.cache_clear()
        assert own(squad_file(tmp_path, content)) == theirs()
        theirs.cache_clear()
        with pytest.raises(ValueError, match=r"squad.json: must be a file of"):
            own(squad_file(tmp_path, {"other": 1}))


def test_a_ruler_task_of_local_documents(tmp_path: Path) -> None:
    [short, long] = load(["QA1"], [1400, 2600], ruler_overrides(None, squad_file(tmp_path), None))
    assert (short.length, long.length, short.metric, short.room) == (1400, 2600, "1400", 32)
    for cell in (short, long):
        assert sorted(cell.prompts) == [0, 1, 2]
        assert all(prompt.endswith("Answer:") for prompt in cell.prompts.values())
        assert max(len(prompt) for prompt in cell.prompts.values()) + 32 <= cell.length + len(" Answer:")
    assert short.prompts[0].count("Document") < long.prompts[0].count("Document")
    assert short.identity(0) != short.identity(1)
    again = load(["QA1"], [1400], ruler_overrides(None, squad_file(tmp_path), None))[0]
    assert again.identity(2) == short.identity(2)


def test_the_engine_gets_room_for_prompts_that_are_longer_than_their_length() -> None:
    [cell] = load(["FWE"], [1024], {})
    # ruler_fwe fills the whole length with the prompt, and its answer comes on top.
    assert loading.longest([cell], MODEL, trust_remote_code=False) > 1024
    prompts = {len(prompt) for prompt in cell.prompts.values()}
    assert loading.longest([cell], MODEL, trust_remote_code=False) == max(prompts) + 50


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
    cells = load(["S1", "FWE"], [700, 1000], {}, limit=2)
    by_place = {(cell.full_name, cell.length): cell for cell in cells}
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        own, result = line["id"], line["result"]
        cell = by_place[own["task"], own["length"]]
        # The prompts are the same when they are made again, and the expected answers are hidden in them.
        assert own["prompt"] == cell.identity(own["document"])["prompt"]
        assert all(expected in cell.prompts[own["document"]] for expected in result["expected"])
        found = [expected.lower() in result["answer"].lower() for expected in result["expected"]]
        assert result["score"] == pytest.approx(sum(found) / len(found))
        assert 0 < len(result["answer"].encode()) <= cell.room


@pytest.mark.slow
def test_local_essays_give_lm_evals_own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk
    from lm_eval.tasks.ruler import niah_utils

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
        for prompt in cell.prompts.values():
            assert prompt.count("One of the special magic numbers for") == needles
            assert len(prompt) + cell.room <= 6000 + 100

    # What is given to lm-eval's generator is what its own tasks give it.
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "generate_samples", lambda *_, **settings: calls.append(settings) or [{"a": 1}])
    for task, needles in ESSAY_NEEDLES.items():
        getattr(niah_utils, task)(max_seq_lengths=[6000], tokenizer=MODEL)
        theirs = calls.pop()
        fixed = {"type_haystack": "essay", "type_needle_k": "words", "num_samples": 500, "max_seq_length": 6000}
        assert theirs.pop("TOKENIZER") is not None
        assert theirs.pop("template") == niah_utils.TEMPLATE
        assert theirs == fixed | dict(needles)
