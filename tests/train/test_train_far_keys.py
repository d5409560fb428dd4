"""In training a hybrid's attention can see keys of other sequences, as if they stood far before."""

from dataclasses import replace

import pytest
import torch
from train.settings import family_settings
from train.zamba2 import Attention

TOKENS = 40
SETTINGS = family_settings(
    "zamba2", d_model=16, hybrid_layers=(1,), attention_heads=4, length=TOKENS, far_sequences=1, far_length=4 * TOKENS
)


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(3, TOKENS, 2 * SETTINGS.d_model, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(SETTINGS)


def trained(
    attention: Attention, hidden: torch.Tensor, drawn: list[float], monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """What attention returns in training, with these numbers for random ones: the text's length, then a place in it."""
    numbers = iter(drawn)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(torch, "rand", lambda *size, **of: torch.tensor(next(numbers)))
        return attention.train()(hidden, None)


def evaluated(attention: Attention, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return attention.eval()(hidden, None)


def test_the_sequence_before_is_seen_at_its_place(
    attention: Attention, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As little text as one sequence stands for is what attention sees of two that are joined."""
    joined = evaluated(attention, torch.cat([hidden.roll(1, 0), hidden], dim=1))[:, TOKENS:]
    far = trained(attention, hidden, [0.0, 0.0], monkeypatch)
    torch.testing.assert_close(far, joined, atol=1e-5, rtol=1e-4)
    assert (far - evaluated(attention, hidden)).abs().mean() > 1e-3


def test_keys_count_as_often_as_text_is_left_out(
    attention: Attention, hidden: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half way, in the logarithm, to four lengths, one sequence counts for two, at its place."""
    far = trained(attention, hidden, [0.5, 0.0], monkeypatch)
    twice = _with_the_sequence_before_twice(attention, hidden)
    torch.testing.assert_close(far, twice, atol=1e-5, rtol=1e-4)
    once = trained(attention, hidden, [0.0, 0.0], monkeypatch)
    assert (far - once).abs().mean() > 1e-4
    # Elsewhere in the text, but not another length.
    elsewhere = trained(attention, hidden, [0.5, 0.9], monkeypatch)
    assert (far - elsewhere).abs().mean() > 1e-4


def test_only_training_sees_them(attention: Attention, hidden: torch.Tensor) -> None:
    plain = Attention(replace(SETTINGS, far_sequences=0))
    plain.load_state_dict(attention.state_dict())
    torch.testing.assert_close(evaluated(attention, hidden), evaluated(plain, hidden), atol=0, rtol=0)
    torch.testing.assert_close(plain.train()(hidden, None), evaluated(plain, hidden), atol=0, rtol=0)


def _with_the_sequence_before_twice(attention: Attention, hidden: torch.Tensor) -> torch.Tensor:
    """Attention written out, with the keys of the sequence before twice at the same place."""
    with torch.no_grad():
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, attention.headdim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        position = torch.arange(TOKENS)
        before = attention._rotate(k.roll(1, 0), position - TOKENS)
        keys = torch.cat([before, before, attention._rotate(k, position)], dim=2)
        products = attention._rotate(q, position) @ keys.transpose(2, 3) * (attention.headdim / 2) ** -0.5
        products[..., 2 * TOKENS :] += torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
        mixed = products.softmax(-1) @ torch.cat([v.roll(1, 0), v.roll(1, 0), v], dim=2)
        result: torch.Tensor = attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return result
