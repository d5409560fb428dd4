"""Confidence intervals against their definitions."""

import numpy as np
import pytest

from vllm_longmamba.evaluate.statistics import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("found", "trials"), [(0, 1), (1, 1), (7, 12), (36, 36), (1, 1000)])
def test_wilson_interval_solves_its_equation(found: int, trials: int) -> None:
    share = found / trials
    low, high = wilson_interval(share, trials)
    assert 0 <= low <= share <= high <= 1
    # Both ends lie 1.96 standard errors, as they would be at that end, from the share.
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / trials), rel=1e-5)


def test_wilson_interval_of_known_values() -> None:
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def mean(samples: np.ndarray) -> float:
    return float(samples[:, 0].mean())


def test_bootstrap_interval_covers_the_mean_of_the_books() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        books = rng.normal(size=20)
        clusters = {
            str(number): [[book + 0.1 * noise] for noise in rng.normal(size=3)] for number, book in enumerate(books)
        }
        low, high = bootstrap_interval(clusters, mean, seed=trial)
        covered += low < 0.0 < high
    # 95 in 100 are meant; 20 books make it a little fewer.
    assert 84 <= covered <= 100


def test_bootstrap_interval_resamples_whole_books() -> None:
    # Windows of a book that all agree tell no more than one of them.
    few = {str(value): [[float(value)]] for value in range(6)}
    many = {name: samples * 50 for name, samples in few.items()}
    assert bootstrap_interval(few, mean) == pytest.approx(bootstrap_interval(many, mean))


def test_bootstrap_interval_of_one_book_resamples_its_windows() -> None:
    low, high = bootstrap_interval({"book": [[0.0], [1.0]] * 50}, mean)
    assert low == pytest.approx(0.4, abs=0.04)
    assert high == pytest.approx(0.6, abs=0.04)
