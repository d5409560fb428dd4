"""benchmarks/evidence_numbers.py: what becomes of digits, and that nothing else changes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from references.torch_models import LongMamba, TorchModel
from references.torch_models.mixers import Mamba2Mixer, Projection

from vllm_longmamba.tables import ThresholdTable, load_table

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "passkey-mamba2-4m"
TABLE = ROOT / "tables" / "shipped" / "passkey-mamba2-4m.safetensors"
MANY, FEW, NONE = (
    "In 1066, 5 or 6 came. ",
    "It was late, in 1066 or so, " + "and nobody spoke " * 8,
    "Call me Ishmael. ",
)


class Characters:
    """A tokenizer of one token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(one) for one in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "references"))


def _table() -> ThresholdTable:
    """The example's table; all of a prompt is filtered."""
    table = load_table(TABLE)
    return replace(table, metadata=replace(table.metadata, unfiltered_end=0))


def test_a_table_with_an_unfiltered_end_is_refused() -> None:
    from support.numbers_reader import Reader

    with pytest.raises(ValueError, match="must have no unfiltered end, and has one of 256 tokens"):
        Reader(TorchModel(EXAMPLE, device="cpu"), load_table(TABLE), 3000)


def _windows(tokenizer: Any = None) -> Any:
    from support.evidence_texts import Texts
    from support.numbers_haystack import DOCUMENTS, WINDOW, Windows

    from vllm_longmamba.evaluate.texts import Book, Encoder

    tokenizer = tokenizer or Characters()
    documents = [Book(name, text * (2 * WINDOW // len(text))) for name, text in (("a", MANY), ("b", FEW), ("c", NONE))]
    encode = lambda texts: [tokenizer.encode(text, add_special_tokens=False) for text in texts]  # noqa: E731
    return Windows(Encoder(tokenizer), Texts(documents, DOCUMENTS, encode), 2)


def _text(windows: Any, **haystack: Any) -> str:
    from support.numbers_haystack import Haystack

    return str(windows.encoder.decode(windows.tokens(Haystack(**haystack), 0, 4000).tolist()))


def test_haystacks() -> None:
    windows = _windows()
    many, added = _text(windows), _text(windows, kind="novels", digits="added")
    assert MANY in many
    assert _text(windows, digits="letters") == many.translate({ord("0") + one: ord("a") + one for one in range(10)})
    assert FEW in _text(windows, kind="few numbers")
    assert not any(one.isdigit() for one in _text(windows, kind="novels"))
    assert [one for one in added if one.isdigit()] == [one for one in many if one.isdigit()]
    assert "hmael" in added


@pytest.mark.parametrize("length", [500, 3000], ids=["plain", "filtered"])
def test_answers_are_those_of_the_whole_prompt(length: int) -> None:
    import evidence_numbers
    from support.numbers_reader import Reader
    from transformers import AutoTokenizer

    from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION

    windows, table = _windows(AutoTokenizer.from_pretrained(EXAMPLE)), _table()
    model = TorchModel(EXAMPLE, device="cpu")
    variation = evidence_numbers.Variation(length=length, key_to_end=301)
    reader = Reader(model, table, length)
    [(_, result)] = evidence_numbers.measure(reader, windows, 0, {"numbers": variation}, 2)
    text = windows.encoder.decode(windows.tokens(variation.before, 0, length).tolist())
    ends = [(PASSKEY_NEEDLE.format(number=key), text[length - 301 :]) for key in result["keys"]]
    prompts = [
        text[: length - 301] + needle + rest[: 301 - len(needle + PASSKEY_QUESTION)] + PASSKEY_QUESTION
        for needle, rest in ends
    ]
    assert [len(prompt) for prompt in prompts] == [length] * 2
    method = LongMamba.from_table(table)
    answers = model.with_method(method).generate([windows.encoder.encode(prompt) for prompt in prompts], 5)
    assert result["answers"] == [windows.encoder.decode(answer) for answer in answers]
    kept, seen = result["kept"]["digits"]
    assert result["digits"] * table.count_global() == seen
    assert (kept == seen) == (table.row_of(length) == 0)


def test_thresholds_are_raised_where_the_key_stays_above() -> None:
    from support.numbers_reader import BELOW, Reader, Tally

    table, tally = _table(), Tally()
    reader = Reader(TorchModel(EXAMPLE, device="cpu"), table, 3000)
    before = [thresholds.clone() for thresholds in reader._thresholds]
    for layer, thresholds in enumerate(before):
        mine = thresholds[table.is_global(layer)]
        factors = torch.tensor([2.0, 0.5]).repeat(len(mine))[: len(mine)]
        # Of the two digits the smaller dt counts.
        tally.of_digits[layer, "key"] = [torch.stack([5 * mine, factors * mine])]
    reader.raise_to([tally])
    for layer, thresholds in enumerate(before):
        is_global = table.is_global(layer)
        mine = thresholds[is_global]
        factors = torch.tensor([2 * BELOW, 1.0]).repeat(len(mine))[: len(mine)]
        torch.testing.assert_close(reader._thresholds[layer][is_global], factors * mine)
        torch.testing.assert_close(reader._thresholds[layer][~is_global], thresholds[~is_global])


@pytest.mark.parametrize(("writes", "decays"), [(True, True), (False, True), (True, False)])
def test_tokens_that_only_write_or_only_decay(writes: bool, decays: bool) -> None:
    from support.numbers_haystack import Haystack
    from support.numbers_reader import _scan_apart

    torch.manual_seed(0)
    model = TorchModel(EXAMPLE, device="cpu")
    mixer: Any = model.layers[0].mixer
    projection, _ = mixer.project(torch.randn(1, 9, model.embedding.shape[1]), mixer.empty_state(1).history)
    chosen = torch.rand(9, mixer.nheads) < 0.5
    state, before = mixer.empty_state(1), torch.randn_like(mixer.empty_state(1).ssm)
    state.ssm = before.clone()
    _scan_apart(_as_imported(mixer), projection, state, chosen, Haystack(writes=writes, decays=decays))
    torch.testing.assert_close(
        state.ssm, _state(mixer, projection, before, chosen, writes, decays), atol=1e-4, rtol=1e-4
    )


def _as_imported(mixer: Mamba2Mixer) -> Any:
    """The mixer as one of the class that the script has imported, under another name of its module."""
    from torch_models.mixers import Mamba2Mixer as Imported

    imported = Imported.__new__(Imported)
    imported.__dict__ = mixer.__dict__
    return imported


def _state(
    mixer: Mamba2Mixer, projection: Projection, state: torch.Tensor, chosen: torch.Tensor, writes: bool, decays: bool
) -> torch.Tensor:
    """The recurrence, token by token; one group."""
    x = torch.unflatten(projection.x, -1, (mixer.nheads, mixer.headdim))[0]
    for token, dt in enumerate(projection.dt[0]):
        fades = torch.where(chosen[token] & (not decays), 0.0, dt * mixer.A)
        feeds = torch.where(chosen[token] & (not writes), 0.0, dt)
        fed = (feeds[:, None] * x[token])[:, :, None] * projection.B[0, token, 0]
        state = fades.exp()[:, None, None] * state + fed
    return state


def test_a_mixer_that_cannot_do_that_is_refused() -> None:
    from support.numbers_haystack import Haystack
    from support.numbers_reader import _scan_apart

    nothing = torch.zeros(0)
    with pytest.raises(ValueError, match="only Mamba-2"):
        _scan_apart(SimpleNamespace(), nothing, nothing, nothing, Haystack(writes=False))


def test_records_become_tables(tmp_path: Path) -> None:
    import results_page

    record = {
        "model": "tiny", "variation": "novels", "digits": 7, "keys": ["12345", "67890"], "answers": ["12345", "6"],
        "kept": {"key": [1, 2], "other": [1, 4]}, "above_key": [0.4, 3],
        "retention": {"whole": [0.25, 3], "behind the key": [0.75, 3]},
    }  # fmt: skip
    more = [record | {"variation": name} for name in ("numbers", "early key")]
    records = [record, record | {"digits": 9}, *more]
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "tiny.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    tables = results_page.tables(tmp_path)
    lines = tables["evidence-numbers-haystacks"]().splitlines()
    assert lines[2] == "| many numbers | 7 to 7 | 1 of 2 (0.09 to 0.91) | 0.75 |"
    assert lines[3] == "| novels | 7 to 9 | 2 of 4 (0.15 to 0.85) | 0.75 |"
    (line,) = tables["evidence-numbers-oracles"]().splitlines()[2:]
    assert line == "| as they are | 1 of 2 (0.09 to 0.91) | 0.75 | 1 of 2 (0.09 to 0.91) | 0.75 |"
    (line,) = tables["evidence-numbers-thresholds"]().splitlines()[2:]
    assert line == "| of the table | 1 of 2 (0.09 to 0.91) | 0.50 | – | 0.25 | 0.40 |"
