"""Everything that a job is told."""

import codecs
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

# Of vLLM's arguments, and of the settings, those that change answers.
_ENGINE = ("model_impl", "dtype", "quantization", "additional_config")
_JOB = ("model", "tokenizer", "max_model_len", "prompt_kind", "instruction", "template", "encoding")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: as vLLM's `SamplingParams` of the same names."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def parameters(self) -> dict[str, Any]:
        """The parameters of a request; without a temperature there is nothing to seed."""
        given = asdict(self) | {"stop": list(self.stop)}
        needless = {"seed": self.temperature == 0, "stop": not self.stop}
        return {name: value for name, value in given.items() if not needless.get(name)}


@dataclass(frozen=True)
class Fit:
    """What happens to documents that do not fit.

    Attributes:
        mode: an error row, cut off, or answered in sections.
        drop: truncate: what goes.
        reduce_instruction: map-reduce: instruction for the answers of sections; None takes that for documents.
    """

    mode: Literal["error", "truncate", "map-reduce"] = "error"
    drop: Literal["end", "middle"] = "end"
    reduce_instruction: str | None = None


@dataclass(frozen=True)
class JobSettings:
    """A whole job; the options of `longmamba summarize` explain themselves.

    Attributes:
        engine: keyword arguments of vLLM's `AsyncEngineArgs`; unused with a server.
        model: name of the model on a server; None takes the first.
        template: source of the Jinja template.
        concurrency: prompts under way at a time; None takes what suits the backend.
        max_bytes: larger documents (after decompression) are error rows.
    """

    inputs: tuple[str, ...]
    output: Path
    engine: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    base_url: str | None = None
    api_key: str | None = None
    timeout_s: float = 3600.0
    retry_for_s: float = 600.0
    ray_address: str | None = None
    replicas: int = 1
    tokenizer: str | None = None
    max_model_len: int | None = None
    prompt_kind: Literal["auto", "base", "chat"] = "auto"
    instruction: str | None = None
    template: str | None = None
    fit: Fit = field(default_factory=Fit)
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int | None = None
    text_column: str = "text"
    id_column: str | None = None
    max_bytes: int = 256 * 2**20
    encoding: str = "utf-8"
    limit: int | None = None
    overwrite: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        if self.model is None and self.base_url is None:
            raise ValueError("--model is needed: the name or folder of a model (or --base-url of a server)")
        if self.base_url is not None and self.ray_address is not None:
            raise ValueError("--base-url and --ray exclude each other")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise ValueError(f"--encoding: Python knows no {self.encoding!r}") from None

    def answer_settings(self) -> dict[str, Any]:
        """All settings that change an answer, as plain values: what a resumed job must have in common."""
        engine = {name: self.engine.get(name) for name in _ENGINE}
        job = {name: getattr(self, name) for name in _JOB}
        return engine | job | asdict(self.fit) | asdict(self.sampling) | {"stop": list(self.sampling.stop)}

    def answer_hash(self) -> bytes:
        """16 bytes that differ where `answer_settings` do."""
        return blake3(repr(sorted(self.answer_settings().items())).encode()).digest(16)
