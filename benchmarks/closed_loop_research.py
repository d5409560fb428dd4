"""Which thresholds find a passkey in long prompts? Closed-loop calibration against the paper's, in plain torch.

    python benchmarks/closed_loop_research.py examples/passkey-mamba2-4m --books FOLDER --train-length 512 \
        --methods plain paper:theta=0.01 closed:theta=0.01,combine=median,n=6 --lengths 8192 16384 --trials 48

Byte-level models only. A trial hides a key in a piece of a held-out book; the model reads the prompt once, and the key
counts as found where each of its five digits is the most likely byte after those before it, which is what greedy
decoding needs. The same run gives the bits per byte of the prompt. One JSON line a trial goes to --output; a trial that
is there already is not repeated. `--report` prints the table of all of them. docs/closed_loop.md explains the methods.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support.closed_loop_methods import Keeping, Measuring, ScaledDt, Soft, scale_decay
from support.closed_loop_records import read_records, report
from support.closed_loop_specs import parse
from support.recording import Recording

from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.text import read_corpus
from vllm_longmamba.evaluate.needles import PASSKEY_QUESTION, hide, passkey_needle
from vllm_longmamba.tables import LayerCalibration, LayerThresholds
from vllm_longmamba.tables.closed_loop import combine_thresholds
from vllm_longmamba.torch_reference import Plain, Prompt, TorchModel

LAST = 2048


class Study:
    """One model: its calibration, its variants' thresholds and their trials."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = TorchModel(options.model, Plain(), options.device)
        self.train_length = options.train_length
        self.texts = [list(text.encode()) for text in read_corpus(options.text).texts]
        self.books = {path.stem: list(path.read_bytes()) for path in sorted(options.books.glob("*.txt"))}
        self.batch = options.batch
        self.cache: Path = options.output.with_suffix(".thresholds")
        self.cache.mkdir(parents=True, exist_ok=True)
        self._plain_dt: list[dict[int, torch.Tensor]] | None = None
        self._retention: dict[int, torch.Tensor] | None = None

    def plain_dt(self) -> list[dict[int, torch.Tensor]]:
        """dt of five sequences of the training length, as the engine's calibration draws them."""
        if self._plain_dt is None:
            self._plain_dt = []
            for sequence in draw_sequences(self.texts, self.train_length, 5, 0):
                recording = Recording()
                self.model.with_method(recording).read([sequence])
                self._plain_dt.append(recording.take())
        return self._plain_dt

    def paper(self, length: int, clamp_percent: float) -> dict[int, LayerThresholds]:
        """The paper's thresholds for one prompt length, and the retentions."""
        result = {}
        for layer in self.model.layers:
            calibration = LayerCalibration(layer.mixer.A, self.train_length, [self.train_length, length], clamp_percent)
            for recorded in self.plain_dt():
                calibration.add(recorded[layer.index])
            result[layer.index] = calibration.result()
        return result

    def clamp_percent(self) -> float:
        """The paper's C."""
        return 20.0 if self.model.layers[0].mixer.A.dim() == 2 else 5.0

    def is_global(self, theta: float) -> dict[int, torch.Tensor]:
        """Which channels are filtered or scaled."""
        if self._retention is None:
            paper = self.paper(2 * self.train_length, self.clamp_percent())
            self._retention = {layer: values.retention for layer, values in paper.items()}
        return {layer: retention > theta for layer, retention in self._retention.items()}

    def factors(self, spec: dict[str, Any], length: int) -> dict[int, torch.Tensor]:
        """Layer -> (channels,) factors of dt or A in prompts of one length; 1 in channels that stay as they are."""
        factor = spec["factor"] * (self.train_length / length) ** spec["power"]
        if spec["theta"] == 0:
            return {layer.index: layer.mixer.A.new_full(layer.mixer.A.shape[:1], factor) for layer in self.model.layers}
        return {
            layer: torch.where(mine, factor, 1.0).to(self.model.device, torch.float32)
            for layer, mine in self.is_global(spec["theta"]).items()
        }

    def measuring(self, spec: dict[str, Any], length: int, combine: str | None) -> Measuring:
        """A method that measures as `spec` says."""
        factor = spec["scale"] * (length / self.train_length) ** spec["power"]
        budgets, clamps = {}, {}
        for layer, mine in self.is_global(spec["theta"]).items():
            recorded = torch.stack([dt[layer] for dt in self.plain_dt()])
            clamps[layer] = recorded.quantile(1 - spec["clamp"] / 100, dim=1).mean(0)
            if spec["clamp"]:
                recorded = torch.minimum(recorded, clamps[layer])
            budget = factor * recorded.sum(1, dtype=torch.float64).mean(0)
            budgets[layer] = torch.where(mine.to(budget.device), budget, torch.inf)
        return Measuring(budgets, clamps if spec["clamp"] else None, combine, spec["soft"])

    def thresholds(self, kind: str, spec: dict[str, Any], length: int) -> dict[int, torch.Tensor]:
        """Layer -> (channels,) for prompts of one length."""
        is_global = self.is_global(spec["theta"])
        clamp_percent = self.clamp_percent() if spec["C"] < 0 else spec["C"]
        paper = {
            layer: values.dt_threshold[1].where(is_global[layer], torch.tensor(-1.0))
            for layer, values in self.paper(length, clamp_percent).items()
        }
        if kind == "paper":
            return paper
        closed = self.closed(spec, length)
        if spec["rule"] == "max":
            return {layer: torch.maximum(values, paper[layer]) for layer, values in closed.items()}
        if spec["rule"] == "min":
            return {layer: torch.minimum(values, paper[layer]) for layer, values in closed.items()}
        return closed

    def closed(self, spec: dict[str, Any], length: int) -> dict[int, torch.Tensor]:
        """Layer -> (channels,) as measured at one length; those of single sequences are kept beside the output."""
        sequences = self._sequences(length, spec["n"], spec["seed"])
        if spec["joint"]:
            method = self.measuring(spec, length, spec["combine"])
            found = self.measure(sequences, method)
        else:
            measured = {name: spec[name] for name in ("theta", "scale", "power", "clamp", "soft", "seed")}
            parts = []
            for number, sequence in enumerate(sequences):
                file = self.cache / f"{length}-{number}-{'-'.join(f'{k}{v}' for k, v in measured.items())}.pt"
                if not file.exists():
                    torch.save(self.measure([sequence], self.measuring(spec, length, None)), file)
                parts.append(torch.load(file))
            parts = parts if "only" not in spec else [parts[spec["only"]]]
            found = {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]}
        return {layer: combine_thresholds(each, spec["combine"]) for layer, each in found.items()}

    def _sequences(self, length: int, number: int, seed: int) -> list[list[int]]:
        """Six are drawn as the engine's calibration does; further ones by other seeds, none of them twice."""
        sequences: list[list[int]] = []
        for further in range(100):
            drawn = draw_sequences(self.texts, length, 6, seed + 1000 * further)
            sequences += [sequence for sequence in drawn if sequence not in sequences]
            if len(sequences) >= number:
                return sequences[:number]
        raise SystemExit(f"the calibration text has only {len(sequences)} sequences of {length} tokens, not {number}")

    @torch.inference_mode()
    def measure(self, sequences: list[list[int]], method: Measuring | Keeping) -> dict[int, torch.Tensor]:
        """What a method has found when all layers have read sequences of one length."""
        model = self.model.with_method(method)
        ids = torch.tensor(sequences, device=model.device)
        states = [layer.mixer.empty_state(len(sequences)) for layer in model.layers]
        model._run(ids, states, Prompt(ids.shape[1], 1))
        return method.found

    def trials(self, name: str, length: int, first: int, last: int) -> list[dict[str, Any]]:
        """Ask for keys.

        Returns:
            A record for each trial from `first` up to `last`.
        """
        kind, spec = parse(name)
        records = []
        for begin in range(first, last, self.batch):
            started = time.monotonic()
            asked = [self._question(length, number) for number in range(begin, min(begin + self.batch, last))]
            ids = torch.tensor([prompt + list(key.encode()) for _, _, key, prompt in asked], device=self.model.device)
            found = self._answer(kind, spec, ids, length)
            seconds = (time.monotonic() - started) / len(asked)
            for (book, depth, _, _), answer in zip(asked, found, strict=True):
                records.append({"book": book, "depth": round(depth, 4), **answer, "seconds": round(seconds, 2)})
        return records

    @torch.inference_mode()
    def _answer(self, kind: str, spec: dict[str, Any], ids: torch.Tensor, length: int) -> list[dict[str, Any]]:
        # What reads the prompt; the plain model goes on from its states.
        if kind == "plain":
            model = self.model
        elif kind == "dt":
            model = self.model.with_method(ScaledDt(self.factors(spec, length)))
        elif kind == "A":
            model = scale_decay(self.model, self.factors(spec, length))
        elif kind == "prompt":
            model = self.model.with_method(self.measuring(spec, length, None))
        else:
            filtered = Soft.from_thresholds(self.thresholds(kind, spec, length))
            filtered.soft = spec["soft"]
            model = self.model.with_method(filtered)
        states = [layer.mixer.empty_state(len(ids)) for layer in model.layers]
        prompt = Prompt(length, 1)
        hidden = model._run(ids[:, :length], states, prompt)
        bits = []
        for start in range(0, length, 1024):
            logits = model._logits(hidden[:, start : start + 1024])
            wanted = ids[:, start + 1 : start + 1 + logits.shape[1], None]
            bits.append(-logits.log_softmax(-1).gather(2, wanted)[..., 0] / math.log(2))
        all_bits = torch.cat(bits, dim=1)
        logits = torch.cat(
            [model._logits(hidden[:, -1:]), model._logits(self.model._run(ids[:, length:-1], states, None))], dim=1
        )
        digits = ids[:, length:]
        hits = (logits.argmax(-1) == digits).all(1).tolist()
        logprobs = logits.log_softmax(-1).gather(2, digits[..., None]).sum((1, 2)).tolist()
        return [
            {
                "found": hit,
                "logprob": round(logprob, 3),
                "bits": round(float(row[:-1].mean()), 4),
                "last_bits": round(float(row[-LAST - 64 : -64].mean()), 4),
            }
            for hit, logprob, row in zip(hits, logprobs, all_bits, strict=True)
        ]

    def _question(self, length: int, number: int) -> tuple[str, float, str, list[int]]:
        rng = random.Random(f"{length}-{number}")
        book = sorted(self.books)[number % len(self.books)]
        # The golden ratio: any first trials are spread over all depths.
        depth = (0.5 + number * 0.6180339887) % 1.0
        key = str(rng.randrange(10000, 100000))
        needle, question = list(passkey_needle(key).encode()), list(PASSKEY_QUESTION.encode())
        room = length - len(needle) - len(question)
        start = rng.randrange(len(self.books[book]) - room)
        return book, depth, key, hide(self.books[book][start : start + room], [(depth, needle)]) + question


def arguments() -> argparse.ArgumentParser:
    """Those of a study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--books", type=Path, required=True, help="folder of held-out books (*.txt)")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="calibration text [the package's sample]")
    parser.add_argument("--train-length", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--batch", type=int, default=6, help="prompts that are read together [%(default)s]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    return parser


def main() -> None:
    """Run what is not there yet."""
    parser = arguments()
    parser.add_argument("--methods", nargs="*", default=["plain", "paper"])
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--report", action="store_true", help="only print the table")
    options = parser.parse_args()
    lines = read_records(options.output) if options.output.exists() else []
    if options.report:
        print(report(lines))
        return
    study = Study(options)
    for method in options.methods:
        for length in options.lengths:
            done = sum(line["method"] == method and line["length"] == length for line in lines)
            for begin in range(done, options.trials, options.batch):
                records = study.trials(method, length, begin, min(begin + options.batch, options.trials))
                new = [{"method": method, "length": length, **record} for record in records]
                with options.output.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in new)
                lines += new
            cell = [line for line in lines if line["method"] == method and line["length"] == length]
            print(report(cell).splitlines()[-1], flush=True)


if __name__ == "__main__":
    sys.exit(main())
