"""The search for DeciMamba's settings, with scores that cost nothing."""

import io

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch_models import DeciMamba, search_decimamba

# Behind layer 2, layers 4 and 5 look furthest back.
DISTANCES = {layer: torch.tensor([distance]) for layer, distance in enumerate([1.0, 1.0, 9.0, 2.0, 7.0, 6.0])}
L_BASES = [64, 128, 256, 512]


def test_search_finds_the_best_of_all_stages() -> None:
    tried: list[DeciMamba] = []

    def score(settings: DeciMamba) -> float:
        tried.append(settings)
        near = -abs(settings.layers[0] - 2) - abs(settings.L_base - 256) / 1000
        return near + 10 * (settings.layers == (2, 4, 5) and settings.L_base == 128) + (settings.score == "norm")

    trials = search_decimamba(score, DISTANCES, L_BASES, betas=(1.0, 0.5), numbers=(2, 3))
    assert trials[0].settings == DeciMamba((2, 4, 5), 128, 1.0, score="norm")
    assert [trial.score for trial in trials] == sorted((trial.score for trial in trials), reverse=True)
    # 6 layers x 4 sizes; then the sets (2, 3), (2, 4), (2, 3, 4), (2, 4, 5) x 3 sizes about 256 x 2 betas; then 5.
    assert len(tried) == len(set(tried)) == len(trials) == 24 + 4 * 3 * 2 + 5
    assert tried[:24] == [DeciMamba((layer,), L_base) for L_base in L_BASES for layer in range(6)]
    assert {settings.layers for settings in tried[24:48]} == {(2, 3), (2, 4), (2, 3, 4), (2, 4, 5)}
    assert {settings.L_base for settings in tried[24:48]} == {128, 256, 512}
    assert all(settings.score == "norm" for settings in tried[48:])


def test_of_equal_settings_the_first_wins_and_the_last_layer_has_no_followers() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    trials = search_decimamba(lambda settings: 1.0, DISTANCES, [64], numbers=(2,), progress=progress)
    assert trials[0].settings == DeciMamba((0,), 64)
    assert all(task.finished for task in progress.tasks)
    assert len(progress.tasks) == 3
    last = search_decimamba(lambda settings: settings.layers[0], DISTANCES, [64], numbers=(2,))
    assert last[0].settings == DeciMamba((5,), 64)
    assert len(last) == 6 + 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"L_bases": []}, "L_bases must ascend"),
        ({"L_bases": [2, 1]}, "L_bases must ascend"),
        ({"L_bases": [64], "numbers": (1, 2)}, "at least 2"),
    ],
    ids=["none", "order", "numbers"],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_decimamba(lambda settings: 0.0, DISTANCES, **arguments)  # type: ignore[arg-type]
