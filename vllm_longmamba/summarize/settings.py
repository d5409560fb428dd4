"""Everything that a job is told."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

# Of vLLM's arguments those that change answers.
_ENGINE = ("model_impl", "dtype", "quantization", "additional_config")


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
        mode: "error", "truncate" or "map-reduce".
        drop: truncate: what goes, "end" or "middle".
        reduce_instruction: map-reduce: instruction for the answers of sections; None takes that for documents.
    """

    mode: str = "error"
    drop: str = "end"
    reduce_instruction: str | None = None


@dataclass(frozen=True)
class JobSettings:
    """A whole job; the options of `longmamba summarize` explain themselves.

    Attributes:
        engine: keyword arguments of vLLM's `AsyncEngineArgs`; unused with a server.
        model: name of the model on a server; None takes the first.
        template: source of the Jinja template.
        replica_resources: Ray: of each GPU worker of a replica; None takes a GPU where the cluster has any, else a CPU.
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
    replica_resources: dict[str, float] | None = None
    tokenizer: str | None = None
    max_model_len: int | None = None
    prompt_kind: str = "auto"
    instruction: str | None = None
    template: str | None = None
    fit: Fit = field(default_factory=Fit)
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int | None = None
    text_column: str = "text"
    id_column: str | None = None
    max_bytes: int = 256 * 2**20
    encoding: str = "utf-8"
    stdin_format: str = "jsonl"
    limit: int | None = None
    overwrite: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--prompt", self.prompt_kind, ("auto", "base", "chat")),
            ("--fit", self.fit.mode, ("error", "truncate", "map-reduce")),
            ("--drop", self.fit.drop, ("end", "middle")),
            ("--stdin-format", self.stdin_format, ("jsonl", "text")),
        ):
            if value not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, got {value!r}")
        if self.model is None and self.base_url is None:
            raise ValueError("--model is needed: the name or folder of a model (or --base-url of a server)")
        if self.base_url is not None and self.ray_address is not None:
            raise ValueError("--base-url and --ray exclude each other")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise ValueError(f"--encoding: Python knows no {self.encoding!r}") from None

    def answer_settings(self) -> dict[str, Any]:
        """All settings that change an answer, as plain values: what a resumed job must have in common."""
        return {
            **{name: self.engine.get(name) for name in _ENGINE},
            "model": self.model,
            "tokenizer": self.tokenizer,
            "max_model_len": self.max_model_len,
            "prompt": self.prompt_kind,
            "instruction": self.instruction,
            "template": self.template,
            "encoding": self.encoding,
            "fit": self.fit.mode,
            "drop": self.fit.drop,
            "reduce_instruction": self.fit.reduce_instruction,
            **asdict(self.sampling),
            "stop": list(self.sampling.stop),
        }

    def answer_hash(self) -> bytes:
        """16 bytes that differ where `answer_settings` do."""
        return blake3(repr(sorted(self.answer_settings().items())).encode()).digest(16)
