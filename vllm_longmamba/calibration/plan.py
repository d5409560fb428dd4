"""What an engine that found no table is going to calibrate, and where the table will be kept."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_longmamba import __version__
from vllm_longmamba.checkpoint.fingerprint import DUMMY
from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.options import expand_home
from vllm_longmamba.tables import (
    CLOSED_LOOP,
    FORMAT_VERSION,
    MEAN,
    PAPER,
    UNCLAMPED,
    ClosedLoop,
    LayerThresholds,
    TableMetadata,
    ThresholdTable,
    default_row_lengths,
    measured_lengths,
)

PLAN_KEY = "longmamba_calibration"

# To be raised where the same settings and text give another table than before.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """How a table is made of a model's weights. Plain values: it travels to all processes in vLLM's config.

    Attributes:
        model_id: name of the model, or of its folder.
        weights_fingerprint: fingerprint of its weights.
        dtype, quantization: how vLLM runs the model; both change dt a little.
        train_length: tokens of a sequence (L).
        max_length: the longest prompt that the table is made for, in tokens.
        num_sequences: number of sequences.
        clamp_percent: share of the largest dt's that are clamped (the paper's C).
        min_retention: what the table proposes as retention above which a channel is global (the paper's theta).
        seed: chooses the sequences.
        texts: paths of the text; none stands for the sample that comes with the package.
        corpus: name of the text, with a hash of its contents.
        method, combine: see `CalibrationSettings`.
        measured_lengths: tokens of the closed-loop sequences; none with another method.
        store: file that keeps the table, None where none does.
    """

    model_id: str
    weights_fingerprint: str
    dtype: str
    quantization: str | None
    train_length: int
    max_length: int
    num_sequences: int
    clamp_percent: float
    min_retention: float
    seed: int
    texts: tuple[str, ...]
    corpus: str
    method: str = PAPER
    combine: str = MEAN
    measured_lengths: tuple[int, ...] = ()
    store: str | None = None

    @property
    def row_lengths(self) -> np.ndarray:
        """(rows,) int64, the prompt lengths of the table's rows."""
        lengths: np.ndarray = default_row_lengths(self.train_length, self.max_length)
        return lengths

    def key(self) -> str:
        """32 hexadecimal digits that stand for all that decides on the table, the weights apart."""
        settings = asdict(self)
        for name in ("model_id", "weights_fingerprint", "texts", "store"):
            del settings[name]
        if self.combine == MEAN:
            # Plans are older than this setting.
            del settings["combine"]
        if self.method != CLOSED_LOOP:
            # Clamp, theta and the way to combine tell the others apart.
            del settings["method"], settings["measured_lengths"]
        content = json.dumps([settings, FORMAT_VERSION, _VERSION], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def metadata(self, text_tokens: int = 1) -> TableMetadata:
        """The metadata of the table to be made.

        Args:
            text_tokens: of the text, which a closed-loop table tells.
        """
        return TableMetadata(
            model_id=self.model_id,
            weights_fingerprint=self.weights_fingerprint,
            train_length=self.train_length,
            corpus=self.corpus,
            clamp_percent=self.clamp_percent,
            min_retention=self.min_retention,
            num_sequences=self.num_sequences,
            seed=self.seed,
            tool_version=f"vllm_longmamba {__version__}",
            method=self.method,
            combine=self.combine if self.method == UNCLAMPED else MEAN,
            closed_loop=self._closed_loop(text_tokens) if self.method == CLOSED_LOOP else None,
        )

    def _closed_loop(self, text_tokens: int) -> ClosedLoop:
        return ClosedLoop(combine=self.combine, lengths=self.measured_lengths, text_tokens=text_tokens)

    def empty_table(self, channels: dict[int, int]) -> ThresholdTable:
        """A table of the right shape that filters nothing: it holds the place until the model runs.

        Args:
            channels: layer index -> channels of the whole layer.
        """
        rows = len(self.row_lengths)
        # vLLM builds models with the GPU as torch's default device; tables live in host memory
        layers = {
            index: LayerThresholds(
                torch.zeros(count, dtype=torch.float64, device="cpu"),
                torch.tensor([[-1.0]], dtype=torch.float32, device="cpu").expand(rows, count),
            )
            for index, count in channels.items()
        }
        return ThresholdTable(metadata=self.metadata(), row_lengths=self.row_lengths, layers=layers)

    def can_filter(self, max_model_len: int) -> bool:
        """Whether any prompt of an engine can be long enough to be filtered."""
        return 2 * max_model_len > int(self.row_lengths[0] + self.row_lengths[1])


def make_plan(vllm_config: Any, options: Any, fingerprint: str) -> CalibrationPlan:
    """Decide how an engine without a table calibrates itself.

    Args:
        vllm_config: vLLM's configuration.
        options: the engine's `LongMambaOptions`.
        fingerprint: of the model's weights.

    Raises:
        ValueError: an unknown training length, an unreadable or too short text.
    """
    from vllm_longmamba.calibration.sequences import model_name
    from vllm_longmamba.calibration.settings import CalibrationSettings
    from vllm_longmamba.calibration.text import read_corpus
    from vllm_longmamba.checkpoint.table_lookup import cache_folder
    from vllm_longmamba.checkpoint.train_length import train_length

    model_config, settings = vllm_config.model_config, CalibrationSettings(method=options.calibration_method)
    length = train_length(model_config.hf_text_config, options)
    given = options.calibration_text
    texts = [expand_home(given, "calibration_text").absolute()] if given else []
    try:
        corpus = read_corpus(texts)
    except OSError as error:
        raise ValueError(f"additional_config['longmamba']: calibration_text cannot be read: {error}") from error
    plan = CalibrationPlan(
        model_id=model_name(model_config.model),
        weights_fingerprint=fingerprint,
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization,
        train_length=length,
        max_length=max(model_config.max_model_len, DEFAULT_MAX_MODEL_LEN),
        num_sequences=settings.num_sequences,
        clamp_percent=settings.clamp(model_config.architecture),
        min_retention=settings.theta,
        seed=settings.seed,
        texts=tuple(str(path) for path in texts),
        corpus=corpus.name,
        method=options.calibration_method,
        combine=settings.way_to_combine,
    )
    if plan.can_filter(model_config.max_model_len):
        _check_length(corpus.characters, plan)
        plan = replace(plan, measured_lengths=_measured_lengths(plan, vllm_config))
    if fingerprint == DUMMY:
        return plan
    store = cache_folder() / f"{fingerprint[:32]}-{plan.key()}.safetensors"
    return replace(plan, store=str(store))


def _measured_lengths(plan: CalibrationPlan, vllm_config: Any) -> tuple[int, ...]:
    """Of a closed loop, whose sequences must each run in one step of the engine to be served with."""
    if plan.method != CLOSED_LOOP:
        return ()
    # One token follows each sequence, and another one is generated.
    steps, positions = vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len
    longest = min(steps - 1, positions - 2)
    first = int(plan.row_lengths[1])
    if vllm_config.cache_config.enable_prefix_caching or longest < first:
        raise ValueError(
            "additional_config['longmamba']: calibration_method 'closed-loop' runs whole sequences in one step each, "
            f"so it needs --no-enable-prefix-caching and --max-num-batched-tokens of at least {first + 1}; give "
            "both (and as many tokens as memory allows: longer prompts are extrapolated), or make the table with "
            f"`longmamba calibrate {plan.model_id} --method closed-loop`"
        )
    return tuple(measured_lengths(plan.row_lengths, longest))


def _check_length(characters: int, plan: CalibrationPlan) -> None:
    # A token has at least one character, so this much is known before the text is tokenized.
    if characters < plan.num_sequences * plan.train_length:
        raise ValueError(
            f"calibration takes {plan.num_sequences} sequences of {plan.train_length} tokens, but {plan.corpus} has "
            f"only {characters} characters; give more text as calibration_text, "
            """--additional-config '{"longmamba": {"calibration_text": "FILE"}}', or make a table with """
            f"`longmamba calibrate {plan.model_id} --text FILE`"
        )


def plan_from_config(additional_config: Any) -> CalibrationPlan | None:
    """The plan that the front end put into vLLM's additional config, None where it found a table."""
    given = additional_config.get(PLAN_KEY) if isinstance(additional_config, dict) else None
    if given is None:
        return None
    # JSON knows no tuples.
    lengths = tuple(given.get("measured_lengths", ()))
    return CalibrationPlan(**{**given, "texts": tuple(given["texts"]), "measured_lengths": lengths})
