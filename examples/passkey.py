"""The passkey task as text: a five-digit key, hidden somewhere in a long text, is asked for at the end of it.

For models with a byte-level tokenizer, such as examples/passkey-mamba2-4m: one byte of ASCII text is one token.
`longmamba eval passkey` asks any model, in tokens.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_longmamba.evaluate.needles import KEY_DIGITS, PASSKEY_NEEDLE, PASSKEY_QUESTION, hide

QUESTION = PASSKEY_QUESTION
HAYSTACK = Path(__file__).parent / "texts" / "haystack.txt"


@dataclass(frozen=True)
class PasskeyTask:
    """One question.

    Attributes:
        key: the five digits to be found.
        length: tokens of the prompt.
        depth: where the key stands, 0 = at the beginning, 1 = just before the question.
        prompt: text with the key in it, and the question.
    """

    key: str
    length: int
    depth: float
    prompt: str

    def is_answered_by(self, answer: str) -> bool:
        """Whether a completion begins with the key."""
        return answer.lstrip().startswith(self.key)


def read_haystack(path: Path = HAYSTACK) -> str:
    """The text in which keys are hidden; ASCII only, so that bytes, characters and tokens are the same."""
    return path.read_text(encoding="ascii")


def passkey_prompt(haystack: str, key: str, length: int, depth: float, start: int = 0) -> str:
    """Hide a key in a text.

    Args:
        haystack: ASCII text, long enough for the prompt.
        key: five digits.
        length: tokens of the prompt, question included.
        depth: share of the text that stands before the key, 0 to 1.
        start: where in the haystack the text begins.

    Returns:
        Exactly `length` ASCII characters.

    Raises:
        ValueError: a wrong key or depth, a haystack that is too short or not ASCII, or a length that is too short for
            the key and the question.
    """
    if len(key) != KEY_DIGITS or not (key.isascii() and key.isdigit()):
        raise ValueError(f"passkey_prompt: key must be {KEY_DIGITS} digits, got {key!r}")
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"passkey_prompt: depth must lie in [0, 1], got {depth}")
    needle = PASSKEY_NEEDLE.format(number=key)
    room = length - len(needle) - len(QUESTION)
    if room < 0:
        raise ValueError(f"passkey_prompt: length must be at least {length - room} tokens, got {length}")
    text = haystack[start : start + room]
    if len(text) < room or not text.isascii():
        raise ValueError(f"passkey_prompt: needs {room} ASCII characters of haystack from {start}, got {len(text)}")
    return hide(text, [(depth, needle)]) + QUESTION


def passkey_tasks(
    haystack: str, lengths: Iterable[int], depths: Iterable[float], trials: int = 1, seed: int = 0
) -> list[PasskeyTask]:
    """Make questions of every length and depth, each with its own key and piece of the haystack.

    Args:
        haystack: ASCII text, longer than the longest prompt.
        lengths: tokens of the prompts.
        depths: where the keys stand.
        trials: questions for each length and depth.
        seed: the same seed gives the same questions.
    """
    depths = list(depths)
    rng = random.Random(seed)
    tasks = []
    for length in lengths:
        for depth in depths:
            for _ in range(trials):
                key = str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))
                start = rng.randrange(max(1, len(haystack) - length))
                tasks.append(PasskeyTask(key, length, depth, passkey_prompt(haystack, key, length, depth, start)))
    return tasks
