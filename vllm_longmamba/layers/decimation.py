"""DeciMamba's choice of tokens: how many of a step's prompt tokens stay is known on the host, which ones on the device.

A decimating layer keeps those of the largest dt (arXiv 2406.14528). The prompts of a step stand one after the other;
*stage* s of a step are the tokens behind its first s decimating layers.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# Tokens whose scores are computed at a time: bounds the memory of a long prompt's dt in float32.
_SCORED_AT_ONCE = 16384


@dataclass(frozen=True)
class Choice:
    """What a decimating layer's choice takes beside the scores. Int64 tensors on the device.

    Attributes:
        sequences: (tokens,) the sequence of each incoming token.
        always: (n,) places of the incoming tokens that stay whatever their score is.
        taken: (kept,) places of those that stay when the incoming tokens stand in order of their sequence and, within
            it, of falling score.
    """

    sequences: torch.Tensor
    always: torch.Tensor
    taken: torch.Tensor


@dataclass
class StepDecimation:
    """One step's prompts on their way through the decimating layers, shared by all layers.

    Attributes:
        metadata: of each stage, vLLM's metadata of the step with the prompts as long as they are there.
        choices: of each decimating layer.
        rows: of each stage but the first, (decode tokens + tokens,) int64, where they stand in the step's tensors. A
            decimating layer appends its own.
    """

    metadata: list[Any]
    choices: list[Choice]
    rows: list[torch.Tensor] = field(default_factory=list)

    def keep(self, stage: int, scores: torch.Tensor) -> torch.Tensor:
        """Choose the tokens that stay behind a decimating layer, and note their rows for the layers behind.

        Args:
            stage: of the tokens that come in.
            scores: (tokens,) float32 of the prompts' tokens of this stage.

        Returns:
            (decode tokens + kept,) int64, ascending: decode tokens, which all stay, and what is kept of the prompts.
        """
        decodes = self.metadata[stage].num_decode_tokens
        kept = keep_largest(scores, self.choices[stage]) + decodes
        rows = torch.cat([torch.arange(decodes, device=kept.device), kept])
        self.rows[stage:] = [rows if stage == 0 else self.rows[stage - 1][rows]]
        return rows

    def rows_of(self, stage: int) -> torch.Tensor | None:
        """Where the tokens of a stage stand in the step's tensors; None for all of them."""
        return None if stage == 0 else self.rows[stage - 1]


def stage_lengths(
    query_lengths: Int32Array, before: Int32Array, droppable: Int32Array, counts: list[int]
) -> list[Int32Array]:
    """Tokens of each sequence at each stage.

    A part of a prompt keeps its share, rounded up over all that was read so far, so that all parts together keep as
    many as the whole prompt. But a step always has a token of each sequence.

    Args:
        query_lengths: (sequences,) in this step.
        before: (sequences,) in the steps before.
        droppable: (sequences,) first tokens of the whole prompt that may be dropped; 0 where it is not decimated.
        counts: how many of these each decimating layer keeps.
    """
    read = np.minimum([before, before + query_lengths], droppable).astype(np.int64)
    always, total = query_lengths - (read[1] - read[0]), droppable.astype(np.int64)
    lengths = [query_lengths]
    for count in counts:
        kept = np.minimum(total, count)
        read, total = -(-read * kept // np.maximum(total, 1)), kept
        lengths.append(np.maximum(read[1] - read[0] + always, 1).astype(np.int32))
    return lengths


def choice_arrays(before: Int32Array, after: Int32Array, always: Int32Array) -> tuple[Int64Array, ...]:
    """The fields of a `Choice`, on the host.

    Args:
        before: (sequences,) tokens of each sequence that come in.
        after: (sequences,) that stay.
        always: (sequences,) last ones that stay in any case.
    """
    ends: Int64Array = before.cumsum(dtype=np.int64)
    sequences = np.repeat(np.arange(len(before)), before)
    return sequences, _ranges(ends, always, always), _ranges(ends, before, after)


def _ranges(ends: Int64Array, back: Int32Array, lengths: Int32Array) -> Int64Array:
    """As many places as `lengths` says from `back` before each of the `ends` on, one range after the other."""
    skipped = ends - back - (lengths.cumsum(dtype=np.int64) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(skipped, lengths)


def keep_largest(scores: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Choose in each sequence the tokens of the largest scores; of equal ones, the earlier. No synchronisation.

    Args:
        scores: (tokens,) float32.
        choice: of these tokens.

    Returns:
        (kept,) int64, ascending.
    """
    scores = scores.index_fill(0, choice.always, torch.inf)
    falling = torch.sort(scores, descending=True, stable=True).indices
    order = falling[torch.sort(choice.sequences[falling], stable=True).indices]
    return torch.sort(order[choice.taken]).values


def token_scores(dt: torch.Tensor, dt_bias: torch.Tensor, score: str) -> torch.Tensor:
    """How much of a token a layer takes up, up to a factor that all tokens share.

    Args:
        dt: (tokens, channels), before bias and softplus.
        dt_bias: (channels,).
        score: "mean" of softplus(dt + dt_bias) over the channels, or its "norm".

    Returns:
        (tokens,) float32: the sum over these channels of what is to be summed over all ranks' channels.
    """
    bias, power = dt_bias.float(), 2 if score == "norm" else 1
    parts = torch.split(dt, _SCORED_AT_ONCE)
    return torch.cat([torch.nn.functional.softplus(part.float() + bias).pow_(power).sum(-1) for part in parts])
