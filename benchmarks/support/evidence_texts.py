"""The texts that numbers are hidden in and that are scored: documents, told apart by how many digits they have."""

import lzma
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.texts import Book

SEPARATOR = "<|doc|>\n"


def read_documents(path: Path) -> list[Book]:
    """The documents of a file (.txt or .txt.xz, between lines of <|doc|>), or of all such files in a folder."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    documents = []
    for file in files:
        content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        texts = content.decode().split(SEPARATOR)
        name = file.name.partition(".")[0]
        documents += [Book(f"{name}-{number}", text.strip() + "\n") for number, text in enumerate(texts)]
    return documents


def digits(text: str) -> float:
    """Digits in 1,000 characters."""
    return 1000 * sum(character.isdigit() for character in text) / max(len(text), 1)


class Texts:
    """Texts as one tokenizer sees them; all documents are encoded when the first is asked for.

    Args:
        documents: to choose from.
        kinds: name -> {"digits": [least, most]} in 1,000 characters, or {"repeat": a text}.
        encode: from texts to the tokens of each.
    """

    def __init__(
        self, documents: list[Book], kinds: Mapping[str, Any], encode: Callable[[list[str]], list[list[int]]]
    ) -> None:
        self._documents, self._kinds, self._encode = documents, kinds, encode

    @cached_property
    def _tokens(self) -> dict[str, list[int]]:
        encoded = self._encode([book.text for book in self._documents])
        return {book.name: tokens for book, tokens in zip(self._documents, encoded, strict=True)}

    def haystack(self, kind: str, length: int) -> list[int]:
        """Tokens of a kind of text, at least `length` of them where the kind can be repeated."""
        rule = self._kinds[kind]
        if "repeat" in rule:
            [once] = self._encode([rule["repeat"]])
            # So many that a prompt can begin anywhere in a sentence.
            return once * (length // len(once) + 2)
        return [token for book in self.documents(kind) for token in self._tokens[book.name]]

    def documents(self, kind: str) -> list[Book]:
        """The documents of a kind."""
        least, most = self._kinds[kind]["digits"]
        return [book for book in self._documents if least <= digits(book.text) <= most]

    def books(self, shortest: int) -> dict[str, list[int]]:
        """Tokens of each document of at least so many tokens."""
        return {name: tokens for name, tokens in self._tokens.items() if len(tokens) >= shortest}


def ruler_file(folder: Path, task: str, length: int) -> Path:
    """Where `evidence_ruler.py` puts the prompts of a task."""
    return folder / f"{task}-{length}.json.xz"
