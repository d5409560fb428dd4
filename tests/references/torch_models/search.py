"""Finds settings of DeciMamba for a model, by any score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.progress import Progress

from .mean_distance import choose_layers
from .methods import DeciMamba

# Settings that are tried with the other score as well.
_LEADING = 5


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Attributes:
        settings: of DeciMamba.
        score: larger is better.
    """

    settings: DeciMamba
    score: float


def search_decimamba(
    score: Callable[[DeciMamba], float],
    distances: Mapping[int, torch.Tensor],
    L_bases: Sequence[int],
    betas: Sequence[float] = (1.0, 0.83, 0.5),
    numbers: Sequence[int] = (2, 3),
    progress: Progress | None = None,
) -> list[Trial]:
    """Search in three stages; the first is the authors' way to the first decimating layer.

    1. Each single layer with each L_base.
    2. With the best first layer and L_base of stage 1: more layers, either those that follow it or those of the
       largest mean distance behind it, with each beta, and L_base one step up and down.
    3. The five best so far with the norm of dt, as in the authors' code, in place of its mean.

    No settings are tried twice.

    Args:
        score: of settings; larger is better.
        distances: layer index -> (channels,) mean distances of the model's layers, as from `mean_distances`.
        L_bases: tokens for the first decimating layer to keep, ascending.
        betas: decays over the decimating layers.
        numbers: of decimating layers in stage 2, at least 2 each.
        progress: shows a bar where given.

    Returns:
        All trials, the best first; of equal scores that which was tried first.

    Raises:
        ValueError: no L_base, L_bases that do not ascend, or a number of layers under 2.
    """
    if not L_bases or list(L_bases) != sorted(set(L_bases)):
        raise ValueError(f"search_decimamba: L_bases must ascend and hold at least one, got {list(L_bases)}")
    if any(number < 2 for number in numbers):
        raise ValueError(f"search_decimamba: numbers of layers must be at least 2, got {list(numbers)}")
    trials: dict[DeciMamba, float] = {}

    def run(stage: str, candidates: list[DeciMamba]) -> list[DeciMamba]:
        new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in trials]
        for candidate in progress.track(new, description=stage) if progress else new:
            trials[candidate] = score(candidate)
        # Of equals that which was tried first: a dict keeps its order, and sorting is stable.
        return sorted(trials, key=lambda settings: -trials[settings])

    best, *_ = run("one layer", [DeciMamba((layer,), L_base) for L_base in L_bases for layer in sorted(distances)])
    first, place = best.layers[0], list(L_bases).index(best.L_base)
    near = L_bases[max(place - 1, 0) : place + 2]
    sets = [layers for number in numbers for layers in _layer_sets(distances, first, number)]
    more = [DeciMamba(layers, L_base, beta) for layers in sets for L_base in near for beta in betas]
    leading = run("more layers", more)[:_LEADING]
    ranking = run("norm of dt", [replace(settings, score="norm") for settings in leading])
    return [Trial(settings, trials[settings]) for settings in ranking]


def _layer_sets(distances: Mapping[int, torch.Tensor], first: int, number: int) -> list[tuple[int, ...]]:
    """Sets of `number` layers that begin with `first`; none where the model ends before."""
    following = [layer for layer in sorted(distances) if layer >= first]
    if number > len(following):
        return []
    furthest = (first, *choose_layers(distances, number - 1, first=first + 1))
    return list(dict.fromkeys([tuple(following[:number]), furthest]))
