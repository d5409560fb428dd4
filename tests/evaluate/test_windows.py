"""The windows of the perplexity protocol."""

from itertools import pairwise

import pytest

from vllm_longmamba.evaluate.perplexity import Window, windows


def test_windows_of_all_lengths_end_at_the_same_places() -> None:
    chosen = list(windows({"long": 5000, "short": 900}, [2000, 512, 1024], windows=7, scored=100))
    by_length = {
        length: [window.end for window in chosen if window.length == length and window.book == "long"]
        for length in (512, 1024, 2000)
    }
    assert by_length[512] == by_length[1024] == by_length[2000]
    ends = by_length[2000]
    assert (len(ends), ends[0], ends[-1]) == (7, 2000, 5000)
    assert {later - earlier for earlier, later in pairwise(ends)} == {500}
    # The short book has its one length, over all of itself, and no more windows than fit without overlap.
    short = [window for window in chosen if window.book == "short"]
    assert [(window.length, window.end) for window in short] == [(512, end) for end in (512, 641, 770, 900)]
    assert [window.length for window in chosen] == sorted(window.length for window in chosen)


def test_windows_are_told_apart() -> None:
    """By the papers' defaults, of 10 windows: results are stored by identity."""
    chosen = list(windows({"one": 50_000, "two": 50_000}, [1000, 2000]))
    assert len(chosen) == len({str(window.identity) for window in chosen}) == 40


@pytest.mark.parametrize("prefix", [[], [-1]], ids=["none", "bos"])
def test_window_tokens(prefix: list[int]) -> None:
    book = list(range(1000))
    for window in windows({"book": len(prefix) + len(book)}, [300, 301], windows=4, scored=50):
        tokens = window.tokens(book, prefix)
        assert len(tokens) == window.length
        assert tokens[: len(prefix)] == prefix
        assert tokens[-1] == window.end - len(prefix) - 1
        assert tokens[len(prefix) :] == list(range(tokens[len(prefix)], tokens[-1] + 1))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([100], "must exceed the 100 tokens that are scored, got 100"), ([512, 9000], "no text has 9000 tokens, .*5000")],
)
def test_windows_refuse(lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(windows({"book": 5000}, lengths))


def test_tokens_of_a_window() -> None:
    assert Window("book", 3, 5).tokens([0, 1, 2, 3, 4, 5], []) == [2, 3, 4]
