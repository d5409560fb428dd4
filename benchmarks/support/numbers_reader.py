"""The model of `evidence_numbers.py`: the torch reference, with the filter and with tokens that it does not see."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional
from torch_models import Prompt, Reading, TorchModel
from torch_models.layers import gated_rms_norm, rms_norm
from torch_models.mixers import CHUNK_SIZE, Mamba2Mixer, MixerState, Projection
from torch_models.ssd import ssd

from vllm_longmamba.tables import ThresholdTable

from .numbers_haystack import Haystack

SEGMENT_TOKENS = 512
# A decay this much weaker is none.
NO_DECAY = 1e-6
# A key's dt differs a little from what it was when it was measured.
BELOW = 0.9


@dataclass
class Tally:
    """What the global channels keep of the tokens of each class.

    Attributes:
        kept, seen: class -> pairs of token and global channel; those of the key's digits also by layer.
        decay: (layer, "whole" prompt or "behind the key") -> (global channels, d_state or 1) sum of dt A of the
            tokens that let the state decay.
        of_digits: (layer, class) -> the dt of digits, unfiltered, (tokens, global channels) each.
    """

    kept: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    decay: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    of_digits: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(
        self,
        layer: int,
        dt: torch.Tensor,
        decaying: torch.Tensor,
        plain: torch.Tensor,
        A: torch.Tensor,
        classes: list[str],
        behind: bool,
    ) -> None:
        """Take a segment.

        Args:
            layer: which.
            dt, decaying, plain: (tokens, global channels), filtered; also 0 where there is no decay; not filtered.
            A: (global channels, ...).
            classes: of the tokens: "key", "digits" of the haystack, and others.
            behind: whether it stands behind the key.
        """
        for name in set(classes):
            mine = torch.tensor([one == name for one in classes])
            if name in ("key", "digits"):
                self.of_digits[layer, name].append(plain[mine])
            for counted in (name, f"{name}, layer {layer}") if name == "key" else (name,):
                self.kept[counted] += int((dt[mine] > 0).sum())
                self.seen[counted] += dt[mine].numel()
        decay = decaying.double().sum(0)[:, None] * A.double().reshape(A.shape[0], -1)
        for part in ("whole", "behind the key") if behind else ("whole",):
            self.decay[layer, part] = self.decay.get((layer, part), torch.zeros_like(decay)) + decay

    def retention(self, part: str) -> tuple[float, int]:
        """Share of the state that a part of the prompt leaves, and the global channels that it is the mean of."""
        return _mean([decay.exp().mean(1) for (_, of), decay in self.decay.items() if of == part])

    def above_key(self) -> tuple[float, int]:
        """Share of the haystack's digits whose dt exceeds the median of the key's; again the mean of channels."""
        shares = []
        for (layer, name), parts in self.of_digits.items():
            if name == "digits":
                of_key = torch.cat(self.of_digits[layer, "key"]).median(0).values
                shares.append((torch.cat(parts) > of_key).double().mean(0))
        return _mean(shares)


def _mean(shares: list[torch.Tensor]) -> tuple[float, int]:
    """(0, 0) of nothing."""
    channels = torch.cat([*shares, torch.zeros(0, dtype=torch.float64)])
    return round(float(channels.sum()) / max(len(channels), 1), 5), len(channels)


class Reader:
    """A model with the filter of one prompt length.

    Args:
        model: the torch reference.
        table: of the model.
        length: tokens of the prompt.
        factor: on the table's thresholds; 0 filters nothing.

    Raises:
        ValueError: the table leaves the ends of prompts unfiltered.
    """

    def __init__(self, model: TorchModel, table: ThresholdTable, length: int, factor: float = 1.0) -> None:
        self.model, self._length = model, length
        self._is_global = [table.is_global(layer.index) for layer in model.layers]
        if end := table.metadata.unfiltered_end:
            raise ValueError(
                f"the table must have no unfiltered end, and has one of {end} tokens; make it with "
                "`longmamba calibrate --unfiltered-end 0`"
            )
        row = table.row_of(length) if factor else 0
        # -1, for no filter, stays negative.
        self._thresholds = [table.thresholds(layer.index)[row] * (factor or 1.0) for layer in model.layers]

    def raise_to(self, tallies: Sequence[Tally]) -> None:
        """Raise thresholds to just below the smallest dt of the keys' digits, in channels that keep all of these.

        Args:
            tallies: of some keys.
        """
        for number, layer in enumerate(self.model.layers):
            mine = self._is_global[number]
            if bool(mine.any()):
                of_keys = torch.cat([dt for tally in tallies for dt in tally.of_digits[layer.index, "key"]])
                lowest = BELOW * of_keys.min(0).values
                self._thresholds[number][mine] = torch.maximum(self._thresholds[number][mine], lowest)

    def start(self) -> list[MixerState]:
        """Empty states for one prompt."""
        return [layer.mixer.empty_state(1) for layer in self.model.layers]

    @torch.inference_mode()
    def read(
        self,
        ids: torch.Tensor,
        states: list[MixerState],
        haystack: Haystack,
        tally: Tally,
        classes: list[str],
        behind: int | None = None,
    ) -> Reading:
        """Read prompt tokens; the states move on.

        Args:
            ids: (batch, tokens).
            states: of the batch.
            haystack: what becomes of its digits.
            tally: counts the first prompt of the batch.
            classes: of the tokens: "key" and "digits" for digits of the key and of the haystack, or others.
            behind: the first token behind the key; None where the key is yet to come.

        Returns:
            What the model goes on from; the logits are those after the last token.
        """
        is_digit = torch.tensor([name == "digits" for name in classes])
        size = max(1, SEGMENT_TOKENS // ids.shape[0])
        edges = sorted({*range(0, ids.shape[1], size), ids.shape[1], behind or 0})
        for first, last in pairwise(edges):
            hidden = self.model.embedding[ids[:, first:last]]
            for number, (layer, state) in enumerate(zip(self.model.layers, states, strict=True)):
                normed = rms_norm(hidden, layer.norm, self.model.eps)
                projection, state.history = layer.mixer.project(normed, state.history)
                mine = self._is_global[number]
                chosen = is_digit[first:last, None] & mine
                filtered = projection.dt <= self._thresholds[number]
                if not (haystack.writes or haystack.decays):
                    filtered = filtered | chosen
                dt = projection.dt.masked_fill(filtered, 0.0)
                if bool(mine.any()):
                    decaying = dt.masked_fill(chosen & (not haystack.decays), 0.0)
                    of_first = (tensor[0][:, mine] for tensor in (dt, decaying, projection.dt))
                    after_key = behind is not None and first >= behind
                    tally.add(layer.index, *of_first, layer.mixer.A[mine], classes[first:last], after_key)
                projection = projection.with_dt(dt)
                if haystack.writes == haystack.decays:
                    hidden = hidden + layer.mixer.scan(projection, state)
                else:
                    hidden = hidden + _scan_apart(layer.mixer, projection, state, chosen, haystack)
        return Reading(self.model, states, self.model.logits(hidden[:, -1:]), Prompt(self._length, 1))


def repeat_states(states: list[MixerState], batch: int) -> list[MixerState]:
    """The states of one prompt, for several that go on from there."""
    return [MixerState(_repeat(state.history, 0, batch), _repeat(state.ssm, -1, batch)) for state in states]


def _repeat(state: torch.Tensor, place: int, batch: int) -> torch.Tensor:
    """Repeat one place; before it, Mamba-1's states have a slot of padding."""
    place %= state.shape[0]
    return torch.cat([state[:place], state[place:].expand(batch, *state.shape[1:])])


def _scan_apart(
    mixer: Any, projection: Projection, state: MixerState, chosen: torch.Tensor, haystack: Haystack
) -> torch.Tensor:
    """Mamba-2's scan, where chosen tokens (tokens, heads) only write into the state, or only let it decay."""
    if not isinstance(mixer, Mamba2Mixer):
        raise ValueError("only Mamba-2's scan can write without a decay; leave these variations out (--variations)")
    x = torch.unflatten(projection.x, -1, (mixer.nheads, mixer.headdim))
    writes, decays = (
        torch.ones_like(projection.dt).masked_fill(chosen & (not does), factor)
        for does, factor in ((haystack.writes, 0.0), (haystack.decays, NO_DECAY))
    )
    # The scan writes dt x.
    fed, dt = x * (writes / decays)[..., None], projection.dt * decays
    y, state.ssm = ssd(fed, dt, mixer.A, projection.B, projection.C, state.ssm, CHUNK_SIZE["cpu"])
    y = (y + mixer.weights["D"][:, None] * x).flatten(-2)
    y = gated_rms_norm(y, projection.z, mixer.weights["norm.weight"], mixer.eps, mixer.ngroups)
    return functional.linear(y, mixer.weights["out_proj.weight"], mixer.weights.get("out_proj.bias"))
