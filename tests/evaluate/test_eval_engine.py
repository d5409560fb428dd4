"""The tasks through the real engine: log-probabilities against the reference, tuning against a fresh engine."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine.harness import ROW_LENGTHS, TRAIN_LENGTH, Filters, assert_agrees, write_table
from references.reference_lm import reference_logprobs
from tiny_models import random_token_ids, write_mamba2_original
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_longmamba.commands.engine_errors import EngineStartError, explained_start
from vllm_longmamba.evaluate.engine import FILTER_EXTENSION, EngineContestant, EngineRunner
from vllm_longmamba.tables import ThresholdTable, load_table

pytestmark = pytest.mark.engine

# Prompts are cut into many chunks; the scored tokens lie in the last ones. Eager and float32, to be compared with the
# reference; tests/evaluate/test_eval_commands.py has the engine as users start it.
ENGINE_ARGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "num_gpu_blocks_override": 64,
    "gpu_memory_utilization": 0.1,
}
if torch.cuda.is_available():
    ENGINE_ARGS["kv_cache_memory_bytes"] = 2**30
SCORED = 30
PROMPTS = [random_token_ids(length, seed=length) for length in (40, TRAIN_LENGTH, 193, 300, 650)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mamba2_original(tmp_path_factory.mktemp("models") / "mamba2")


@pytest.fixture(scope="module")
def tables(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tables of the same rows with other thresholds and other global channels."""
    folder = tmp_path_factory.mktemp("tables")
    paths = [folder / "first.safetensors", folder / "second.safetensors"]
    for seed, path in enumerate(paths):
        write_table(model, path, seed=seed)
    return paths


@pytest.fixture(scope="module")
def runner(model: Path, tables: list[Path]) -> Iterator[EngineRunner]:
    """One engine for all tests, started as `longmamba tune` starts it."""
    arguments = arguments_of(model, {"table": str(tables[0])}, worker_extension_cls=FILTER_EXTENSION)
    with EngineContestant(arguments).start() as running:
        yield running


def arguments_of(model: Path, options: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model": str(model), "additional_config": {"longmamba": options}, **ENGINE_ARGS, **changes}


def assert_filtered_by(
    table: ThresholdTable, min_retention: float, model: Path, prompt: list[int], logprobs: np.ndarray
) -> None:
    """Compare an engine's log-probabilities of the scored tokens with the reference, filtered by this table."""
    row = int(np.argmin(np.abs(np.array(ROW_LENGTHS) - len(prompt)))) if len(prompt) > TRAIN_LENGTH else 0
    filters = {layer: table.thresholds(layer, min_retention)[row] for layer in table.layers}

    def expected(filters: Filters) -> np.ndarray:
        reference = reference_logprobs(model, prompt, prompt_length=len(prompt), filters=filters)
        return reference[-SCORED - 1 : -1].gather(1, torch.tensor(prompt[-SCORED:])[:, None])[:, 0].numpy()

    assert_agrees(logprobs, expected, filters)


# The thetas lie on both sides of the tables' retentions, 1e-6 and 0.3; 1 is the plain model. The order goes back and
# forth, so that nothing of an earlier filter may remain.
@pytest.mark.parametrize(
    ("number", "min_retention"), [(0, 1e-2), (1, 1e-2), (1, 1.0), (1, 1e-9), (0, 1e-7)], ids=lambda value: f"{value:g}"
)
def test_tail_logprobs_under_changing_filters(
    number: int, min_retention: float, runner: EngineRunner, model: Path, tables: list[Path]
) -> None:
    runner.set_filter(tables[number], min_retention)
    table = load_table(tables[number])
    assert any(bool(table.is_global(layer, min_retention).any()) for layer in table.layers) or min_retention == 1.0
    results = dict(runner.tail_logprobs(((i, prompt) for i, prompt in enumerate(PROMPTS)), SCORED))
    assert sorted(results) == list(range(len(PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        assert_filtered_by(table, min_retention, model, prompt, results[i])


def test_complete_continues_greedily(runner: EngineRunner, tables: list[Path]) -> None:
    from vllm import SamplingParams

    runner.set_filter(tables[0], 1e-2)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = runner.llm.generate(inputs, SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False)
    generated = [list(output.outputs[0].token_ids) for output in outputs]
    handed_out: list[int] = []

    def jobs() -> Iterator[tuple[int, list[int], int]]:
        for job in range(11):
            handed_out.append(job)
            yield job, PROMPTS[job % len(PROMPTS)], 1 + job % 3

    answers: dict[int, str] = {}
    for job, answer in runner.complete(jobs()):
        # Eight at a time: twice as many as the engine runs at once.
        assert len(handed_out) <= 8 + len(answers)
        answers[job] = answer
    assert sorted(answers) == list(range(11))
    encoder = runner._encoder
    for job, answer in answers.items():
        assert answer == encoder.decode(generated[job % len(PROMPTS)][: 1 + job % 3])


def test_a_table_of_other_rows_is_refused(runner: EngineRunner, tables: list[Path], tmp_path: Path) -> None:
    from small_tables import write_small_table

    write_small_table(tmp_path / "other.safetensors")
    with pytest.raises(Exception, match="its rows are for other prompt lengths"):
        runner.set_filter(tmp_path / "other.safetensors", 0.1)


def test_description(runner: EngineRunner, model: Path, tables: list[Path]) -> None:
    def describe(options: dict[str, Any], **changes: Any) -> dict[str, Any]:
        arguments = arguments_of(model, options, **changes)
        return EngineContestant(arguments, "longmamba" if options.get("filter", True) else "plain").description

    first = describe({"table": str(tables[0])})
    assert first["train_length"] == TRAIN_LENGTH
    assert first["min_retention"] == 1e-2
    assert first["dtype"] == "float32"
    plain = describe({"filter": False})
    assert plain["weights"] == first["weights"]
    assert "table" not in plain
    others = [
        describe({"table": str(tables[1])}),
        describe({"table": str(tables[0]), "min_retention": 0.5}),
        describe({"table": str(tables[0]), "unfiltered_end": 20}),
        describe({"table": str(tables[0]), "filter_generated": True}),
        describe({"table": str(tables[0])}, mamba_ssm_cache_dtype="float16"),
        describe({"table": str(tables[0])}, dtype="bfloat16"),
        plain,
    ]
    assert all(other != first for other in others)
    assert others[2] == first | {"unfiltered_end": 20}
    assert describe({"table": str(tables[0]), "unfiltered_end": 0}) == first


def test_a_plain_model_that_filters_is_refused(
    runner: EngineRunner, model: Path, tables: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever led there: what its arguments say, and what it runs with in the end."""
    wrong = "the plain model runs without the filter, but its engine runs with it"
    with pytest.raises(ValueError, match=wrong):
        EngineContestant(arguments_of(model, {"table": str(tables[0])}), "plain")
    with pytest.raises(ValueError, match="model_impl must be 'longmamba' for this method"):
        EngineContestant(arguments_of(model, {}, model_impl="auto"))

    stopped = []

    class Filtering:
        """An engine of these arguments that filters all the same."""

        def __init__(self, **arguments: Any) -> None:
            assert not arguments["additional_config"]["longmamba"]["filter"]
            core = SimpleNamespace(shutdown=lambda: stopped.append(True))
            self.llm_engine = SimpleNamespace(vllm_config=runner.llm.llm_engine.vllm_config, engine_core=core)

    contestant = EngineContestant(arguments_of(model, {"filter": False}), "plain")
    monkeypatch.setattr("vllm.LLM", Filtering)
    with pytest.raises(ValueError, match=wrong), contestant.start():
        pass
    assert stopped == [True]


def test_an_engine_that_dies_is_no_traceback(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    core = SimpleNamespace(shutdown=lambda: stopped.append(True))
    contestant = EngineContestant(arguments_of(model, {"filter": False}), "plain")
    monkeypatch.setattr(contestant, "_check", lambda config: None)
    engine = SimpleNamespace(vllm_config=None, engine_core=core)
    monkeypatch.setattr("vllm.LLM", lambda **_: SimpleNamespace(llm_engine=engine))
    with pytest.raises(ValueError, match=r"engine died, .*; give the same command again"), contestant.start():
        raise EngineDeadError
    assert stopped == [True]


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path, n_layer=1, tokenizer=False)
    with pytest.raises(EngineStartError) as error:
        EngineContestant(arguments_of(model, {"filter": False}), "plain", partial(explained_start, False))
    assert "\n" not in str(error.value)


def test_a_failed_start_is_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(model, {"filter": False}, gpu_memory_utilization=0.1)
    starting = partial(explained_start, False)
    contestant = EngineContestant(arguments, "plain", starting)

    def fail(**_: Any) -> None:
        raise RuntimeError("Available memory on node 0 (1/2 GiB) on startup is less than desired")

    monkeypatch.setattr("vllm.LLM", fail)
    with pytest.raises(EngineStartError, match="export VLLM_CPU_KVCACHE_SPACE=1") as error, contestant.start():
        pass
    assert "\n" not in str(error.value)
