"""examples/train learns, moves through its stages and keeps its budget."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from references.reference_lm import reference_logprobs
from train.batches import Batches
from train.corpus import Corpus
from train.curriculum import Curriculum, Schedule
from train.optimizer import learning_rate, make_optimizer
from train.settings import FAMILIES, Settings, Stage, family_settings
from train.tasks import TASKS, UNKNOWN
from train.training import losses, make_model, train

STAGES = (
    Stage(64, {"text": 1.0, "passkey": 1.0}, 1.0, until=0.5),
    Stage(128, {"text": 1.0}, 0.5, until=1.0),
)
SMALL: dict[str, Any] = {
    "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "length": 128, "batch": 2, "peak_lr": 1e-2,
    "warmup_steps": 4, "measured_steps": 2, "stages": STAGES, "bf16": False, "compile": False,
}  # fmt: skip
HYBRID: dict[str, Any] = {"hybrid_layers": (1,), "attention_heads": 4, "mlp_width": 32, "attention_length": 256}


def small(family: str, **changes: Any) -> Settings:
    return family_settings(family, 512, **SMALL | (HYBRID if family == "zamba2" else {}) | {"steps": 24} | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_the_loss(family: str, corpus: Corpus) -> None:
    settings, exported = small(family), []
    model = make_model(settings)
    curves = train(model, settings, corpus, export=lambda: exported.append(True))
    assert curves[-1]["text_loss"] < curves[0]["text_loss"] - 0.3
    assert curves[-1]["tokens"] == 23 * 256
    assert len(exported) == 4
    assert [entry["lr"] for entry in curves][-1] < 0.1 * settings.peak_lr


def test_training_is_reproducible_by_steps(corpus: Corpus) -> None:
    settings = small("mamba2", steps=4)
    models = [make_model(settings) for _ in range(2)]
    for model in models:
        train(model, settings, corpus)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


def test_lengths_grow_when_digits_are_right(corpus: Corpus) -> None:
    """Long before the stage must end, but not before the share is reached."""
    reached = {}
    for share in (0.0, 1.1):
        stages = (Stage(64, {"passkey": 1.0}, 1.0, until=0.8, digits_right=share), STAGES[1])
        lines: list[str] = []
        curves = train(make_model(small("mamba2")), small("mamba2", stages=stages), corpus, report=lines.append)
        reached[share] = next(entry["step"] for entry in curves if entry["stage"] == 1)
        assert any("sequences of 128 tokens" in line for line in lines)
        assert {(entry["stage"], entry["length"]) for entry in curves} == {(0, 64), (1, 128)}
        assert all(("passkey" in entry) == (entry["stage"] == 0) for entry in curves)
    assert reached == {0.0: 5, 1.1: 23}


def test_curriculum_by_hand() -> None:
    curriculum = Curriculum(small("mamba2"))
    assert not curriculum.move_on(0.4, None)
    assert not curriculum.move_on(0.4, 0.89)
    assert curriculum.move_on(0.4, 0.9)
    assert not curriculum.move_on(1.0, 1.0)
    by_time = Curriculum(small("mamba2"))
    assert by_time.move_on(0.5, 0.0)
    assert by_time.stage == STAGES[1]


def test_schedule_keeps_the_minutes() -> None:
    """The clock counts from the program's start; compilation takes from the training, the export is kept free."""
    now = 130.0
    schedule = Schedule(small("mamba2", steps=100, minutes=2.0, reserve_seconds=10), 100.0, clock=lambda: now)
    schedule.begin()
    assert schedule.progress(0) == 0
    now = 170.0
    assert schedule.progress(1) == pytest.approx(0.5)
    assert schedule.progress(80) == pytest.approx(0.8)
    now = 210.0
    assert schedule.progress(1) == pytest.approx(1.0)
    late = Schedule(small("mamba2", steps=100, minutes=0.5, reserve_seconds=10), 100.0, clock=lambda: now)
    late.begin()
    assert late.progress(1) == 1.0


def test_a_stopped_run_is_exported(corpus: Corpus) -> None:
    exported: list[bool] = []
    answers = iter([False, False, True])
    settings = small("mamba2")
    curves = train(
        make_model(settings), settings, corpus, export=lambda: exported.append(True), stopped=lambda: next(answers)
    )
    assert exported == [True]
    assert curves == []


def test_losses_by_hand() -> None:
    """Four targets: text, two answers of which one is predicted, and a digit that cannot be known."""
    logits = torch.zeros(1, 4, 16)
    logits[0, 0, 7] = logits[0, 1, 8] = 3.0
    targets = torch.tensor([[7, 8, 9, 10]])
    needles = TASKS.index("needles")
    kinds = torch.tensor([[0, needles, needles, UNKNOWN]], dtype=torch.uint8)
    text, answer, counts = losses(logits, targets, kinds)
    peaked = -logits[0, 0].log_softmax(-1)[7].item()
    assert text.item() == pytest.approx(peaked)
    assert answer.item() == pytest.approx((peaked + math.log(16)) / 2)
    expected = torch.zeros(2, len(TASKS))
    expected[:, needles] = torch.tensor([2.0, 1.0])
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_sequences_of_a_row_do_not_see_each_other(family: str, corpus: Corpus) -> None:
    model, settings = make_model(small(family)), small(family)
    batch = next(iter(Batches(corpus, settings)))
    alone = batch.inputs.reshape(4, 64)
    with torch.no_grad():
        packed = model(batch.inputs, batch.seq_idx)
        one_each = model(alone, torch.zeros(64, dtype=torch.int32))
        joined = model(batch.inputs, torch.zeros(128, dtype=torch.int32))
    torch.testing.assert_close(packed.reshape(one_each.shape), one_each, atol=1e-5, rtol=1e-5)
    assert (joined - packed)[:, 64:].abs().max() > 1e-3


def test_attention_runs_over_the_rows_of_a_step(corpus: Corpus) -> None:
    """In training only: a later row then depends on an earlier one, through the attention alone."""
    model, settings = make_model(small("zamba2")), small("zamba2")
    batch = next(iter(Batches(corpus, settings)))
    changed = batch.inputs.clone()
    changed[0] = changed[0].flip(0)
    difference = {}
    with torch.no_grad():
        for mode in (True, False):
            first, second = (model.train(mode)(inputs, batch.seq_idx)[1] for inputs in (batch.inputs, changed))
            difference[mode] = (first - second).abs().max().item()
    assert difference[True] > 1e-4
    assert difference[False] == 0


def test_learning_rate() -> None:
    settings = small("mamba2", peak_lr=1.0, warmup_steps=10, final_lr_share=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(settings, 10, 0.0) == pytest.approx(1.0)
    assert learning_rate(settings, 99, 0.5) == pytest.approx(0.55)
    assert learning_rate(settings, 99, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_optimised_once(family: str) -> None:
    settings = small(family)
    model = make_model(settings)
    groups = make_optimizer(model, settings).param_groups
    optimised = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in model.parameters())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert any("in_proj" in name for name in names)
    assert not any(word in name for name in names for word in ("A_log", "norm", "bias", "embed", "conv1d"))


def test_settings_survive_a_file(tmp_path: Path) -> None:
    settings = small("zamba2", minutes=2.5)
    settings.save(tmp_path / "settings.json")
    changes = json.loads((tmp_path / "settings.json").read_text())
    assert family_settings(changes.pop("family"), changes.pop("vocabulary"), **changes) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt"}, "family must be one of"),
        ({"steps": None}, "steps or minutes must be given"),
        ({"hybrid_layers": (1,)}, "needs hybrid_layers"),
        ({"family": "zamba2", "hybrid_layers": ()}, "needs hybrid_layers"),
        ({"family": "zamba2", "hybrid_layers": (12,)}, "below n_layer 12"),
        ({"family": "zamba2", "attention_length": 3000}, "must divide the 65536 tokens of a step, got 3000"),
        ({"stages": (Stage(512, {"text": 1.0}, 1.0, 0.5),)}, "the last at 1"),
        ({"stages": (Stage(500, {"text": 1.0}, 1.0, 1.0),)}, "must divide 2048, got 500"),
        ({"stages": (Stage(512, {"sums": 1.0}, 1.0, 1.0),)}, "must name some of"),
        ({"stages": (Stage(512, {"text": 0.0}, 1.0, 1.0),)}, "must name some of"),
        ({"colour": 1}, r"unknown \['colour'\]"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family_settings(**{"family": "mamba2", "vocabulary": 512, "steps": 1} | changes)


def command(*arguments: object) -> list[str]:
    changes = SMALL | {"stages": [vars(stage) for stage in STAGES]}
    settings = [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return [sys.executable, "-m", "train", *map(str, arguments), *settings]


def in_examples() -> dict[str, Any]:
    examples = Path(__file__).resolve().parents[2] / "examples"
    return {"cwd": examples, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}


def test_command_line(corpus_folder: Path, tmp_path: Path) -> None:
    """Trains three steps and leaves a checkpoint that an independent implementation reads."""
    arguments = command("mamba2", "--data", corpus_folder, "--out", tmp_path, "--steps", 3, "--workers", 2)
    result = subprocess.run(arguments, capture_output=True, timeout=300, **in_examples())
    assert result.returncode == 0, result.stderr
    assert [entry["step"] for entry in json.loads((tmp_path / "curves.json").read_text())] == [3]
    assert json.loads((tmp_path / "settings.json").read_text())["warmup_steps"] == 4
    assert reference_logprobs(tmp_path, [1, 2, 3], prompt_length=0).shape == (3, 512)


def test_a_killed_run_leaves_a_checkpoint(corpus_folder: Path, tmp_path: Path) -> None:
    """Also when its workers get the signal, as from `timeout`."""
    arguments = command("mamba1", "--data", corpus_folder, "--out", tmp_path, "--steps", 10**9, "--workers", 1)
    with subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.PIPE, **in_examples()) as process:
        assert process.stdout is not None
        started = any("sequences of" in line or "tokens" in line for line in process.stdout)
        assert started
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    assert (tmp_path / "pytorch_model.bin").exists()
    assert json.loads((tmp_path / "curves.json").read_text())
