"""How should the thresholds of five sequences become one? Keys found with tables of ten groups of sequences, in torch.

    python benchmarks/calibration_combinations.py examples/passkey-mamba2-4m --lengths 4096 --combine mean clipped

Plain torch (`vllm_longmamba.torch_reference`), without the clamp, theta 0.05; byte-level models, which are asked the
questions of calibration_groups.py. A key counts as found where each of its five digits is the most likely byte after
those before it, as greedy decoding finds it. A JSON line for each table and question goes to --output.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from calibration_groups import DEPTHS
from support.recording import Recording

from vllm_longmamba.calibration.sequences import draw_sequences
from vllm_longmamba.calibration.text import sample_corpus
from vllm_longmamba.tables import COMBINE, DEFAULT_MIN_RETENTION, UNCLAMPED, LayerCalibration, combine_thresholds
from vllm_longmamba.torch_reference import LongMamba, Plain, TorchModel

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from passkey import passkey_tasks, read_haystack  # noqa: E402

MIN_RETENTION = DEFAULT_MIN_RETENTION[UNCLAMPED]


def _geometric(each: torch.Tensor) -> torch.Tensor:
    return each.clamp(min=1e-30).log().mean(0).exp()


def _trimmed(each: torch.Tensor) -> torch.Tensor:
    return each.sort(0).values[1:-1].mean(0)


# From (sequences, channels) to (channels,).
WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"geometric": _geometric, "trimmed": _trimmed}


class Groups:
    """A model and the dt of its calibration sequences."""

    def __init__(self, folder: Path, train_length: int, groups: int) -> None:
        self.model, self.train_length, self.groups = TorchModel(folder, Plain(), "cpu"), train_length, groups
        recording = Recording()
        reader = self.model.with_method(recording)
        texts = [list(text.encode()) for text in sample_corpus().texts]
        self.dt = []
        for seed in range(groups):
            self.dt.append([])
            for sequence in draw_sequences(texts, train_length, 5, seed):
                reader.read([sequence])
                self.dt[seed].append(recording.take())

    def thresholds(self, group: int, length: int, combine: str) -> dict[int, torch.Tensor]:
        """Layer -> (channels,) for prompts of one length, -1.0 in local channels."""
        found = {}
        for layer, (each, retention) in self._sequences(group, length).items():
            values = WAYS[combine](each) if combine in WAYS else combine_thresholds(each, combine)
            found[layer] = torch.where(retention > MIN_RETENTION, values, -1.0)
        return found

    @cache  # noqa: B019
    def _sequences(self, group: int, length: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Layer -> thresholds of each sequence (sequences, channels), and mean retention; the same for all ways."""
        found = {}
        for layer in self.model.layers:
            results = []
            for dt in self.dt[group]:
                calibration = LayerCalibration(layer.mixer.A, self.train_length, [self.train_length, length], 0.0)
                calibration.add(dt[layer.index])
                results.append(calibration.result())
            each = torch.stack([result.dt_threshold[1] for result in results])
            found[layer.index] = each, torch.stack([result.retention for result in results]).mean(0)
        return found


@torch.inference_mode()
def finds(model: TorchModel, prompt: list[int], key: list[int]) -> bool:
    """Whether a model, under its method, continues a prompt with a key."""
    reading = model.read([prompt])
    after = reading.append(torch.tensor([key[:-1]]))
    return torch.cat([reading.logits[:, -1:], after], dim=1).argmax(-1)[0].tolist() == key


def main() -> None:
    """Ask, and print how many keys each group's table finds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--combine", nargs="+", default=["mean", "clipped"], choices=[*COMBINE, *WAYS])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--train-length", type=int, default=512)
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="12 questions each [%(default)s]")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    options = parser.parse_args()
    groups = Groups(options.model, options.train_length, options.groups)
    for length in options.lengths:
        seeds = [passkey_tasks(read_haystack(), [length], DEPTHS, seed=seed) for seed in range(options.seeds)]
        for combine in options.combine:
            counts = []
            for group in range(options.groups):
                method = LongMamba.from_thresholds(groups.thresholds(group, length, combine))
                model = groups.model.with_method(method)
                asked = [(seed, place, task) for seed, tasks in enumerate(seeds) for place, task in enumerate(tasks)]
                hits = [finds(model, list(task.prompt.encode()), list(task.key.encode())) for *_, task in asked]
                cell = {"length": length, "combine": combine, "group": group}
                with options.output.open("a") as file:
                    for (seed, place, _), hit in zip(asked, hits, strict=True):
                        file.write(json.dumps({**cell, "seed": seed, "place": place, "found": hit}) + "\n")
                counts.append(sum(hits))
            print(f"{combine}, {length} bytes: {counts} of {len(seeds) * len(DEPTHS)}", flush=True)


if __name__ == "__main__":
    main()
