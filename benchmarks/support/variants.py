"""Variants of LongMamba as contestants of `longmamba eval`, on one model in the torch reference; and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vllm_longmamba import __version__
from vllm_longmamba.calibration.sequences import draw_sequences, tokenize
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.calibration.text import read_corpus
from vllm_longmamba.checkpoint.table_lookup import Weights, find_table
from vllm_longmamba.evaluate.methods import ModelSettings
from vllm_longmamba.evaluate.statistics import Floats
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.evaluate.torch_contestant import TorchContestant, TorchRunner, tail_logprobs
from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import UNCLAMPED, LayerCalibration, TableMetadata, ThresholdTable, load_table
from vllm_longmamba.torch_reference import (
    LongMamba,
    Plain,
    Prompt,
    Reading,
    ReadingMethod,
    TorchModel,
)
from vllm_longmamba.torch_reference.checkpoint import weight_files

from .recording import Recording

# Tokens that are run at a time where they count as generated.
_SEGMENT = 256
Generated = Literal["not filtered", "filtered", "growing"]


class Subject:
    """The model whose variants are compared. What is not asked for is not loaded.

    Args:
        folder: its checkpoint, of a family that the torch reference runs.
        table: its threshold table; None searches for it as serving does.
        max_length: the longest prompt.
        device: "cpu" or "cuda"; None takes the GPU where there is one.
        segment_tokens: tokens of all prompts that the model reads at a time; None: as in `TorchModel`.
        train_length: L of a model without a table; its own tables then have the settings of `longmamba calibrate`.
    """

    def __init__(
        self,
        folder: Path,
        table: str | None,
        max_length: int,
        device: str | None = None,
        segment_tokens: int | None = None,
        train_length: int | None = None,
    ) -> None:
        self.folder = folder
        self._table, self._max_length, self._train_length = table, max_length, train_length
        self._device, self._segment_tokens = device, segment_tokens

    @cached_property
    def contestant(self) -> TorchContestant:
        """The plain model."""
        return TorchContestant(ModelSettings(str(self.folder), {}, {"max_model_len": self._max_length}), "plain")

    @cached_property
    def encoder(self) -> Encoder:
        """Its tokenizer. It reads every text once: all variants are asked about the same books."""
        encoder = self.contestant.encoder
        encoder.encode = cache(encoder.encode)  # type: ignore[method-assign]
        return encoder

    @cached_property
    def table(self) -> ThresholdTable:
        """Its table."""
        weights = Weights(self.folder, [str(file) for file in weight_files(self.folder)])
        return load_table(find_table(str(self.folder), weights, LongMambaOptions(table=self._table)))

    @cached_property
    def metadata(self) -> TableMetadata:
        """Its table's, or that of tables to come."""
        if self._train_length is None:
            return self.table.metadata
        settings = CalibrationSettings()
        return TableMetadata(
            model_id=self.folder.name,
            weights_fingerprint=self.contestant.description["weights"],
            train_length=self._train_length,
            corpus="",
            clamp_percent=0.0,
            min_retention=settings.theta,
            num_sequences=settings.num_sequences,
            seed=settings.seed,
            tool_version=f"vllm_longmamba {__version__}",
            method=UNCLAMPED,
        )

    @cached_property
    def model(self) -> TorchModel:
        """The model itself."""
        return TorchModel(self.folder, device=self._device, segment_tokens=self._segment_tokens)

    def plain(self) -> Variant:
        """The model without a filter."""
        return Variant(self, Plain(), {"filter": False})

    def filtered(
        self, table: ThresholdTable, min_retention: float | None = None, unfiltered_end: int | None = None
    ) -> Variant:
        """The model with a table and a theta, and perhaps an unfiltered end."""
        method = LongMamba.from_table(table, min_retention, unfiltered_end)
        theta = table.metadata.min_retention if min_retention is None else min_retention
        channels = table.count_global(theta)
        described = {"table": table.digest(), "min_retention": theta, "global_channels": channels}
        end = table.unfiltered_end(unfiltered_end)
        return Variant(self, method, described | ({"unfiltered_end": end} if end else {}))

    def calibrated(
        self,
        texts: Sequence[Path],
        row_lengths: Sequence[int],
        clamp_percent: float,
        seed: int = 0,
        budget: float = 1.0,
    ) -> ThresholdTable:
        """A table of the paper's method, for C = 0 of "unclamped"; sequences, L and theta are as in `metadata`.

        Args:
            texts: to calibrate on; none stands for the package's sample.
            row_lengths: prompt lengths of the rows, the first is L.
            clamp_percent: C.
            seed: chooses the sequences.
            budget: what a channel may keep, as a factor of its sum over L.
        """
        corpus, metadata = read_corpus(list(texts)), self.metadata
        settings = CalibrationSettings(clamp_percent=clamp_percent)
        tokens = tokenize(_Tokenizer(self.encoder), corpus)
        recording = Recording()
        model = self.model.with_method(recording)
        layers = {
            layer.index: LayerCalibration(
                layer.mixer.A,
                metadata.train_length,
                list(row_lengths),
                clamp_percent,
                settings.way_to_combine,
                budget,
            )
            for layer in model.layers
        }
        for sequence in draw_sequences(tokens, metadata.train_length, metadata.num_sequences, seed):
            model.read([sequence])
            for index, dt in recording.take().items():
                layers[index].add(dt)
        return ThresholdTable(
            metadata=replace(
                metadata,
                corpus=corpus.name,
                clamp_percent=float(clamp_percent),
                seed=seed,
                method=settings.method,
                combine=settings.way_to_combine,
                closed_loop=None,
                budget=budget,
            ),
            row_lengths=np.array(row_lengths),
            layers={index: calibration.result() for index, calibration in layers.items()},
        )


class Variant:
    """A contestant; see `Contestant`.

    Args:
        subject: the model.
        method: what acts on it.
        description: what tells it from other variants.
        generated: None, or how the second half of every prompt is run, which then counts as generated.
    """

    def __init__(
        self,
        subject: Subject,
        method: ReadingMethod,
        description: Mapping[str, Any],
        generated: Generated | None = None,
    ) -> None:
        self._subject, self._method, self._generated = subject, method, generated
        self.encoder = subject.encoder
        self.train_length = subject.metadata.train_length
        of_model = {**subject.contestant.description, "train_length": self.train_length}
        self.description: dict[str, Any] = {**of_model, **description}
        if generated is not None:
            self.description |= {"second_half": f"generated, {generated}"}

    @contextmanager
    def start(self) -> Iterator[TorchRunner]:
        """The model is shared: nothing is freed."""
        model = self._subject.model.with_method(self._method)
        if self._generated is None:
            yield TorchRunner(model, self.encoder)
        else:
            yield HalfGenerated(model, self.encoder, self._generated)


class HalfGenerated(TorchRunner):
    """The first half of a prompt is the prompt; the rest is run as if the model had generated it.

    Args:
        generated: how generated tokens are run: "not filtered", "filtered" as the prompt is, by the prompt's length, or
            "growing", filtered by the length of prompt and generated text so far.
    """

    def __init__(self, model: TorchModel, encoder: Any, generated: Generated) -> None:
        super().__init__(model, encoder)
        self._generated = generated

    def complete(self, jobs: Iterable[tuple[Any, list[int], int]]) -> Iterator[tuple[Any, str]]:
        """See `Runner`."""
        for (length, max_tokens), alike in groupby(jobs, key=lambda job: (len(job[1]), job[2])):
            while batch := list(islice(alike, self.together(length))):
                logits, reading = self._run([tokens for _, tokens, _ in batch], 1)
                steps: list[torch.Tensor] = []
                while len(steps) < max_tokens:
                    steps.append(logits[:, -1:].argmax(-1))
                    logits = self._append(reading, steps[-1], length + len(steps))
                for (key, *_), answer in zip(batch, torch.cat(steps, dim=1).tolist(), strict=True):
                    yield key, self._encoder.decode(answer)

    def tail_logprobs(self, jobs: Iterable[tuple[Any, list[int]]], scored: int) -> Iterator[tuple[Any, Floats]]:
        """See `Runner`."""
        for length, alike in groupby(jobs, key=lambda job: len(job[1])):
            while batch := list(islice(alike, self.together(length))):
                texts = [tokens for _, tokens in batch]
                logits, _ = self._run(texts, scored + 1)
                for (key, _), logprobs in zip(batch, tail_logprobs(logits[:, :-1], texts), strict=True):
                    yield key, logprobs

    def _run(self, texts: list[list[int]], outputs: int) -> tuple[torch.Tensor, Reading]:
        """(texts, outputs, vocabulary) logits after the last tokens, and the reading to go on from."""
        done = len(texts[0]) // 2
        reading = self.model.read([tokens[:done] for tokens in texts])
        logits = reading.logits[:, :0]
        rest = torch.tensor([tokens[done:] for tokens in texts], device=self.model.device)
        for part in rest.split(_SEGMENT, dim=1):
            done += part.shape[1]
            logits = torch.cat([logits, self._append(reading, part, done)], dim=1)[:, -outputs:]
        return logits, reading

    def _append(self, reading: Reading, part: torch.Tensor, length: int) -> torch.Tensor:
        """Run (texts, tokens) generated tokens, with which each text has `length` tokens: logits after each."""
        if self._generated == "growing":
            reading = replace(reading, prompt=Prompt(length, outputs=1))
        return reading.append(part, method_acts=self._generated != "not filtered")


class _Tokenizer:
    """An `Encoder` for `tokenize`."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokens of a text alone."""
        return list(self._encoder.encode(text))
