"""Text files and what a model's tokenizer makes of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.evaluate.needles import Question, hide


@dataclass(frozen=True)
class Book:
    """One text file.

    Attributes:
        name: the file's name without its ending.
        text: its contents.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for the text."""
        return str(blake3(self.text.encode()).hexdigest()[:32])


def read_books(paths: Iterable[Path]) -> list[Book]:
    """Read text files (UTF-8), and all *.txt of folders and the folders in them.

    Args:
        paths: files and folders.

    Returns:
        The texts in the order given, those of a folder by name.

    Raises:
        ValueError: a folder without *.txt, a file that is not UTF-8, or two files of one name.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: there is no .txt file in this folder; name the files themselves")
        files += found
    books = []
    for file in files:
        try:
            books.append(Book(file.stem, file.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: texts must be UTF-8, but {error}; convert the file") from error
    names = [book.name for book in books]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"texts are told apart by file name, but {', '.join(twice)} came twice; rename one")
    return books


class Encoder:
    """A tokenizer as the tasks need it.

    Attributes:
        name: name or folder.
        prefix: tokens that the tokenizer puts in front of every text: the one of its beginning, or none.
        end_of_text: the token that ends a text, None where there is none.
    """

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        self.name = name
        self._tokenizer = tokenizer
        of_nothing = list(tokenizer.encode(""))
        self.prefix: list[int] = of_nothing if of_nothing == [getattr(tokenizer, "bos_token_id", None)] else []
        self.end_of_text: int | None = getattr(tokenizer, "eos_token_id", None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text alone, without any that the tokenizer adds."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a whole prompt, with the tokenizer's own prefix."""
        return self.prefix + self.encode(text)

    def sizes(self, books: Mapping[str, list[int]]) -> dict[str, int]:
        """Tokens of each book with the tokenizer's own prefix."""
        return {name: len(self.prefix) + len(tokens) for name, tokens in books.items()}

    @property
    def end_text(self) -> str:
        """What the token that ends a text is decoded to; "" where there is none."""
        return self.decode([self.end_of_text]) if self.end_of_text is not None else ""

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens."""
        return str(self._tokenizer.decode(tokens))

    def encode_question(self, text: str) -> list[int]:
        """Tokens of a question that ends with a space, to be answered by digits.

        Most tokenizers join the space to what follows, and a model never saw the space alone: there it is left out.
        """
        tokens = self.encode(text)
        joined = self.encode(text + "4")[: len(tokens)] != tokens
        return self.encode(text.rstrip(" ")) if joined else tokens

    def prompt(self, question: Question, haystack: list[int]) -> list[int]:
        """The tokens of a question: exactly `question.length`, those of the tokenizer's own prefix included.

        Args:
            question: what to hide and to ask.
            haystack: tokens of the text to hide it in.

        Raises:
            ValueError: the length is too short for needles and question, or the haystack for the length.
        """
        end = self.encode_question(question.text())
        needles = [(needle.depth, self.encode(needle.text())) for needle in question.needles]
        room = question.length - len(self.prefix) - len(end) - sum(len(needle) for _, needle in needles)
        if room < 0:
            raise ValueError(
                f"{question.task}: a length of {question.length} tokens is too short for what is hidden and asked; "
                f"it must be at least {question.length - room}"
            )
        if len(haystack) < room:
            raise ValueError(
                f"{question.task}: a prompt of {question.length} tokens needs {room} tokens of haystack, but there are "
                f"only {len(haystack)}; give more text (--haystack may be repeated, and may be a folder)"
            )
        start = int(question.start * (len(haystack) - room + 1))
        return self.prefix + hide(haystack[start : start + room], needles) + end

    def check_room(self, questions: Sequence[Question], haystack: list[int]) -> None:
        """Refuse too short a length or haystack before anything starts; raises as `prompt` does."""
        by_length = sorted(questions, key=lambda question: question.length)
        for question in (by_length[0], by_length[-1]):
            self.prompt(question, haystack)
