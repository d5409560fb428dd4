"""Text files become a tokenizer and tokens."""

import lzma
import re
from pathlib import Path

import numpy as np
import pytest
from train.__main__ import main
from train.corpus import Corpus, load_corpus, prepare, read_documents


def test_documents_of_plain_and_packed_files(tmp_path: Path) -> None:
    text = "First.\n\n<|doc|>\n  \n<|doc|>\nSecond: naïve.\n"
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("plain.txt", "packed.txt.xz"):
        assert read_documents(tmp_path / name) == ["First.", "Second: naïve."]


def test_tokens_are_those_of_the_text(corpus: Corpus, text_file: Path) -> None:
    assert corpus.tokens.dtype == np.uint16
    assert corpus.tokens[-1] == 0
    assert corpus.tokenizer.decode(corpus.tokens.tolist()) == text_file.read_text(encoding="utf-8").strip()


def test_digits_are_single_tokens(corpus: Corpus) -> None:
    encoded = corpus.tokenizer.encode("is 48213.")
    assert [corpus.tokenizer.id_to_token(token) for token in encoded.ids][-6:] == [*"48213", "."]


def test_any_bytes_survive(corpus: Corpus) -> None:
    text = "\t日本 é 🙂\r\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text


def test_number_of_tokens_is_limited(text_file: Path, tmp_path: Path) -> None:
    assert prepare([text_file, text_file], tmp_path, vocabulary=300, tokens=1000) == 1000
    assert len(load_corpus(tmp_path).tokens) == 1000


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt have no text"):
        prepare([tmp_path / "empty.txt"], tmp_path, vocabulary=300, tokens=10)
    with pytest.raises(ValueError, match="258 to 65536 tokens, got 70000"):
        prepare([tmp_path / "empty.txt"], tmp_path, vocabulary=70_000, tokens=10)
    with pytest.raises(ValueError, match="1 token or more, got -5"):
        prepare([tmp_path / "empty.txt"], tmp_path, vocabulary=300, tokens=-5)
    for name in ("latin-1.txt", "plain.txt.xz"):
        (tmp_path / name).write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=f"{name}: texts must be UTF-8"):
            read_documents(tmp_path / name)
    with pytest.raises(ValueError, match=r"must hold tokens\.npy\.xz, write it with"):
        load_corpus(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "gone.txt", "--out", "."], "python -m train prepare: .*gone.txt"),
        (
            ["mamba2", "--data", ".", "--out", ".", "--steps", "1"],
            r"python -m train mamba2: .*must hold tokens\.npy\.xz",
        ),
        (["mamba2", "--data", "DATA", "--out", ".", "--set", "d_model"], "python -m train mamba2: --set d_model: "),
        (
            ["mamba2", "--data", "DATA", "--out", ".", "--set", "d_model=big"],
            "python -m train mamba2: --set d_model=big: ",
        ),
        (
            ["mamba2", "--data", "DATA", "--out", "."],
            "python -m train mamba2: settings: steps or minutes must be given",
        ),
        (["mamba2", "--data", "DATA", "--out", ".", "--steps", "0"], "python -m train mamba2: .*steps must be above 0"),
        (["mamba1", "--data", "DATA", "--out", ".", "--minutes=-1"], "python -m train mamba1: .*minutes must be above"),
    ],
    ids=["text", "data", "no value", "no JSON", "settings", "steps", "minutes"],
)
def test_mistakes_are_said_without_a_traceback(
    arguments: list[str], message: str, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main([str(corpus_folder) if argument == "DATA" else argument for argument in arguments])
    assert re.match(message, str(error.value))
    assert not list(tmp_path.iterdir())


def test_damaged_tokens_are_refused(corpus_folder: Path, tmp_path: Path) -> None:
    for path in corpus_folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:5000] if path.name == "tokens.npy.xz" else content)
    with pytest.raises(ValueError, match=r"tokens\.npy\.xz: is damaged .*, write it anew"):
        load_corpus(tmp_path)


def test_a_failed_prepare_leaves_what_was_there(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([text_file], tmp_path, vocabulary=300, tokens=100)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(file: object, array: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        prepare([text_file], tmp_path, vocabulary=400, tokens=100)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
