"""The texts that numbers are hidden in and that are scored: documents, told apart by how many digits they have."""

import lzma
import string
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_longmamba.evaluate.texts import Book

SEPARATOR = "<|doc|>\n"

# From texts to the tokens of each.
Encode = Callable[[list[str]], list[list[int]]]


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


def digit_tokens(encode: Encode) -> list[int]:
    """The tokens of the digits 0 to 9.

    Args:
        encode: of a tokenizer that has one token for each digit, wherever it stands.

    Raises:
        ValueError: the tokenizer joins digits.
    """
    together, *alone = encode([string.digits, *string.digits])
    tokens = [of_one[-1] for of_one in alone]
    if together[-len(tokens) :] != tokens:
        raise ValueError(
            f"digits in tokens: a digit must be a token of its own, but the tokenizer makes {together} of "
            f"{string.digits} and {alone} of each; take another model, or kinds of text without pieces"
        )
    return tokens


class Texts:
    """Texts as one tokenizer sees them; all documents are encoded when the first is asked for.

    Args:
        documents: to choose from.
        kinds: name -> {"digits": [least, most]}, documents with so many in 1,000 characters, or {"repeat": a text}.
            With "piece": {"tokens": n, "least_digits": m} beside "digits", a haystack is pieces of these documents: n
            tokens each, with at least m digits in 1,000 tokens.
        encode: from texts to the tokens of each.
    """

    def __init__(self, documents: list[Book], kinds: Mapping[str, Any], encode: Encode) -> None:
        self._documents, self._kinds, self._encode = documents, kinds, encode

    @cached_property
    def _tokens(self) -> dict[str, list[int]]:
        encoded = self._encode([book.text for book in self._documents])
        return {book.name: tokens for book, tokens in zip(self._documents, encoded, strict=True)}

    @cached_property
    def digit_tokens(self) -> list[int]:
        """The tokens of the digits 0 to 9."""
        return digit_tokens(self._encode)

    def haystack(self, kind: str, length: int) -> list[int]:
        """Tokens of a kind of text that prompts are cut from.

        Whole documents stand there once. A text that is repeated, and pieces of documents, begin again and again: there
        are so many tokens that a prompt can begin anywhere. A prompt reads a piece twice only where it is longer than
        all pieces together.

        Args:
            kind: of text.
            length: tokens of a prompt.

        Raises:
            ValueError: no piece has so many digits.
        """
        rule = self._kinds[kind]
        if "repeat" in rule:
            [once] = self._encode([rule["repeat"]])
        elif "piece" in rule:
            once = self.pieces(kind)
        else:
            return self.whole(kind)
        return once * (length // len(once) + 2)

    def whole(self, kind: str) -> list[int]:
        """Tokens of the documents of a kind, one after another."""
        return [token for book in self.documents(kind) for token in self._tokens[book.name]]

    def pieces(self, kind: str) -> list[int]:
        """Tokens of the pieces of a kind, in the order of the documents; what is left at a document's end is no piece.

        Raises:
            ValueError: no piece has so many digits.
        """
        tokens, least_digits = (self._kinds[kind]["piece"][name] for name in ("tokens", "least_digits"))
        is_digit = frozenset(self.digit_tokens).__contains__
        kept = []
        for book in self.documents(kind):
            document = self._tokens[book.name]
            for first in range(0, len(document) - tokens + 1, tokens):
                piece = document[first : first + tokens]
                if 1000 * sum(map(is_digit, piece)) >= least_digits * tokens:
                    kept += piece
        if not kept:
            raise ValueError(
                f"{kind}: a haystack is pieces of {tokens} tokens with at least {least_digits} digits in 1,000, but "
                "no document has such a piece; give other documents"
            )
        return kept

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
