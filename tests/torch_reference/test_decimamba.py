"""DeciMamba: which tokens stay, and whole models against a slow truth that is written differently."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from references.reference_lm import NORM_EPS, TimeSteps, mamba1_mixer, mamba2_mixer, rms_norm
from tiny_models import random_token_ids
from torch_models import DeciMamba, LayerPlan, LayerView, Prompt, TorchModel
from torch_models.methods.decimamba import keep_largest

TOLERANCE = 1e-3
MANY = 1 << 40

Tiny = Callable[[str], Path]


class Drop(TimeSteps):
    """Chooses the tokens of one layer by sorting. A token of dt = 0 in all channels is to the others as if dropped."""

    def __init__(self, count: int, always: int) -> None:
        super().__init__(0, {})
        self.count, self.always = count, always
        self.kept: list[int] = []

    def is_filtered(self, layer: int, dt: torch.Tensor) -> torch.Tensor:
        means = dt.mean(-1).tolist()
        before = len(means) - self.always
        order = sorted(range(before), key=lambda token: -means[token])
        self.kept = sorted(order[: self.count]) + list(range(before, len(means)))
        dropped = torch.ones_like(dt, dtype=torch.bool)
        dropped[self.kept] = False
        return dropped


def slow_logprobs(
    folder: Path, tokens: Sequence[int], always: int, counts: dict[int, int]
) -> tuple[torch.Tensor, dict[int, int]]:
    """Float64 log-probabilities after the last `always` tokens, and the tokens behind each layer.

    Args:
        always: last tokens that no layer drops; those among them that were generated are treated like any other.
        counts: decimating layer -> how many of the tokens before those it keeps.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = {name: w.double() for name, w in torch.load(folder / "pytorch_model.bin", weights_only=True).items()}
    hidden, lengths = weights["backbone.embedding.weight"][torch.tensor(tokens)], {}
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}."
        mixer = {name.removeprefix(prefix + "mixer."): w for name, w in weights.items() if name.startswith(prefix)}
        steps = Drop(counts.get(layer, MANY), always)
        run = mamba1_mixer if "x_proj.weight" in mixer else mamba2_mixer
        hidden = hidden + run(rms_norm(hidden, weights[prefix + "norm.weight"], NORM_EPS), mixer, layer, steps)
        hidden = hidden[steps.kept]
        lengths[layer] = hidden.shape[0]
    logits = rms_norm(hidden, weights["backbone.norm_f.weight"], NORM_EPS) @ weights["backbone.embedding.weight"].T
    return logits.log_softmax(-1)[-always:], lengths


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@pytest.mark.parametrize("segment_tokens", [13, 1024])
@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        (DeciMamba((1,), 30), {1: 30}),
        (DeciMamba((0, 2), 60, beta=0.5, min_tokens=3), {0: 60, 2: 30}),
        (DeciMamba((0, 1, 2), 41, beta=0.33, min_tokens=9), {0: 41, 1: 13, 2: 9}),
    ],
    ids=["one layer", "two layers", "down to min_tokens"],
)
def test_decimated_model_and_decoding(
    tiny: Tiny, name: str, segment_tokens: int, settings: DeciMamba, counts: dict[int, int]
) -> None:
    tokens = random_token_ids(107, seed=3)
    prompt, generated = tokens[:101], tokens[101:]
    expected, lengths = slow_logprobs(tiny(name), tokens, 1 + len(generated), counts)
    assert lengths == {layer: len(generated) + 1 + min([100, *_until(counts, layer)]) for layer in range(3)}
    model = TorchModel(tiny(name), settings, device="cpu", segment_tokens=segment_tokens)
    reading = model.read([prompt])
    logits = [reading.logits[0], *(reading.append(torch.tensor([[token]]))[0] for token in generated)]
    torch.testing.assert_close(torch.cat(logits).log_softmax(-1).double(), expected, rtol=0, atol=TOLERANCE)


def _until(counts: dict[int, int], layer: int) -> list[int]:
    return [count for decimating, count in counts.items() if decimating <= layer]


def test_last_logprobs_keeps_the_scored_tokens(tiny: Tiny) -> None:
    tokens = random_token_ids(90, seed=4)
    expected, _ = slow_logprobs(tiny("mamba2"), tokens, 13, {1: 25})
    expected = expected[:-1].gather(1, torch.tensor(tokens[-12:])[:, None])[:, 0]
    found = TorchModel(tiny("mamba2"), DeciMamba((1,), 25), device="cpu").last_logprobs(tokens, 12)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("L_base", [99, 100, 5000])
def test_enough_tokens_is_the_plain_model_exactly(tiny: Tiny, name: str, L_base: int) -> None:
    # The last token is kept beside L_base others.
    prompts = [random_token_ids(100, seed=seed) for seed in (1, 2)]
    plain = TorchModel(tiny(name), device="cpu")
    decimated = plain.with_method(DeciMamba((0, 2), L_base))
    for prompt in prompts:
        assert torch.equal(decimated.read([prompt]).logits, plain.read([prompt]).logits)
    assert decimated.generate(prompts, 5) == [plain.generate([prompt], 5)[0] for prompt in prompts]


def test_one_token_fewer_is_not(tiny: Tiny) -> None:
    prompt = random_token_ids(100, seed=1)
    plain = TorchModel(tiny("mamba2"), device="cpu")
    decimated = plain.with_method(DeciMamba((0,), 98))
    assert not torch.equal(decimated.read([prompt]).logits, plain.read([prompt]).logits)


@pytest.mark.parametrize(
    ("count", "always", "kept"),
    [
        (2, 1, [1, 3, 5]),
        (3, 0, [1, 3, 5]),
        (1, 3, [1, 3, 4, 5]),
        (0, 1, [5]),
        (99, 1, [0, 1, 2, 3, 4, 5]),
        (2, 9, [0, 1, 2, 3, 4, 5]),
    ],
    ids=["two and the last", "no token for sure", "three for sure", "the last only", "all", "all for sure"],
)
def test_keep_largest_by_hand(count: int, always: int, kept: list[int]) -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])
    assert keep_largest(scores, count, always).tolist() == kept


def test_plan_by_hand() -> None:
    # Means 1.5, 2, 1, 0.5; norms 3, 2.83, 1.41, 0.71. Two channels; the last token stays in any case.
    dt = torch.tensor([[3.0, 0.0], [2.0, 2.0], [1.0, 1.0], [0.5, 0.5]])

    class Part:
        def __init__(self, rows: slice) -> None:
            self.dt = dt[None, rows]

    view = LayerView(4, torch.zeros(2), lambda: iter([Part(slice(0, 1)), Part(slice(1, 4))]))  # type: ignore[arg-type]
    settings = {"layers": (4,), "L_base": 1, "min_tokens": 0}
    assert DeciMamba(**settings).plan(view, Prompt(4, 1)).kept_tokens.tolist() == [1, 3]
    assert DeciMamba(**settings, score="norm").plan(view, Prompt(4, 1)).kept_tokens.tolist() == [0, 3]
    assert DeciMamba(layers=(3,), L_base=1).plan(view, Prompt(4, 1)) == LayerPlan()


def test_tokens_kept() -> None:
    settings = DeciMamba((3, 5, 6, 9), 100, beta=0.5)
    assert [settings.tokens_kept(layer) for layer in settings.layers] == [100, 50, 25, 20]


def test_settings_as_json() -> None:
    settings = DeciMamba((2, 4), 512, beta=0.83, min_tokens=5, score="norm")
    assert DeciMamba(**json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "layers must be ascending"),
        ({"layers": (2, 1)}, "layers must be ascending"),
        ({"layers": (1, 1)}, "layers must be ascending"),
        ({"layers": (-1, 1)}, "layers must be ascending"),
        ({"L_base": 0}, "L_base must be at least 1"),
        ({"min_tokens": -1}, "min_tokens not negative"),
        ({"beta": 0.0}, r"beta must lie in \(0, 1\]"),
        ({"beta": 1.5}, r"beta must lie in \(0, 1\]"),
        ({"score": "max"}, "score must be 'mean' or 'norm'"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeciMamba(**({"layers": (1,), "L_base": 10} | settings))  # type: ignore[arg-type]


def test_refusals(tiny: Tiny) -> None:
    model = TorchModel(tiny("mamba2"), device="cpu")
    with pytest.raises(ValueError, match=r"but not \[3, 7\]"):
        model.with_method(DeciMamba((1, 3, 7), 10))
    with pytest.raises(ValueError, match="one prompt at a time, got 2"):
        model.with_method(DeciMamba((1,), 10)).read([[1, 2], [3, 4]])
