"""Documents of random words for a model that reads bytes: one of n characters has n tokens, whatever the shape."""

import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE_MODEL = EXAMPLES / "passkey-mamba2-4m"
# As `longmamba summarize` asks a base model.
INSTRUCTION = "TL;DR:"


def log_uniform_lengths(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Random lengths whose logarithm is uniform between both."""
    rng = random.Random(seed)
    return [round(shortest * (longest / shortest) ** rng.random()) for _ in range(count)]


def make_documents(lengths: Iterable[int], seed: int) -> list[str]:
    """Random words of a book, so many characters of them; no two documents begin alike."""
    book = (EXAMPLES / "texts" / "haystack.txt").read_text(encoding="ascii")
    words = sorted(set(re.findall("[a-z]+", book)))
    rng = random.Random(seed)
    # A word and its space have two characters or more.
    return [" ".join(rng.choices(words, k=length // 2 + 1))[:length] for length in lengths]


def prompt_of(document: str) -> str:
    """The prompt that `longmamba summarize` makes of a document for a base model."""
    return f"{document}\n\n{INSTRUCTION}"


def write_jsonl(file: Path, documents: Sequence[str]) -> Path:
    """Write documents as input of `longmamba summarize`; their ids count from 0."""
    with file.open("w") as lines:
        for number, document in enumerate(documents):
            lines.write(json.dumps({"id": str(number), "text": document}) + "\n")
    return file


def add_tokenizer(model: Path) -> None:
    """Give a model's folder the tokenizer of the example models, one token a byte."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE_MODEL / file, model / file)


def remove_end_token(model: Path) -> None:
    """Take the end-of-text token from a model's folder with `add_tokenizer`: its answers end at their greatest length.

    `longmamba summarize` has no option that goes on after that token.
    """
    for file, name in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | {name: None}, indent=1) + "\n")
