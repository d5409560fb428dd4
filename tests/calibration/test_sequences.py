"""Tests of vllm_longmamba/calibration/sequences.py: windows of texts, the same for the same seed."""

import pytest

from vllm_longmamba.calibration.sequences import choose_sequences, draw_sequences


def test_choose_sequences() -> None:
    tokens = list(range(1000))
    chosen = choose_sequences(tokens, 96, 5, seed=0)
    assert chosen == choose_sequences(tokens, 96, 5, seed=0)
    assert chosen != choose_sequences(tokens, 96, 5, seed=1)
    flat = [token for sequence in chosen for token in sequence]
    assert len(set(flat)) == 5 * 96
    assert all(sequence == list(range(sequence[0], sequence[0] + 96)) for sequence in chosen)
    with pytest.raises(ValueError, match="5 sequences of 300 tokens, 1500 in all, but the text has only 1000"):
        choose_sequences(tokens, 300, 5, seed=0)


def test_draw_sequences() -> None:
    """From three texts of 20, 10 and 4 windows: 5 sequences are 3, 1 and 1 (shares of 2.9, 1.5, 0.6)."""
    texts = [list(range(start, start + 96 * windows + 50)) for start, windows in ((0, 20), (10_000, 10), (20_000, 4))]
    drawn = draw_sequences(texts, 96, 5, seed=0)
    assert [sequence[0] // 10_000 for sequence in drawn] == [0, 0, 0, 1, 2]
    assert all(sequence == list(range(sequence[0], sequence[0] + 96)) for sequence in drawn)
    # A table is stored under its settings, the seed among them: other sequences would make another of the same name.
    assert [sequence[0] % 10_000 // 96 for sequence in drawn] == [12, 10, 15, 5, 3]
    assert drawn == draw_sequences(texts, 96, 5, seed=0)
    assert drawn != draw_sequences(texts, 96, 5, seed=1)
    assert len(draw_sequences(texts, 96, 34, seed=0)) == 34
    # One text, or texts without enough windows of their own, are a single one.
    assert draw_sequences(texts[:1], 96, 5, seed=3) == choose_sequences(texts[0], 96, 5, seed=3)
    joined = [token for text in texts for token in text]
    assert draw_sequences(texts, 1700, 2, seed=3) == choose_sequences(joined, 1700, 2, seed=3)
    with pytest.raises(ValueError, match="2 sequences of 2000 tokens, 4000 in all, but the text has only 3414"):
        draw_sequences(texts, 2000, 2, seed=0)
