"""Settings, optimisers and the training loop of examples/train."""

import itertools
import json
import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from references.reference_lm import reference_logprobs
from train import mixers, training
from train.__main__ import app
from train.books import read_books, windows
from train.decays import FixedDecays, mamba2_mixers, raise_decays
from train.evaluation import evaluation_of
from train.mixers import FORGETTING_OF_MEMORY, excess_retention, forgetting_of_memories
from train.optimizer import learning_rate, make_optimizers
from train.settings import FAMILIES, Settings, Stage, family_settings, read_settings
from train.tasks import Batch
from train.toy_recall import recall_sequences, toy_settings, train_recall
from train.training import losses, make_model, train
from typer.testing import CliRunner

SMALL = {
    "d_model": 32, "n_layer": 2, "d_state": 8, "headdim": 16, "chunk_size": 16, "length": 96, "batch": 4,
    "bf16": False, "compile": False, "evaluations": 2, "evaluation_sequences": 4, "warmup_steps": 2, "peak_lr": 1e-2,
}  # fmt: skip
HYBRID = {"hybrid_layers": (1,), "attention_heads": 4, "mlp_width": 16}
STAGES = (Stage(0.5, {"passkey": 1.0}, 1.0), Stage(1.0, {"text": 0.5, "passkey": 0.5}, 0.5))


def small(family: str, **changes: object) -> Settings:
    return family_settings(family, **SMALL | (HYBRID if family == "zamba2" else {}) | {"stages": STAGES} | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss(family: str, text_file: Path) -> None:
    settings = small(family, steps=16)
    model, lines = make_model(settings), []
    curves = train(model, settings, read_books(text_file, torch.device("cpu")), report=lines.append)
    text = [entry["text_loss"] for entry in curves.steps]
    assert text[0] == pytest.approx(5.6, abs=0.3)  # a guess among 264
    assert text[-1] < text[0] - 0.8
    assert curves.steps[-1]["answer_loss"] < curves.steps[0]["answer_loss"] - 0.8
    assert [entry["step"] for entry in curves.evaluations] == [9]
    assert len(lines) == 1
    assert set(curves.evaluations[0]) >= {"passkey", "four_needles", "text_loss", "seconds"}


def test_training_is_reproducible_by_steps(text_file: Path) -> None:
    settings, books = small("mamba2", steps=3), read_books(text_file, torch.device("cpu"))
    first, second = make_model(settings), make_model(settings)
    assert train(first, settings, books).steps[-1]["text_loss"] == train(second, settings, books).steps[-1]["text_loss"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_minutes_end_a_run(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once a look: the program began 40 s ago and has 60 s, 10 of them for the end."""
    clock = itertools.count(100)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    settings = small("mamba2", steps=10**9, minutes=1.0, reserve_seconds=10.0)
    curves = train(make_model(settings), settings, read_books(text_file, torch.device("cpu")), started=60)
    assert 45 <= curves.steps[-1]["seconds"] <= 51
    assert 0 < curves.steps[-1]["lr"] < 0.1 * settings.peak_lr


def test_longer_evaluations_and_exports(text_file: Path) -> None:
    settings = small("mamba2", steps=8, evaluations=4, evaluated_lengths=(1, 2), exports=(0.3, 0.6))
    lines, shares = [], []
    books = read_books(text_file, torch.device("cpu"))
    curves = train(make_model(settings), settings, books, report=lines.append, export=shares.append)
    assert shares == [0.3, 0.6]
    assert all("  x2: " in line for line in lines)
    assert set(curves.evaluations[0]) > {"passkey", "passkey_x2", "four_needles_x2", "text_loss_x2"}


def test_initial_steps_and_decays_lie_in_their_ranges() -> None:
    mixer = make_model(small("mamba2", dt_min=0.02, dt_max=0.03, a_min=2, a_max=3)).backbone.layers[0].mixer
    dt, decay = torch.nn.functional.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.02 <= dt.min() < dt.max() <= 0.03 + 1e-6
    assert 2 <= decay.min() < decay.max() <= 3 + 1e-6


def test_excess_retention_by_hand() -> None:
    """Heads that forget evenly enough, half enough, not at all, and all in one of sixteen tokens."""
    needed = math.log(4)
    dt = torch.stack([torch.full((16,), needed / 16), torch.full((16,), needed / 32), torch.zeros(16), torch.zeros(16)])
    dt[3, 0] = needed
    excess = excess_retention(dt.T[None] / 2, torch.full((4,), -2.0), torch.full((4,), 0.25))
    assert excess.item() == pytest.approx((0 + 0.5**2 + 1 + 0.5**2) / 4)


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_a_ceiling_of_retention_is_learnt(family: str, text_file: Path) -> None:
    """From heads that hardly forget over the 96 bytes."""
    lingering = {"dt_min": 1e-4, "dt_max": 2e-4, "a_max": 1.0, "steps": 30, "peak_lr": 0.02}
    books = read_books(text_file, torch.device("cpu"))
    excess = {}
    for weight in (0.0, 10.0):
        settings = small(family, retention_ceiling=0.2, retention_weight=weight, **lingering)
        model = make_model(settings)
        train(model, settings, books)
        with torch.no_grad():
            model(books.held_out[None, :96].long())
        excess[weight] = float(training.excess_retention(model))
    assert excess[0.0] > 1.5  # of 2 layers with at most 1 each
    assert excess[10.0] < 0.5 * excess[0.0]


def test_memory_heads_have_a_ceiling_of_their_own() -> None:
    settings = small("mamba2", retention_ceiling=0.01, memory_heads=((0, 1), (1, 0), (1, 3)), memory_ceiling=0.5)
    found = [layer.mixer.ceilings.tolist() for layer in make_model(settings).backbone.layers]
    assert found == [pytest.approx([0.01, 0.5, 0.01, 0.01]), pytest.approx([0.5, 0.01, 0.01, 0.5])]


def test_a_ceiling_for_some_layers(text_file: Path) -> None:
    model = make_model(small("mamba2", retention_ceiling=0.2, ceiling_layers=(1,)))
    first, second = mamba2_mixers(model)
    assert first.ceilings is None
    assert second.ceilings.tolist() == pytest.approx([0.2] * 4)
    with torch.no_grad():
        model(read_books(text_file, torch.device("cpu")).held_out[None, :96].long())
    assert float(training.excess_retention(model)) == pytest.approx(float(second.excess))


def test_forgetting_of_memories_by_hand() -> None:
    """A head that forgets 0.5 in one sequence and 1.5 in the other, and one that forgets more than counts in both."""
    dt = torch.zeros(2, 16, 2)
    dt[:, 3, 0], dt[..., 1] = torch.tensor([0.25, 0.75]), 10.0
    assert forgetting_of_memories(dt, torch.full((2,), -2.0)).item() == pytest.approx(1 + 3)


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_what_costs_is_written_less(family: str, text_file: Path) -> None:
    books = read_books(text_file, torch.device("cpu"))
    forgotten = {}
    for cost in (0.0, 1.0):
        settings = small(family, write_cost=cost, dt_min=1e-3, dt_max=2e-3, a_max=2.0, steps=30, peak_lr=0.05)
        model = make_model(settings)
        train(model, settings, books)
        sums = -kept_over_a_sequence(model, books.held_out[None, :96].long()).log()
        forgotten[cost] = sums.clamp(max=FORGETTING_OF_MEMORY).sum().item()
    assert forgotten[1.0] < 0.5 * forgotten[0.0]


def kept_over_a_sequence(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Share of its state that each head keeps, by the geometric mean over sequences: (layers, heads)."""
    forgotten = []
    for mixer in mamba2_mixers(model):
        mixer.register_forward_pre_hook(lambda mixer, inputs: forgotten.append(mixer.forgetting(*inputs)))
    with torch.no_grad():
        model(tokens)
    return torch.stack([(-one.sum(1).mean(0)).exp() for one in forgotten])


def test_forgetting_is_what_the_scan_decays_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(small("mamba2")), []
    scan = mixers.ssd
    monkeypatch.setattr(mixers, "ssd", lambda x, dt, A, *rest: seen.append(-A * dt) or scan(x, dt, A, *rest))
    kept = kept_over_a_sequence(model, torch.arange(96)[None])
    torch.testing.assert_close(kept, torch.stack([(-one.sum(1).mean(0)).exp() for one in seen]))


@pytest.mark.parametrize("family", ["mamba2", "zamba2"])
def test_decays_are_raised_to_a_ceiling_and_stay(family: str, text_file: Path) -> None:
    """Of heads above and below it; what decides on them is not trained, all else is."""
    settings = small(family, start_ceiling=0.2, fixed_decays=True, steps=5, peak_lr=0.05)
    books = read_books(text_file, torch.device("cpu"))
    model = make_model(settings)
    for mixer in mamba2_mixers(model):
        mixer.A_log.data[:2] -= 6
        mixer.A_log.data[2:] += 6
    before, decays = deepcopy(model), FixedDecays(model)
    raise_decays(model, settings, books.train, torch.Generator().manual_seed(0))
    tokens = windows(books.train, 32, 96, torch.Generator().manual_seed(0))
    first, raised = kept_over_a_sequence(before, tokens), kept_over_a_sequence(model, tokens)
    assert (first[:, :2] > 0.5).all()
    assert (first[:, 2:] < 0.1).all()
    torch.testing.assert_close(raised[0], first[0].clamp(max=0.2))  # the first layer's input does not change
    assert raised.max() < 0.25

    decays.restore()
    torch.testing.assert_close(kept_over_a_sequence(model, tokens), first)
    train(model, settings, books)
    changed = {name for name, part in model.named_parameters() if not part.equal(dict(before.named_parameters())[name])}
    assert any(name.endswith("in_proj.weight") for name in changed)
    for old, new in zip(mamba2_mixers(before), mamba2_mixers(model), strict=True):
        torch.testing.assert_close(new.decay_parameters()[1:], old.decay_parameters()[1:], rtol=0, atol=0)
        assert (new.A_log > old.A_log).tolist() == [True, True, False, False]


def test_losses_by_hand() -> None:
    """Two classes in the logits of three targets: text, an answer, and a digit that cannot be known."""
    logits = torch.zeros(1, 3, 264)
    logits[0, 0, 7] = 3.0
    marks = torch.zeros(2, 1, 4, dtype=torch.bool)
    marks[0, 0, 2] = marks[1, 0, 3] = True
    batch = Batch(torch.tensor([[1, 7, 8, 9]]), marks[0], marks[1])
    text, answer = losses(logits, batch)
    assert answer.item() == pytest.approx(torch.tensor(264.0).log().item())
    assert text.item() == pytest.approx(-logits[0, 0].log_softmax(-1)[7].item())


@pytest.mark.parametrize("task", ["passkey", "four_needles"])
def test_accuracy_counts_whole_answers(task: str, text_file: Path) -> None:
    """A model that looks ahead is always right; one that gets a single digit wrong never is."""

    class Oracle(torch.nn.Module):
        def __init__(self, wrong_digit: int | None) -> None:
            super().__init__()
            self.wrong_digit = wrong_digit

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            ahead = tokens.roll(-1, 1)
            if self.wrong_digit is not None:
                ahead[:, -6 + self.wrong_digit] = ord("x")
            return torch.nn.functional.one_hot(ahead, 264).float()

    settings = small("mamba2", length=512)
    held_out = read_books(text_file, torch.device("cpu")).held_out
    evaluation = evaluation_of(settings, held_out)
    assert evaluation.accuracy(Oracle(None), task, 512) == 1.0
    for digit in range(5):
        assert evaluation.accuracy(Oracle(digit), task, 512) == 0.0


def test_learning_rate() -> None:
    settings = Settings("mamba2", peak_lr=1.0, warmup_steps=10, final_lr_share=0.1)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(settings, 10, 0.0) == pytest.approx(1.0)
    assert learning_rate(settings, 99, 0.5) == pytest.approx(0.55)
    assert learning_rate(settings, 99, 1.0) == pytest.approx(0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(family: str, optimizer: str) -> None:
    settings = small(family, optimizer=optimizer)
    model = make_model(settings)
    groups = [group for opt in make_optimizers(model, settings) for group in opt.param_groups]
    optimised = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(parameter) for parameter in model.parameters())
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert any("in_proj" in name for name in names)
    assert not any(word in name for name in names for word in ("A_log", "norm", "bias", "embed", "conv1d"))


def test_settings_survive_a_file(tmp_path: Path) -> None:
    settings = small("zamba2", minutes=2.5)
    settings.save(tmp_path / "settings.json")
    changes = read_settings(tmp_path / "settings.json")
    assert family_settings(changes.pop("family"), **changes) == settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "gpt"}, "family must be one of"),
        ({"optimizer": "sgd"}, "adamw or muon"),
        ({"hybrid_layers": (1,)}, "needs hybrid_layers"),
        ({"family": "zamba2"}, "needs hybrid_layers"),
        ({"family": "zamba2", "hybrid_layers": (8,)}, "below n_layer 8"),
        ({"far_sequences": 1}, "far_sequences are for zamba2's attention"),
        ({"family": "zamba2", "hybrid_layers": (1,), "far_sequences": 64}, "others of a batch of 64"),
        ({"far_length": 511}, "far_length must be at least the length 512"),
        ({"stages": (Stage(0.5, {"text": 1.0}, 1.0),)}, "the last at 1"),
        ({"dt_min": 0.2}, "dt_min <= dt_max"),
        ({"a_min": 0}, "0 < a_min"),
        ({"evaluated_lengths": (4,)}, "ascend from 1"),
        ({"retention_ceiling": 1.5}, "retention_ceiling must be above 0 and at most 1"),
        ({"memory_heads": ((0, 0),)}, "need a retention_ceiling and a memory_ceiling below 1"),
        ({"retention_ceiling": 0.1, "ceiling_layers": (8,)}, "ceiling_layers must lie below n_layer 8"),
        ({"ceiling_layers": (0,)}, "ceiling_layers need a retention_ceiling below 1"),
        ({"retention_ceiling": 0.1, "memory_ceiling": 0.2, "memory_heads": ((0, 16),)}, "8 layers with 16 heads each"),
        ({"retention_ceiling": 0.2, "family": "mamba1"}, "leave it out"),
        ({"write_cost": 0.1, "family": "mamba1"}, "write_cost is for Mamba-2's heads"),
        ({"start_ceiling": 0.0}, "start_ceiling must be above 0"),
        ({"fixed_decays": True, "family": "mamba1"}, "fixed_decays is for Mamba-2's heads"),
        ({"exports": (0.5, 1)}, "exports must ascend between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"family": "mamba2"} | changes)


def test_stage_follows_progress() -> None:
    settings = small("mamba2")
    stages = [STAGES.index(settings.stage(progress)) for progress in (0.0, 0.49, 0.5, 1.0)]
    assert stages == [0, 0, 1, 1]


def test_command_line(text_file: Path, tmp_path: Path) -> None:
    """Trains two steps and leaves a checkpoint that an independent implementation reads."""
    changes = {name: value for name, value in SMALL.items() if name != "warmup_steps"} | {"evaluation_sequences": 2}
    (tmp_path / "changes.json").write_text(json.dumps(changes))
    arguments = ["mamba2", "--text", text_file, "--out", tmp_path / "out", "--settings", tmp_path / "changes.json"]
    stage = {"until": 1, "shares": {"passkey": 1}, "answer_weight": 0.5}
    arguments += ["--set", f"stages={json.dumps([stage])}", "--set", "exports=[0.5]", "--set", "evaluations=2"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--steps", "2", "--set", "warmup_steps=1"])
    assert result.exit_code == 0, result.output
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert set(curves["final"]) >= {"96", "192", "384", "768", "device", "seconds"}
    assert curves["steps"]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["warmup_steps"] == 1
    assert reference_logprobs(tmp_path / "out", [1, 2, 3], prompt_length=0).shape == (3, 264)


def test_toy_recall_sequences() -> None:
    tokens = recall_sequences(8, torch.Generator().manual_seed(0))
    for first, second in tokens.reshape(8, 2, -1, 2).tolist():
        assert sorted(first) == sorted(second)
        assert len({key for key, _ in first}) == len(first)


def test_toy_recall_trains() -> None:
    assert len(train_recall(toy_settings("mamba2", steps=2, seed=0))) == 2
