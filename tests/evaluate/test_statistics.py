"""Confidence intervals against their definitions."""

import numpy as np
import pytest

from vllm_longmamba.evaluate.statistics import average_interval, ratio_interval, share_interval


@pytest.mark.parametrize(("found", "trials"), [(0, 1), (1, 1), (7, 12), (36, 36), (1, 1000)])
def test_share_interval_solves_wilsons_equation(found: int, trials: int) -> None:
    share = found / trials
    low, high = share_interval([1.0] * found + [0.0] * (trials - found))
    assert 0 <= low <= share <= high <= 1
    # Both ends lie 1.96 standard errors, as they would be at that end, from the share.
    for end in {round(low, 12), round(high, 12)} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / trials), rel=1e-5)


def test_share_interval_of_parts() -> None:
    whole = [share_interval([1.0] * found + [0.0] * (4 - found)) for found in range(5)]
    assert share_interval([0.5, 0.5, 1.0, 0.0]) == whole[2]
    # In floats, six times a third is less than 2, and twenty times a fifth more than 4.
    assert share_interval([1 / 3] * 6) == share_interval([1.0] * 2 + [0.0] * 4)
    assert share_interval([0.2] * 20) == share_interval([1.0] * 4 + [0.0] * 16)
    low, high = share_interval([0.25, 1.0, 0.0, 0.0])
    assert (low, high) == (whole[1][0], whole[2][1])


def test_ratio_interval_covers_the_ratio_of_the_books() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        books = 5 + rng.normal(size=20)
        clusters = {
            str(number): [[book + 0.1 * noise, 1.0] for noise in rng.normal(size=3)]
            for number, book in enumerate(books)
        }
        low, high = ratio_interval(clusters)
        covered += low < 5.0 < high
    # 95 in 100 are meant; 20 books make it a little fewer.
    assert 84 <= covered <= 100


def test_ratio_interval_weighs_by_the_sum_below() -> None:
    low, high = ratio_interval({"a": [[200.0, 100.0]] * 3, "b": [[100.0, 100.0]] * 3})
    # Draws of one book twice are a quarter each, more than 2.5 %.
    assert (low, high) == (1.0, 2.0)
    # One long book decides wherever it is drawn; one draw in three is without it.
    low, high = ratio_interval({"long": [[100.0, 100.0]] * 9, **{str(n): [[2.0, 1.0]] for n in range(9)}})
    assert low == pytest.approx(1.0, abs=0.01)
    assert high == 2.0


def test_ratio_interval_keeps_both_sums_of_a_book_together() -> None:
    assert ratio_interval({str(n): [[2.0 * n, float(n)]] for n in range(1, 9)}) == (2.0, 2.0)


def test_intervals_are_the_same_every_time() -> None:
    scores = np.random.default_rng(0).random(50).tolist()
    assert average_interval([scores]) == average_interval([scores])


def test_ratio_interval_resamples_whole_books() -> None:
    # Windows of a book that all agree tell no more than one of them.
    few = {str(value): [[float(value), 1.0]] for value in range(6)}
    many = {name: samples * 50 for name, samples in few.items()}
    assert ratio_interval(few) == pytest.approx(ratio_interval(many))


def test_ratio_interval_of_one_book_resamples_its_windows() -> None:
    low, high = ratio_interval({"book": [[0.0, 1.0], [1.0, 1.0]] * 50})
    assert low == pytest.approx(0.4, abs=0.04)
    assert high == pytest.approx(0.6, abs=0.04)
    assert ratio_interval({"book": [[3.0, 2.0]]}) == (1.5, 1.5)


def test_average_interval_weighs_tasks_alike() -> None:
    low, high = average_interval([[1.0], [0.0, 1.0] * 50])
    # Only the second varies: half of its mean's 0.5 +- 1.96 * 0.05.
    assert low == pytest.approx(0.70, abs=0.01)
    assert high == pytest.approx(0.80, abs=0.01)
