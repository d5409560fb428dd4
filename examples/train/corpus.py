"""Text files become a tokenizer and one long array of tokens, and are read back for training."""

import lzma
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|doc|>\n"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|padding|>")  # ids 0 and 1
TOKENS_FILE = "tokens.npy.xz"
TOKENIZER_FILE = "tokenizer.json"
# Of the documents that are read, so many characters are enough to train a tokenizer.
TOKENIZER_CHARACTERS = 40_000_000
DOCUMENTS_AT_ONCE = 32


@dataclass(frozen=True)
class Corpus:
    """What `prepare` wrote.

    Attributes:
        tokens: (tokens,) uint16, documents one after another, each with an END_OF_TEXT behind it.
        tokenizer: the one they were made with.
    """

    tokens: npt.NDArray[np.uint16]
    tokenizer: Tokenizer


def prepare(texts: list[Path], out: Path, vocabulary: int, tokens: int, seed: int = 0) -> int:
    """Trains a tokenizer on text files and writes it, and their tokens, into a folder.

    Args:
        texts: UTF-8 files, packed with xz or not, whose documents are separated by lines `<|doc|>`.
        out: the folder, made if missing.
        vocabulary: tokens of the tokenizer, at most 65,536.
        tokens: most tokens to write; documents are taken in random order.
        seed: of this order.

    Returns:
        How many tokens were written.

    Raises:
        ValueError: no text, a file that cannot be read as text, less than one token, or a vocabulary that does not fit
            into 16 bits.
    """
    if tokens < 1:
        raise ValueError(f"prepare: there must be 1 token or more, got {tokens}")
    if not 256 + len(SPECIAL_TOKENS) <= vocabulary <= 2**16:
        raise ValueError(f"prepare: the vocabulary must have 258 to 65536 tokens, got {vocabulary}")
    documents = [document for path in texts for document in read_documents(path)]
    if not documents:
        raise ValueError(f"prepare: {', '.join(map(str, texts))} have no text")
    random.Random(seed).shuffle(documents)
    tokenizer = train_tokenizer(documents, vocabulary)
    array = np.concatenate(list(_encoded(tokenizer, documents, tokens)))[:tokens]
    out.mkdir(parents=True, exist_ok=True)
    # Tokens and their tokenizer belong together.
    with whole_file(out / TOKENIZER_FILE) as part, whole_file(out / TOKENS_FILE) as packed:
        tokenizer.save(str(part))
        with lzma.open(packed, "wb", preset=6) as file:
            np.save(file, array)
    return len(array)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write under; at the end of the block the file gets its own, and none if the block fails."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_corpus(folder: Path) -> Corpus:
    """Reads what `prepare` wrote.

    Raises:
        ValueError: the folder lacks a file, or the tokens are damaged.
    """
    for name in (TOKENS_FILE, TOKENIZER_FILE):
        if not (folder / name).exists():
            raise ValueError(f"{folder}: must hold {name}, write it with `python -m train prepare TEXT --out {folder}`")
    try:
        with lzma.open(folder / TOKENS_FILE) as file:
            tokens = np.load(file)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{folder / TOKENS_FILE}: is damaged ({error}), write it anew with `prepare`") from error
    return Corpus(tokens, Tokenizer.from_file(str(folder / TOKENIZER_FILE)))


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, packed with xz or not; empty ones are left out.

    Raises:
        ValueError: the file is not UTF-8, or not packed with xz as its name says.
    """
    content = path.read_bytes()
    try:
        text = (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(f"{path}: texts must be UTF-8, and packed with xz if they end in .xz, but {error}") from error
    return [document for part in text.split(SEPARATOR) if (document := part.strip())]


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_paragraphs(documents), trainer)
    return tokenizer


def _paragraphs(documents: list[str]) -> Iterator[str]:
    """Pieces of TOKENIZER_CHARACTERS of the documents."""
    left = TOKENIZER_CHARACTERS
    for document in documents:
        for start in range(0, min(len(document), left), 100_000):
            yield document[start : start + 100_000]
        left -= len(document)
        if left <= 0:
            return


def _encoded(tokenizer: Tokenizer, documents: list[str], tokens: int) -> Iterator[npt.NDArray[np.uint16]]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(documents[first : first + DOCUMENTS_AT_ONCE]):
            yield np.array([*encoding.ids, end], dtype=np.uint16)
            tokens -= len(encoding.ids) + 1
        if tokens <= 0:
            return
