"""One engine of `evidence.py`: it makes the tables at its start, and runs units with one or the other."""

import json
import lzma
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_longmamba.architectures import MODEL_IMPL
from vllm_longmamba.calibration.settings import CalibrationSettings, to_config
from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.evaluate.comparison import ask
from vllm_longmamba.evaluate.engine import EngineRunner, FilterWorkerExtension
from vllm_longmamba.evaluate.needles import middles, needle_questions, passkey_questions
from vllm_longmamba.evaluate.perplexity import SCORED_TOKENS, Window, windows
from vllm_longmamba.evaluate.store import settings_key
from vllm_longmamba.evaluate.texts import Encoder
from vllm_longmamba.tables import load_table

from .evidence_plan import Setting, Unit
from .evidence_texts import Texts, read_documents, ruler_file

DEPTHS = 10
NEEDLES = 4
# Questions of a search have seeds of their own.
SEARCH_SEED = 1000
# Room for an answer of RULER behind the longest prompt.
ROOM = 256
_ENGINE = {"max_num_seqs": 32, "enable_prefix_caching": False}


class Tables:
    """The threshold tables of a model, each made once.

    Args:
        settings: contents of the settings file.
        folder: keeps them.
        longest: tokens of the longest prompt with its answer.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, longest: int) -> None:
        self._settings, self._folder, self._longest = settings, folder, longest

    def path(self, name: str, seed: int = 0) -> Path:
        """The file of a table."""
        calibration = self.calibration(name, seed)
        return self._folder / f"{name.replace(' ', '-')}-{seed}-{calibration.key()[:8]}.safetensors"

    def calibration(self, name: str, seed: int = 0) -> CalibrationSettings:
        """How it is made."""
        return CalibrationSettings(
            train_length=self._settings["train_length"],
            max_length=max(self._longest, DEFAULT_MAX_MODEL_LEN),
            seed=seed,
            **self._settings["tables"][name],
        )

    def at_start(self) -> list[CalibrationSettings]:
        """Of the tables that a serving engine makes, the default first."""
        names = [(name, seed) for name in self._settings["tables"] for seed in (0, *self._seeds(name))]
        return [replace(self.calibration(name, seed), store=str(self.path(name, seed))) for name, seed in names]

    def _seeds(self, name: str) -> list[int]:
        seeds: list[int] = self._settings["seeds"].get(name, [])
        return seeds


class Engine:
    """A started engine.

    Args:
        model: folder.
        settings: contents of the settings file.
        tables: of the model.
        decimamba: DeciMamba's settings as JSON; "" for LongMamba and the plain model.
        texts: to measure on, and to search on.
        ruler: folder of RULER's prompts.
        longest: tokens of the longest prompt with its answer.
    """

    def __init__(
        self,
        model: Path,
        settings: Mapping[str, Any],
        tables: Tables,
        decimamba: str,
        texts: tuple[Path, Path],
        ruler: Path,
        longest: int,
    ) -> None:
        from vllm import LLM

        self._settings, self._tables, self._ruler = settings, tables, ruler
        arguments = {**_ENGINE, "model": str(model), "max_model_len": longest, **settings["engine"]}
        if decimamba:
            config: dict[str, Any] = {"decimamba": json.loads(decimamba)}
            arguments |= {"model_impl": "decimamba"}
        else:
            config = {"longmamba": {"train_length": settings["train_length"]}, **to_config(tables.at_start())}
            arguments |= {"model_impl": MODEL_IMPL, "worker_extension_cls": f"{__name__}.EvidenceWorkerExtension"}
        started = time.monotonic()
        self._llm = LLM(additional_config=config, **arguments)
        self.seconds = time.monotonic() - started
        tokenizer = self._llm.get_tokenizer()
        self._encoder = Encoder(tokenizer)
        self._runner = EngineRunner(self._llm, self._encoder)

        def encode(texts: list[str]) -> list[list[int]]:
            # All at once, on all cores.
            encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
            return encoded

        self._texts = [Texts(read_documents(path), settings["texts"], encode) for path in texts]
        self._setting: Setting | None = None

    def describe(self) -> dict[str, Any]:
        """What the figures depend on, beside the settings."""
        import vllm

        from vllm_longmamba import __version__

        config = self._llm.llm_engine.vllm_config
        texts: Texts = self._texts[0]
        return {
            "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "vllm": vllm.__version__,
            "vllm_longmamba": __version__,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "eager": config.model_config.enforce_eager,
            "step_tokens": config.scheduler_config.max_num_batched_tokens,
            "start_seconds": round(self.seconds, 1),
            "texts": {
                kind: [book.name for book in texts.documents(kind)]
                for kind, rule in self._settings["texts"].items()
                if "digits" in rule
            },
        }

    def close(self) -> None:
        """End its processes."""
        self._llm.llm_engine.engine_core.shutdown()

    def measure(self, unit: Unit) -> dict[str, Any]:
        """Run a unit: what it found, by depth of the number, or the losses of the documents."""
        self._use(unit.setting)
        texts = self._texts[unit.searching]
        if unit.task == "text":
            return self._score(unit, texts)
        if unit.task in ("passkey", "needles"):
            return self._ask(unit, texts)
        return self._ask_ruler(unit)

    def _use(self, setting: Setting) -> None:
        if setting.decimamba or setting == self._setting:
            return
        path = self._tables.path(setting.table, setting.seed)
        theta = load_table(path).metadata.min_retention if setting.theta is None else setting.theta
        self._runner.set_filter(path, theta, setting.end)
        self._llm.collective_rpc("change_decay", args=(setting.dt_factor, setting.A_quantile))
        self._setting = setting

    def _ask(self, unit: Unit, texts: Texts) -> dict[str, Any]:
        first = SEARCH_SEED if unit.searching else 0
        seeds = range(first, first + -(-unit.count // DEPTHS))
        if unit.task == "passkey":
            questions = list(passkey_questions([unit.length], middles(DEPTHS), seeds))
        else:
            questions = list(needle_questions([unit.length], middles(DEPTHS), seeds, NEEDLES))
        haystack = texts.haystack(unit.text, unit.length)
        asked: Counter[str] = Counter()
        found: Counter[str] = Counter()
        for question, result in ask(self._runner, self._encoder, questions[: unit.count], haystack):
            asked[f"{question.depth:.2f}"] += 1
            found[f"{question.depth:.2f}"] += result["found"]
        return {
            "found": found.total(),
            "by_depth": {depth: [found[depth], asked[depth]] for depth in sorted(asked)},
        }

    def _score(self, unit: Unit, texts: Texts) -> dict[str, Any]:
        books = texts.books(self._settings["shortest_document"])
        longest = max(map(len, books.values()))
        works = [*self._settings["work"], *self._settings["search"]]
        lengths = {length for work in works if "text" in work.get("tasks", ()) for length in work["lengths"]}
        # The windows of all lengths end at the same places.
        chosen = windows(
            {name: len(tokens) for name, tokens in books.items()},
            sorted(length for length in lengths if length <= longest),
            unit.count,
        )
        jobs = ((one, one.tokens(books[one.book], [])) for one in chosen if one.length == unit.length)
        losses: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        window: Window
        for window, logprobs in self._runner.tail_logprobs(jobs, unit.length - 1):
            of_book = losses[window.book]
            of_book["windows"] += 1
            of_book["nats"] -= float(logprobs[-SCORED_TOKENS:].sum())
            of_book["tokens"] += SCORED_TOKENS
            of_book["all_nats"] -= float(logprobs.sum())
            of_book["all_tokens"] += len(logprobs)
        return {"books": {name: dict(of_book) for name, of_book in sorted(losses.items())}}

    def _ask_ruler(self, unit: Unit) -> dict[str, Any]:
        with lzma.open(ruler_file(self._ruler, unit.task, unit.length), "rt", encoding="utf-8") as content:
            questions = json.load(content)[: unit.count]
        new = self._settings["ruler_tokens"]
        jobs = ((number, self._encoder.encode_prompt(one["prompt"]), new) for number, one in enumerate(questions))
        scores = [values_found(answer, questions[number]["outputs"]) for number, answer in self._runner.complete(jobs)]
        return {"found": sum(scores), "scores": scores}


def values_found(answer: str, values: list[str]) -> float:
    """Share of the values that are in an answer: lm-eval's `string_match_all` of RULER, for numbers."""
    return sum(value in answer for value in values) / len(values)


class EvidenceWorkerExtension(FilterWorkerExtension):
    """Changes what a model forgets, in every worker, without LongMamba."""

    def change_decay(self, dt_factor: float, quantile: float) -> None:
        """MambaExtend's constant factor on dt, and A clipped from below; 1 and 0 give the model as it was.

        The scan is exp(dt A) h + dt B x, then C h + D x. With dt_factor on dt it is A times the factor, and D divided
        by it, both before an output times the factor. Mamba-2's norm takes that output's factor away again, all but the
        share of its epsilon.
        """
        from vllm_longmamba.layers.filtered_mixer import filtered_mixers

        mixers = filtered_mixers(self.get_model())
        if not hasattr(self, "_as_they_were"):
            self._as_they_were = [
                [weight.detach().clone() for weight in (mixer.A, mixer.D, mixer.out_proj.weight)] for mixer in mixers
            ]
        sizes = torch.cat([-A.float().flatten() for A, *_ in self._as_they_were])
        least = sizes.sort().values[min(int(quantile * len(sizes)), len(sizes) - 1)] if quantile else 0.0
        for mixer, (A, D, out) in zip(mixers, self._as_they_were, strict=True):
            mixer.A.data.copy_((A * dt_factor).clamp(max=-float(least)))
            mixer.D.data.copy_(D / dt_factor)
            mixer.out_proj.weight.data.copy_(out if hasattr(mixer, "norm") else out * dt_factor)


def description_key(model: str, decimamba: str) -> str:
    """Key of an engine's own record."""
    return settings_key({"model": model, "decimamba": decimamba})


def unit_record(unit: Unit, seconds: float, result: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the records."""
    return {"key": unit.key, "unit": unit.settings(), "seconds": round(seconds, 2), **result}
