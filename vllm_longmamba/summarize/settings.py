"""Everything that a job is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from vllm_longmamba.summarize.answering import DROPS, FITS, Fit
from vllm_longmamba.summarize.backends import Sampling
from vllm_longmamba.summarize.sources import SourceOptions

PROMPT_KINDS = ("auto", "base", "chat")
STDIN_FORMATS = ("jsonl", "text")


@dataclass(frozen=True)
class JobSettings:
    """A whole job.

    Attributes:
        inputs: folders, files, glob patterns, "-".
        output: .jsonl or .parquet.
        model: name or folder; with a server: its name there, or None for the first.
        base_url: of a server; None runs the engine here.
        api_key: for the server.
        timeout_s, retry_for_s: see `ServerOptions`.
        ray_address: of a Ray cluster; None runs no Ray.
        replicas, replica_resources: see `RayOptions`.
        tokenizer: name or folder; None takes the model's.
        table, min_retention: of LongMamba.
        max_model_len: tokens of prompt and answer; None takes what the model or the server says.
        dtype, tensor_parallel_size: as for vllm serve.
        engine_args: any other arguments of vLLM's engine.
        prompt_kind: "base", "chat", or "auto": chat where the tokenizer has a chat template.
        instruction, template: see `PromptMaker`; the template's source.
        fit: what happens to documents that do not fit.
        sampling: how answers are sampled.
        concurrency: prompts under way at a time; None takes what suits the backend.
        source: how files and rows become records.
        encoding: of text files.
        stdin_format: "jsonl" or "text".
        limit: records to look at; None is all.
        overwrite, retry_errors: see `Output.open`.
    """

    inputs: tuple[str, ...]
    output: Path
    model: str | None = None
    base_url: str | None = None
    api_key: str = "none"
    timeout_s: float = 3600.0
    retry_for_s: float = 600.0
    ray_address: str | None = None
    replicas: int = 1
    replica_resources: dict[str, float] | None = None
    tokenizer: str | None = None
    table: str | None = None
    min_retention: float | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    engine_args: dict[str, Any] = field(default_factory=dict)
    prompt_kind: str = "auto"
    instruction: str | None = None
    template: str | None = None
    fit: Fit = field(default_factory=Fit)
    sampling: Sampling = field(default_factory=Sampling)
    concurrency: int | None = None
    source: SourceOptions = field(default_factory=SourceOptions)
    encoding: str = "utf-8"
    stdin_format: str = "jsonl"
    limit: int | None = None
    overwrite: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        for option, value, known in (
            ("--prompt", self.prompt_kind, PROMPT_KINDS),
            ("--fit", self.fit.mode, FITS),
            ("--drop", self.fit.drop, DROPS),
            ("--stdin-format", self.stdin_format, STDIN_FORMATS),
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
            "model": self.model,
            "model_impl": self.engine_args.get("model_impl"),
            "tokenizer": self.tokenizer,
            "table": self.table,
            "min_retention": self.min_retention,
            "max_model_len": self.max_model_len,
            "dtype": self.dtype,
            "prompt": self.prompt_kind,
            "instruction": self.instruction,
            "template": self.template,
            "fit": self.fit.mode,
            "drop": self.fit.drop,
            "reduce_instruction": self.fit.reduce_instruction,
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
            "stop": list(self.sampling.stop),
            "encoding": self.encoding,
        }

    def answer_hash(self) -> bytes:
        """16 bytes that differ where `answer_settings` do."""
        return blake3(repr(sorted(self.answer_settings().items())).encode()).digest(16)
