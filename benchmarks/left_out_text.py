"""What does text lose by the filter: by what the filter leaves out, or by what it keeps? Text by text.

    python benchmarks/left_out_text.py examples/reference-mamba2-few-writes-4m --text BOOKS --output out/left_out.json

Loss of the last 100 tokens of windows under: plain; plain of the last L tokens alone; the default table; half of L
unfiltered and a quarter of the budget; and with nothing kept of what stands before an unfiltered end of L / 2 or L
tokens, in the global channels. Models of the torch reference whose tokens are bytes.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from support.variants import Subject

from vllm_longmamba.evaluate.perplexity import windows
from vllm_longmamba.evaluate.texts import read_books
from vllm_longmamba.evaluate.torch_contestant import tail_logprobs
from vllm_longmamba.tables import NO_FILTER, LayerThresholds, ThresholdTable
from vllm_longmamba.torch_reference import LongMamba, Plain, ReadingMethod

SCORED = 100


def keeping_nothing(table: ThresholdTable) -> ThresholdTable:
    """A table with thresholds that no dt reaches, where there were any."""
    layers = {
        index: LayerThresholds(
            layer.retention, torch.where(layer.dt_threshold == NO_FILTER, NO_FILTER, torch.finfo(torch.float32).max)
        )
        for index, layer in table.layers.items()
    }
    return replace(table, layers=layers)


def methods(subject: Subject, length: int) -> Iterator[tuple[str, ReadingMethod]]:
    """Names and methods for windows of a length."""
    train_length = subject.metadata.train_length
    rows = [train_length, length]
    default = subject.calibrated([], rows, 0.0)
    yield "plain", Plain()
    yield "unclamped", LongMamba.from_table(default)
    smaller = subject.calibrated([], rows, 0.0, budget=0.25)
    yield "unfiltered end", LongMamba.from_table(smaller, unfiltered_end=train_length // 2)
    for end in (train_length // 2, train_length):
        yield f"nothing before the last {end}", LongMamba.from_table(keeping_nothing(default), unfiltered_end=end)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--length", type=int, default=8192, help="of the windows [%(default)s]")
    parser.add_argument("--windows", type=int, default=2, help="of each text [%(default)s]")
    parser.add_argument("--train-length", type=int, help="L of a model without a table")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    subject = Subject(options.model, None, 2 * options.length, options.device, train_length=options.train_length)
    books = {book.name: subject.encoder.encode(book.text) for book in read_books(options.text)}
    sizes = {name: len(tokens) for name, tokens in books.items() if len(tokens) >= options.length}
    texts: dict[str, list[list[int]]] = {name: [] for name in sizes}
    for window in windows(sizes, [options.length], options.windows, SCORED):
        texts[window.book].append(window.tokens(books[window.book], []))
    train_length = subject.metadata.train_length
    found = {
        f"plain, the last {train_length} alone": {
            name: _loss(subject, Plain(), [text[-train_length - SCORED :] for text in own])
            for name, own in texts.items()
        }
    }
    for name, method in methods(subject, options.length):
        found[name] = {book: _loss(subject, method, own) for book, own in texts.items()}
    print(f"{'':30}", *(f"{name[-7:]:>7}" for name in texts), "   mean")
    for name, losses in found.items():
        print(f"{name:30}", *(f"{loss:7.3f}" for loss in [*losses.values(), np.mean([*losses.values()])]))
    options.output.write_text(json.dumps({"length": options.length, "loss": found}, indent=1) + "\n")


def _loss(subject: Subject, method: ReadingMethod, texts: list[list[int]]) -> float:
    logits = subject.model.with_method(method).read(texts, SCORED + 1).logits[:, :-1]
    return -float(np.mean(tail_logprobs(logits, texts)))


if __name__ == "__main__":
    main()
