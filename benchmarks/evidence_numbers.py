"""Why pass keys get lost in text full of numbers: the same haystack with its digits replaced, moved or not read.

    python benchmarks/evidence_numbers.py MODEL --table TABLE --text DOCUMENTS --output out/numbers.jsonl

TABLE is the model's own (`longmamba calibrate MODEL --train-length 2048 --output TABLE`), DOCUMENTS what evidence.py
measures on. A window of haystack is read once up to the key. Then several keys are hidden, each followed by the rest
of the prompt. VARIATIONS says what becomes of the haystack. A finished window of a variation is one line of --output;
the same command goes on where it ended. `results_page.py --add` takes the file.

Runs the torch reference in float32, on as many cores as torch is given. A window takes 20 to 60 s on one.
"""

import argparse
import copy
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import support.logprobs  # noqa: F401  # makes torch_models importable
import torch
from support.evidence_texts import Texts, read_documents
from support.numbers_haystack import DOCUMENTS, Haystack, Windows
from support.numbers_reader import Reader, Tally, repeat_states
from torch_models import TorchModel

from vllm_longmamba.evaluate.needles import KEY_DIGITS, PASSKEY_NEEDLE, PASSKEY_QUESTION
from vllm_longmamba.evaluate.store import settings_key
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.tables import load_table

# Tokens before a key when its dt is measured.
CONTEXT = 1024
AS_IS = Haystack()
LETTERS = Haystack(digits="letters")
NO_WRITES, NO_DECAY = Haystack(writes=False), Haystack(decays=False)
DROPPED = Haystack(writes=False, decays=False)
# Tokens from an early key to the end.
EARLY = 14336


@dataclass(frozen=True)
class Variation:
    """A prompt: haystack, key, haystack, question.

    Attributes:
        before: the key.
        behind: it; None means as before.
        length: tokens of the prompt.
        key_to_end: how many of them begin with the key's sentence.
        factor: on the table's thresholds; 0 filters nothing.
        at_key: thresholds are raised as far as they can be without losing a digit of the keys.
    """

    before: Haystack = AS_IS
    behind: Haystack | None = None
    length: int = 16384
    key_to_end: int = 1024
    factor: float = 1.0
    at_key: bool = False


VARIATIONS = {
    "numbers": Variation(),
    "numbers, 2k": Variation(length=2048, factor=0),
    "few numbers": Variation(Haystack("few numbers")),
    "novels": Variation(Haystack("novels")),
    "novels, digits added": Variation(Haystack("novels", digits="added")),
    "letters for digits": Variation(LETTERS),
    "letters before the key": Variation(LETTERS, AS_IS),
    "letters behind the key": Variation(AS_IS, LETTERS),
    "digits dropped": Variation(DROPPED),
    "digits do not write": Variation(NO_WRITES),
    "digits do not decay": Variation(NO_DECAY),
    "early key": Variation(LETTERS, AS_IS, key_to_end=EARLY),
    "early key, digits dropped": Variation(LETTERS, DROPPED, key_to_end=EARLY),
    "early key, digits do not write": Variation(LETTERS, NO_WRITES, key_to_end=EARLY),
    "early key, digits do not decay": Variation(LETTERS, NO_DECAY, key_to_end=EARLY),
    "thresholds times 16": Variation(factor=16),
    "thresholds at the key": Variation(at_key=True),
}


def measure(
    reader: Reader, windows: Windows, window: int, variations: Mapping[str, Variation], keys: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One window, in variations that begin alike.

    Args:
        reader: of their length and factor.
        windows: of text.
        window: which.
        variations: by name; they differ in `behind` only.
        keys: how many are hidden, each in a prompt of its own.

    Yields:
        Name of a variation, and what was found, kept and left in it.
    """
    encoder = windows.encoder
    rng = random.Random(f"numbers {window}")
    numbers = [str(rng.randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS)) for _ in range(keys)]
    needles = torch.tensor([encoder.encode(PASSKEY_NEEDLE.format(number=number)) for number in numbers])
    question = torch.tensor(encoder.encode_question(PASSKEY_QUESTION))
    needle = needles.shape[1]
    first = next(iter(variations.values()))
    place = first.length - first.key_to_end
    before = windows.tokens(first.before, window, first.length)[:place]
    if first.at_key:
        reader.raise_to([_read_key(reader, windows, before[-CONTEXT:], key) for key in needles])
    tally, states = Tally(), reader.start()
    reader.read(before[None], states, first.before, tally, _classes(windows, before, "digits"))
    for name, variation in variations.items():
        haystack = variation.behind or variation.before
        rest = windows.tokens(haystack, window, first.length)[place : first.length - needle - len(question)]
        ids = torch.cat([needles, rest.expand(keys, -1), question.expand(keys, -1)], dim=1)
        behind = torch.cat([rest, question])
        classes = _classes(windows, needles[0], "key") + _classes(windows, behind, "digits")
        counts, after = copy.deepcopy(tally), repeat_states(states, keys)
        reading = reader.read(ids, after, haystack, counts, classes, needle)
        answers = [encoder.decode(tokens) for tokens in reading.generate(KEY_DIGITS).tolist()]
        text = encoder.decode(torch.cat([before, rest]).tolist())
        result = {
            "digits": int(windows.is_digit(torch.cat([before, rest])).sum()),
            "keys": numbers,
            "answers": answers,
            "in_haystack": [answer in text for answer in answers],
            "kept": {of: [counts.kept[of], seen] for of, seen in sorted(counts.seen.items())},
            "above_key": counts.above_key(),
            "retention": {part: counts.retention(part) for part in ("whole", "behind the key")},
        }
        yield name, result


def _read_key(reader: Reader, windows: Windows, before: torch.Tensor, needle: torch.Tensor) -> Tally:
    """The dt of a key's digits behind a short text."""
    tally, ids = Tally(), torch.cat([before, needle])
    classes = _classes(windows, before, "digits") + _classes(windows, needle, "key")
    reader.read(ids[None], reader.start(), AS_IS, tally, classes)
    return tally


def _classes(windows: Windows, tokens: torch.Tensor, digit: str) -> list[str]:
    return [digit if is_digit else "other" for is_digit in windows.is_digit(tokens).tolist()]


def main() -> None:
    """Measure what is left."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model that the torch reference runs")
    parser.add_argument("--table", type=Path, required=True, help="its threshold table")
    parser.add_argument("--text", type=Path, required=True, help="documents, .txt or .txt.xz")
    parser.add_argument("--variations", nargs="*", choices=VARIATIONS, default=list(VARIATIONS), metavar="NAME")
    parser.add_argument("--windows", type=int, default=10, help="of haystack [%(default)s]")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of windows, from 0 [all]")
    parser.add_argument("--keys", type=int, default=4, help="in each window, one a prompt [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("out/numbers.jsonl"), help="[%(default)s]")
    options = parser.parse_args()
    model, table = TorchModel(options.model, device="cpu"), load_table(options.table)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    windows = Windows(Encoder(tokenizer), Texts(read_documents(options.text), DOCUMENTS, encode), options.windows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.touch()
    done = {json.loads(line)["key"] for line in options.output.read_text().splitlines()}
    for window in options.only or range(options.windows):
        alike: dict[Variation, dict[str, Variation]] = defaultdict(dict)
        for name in options.variations:
            if _key(options, name, window) not in done:
                alike[replace(VARIATIONS[name], behind=None)][name] = VARIATIONS[name]
        for beginning, variations in alike.items():
            started = time.monotonic()
            reader = Reader(model, table, beginning.length, beginning.factor)
            for name, result in measure(reader, windows, window, variations, options.keys):
                what = {"key": _key(options, name, window), "model": options.model.name, "variation": name}
                _record(options, {**what, "window": window, "torch": torch.__version__, **result})
                found = sum(map(str.__eq__, result["keys"], result["answers"]))
                print(f"{window} {name}: {found} of {options.keys}, {time.monotonic() - started:.0f} s", flush=True)


def _record(options: argparse.Namespace, record: Mapping[str, Any]) -> None:
    with options.output.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _key(options: argparse.Namespace, variation: str, window: int) -> str:
    where = {"window": window, "windows": options.windows, "keys": options.keys}
    return settings_key({"numbers": options.model.name, "variation": variation, **where})


if __name__ == "__main__":
    main()
