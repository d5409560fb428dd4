"""Real engines that find no table: they calibrate themselves, filter with the result, and find it at the next start."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_modules import EXAMPLES, load_example
from references.reference_lm import _read_weights, reference_dt, reference_logprobs
from tiny_models import random_token_ids

import vllm_longmamba.calibration.at_start as calibrate_at_start
import vllm_longmamba.tables.shipped as shipped
from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.text import sample_corpus
from vllm_longmamba.layers.filtered_mixer import filtered_mixers
from vllm_longmamba.tables import LayerCalibration, LayerThresholds, ThresholdTable, load_table, table_to_bytes

from .harness import MEMORY, TRAIN_LENGTH, Completion, Engine, Filters, assert_agrees, filters_of, scaled

pytestmark = pytest.mark.engine
SLOW = pytest.mark.slow

# Chunks that end at, before and behind the training length, the prefix cache with its aligned chunks, attention.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "mamba1": {"max_num_batched_tokens": 40},
    "mamba2": {"max_num_batched_tokens": 96},
    "zamba2": {"max_num_batched_tokens": 64, "enable_prefix_caching": True},
}

# bfloat16 may put a dt on the other side of its threshold, and in a tiny model one token decides much.
BFLOAT16_SHIFTS = (0.0, 2**-9, -(2**-9), 2**-8, -(2**-8))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache of tables, empty. vLLM keeps its own, and tables of up to 1024 tokens are long enough."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    monkeypatch.setenv("VLLM_CACHE_ROOT", os.environ.get("VLLM_CACHE_ROOT", str(own / "vllm")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("vllm_longmamba.calibration.prepare.DEFAULT_MAX_MODEL_LEN", 1024)
    monkeypatch.setattr(shipped, "__path__", [str(tmp_path / "none")])
    return tmp_path / "cache" / "vllm_longmamba"


@pytest.fixture
def start() -> Iterator[Callable[..., Engine]]:
    """Function: (model, engine arguments) -> an engine without a table; ended with the test, or by the next start."""
    running: list[Engine] = []

    def run(model: Path, train_length: int = TRAIN_LENGTH, **arguments: Any) -> Engine:
        while running:
            running.pop().close()
        options = {"longmamba": {"train_length": train_length}}
        given = {"model_impl": "longmamba", "additional_config": options, "max_model_len": 1024} | arguments
        running.append(Engine(model, **given))
        return running[0]

    yield run
    while running:
        running.pop().close()


def assert_filtered_by(table: ThresholdTable, model: Path, prompt: list[int], result: Completion) -> None:
    """Compare an engine's completion with the reference, filtered by this table."""
    filters = filters_of(table, len(prompt))

    def expected(filters: Filters) -> np.ndarray:
        return _generated(model, prompt + result.tokens, len(prompt), filters, table.metadata.unfiltered_end)

    assert_agrees(result.logprobs, expected, filters)


def stored(cache: Path) -> Path:
    """The only file in the cache."""
    (path,) = cache.iterdir()
    return path


def assert_thresholds_agree(found: LayerThresholds, expected: LayerThresholds) -> None:
    """Equal up to rounding, which moves a few thresholds to the next sample.

    In each sequence a threshold is the sample at which the running sum of dt exceeds its budget. float32 dt's that are
    added up in another order (two ranks, another kernel) change that sum by up to 5e-6. Where it exceeds the budget by
    less, the next sample is taken: it differs by some per cent, the mean of five sequences by a fifth of that. A sample
    is about a twentieth of the budget or less, so this is to be expected in 5 * 2 * 5e-6 / 0.05, one threshold in a
    thousand. 2 + count // 250 of a layer's thresholds exceed the 0.999 quantile of the Poisson distribution of that
    mean. Seen with two ranks: 1 of 6 * 168, by 0.5 %, whose sum exceeds the budget by 1.2e-6 in one sequence.
    """
    np.testing.assert_allclose(found.retention, expected.retention, rtol=1e-3)
    np.testing.assert_allclose(found.dt_threshold, expected.dt_threshold, rtol=0.1)
    moved = ~np.isclose(found.dt_threshold, expected.dt_threshold, rtol=1e-3, atol=0)
    assert moved.sum() <= 2 + moved.size // 250


def assert_table_of_the_sample(model: Path, table: ThresholdTable) -> None:
    """Compare with the paper's formulas on the reference's dt, without clamp, with clipped means and half a budget."""
    from tokenizers import Tokenizer

    assert (table.metadata.unfiltered_end, table.metadata.budget) == (TRAIN_LENGTH // 2, 0.5)

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    sequences = draw_sequences([tokenizer.encode(text).ids for text in sample_corpus().texts], TRAIN_LENGTH, 5, seed=0)
    all_dt = [reference_dt(model, sequence) for sequence in sequences]
    weights = _read_weights(model)
    for layer, thresholds in table.layers.items():
        (A_log,) = (value for name, value in weights.items() if f"layers.{layer}." in name and name.endswith("A_log"))
        expected = LayerCalibration(
            -torch.exp(A_log.double()),
            TRAIN_LENGTH,
            table.row_lengths,
            clamp_percent=0.0,
            method="unclamped",
            budget=0.5,
        )
        for dt in all_dt:
            expected.add(dt[layer].float())
        assert_thresholds_agree(thresholds, expected.result())


@pytest.mark.parametrize("family", ARGUMENTS)
def test_engine_makes_its_table(
    family: str, cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    model, arguments = tiny_model(family), ARGUMENTS[family]
    prompts = [random_token_ids(length, seed=length) for length in (TRAIN_LENGTH, 150, 333)]
    engine = start(model, **arguments)
    table = load_table(stored(cache))
    assert_table_of_the_sample(model, table)
    results = engine.generate(prompts)
    for prompt, result in zip(prompts, results, strict=True):
        assert_filtered_by(table, model, prompt, result)
    if "enable_prefix_caching" in arguments:
        again = engine.generate(prompts)
        assert again[2].cached_tokens > 0
        assert [result.tokens for result in again] == [result.tokens for result in results]


@pytest.mark.parametrize("family", ["mamba1", pytest.param("mamba2", marks=SLOW), pytest.param("zamba2", marks=SLOW)])
def test_bfloat16(family: str, cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path]) -> None:
    """torch's default dtype is then bfloat16 while vLLM builds the model; the table stays float32."""
    model = tiny_model(family)
    prompts = [random_token_ids(length, seed=length) for length in (150, 333)]
    results = start(model, dtype="bfloat16").generate(prompts)
    table = load_table(stored(cache))
    for prompt, result in zip(prompts, results, strict=True):
        text, filters = prompt + result.tokens, filters_of(table, len(prompt))
        filtered = [
            _generated(model, text, len(prompt), scaled(filters, 1 + shift), table.metadata.unfiltered_end)
            for shift in BFLOAT16_SHIFTS
        ]
        plain = _generated(model, text, len(prompt))
        distance = min(np.abs(result.logprobs - expected).mean() for expected in filtered)
        assert distance < 0.5 * np.abs(result.logprobs - plain).mean()


def _generated(
    model: Path, text: list[int], prompt_length: int, filters: Filters | None = None, unfiltered_end: int = 0
) -> np.ndarray:
    """The reference's log-probabilities of the generated tokens."""
    logprobs = reference_logprobs(
        model, text, prompt_length=prompt_length, filters=filters, unfiltered_end=unfiltered_end
    )
    return logprobs[prompt_length - 1 : -1].numpy()


def test_cache_that_takes_nothing_then_one_that_does(
    cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs the file, not the start. The same seed gives the same bytes, and the next start reads them."""
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    model = tiny_model("mamba2")
    prompt = random_token_ids(333, seed=5)
    engine = start(model)
    (without,) = engine.generate([prompt])
    made = engine.llm.llm_engine.engine_core.engine_core.longmamba_table
    assert cache.read_text() == "a file where the folder should be"
    cache.unlink()
    (first,) = start(model).generate([prompt])
    assert stored(cache).read_bytes() == table_to_bytes(made)

    monkeypatch.setattr(calibrate_at_start, "_calibrate", lambda *_: pytest.fail("this start calibrates"))
    (second,) = start(model).generate([prompt])
    assert stored(cache).read_bytes() == table_to_bytes(made)
    assert without.tokens == first.tokens == second.tokens
    np.testing.assert_array_equal(without.logprobs, first.logprobs)
    np.testing.assert_array_equal(first.logprobs, second.logprobs)


# In every run, tables of both that are made in eager engines are compared with the reference.
@pytest.mark.parametrize(
    "arguments",
    [pytest.param({"dtype": "float32", "enforce_eager": True}, marks=SLOW), {"dtype": "bfloat16"}],
    ids=str,
)
def test_the_command_makes_the_same_table(
    arguments: dict[str, Any], cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path]
) -> None:
    """To the last bit, also compiled and in the model's own dtype."""
    model = tiny_model("mamba2")
    start(model, **({"enforce_eager": False} | arguments))
    at_start = load_table(stored(cache))
    settings = CalibrationSettings(train_length=TRAIN_LENGTH, max_length=1024)
    table = calibrate(str(model), settings, **{**arguments, **MEMORY})
    assert table_to_bytes(table) == table_to_bytes(at_start)


def threshold_buffers(worker: Any) -> tuple[int, int, int]:
    """How many mixers, buffers of thresholds (which vLLM's sleep mode keeps) and such entries of the checkpoint."""
    model = worker.get_model()
    buffers = [name for name, _ in model.named_buffers() if name.endswith("dt_threshold")]
    return len(filtered_mixers(model)), len(buffers), len(set(buffers) & set(model.state_dict()))


def test_dummy_weights(cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path]) -> None:
    engine = start(tiny_model("mamba1"), load_format="dummy")
    assert len(engine.generate([random_token_ids(200)])[0].tokens) == 6
    assert not cache.exists()
    assert engine.llm.collective_rpc(threshold_buffers) == [(3, 3, 0)]


def test_tensor_parallel_ranks_make_the_same_table(
    cache: Path, start: Callable[..., Engine], tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = torch.cuda.device_count() if torch.cuda.is_available() else (os.cpu_count() or 1)
    if places < 2:
        pytest.skip("needs two GPUs or two CPU cores")
    model = tiny_model("zamba2")
    start(model)
    one = load_table(stored(cache))
    stored(cache).unlink()
    # Without this, vLLM wants a NUMA node for each rank.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    prompt = random_token_ids(333, seed=7)
    (result,) = start(model, tensor_parallel_size=2).generate([prompt])
    two = load_table(stored(cache))
    assert two.metadata == one.metadata
    assert list(two.layers) == list(one.layers)
    for layer in one.layers:
        assert_thresholds_agree(two.layers[layer], one.layers[layer])
    assert_filtered_by(two, model, prompt, result)


def test_example_model_with_a_table_of_its_own(cache: Path, start: Callable[..., Engine]) -> None:
    """As good as the shipped table."""
    from vllm import SamplingParams

    passkey = load_example("passkey")
    engine = start(EXAMPLES / "passkey-mamba2-4m", 512, skip_tokenizer_init=False, max_model_len=8192)
    assert load_table(stored(cache)).metadata.train_length == 512
    depths = [(number + 0.5) / 12 for number in range(12)]
    tasks = passkey.passkey_tasks(passkey.read_haystack(), [2048], depths, seed=1)
    sampling = SamplingParams(temperature=0.0, max_tokens=passkey.KEY_DIGITS)
    outputs = engine.llm.generate([task.prompt for task in tasks], sampling, use_tqdm=False)
    answers = [output.outputs[0].text for output in outputs]
    assert sum(task.is_answered_by(answer) for task, answer in zip(tasks, answers, strict=True)) >= 11
