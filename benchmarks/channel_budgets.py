"""Which channels should keep more, or less, of a long prompt than the others? A search by needles, pass keys and text.

    python benchmarks/channel_budgets.py examples/reference-mamba2-few-writes-4m --text FOLDER \
        --lengths 2048 8192 16384 --budget 0.25 --unfiltered-end 256 --device cuda --output out/budgets.json

Starts with the same budget for all global channels, tries another one for each by itself (--budgets), and keeps what
scores better, until nothing does or the time is up. The score is the mean probability of the right answers, needles
counting twice as much as pass keys, less 20 for each nat by which the last tokens of text cost more than plain and
--allowed. Byte-level Mamba-2 models of the torch reference; with Mamba-1 there are too many channels. Prints what
`longmamba calibrate` is to be told, and writes it with all that was tried. Score the result on other text.
"""

import argparse
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from support.trial import Trial
from support.variants import Subject

from vllm_longmamba.tables import LayerThresholds, ThresholdTable, filtered_channels
from vllm_longmamba.torch_reference import LongMamba, Plain

Channel = tuple[int, int]
# Answers less than this much better are taken for chance.
GAIN = 0.004


class Search:
    """A trial, and a table for each budget."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        subject = Subject(options.model, None, 2 * max(options.lengths), options.device, options.segment_tokens)
        budgets = sorted({options.budget, *options.budgets})
        rows = [subject.metadata.train_length, *sorted(options.lengths)]
        self.tables = {budget: subject.calibrated([], rows, 0.0, budget=budget) for budget in budgets}
        self.trial = Trial(subject, options.text, options.lengths, options.questions, options.windows)
        self.plain = {length: self.trial.loss(Plain(), length) for length in options.lengths}

    def channels(self) -> list[Channel]:
        """The global channels."""
        found = filtered_channels(self.tables[self.options.budget])
        return [(layer, channel) for layer, channels in found.items() for channel in channels]

    def table(self, budgets: dict[Channel, float]) -> ThresholdTable:
        """Thresholds of the channels by their own budgets."""
        base = self.tables[self.options.budget]
        layers = dict(base.layers)
        for (layer, channel), budget in budgets.items():
            thresholds = layers[layer].dt_threshold.clone()
            thresholds[:, channel] = self.tables[budget].layers[layer].dt_threshold[:, channel]
            layers[layer] = LayerThresholds(layers[layer].retention, thresholds)
        return replace(base, layers=layers)

    def score(self, budgets: dict[Channel, float]) -> dict[str, Any]:
        """Probabilities of the right answers and losses above plain, by length, and the score."""
        method = LongMamba.from_table(self.table(budgets), unfiltered_end=self.options.unfiltered_end)
        lengths = self.options.lengths
        found = {
            task: [self.trial.answers(method, task, length).probability for length in lengths]
            for task in ("needles", "passkey")
        }
        above = [self.trial.loss(method, length) - self.plain[length] for length in lengths]
        excess = sum(max(0.0, loss - self.options.allowed) for loss in above)
        answers = sum(found["needles"]) + 0.5 * sum(found["passkey"])
        return {**found, "above plain": above, "score": (answers - 20 * excess) / len(lengths)}


def main() -> None:
    """Search, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to hide in and to score")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--budget", type=float, default=0.25, help="of the channels at first [%(default)s]")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.0, 1.0, 0.125], help="to try")
    parser.add_argument("--unfiltered-end", type=int, default=256)
    parser.add_argument("--questions", type=int, default=27, help="of each kind and length, by nines [%(default)s]")
    parser.add_argument("--windows", type=int, default=1, help="of each length in each text [%(default)s]")
    parser.add_argument("--allowed", type=float, default=0.002, help="nats of text above plain [%(default)s]")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--segment-tokens", type=int)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    search, started = Search(options), time.monotonic()
    own: dict[Channel, float] = {}
    best = search.score(own)
    tried: list[dict[str, Any]] = [{"channels": _names(own), **best}]
    improved = True
    while improved and time.monotonic() - started < options.seconds:
        improved = False
        for budget, channel in product(options.budgets, search.channels()):
            if own.get(channel, options.budget) == budget or time.monotonic() - started > options.seconds:
                continue
            score = search.score({**own, channel: budget})
            tried.append({"channels": _names({**own, channel: budget}), **score})
            if score["score"] > best["score"] + GAIN:
                own, best, improved = {**own, channel: budget}, score, True
            print(_names({channel: budget}), {name: _rounded(value) for name, value in score.items()}, flush=True)
            options.output.write_text(json.dumps({"best": {"channels": _names(own), **best}, "tried": tried}, indent=1))
    print(f"--budget {options.budget:g}", *(f"--channel-budget {name}" for name in _names(own)))


def _names(budgets: dict[Channel, float]) -> list[str]:
    return [f"{layer}.{channel}={budget:g}" for (layer, channel), budget in sorted(budgets.items())]


def _rounded(value: Any) -> Any:
    return [round(one, 3) for one in value] if isinstance(value, list) else round(value, 4)


if __name__ == "__main__":
    main()
