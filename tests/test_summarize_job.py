"""benchmarks/summarize_job.py: its documents and models, what its clock counts, and, slow, all of it."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vllm_longmamba.summarize import engine
from vllm_longmamba.summarize.prompts import Prompt, PromptMaker
from vllm_longmamba.summarize.records import Completion

ROOT = Path(__file__).resolve().parent.parent
COUNT = 3
WARM_UP_SECONDS, DOCUMENT_SECONDS = 1.5, 0.2


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    from summarize_job import job_settings

    return job_settings("mamba2-1.3b", tmp_path, COUNT, is_tiny=True)


def _tokenizer(settings: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings["model"])


def test_lengths_are_log_uniform_and_seeded() -> None:
    from support.byte_documents import log_uniform_lengths

    lengths = log_uniform_lengths(2000, 4096, 65536, seed=0)
    assert lengths == log_uniform_lengths(2000, 4096, 65536, seed=0)
    assert lengths != log_uniform_lengths(2000, 4096, 65536, seed=1)
    assert min(lengths) >= 4096
    assert max(lengths) <= 65536
    for tokens, share in ((8192, 0.25), (16384, 0.5), (32768, 0.75)):
        assert sum(length < tokens for length in lengths) / len(lengths) == pytest.approx(share, abs=0.04)


def test_prompts_have_a_token_a_character_and_are_those_of_the_command(settings: dict[str, Any]) -> None:
    from support.byte_documents import make_documents, prompt_of

    lengths = [1, 50, 200, 200, 3000]
    documents = make_documents(lengths, seed=0)
    assert [len(document) for document in documents] == lengths
    assert documents[2] != documents[3]
    maker = PromptMaker(False, None, None, _tokenizer(settings))
    for document in documents:
        prompt = maker.prompt(document)
        assert prompt.text == prompt_of(document)
        assert prompt.tokens == len(prompt.text)


def test_no_answer_ends_before_its_greatest_length(settings: dict[str, Any]) -> None:
    from vllm.transformers_utils.config import try_get_generation_config

    generation = try_get_generation_config(settings["model"], trust_remote_code=False)
    assert generation is None or generation.eos_token_id is None
    assert _tokenizer(settings).eos_token_id is None


def test_longest_document_and_its_answer_fit(settings: dict[str, Any]) -> None:
    from summarize_job import ANSWER_TOKENS, TINY_TOKENS
    from support.byte_documents import prompt_of

    shortest, longest, *_ = settings["warm_up"]
    assert (len(shortest), len(longest)) == TINY_TOKENS
    assert len(settings["documents"]) == COUNT
    assert settings["max_model_len"] == len(prompt_of(longest)) + ANSWER_TOKENS


def test_the_command_has_the_engine_of_generate_and_its_clock_leaves_out_start_and_warm_up(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import job_process

    warm_up = [job_process.prompt_of(document) for document in settings["warm_up"]]
    asked: list[str] = []
    given: dict[str, Any] = {}

    class Backend:
        concurrency = COUNT

        def __init__(self, arguments: dict[str, Any], sampling: Any, concurrency: int | None) -> None:
            given.update(arguments, max_tokens=sampling.max_tokens)
            time.sleep(WARM_UP_SECONDS)
            self.tokenizer, self.max_model_len = _tokenizer(settings), arguments["max_model_len"]

        async def complete(self, prompt: Prompt) -> Completion:
            asked.append(prompt.text)
            await asyncio.sleep(WARM_UP_SECONDS if prompt.text in warm_up else DOCUMENT_SECONDS)
            return Completion("", prompt.tokens, settings["answer_tokens"], "length")

        async def close(self) -> None:
            await asyncio.sleep(WARM_UP_SECONDS)

    monkeypatch.setattr(engine, "EngineBackend", Backend)
    measured = job_process.run_command(settings, tmp_path)
    documents = [job_process.prompt_of(document) for document in settings["documents"]]
    assert sorted(asked[: len(warm_up)]) == sorted(warm_up)
    assert sorted(asked[len(warm_up) :]) == sorted(documents)
    assert DOCUMENT_SECONDS <= measured["seconds"] < WARM_UP_SECONDS
    assert measured["start_seconds"] > WARM_UP_SECONDS
    assert measured["prompt_tokens"] == [len(document) for document in documents]
    assert measured["output_tokens"] == [128] * COUNT
    of_generate = job_process.engine_arguments(settings | {"way": "longmamba"})
    assert given == of_generate | {"tensor_parallel_size": 1, "max_tokens": 128}
    of_stock = job_process.engine_arguments(settings | {"way": "stock"})
    assert of_generate.keys() - of_stock.keys() == {"model_impl", "additional_config"}


def _measured(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    prompts = [len(document) + len("\n\nTL;DR:") for document in settings["documents"]]
    return {
        "start_seconds": 9.0, "seconds": 6.0, "prompt_tokens": prompts, "output_tokens": [128] * COUNT,
    } | changes  # fmt: skip


def test_figures_and_table(settings: dict[str, Any]) -> None:
    from summarize_job import figures, table

    ours = figures(settings, _measured(settings))
    assert ours["documents_per_minute"] == 30
    assert ours["tokens_per_second"] == (ours["prompt_tokens"] + 128 * COUNT) / 6
    stock = figures(settings, _measured(settings, seconds=12.0))
    rows = table({"mamba2-1.3b": {"command": ours, "stock": stock}, "mamba-1.4b": {"command": ours}}).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["2.00 x", "1.00 x", ""]
    assert rows[0].startswith("| mamba2-1.3b | `longmamba summarize` | 9.0 s | 6.0 s | 30.0 |")


@pytest.mark.parametrize(("name", "message"), [("prompt_tokens", "the prompts"), ("output_tokens", "the answers")])
def test_other_prompts_or_answers_are_refused(settings: dict[str, Any], name: str, message: str) -> None:
    from summarize_job import figures

    with pytest.raises(RuntimeError, match=f"{message} must have"):
        figures(settings, _measured(settings, **{name: [1] * COUNT}))


@pytest.mark.slow
@pytest.mark.engine
def test_script_runs(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "summarize_job.py"), "--tiny", "--models", "mamba2-1.3b"]
    environment = dict(os.environ)
    # As users have it, the engine in a process of its own.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [*script, "--documents", str(COUNT), "--out", str(tmp_path / "job-1.3b")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    document = json.loads((tmp_path / "job-1.3b.json").read_text())
    assert document["environment"]["command"].endswith(str(tmp_path / "job-1.3b"))
    assert document["settings"]["max_model_len"] == 736
    ways = document["models"]["mamba2-1.3b"]
    assert list(ways) == ["command", "longmamba", "stock"]
    for figure in ways.values():
        assert figure["output_tokens"] == 128 * COUNT
        assert figure["documents_per_minute"] == pytest.approx(60 * COUNT / figure["seconds"], rel=0.01)
    assert (tmp_path / "job-1.3b.md").read_text().count("| mamba2-1.3b |") == 3
