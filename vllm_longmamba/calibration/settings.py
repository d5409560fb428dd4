"""How a threshold table is made: what a user chooses, and what the model and the engine add before it starts."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vllm_longmamba import __version__
from vllm_longmamba.architectures import is_mamba1
from vllm_longmamba.checkpoint.train_length import DEFAULT_MAX_MODEL_LEN
from vllm_longmamba.tables import (
    DEFAULT_MIN_RETENTION,
    FORMAT_VERSION,
    METHODS,
    PAPER,
    UNCLAMPED,
    LayerThresholds,
    TableMetadata,
    ThresholdTable,
    check_range,
    default_row_lengths,
)

CALIBRATION_KEY = "longmamba_calibration"

# Where the unfiltered end leaves less of a budget of 1: a smaller one was not tried.
LEAST_BUDGET = 0.25

# To be raised where the same settings and text give another table than before.
_VERSION = 3
# What decides nothing about the table beside the other fields.
_NOT_IN_KEY = ("model_id", "weights_fingerprint", "texts", "text_column", "store")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How a table is made. Plain values: one object travels through vLLM's configuration to all processes.

    Attributes:
        num_sequences: calibration sequences, each of the training length; the paper takes 5.
        clamp_percent: share of the largest dt's that are clamped (the paper's C). By default 20 for Mamba-1 and 5 for
            Mamba-2 layers, the paper's choice for Mamba-1.4B and Mamba2-1.3B; 0 with the method "unclamped".
        min_retention: what the table proposes as retention above which a channel is global (the paper's theta). By
            default that of the method.
        train_length: the paper's L; by default what is known of the model.
        max_length: the longest prompt the table is made for, in tokens.
        seed: chooses the sequences.
        method: "paper"; or "unclamped", the same without the clamp, and with the clipped mean over the sequences. By
            default "unclamped", or "paper" where clamp_percent is given.
        budget: what a channel may keep before the unfiltered end, as a factor of its sum of dt over the training
            length. By default what the end leaves of 1, but at least 0.25; 1 with the method "paper".
        unfiltered_end: as many of a prompt's last tokens are not filtered; serving may change it. By default half of
            the training length; 0 with the method "paper".
        texts: paths of the text; none stands for the sample that comes with the package.
        text_column: the field or column of .jsonl and .parquet files that holds the text.
        store: file that keeps the table, None where none does.
        model_id: name of the model, or of its folder. This and what follows is filled in by the engine's front end,
            as are the defaults above: see prepare.py.
        weights_fingerprint: fingerprint of the weights, empty until then.
        dtype, quantization: how vLLM runs the model; both change dt a little.
        corpus: name of the text, with a hash of its contents.

    Raises:
        ValueError: an unknown method; a budget that is not above 0; an unfiltered_end below 0; a clamp with
            "unclamped"; a budget with "paper".
    """

    num_sequences: int = 5
    clamp_percent: float | None = None
    min_retention: float | None = None
    train_length: int | None = None
    max_length: int = DEFAULT_MAX_MODEL_LEN
    seed: int = 0
    method: str | None = None
    budget: float | None = None
    unfiltered_end: int | None = None
    texts: tuple[str, ...] = ()
    text_column: str = "text"
    store: str | None = None
    model_id: str = ""
    weights_fingerprint: str = ""
    dtype: str = ""
    quantization: str | None = None
    corpus: str = ""

    def __post_init__(self) -> None:
        # JSON knows no tuples.
        object.__setattr__(self, "texts", tuple(self.texts))
        for name in ("budget", "unfiltered_end"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, "CalibrationSettings")
        if self.method is None:
            object.__setattr__(self, "method", PAPER if self.clamp_percent else UNCLAMPED)
        if self.method not in METHODS:
            raise ValueError(f"CalibrationSettings: method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == UNCLAMPED and self.clamp_percent:
            raise ValueError(
                f"CalibrationSettings: the method {UNCLAMPED} has no clamp, got clamp_percent {self.clamp_percent}; "
                f"leave it out, or take the method {PAPER}"
            )
        if self.method == PAPER and self.budget not in (None, 1):
            raise ValueError(
                f"CalibrationSettings: the method {PAPER} has no budget but that of the training length, got "
                f"{self.budget}; leave it out, or take the method {UNCLAMPED}"
            )

    @property
    def theta(self) -> float:
        """`min_retention`, or the method's where none is given."""
        assert self.method is not None
        return DEFAULT_MIN_RETENTION[self.method] if self.min_retention is None else self.min_retention

    def clamp(self, architecture: str) -> float:
        """`clamp_percent`; where none is given, the method's: the paper has 20 for Mamba-1.4B and 5 for Mamba2-1.3B."""
        if self.clamp_percent is not None:
            return self.clamp_percent
        if self.method == UNCLAMPED:
            return 0.0
        return 20.0 if is_mamba1(architecture) else 5.0

    def end(self) -> int:
        """`unfiltered_end`; where none is given, the method's. The training length must be known."""
        if self.unfiltered_end is not None:
            return self.unfiltered_end
        assert self.train_length is not None
        return 0 if self.method == PAPER else self.train_length // 2

    def budget_before_end(self) -> float:
        """`budget`; where none is given, the method's. The training length must be known."""
        if self.budget is not None:
            return self.budget
        if self.method == PAPER:
            return 1.0
        assert self.train_length is not None
        return max(1 - self.end() / self.train_length, LEAST_BUDGET)

    @property
    def row_lengths(self) -> np.ndarray:
        """(rows,) int64, the prompt lengths of the table's rows; the training length must be known."""
        assert self.train_length is not None
        lengths: np.ndarray = default_row_lengths(self.train_length, self.max_length)
        return lengths

    def can_filter(self, max_model_len: int) -> bool:
        """Whether any prompt of an engine can be long enough to be filtered: above the training length, and answered.

        So the engine has room for a calibration sequence, which at_start.py makes one token longer and has answered.
        """
        first, second = map(int, self.row_lengths[:2])
        return max_model_len > first + 1 and 2 * max_model_len > first + second

    def key(self) -> str:
        """32 hexadecimal digits that stand for all that decides on the table, the weights apart."""
        settings = {name: value for name, value in asdict(self).items() if name not in _NOT_IN_KEY}
        content = json.dumps([settings, FORMAT_VERSION, _VERSION], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def metadata(self) -> TableMetadata:
        """The metadata of the table to be made."""
        assert self.method is not None
        assert self.train_length is not None
        assert self.clamp_percent is not None
        return TableMetadata(
            model_id=self.model_id,
            weights_fingerprint=self.weights_fingerprint,
            train_length=self.train_length,
            corpus=self.corpus,
            clamp_percent=self.clamp_percent,
            min_retention=self.theta,
            num_sequences=self.num_sequences,
            seed=self.seed,
            tool_version=f"vllm_longmamba {__version__}",
            method=self.method,
            budget=self.budget_before_end(),
            unfiltered_end=self.end(),
        )

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


def to_config(settings: list[CalibrationSettings]) -> dict[str, Any]:
    """The entry of vLLM's additional config by which an engine makes these tables at its start."""
    return {CALIBRATION_KEY: [asdict(each) for each in settings]}


def from_config(additional_config: Any) -> list[CalibrationSettings]:
    """The tables that an engine makes at its start; none where the front end found one.

    Args:
        additional_config: `VllmConfig.additional_config`, a dict or None.

    Raises:
        ValueError: the entry is not what `to_config` makes.
    """
    given = additional_config.get(CALIBRATION_KEY, []) if isinstance(additional_config, dict) else []
    try:
        return [CalibrationSettings(**each) for each in given]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"additional_config[{CALIBRATION_KEY!r}] is set by vllm_longmamba itself ({error}); leave it out, and set "
            "options in additional_config['longmamba']"
        ) from error
