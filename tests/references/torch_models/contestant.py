"""Runs the tasks through the torch reference: DeciMamba, and plain and LongMamba on the same terms, in float32."""

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch

from vllm_longmamba import __version__
from vllm_longmamba.checkpoint.table_lookup import Weights, find_table
from vllm_longmamba.evaluate.engine import EngineContestant
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.runner import Key
from vllm_longmamba.evaluate.statistics import Floats
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.options import options_from_config
from vllm_longmamba.tables import load_table

from .checkpoint import read_config, weight_files
from .methods import LongMamba, ReadingMethod
from .model import TorchModel
from .settings import decimamba_from


class TorchContestant:
    """A model in the torch reference.

    Args:
        settings: the model must be a folder. Of the engine's arguments the tokenizer and LongMamba's options count.
        method: what acts on it: "plain", "longmamba" or "decimamba".

    Attributes:
        description: weights, method and its settings, versions.
        encoder: the model's tokenizer, the same as in the engine.

    Raises:
        ValueError: no folder of a family that the reference runs, no table, no or wrong settings of DeciMamba.
    """

    def __init__(self, settings: ModelSettings, method: str) -> None:
        self._folder = Path(settings.model)
        if not self._folder.is_dir():
            raise ValueError(
                f"--method: {method} runs in the torch reference, which takes the folder of a checkpoint, but there is "
                f"no folder {settings.model}; download the model into one"
            )
        try:
            config = read_config(self._folder)
        except ValueError as error:
            raise ValueError(f"--method: {method} runs in the torch reference: {error}") from error
        engine = EngineContestant(settings.plain, filters=False, starting=settings.starting)
        self.encoder: Encoder = engine.encoder
        self.description: dict[str, Any] = {
            "weights": engine.description["weights"],
            "dtype": "float32",
            "torch_reference": method,
            "torch": torch.__version__,
            "vllm_longmamba": __version__,
        }
        self._method: ReadingMethod | None = None
        if method == "longmamba":
            self._use_table(settings.longmamba)
        elif method == "decimamba":
            self._use_decimamba(settings.decimamba, config["num_hidden_layers"])

    def _use_table(self, arguments: Mapping[str, Any]) -> None:
        options = options_from_config(arguments.get("additional_config"))
        weights = Weights(self._folder, [str(file) for file in weight_files(self._folder)])
        table = load_table(find_table(str(self._folder), weights, options))
        self._method = LongMamba.from_table(table, options.min_retention, options.unfiltered_end)
        end = table.unfiltered_end(options.unfiltered_end)
        self.description |= {
            "table": table.digest(),
            "train_length": table.metadata.train_length,
            "min_retention": (
                options.min_retention if options.min_retention is not None else table.metadata.min_retention
            ),
            "clamp_percent": table.metadata.clamp_percent,
            **({"unfiltered_end": end} if end else {}),
        }

    def _use_decimamba(self, given: Mapping[str, Any] | None, layers: int) -> None:
        method = decimamba_from(given)
        method.check(dict.fromkeys(range(layers), 0))
        self._method = method
        self.description["decimamba"] = method.to_dict()

    @contextmanager
    def start(self) -> Iterator["TorchRunner"]:
        """Load the model, on the GPU where there is one; its memory is given back at the end."""
        # An engine that is forked from a process whose torch has run on several threads hangs.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        runner = TorchRunner(TorchModel(self._folder, self._method or "plain"), self.encoder)
        try:
            yield runner
        finally:
            runner.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class TorchRunner:
    """A loaded model.

    Attributes:
        model: the reference, with its method.
    """

    def __init__(self, model: TorchModel, encoder: Encoder) -> None:
        self.model = model
        self._encoder = encoder

    def complete(self, jobs: Iterable[tuple[Key, list[int], int]]) -> Iterator[tuple[Key, str]]:
        """See `Runner`. Answers end before the token that ends a text."""
        stop = () if self._encoder.end_of_text is None else (self._encoder.end_of_text,)
        for (length, max_tokens), alike in groupby(jobs, key=lambda job: (len(job[1]), job[2])):
            while batch := list(islice(alike, self.together(length))):
                answers = self.model.generate([tokens for _, tokens, _ in batch], max_tokens, stop)
                for (key, *_), answer in zip(batch, answers, strict=True):
                    yield key, self._encoder.decode(answer)

    def tail_logprobs(self, jobs: Iterable[tuple[Key, list[int]]], scored: int) -> Iterator[tuple[Key, Floats]]:
        """See `Runner`."""
        for length, alike in groupby(jobs, key=lambda job: len(job[1])):
            while batch := list(islice(alike, self.together(length))):
                texts = [tokens for _, tokens in batch]
                logits = self.model.read(texts, outputs=scored + 1).logits[:, :-1]
                for (key, _), logprobs in zip(batch, tail_logprobs(logits, texts), strict=True):
                    yield key, logprobs

    def together(self, length: int) -> int:
        """How many prompts of a length the model reads at once: as many as fill its segment."""
        return 1 if self.model.method.needs_whole_prompt else max(1, self.model.segment_tokens // length)

    def close(self) -> None:
        """Forget the model; whoever still holds the runner does not hold its memory then."""
        del self.model


def tail_logprobs(logits: torch.Tensor, texts: Sequence[Sequence[int]]) -> list[Floats]:
    """Log-probabilities of texts' last tokens.

    Args:
        logits: (texts, scored, vocabulary), each before the token that it predicts.
        texts: token ids; all of one length.

    Returns:
        (scored,) float64 of each text.
    """
    ids = torch.tensor([list(text[-logits.shape[1] :]) for text in texts], device=logits.device)
    return list(logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].double().cpu().numpy())
