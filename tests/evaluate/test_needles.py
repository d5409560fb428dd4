"""The questions: what is hidden, where, and what counts as found."""

import pytest

from vllm_longmamba.evaluate.needles import (
    KEY_DIGITS,
    NAMES,
    Needle,
    Question,
    hide,
    middles,
    needle_questions,
    passkey_questions,
)


@pytest.mark.parametrize("text", ["0123456789", list(range(10))], ids=["characters", "tokens"])
def test_hide_leaves_nothing_out(text: str | list[int]) -> None:
    marks = ["A", "B", "C"] if isinstance(text, str) else [[-1], [-2], [-3]]
    hidden = hide(text, [(1.0, marks[2]), (0.0, marks[0]), (0.34, marks[1])])
    expected = "A012B3456789C" if isinstance(text, str) else [-1, 0, 1, 2, -2, *range(3, 10), -3]
    assert hidden == expected
    assert hide(text[:0], [(0.5, marks[0])]) == marks[0]


def test_middles() -> None:
    assert middles(1) == [0.5]
    assert middles(4) == [0.125, 0.375, 0.625, 0.875]


def test_passkey_questions_do_not_depend_on_the_rest_of_the_grid() -> None:
    grid = list(passkey_questions([512, 700], middles(3), [0, 1]))
    assert len(grid) == 12
    assert len({question.asked.number for question in grid}) == 12
    assert set(passkey_questions([700], [middles(3)[2]], [1])) <= set(grid)
    assert len({str(question.identity) for question in grid}) == 12
    question = grid[0]
    assert question.needles == (question.asked,)
    assert question.text() == "\nWhat is the pass key? The pass key is "
    assert question.asked.text() == f"\nThe pass key is {question.asked.number}. Remember it.\n"


def test_passkeys_have_all_their_digits() -> None:
    keys = [question.asked.number for question in passkey_questions([512], [0.5], range(200))]
    assert all(key.isdigit() and len(key) == KEY_DIGITS and key[0] != "0" for key in keys)


def test_questions_stay_the_same() -> None:
    """Results that are stored, and those that are published, are of these questions."""
    (passkey,) = passkey_questions([512], [0.5], [0])
    (needle,) = needle_questions([512], [0.5], [0], 2)
    assert (passkey.asked.number, round(passkey.start, 6)) == ("54509", 0.188295)
    assert ([(each.name, each.number) for each in needle.needles], round(needle.start, 6)) == (
        [("desert", "58258"), ("bridge", "96598")],
        0.162415,
    )


def test_needle_questions_ask_for_one() -> None:
    questions = list(needle_questions([512], middles(5), [0, 1, 2], needles=4))
    assert len(questions) == 15
    for question in questions:
        assert len({needle.name for needle in question.needles}) == 4
        assert len({needle.number for needle in question.needles}) == 4
        assert all(needle.number.isdigit() and len(needle.number) == KEY_DIGITS for needle in question.needles)
        assert question.asked == question.needles[0]
        assert question.asked.depth == question.depth
    assert len({str(question.identity) for question in questions}) == 15
    # The others stand anywhere, not at the depth asked for.
    assert len({needle.depth for question in questions for needle in question.needles[1:]}) == 45
    (full,) = needle_questions([512], [0.5], [0], len(NAMES))
    assert {needle.name for needle in full.needles} == set(NAMES)
    name = questions[0].asked.name
    assert questions[0].text() == f"\nWhat is the magic number of the {name}? The magic number of the {name} is "


@pytest.mark.parametrize("needles", [0, len(NAMES) + 1])
def test_needle_questions_refuse(needles: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and {len(NAMES)}, got {needles}"):
        list(needle_questions([512], [0.5], [0], needles))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("48213", True), (" 48213.", True), ("48214", False), ("It is 48213", False), ("4821", False), ("", False)],
)
def test_a_number_is_found_at_the_beginning_of_the_answer(answer: str, expected: bool) -> None:
    needles = (Needle("river", "48213", 0.5), Needle("castle", "50000", 0.1))
    assert Question("needles", 512, 0.5, 0, needles, 0.0).found_in(answer) is expected
