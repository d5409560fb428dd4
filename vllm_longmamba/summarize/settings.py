"""Everything that a job is told: the options of `longmamba summarize`, and what they are when nobody says."""

import codecs
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from blake3 import blake3

_SOURCE, _PROMPT, _JOB, _FLEET = "Input and output", "Prompt and answer", "Job", "Server and Ray"
# Of vLLM's arguments, and of the settings, those that change answers.
_ENGINE = ("model_impl", "dtype", "quantization", "additional_config")
_ANSWERS = ("model", "tokenizer", "max_model_len", "prompt_kind", "instruction", "template", "encoding")


def _option(text: str, panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _content(path: str) -> str:
    """Read the value of --template; typer calls it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path!r}: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled: as vLLM's `SamplingParams` of the same names."""

    max_tokens: Annotated[int, _option("Maximum number of tokens in an answer.", _PROMPT, min=1)] = 256
    temperature: Annotated[
        float, _option("Temperature of the sampling; 0 takes the likeliest token.", _PROMPT, min=0.0)
    ] = 0.0
    top_p: Annotated[float, _option("Share of the probability that is sampled from.", _PROMPT, min=0.0, max=1.0)] = 1.0
    seed: Annotated[int, _option("Seed of every request.", _PROMPT)] = 0
    stop: Annotated[list[str], _option("Text that ends an answer; repeatable.", _PROMPT)] = field(default_factory=list)

    def parameters(self) -> dict[str, Any]:
        """The parameters of a request; without a temperature there is nothing to seed."""
        needless = {"seed": self.temperature == 0, "stop": not self.stop}
        return {name: value for name, value in asdict(self).items() if not needless.get(name)}


@dataclass(frozen=True)
class Fit:
    """What happens to documents that do not fit."""

    mode: Annotated[
        Literal["error", "truncate", "map-reduce"],
        _option("What happens to a document that does not fit.", _PROMPT, "--fit"),
    ] = "error"
    drop: Annotated[Literal["end", "middle"], _option("What --fit truncate cuts off.", _PROMPT)] = "end"
    reduce_instruction: Annotated[
        str | None,
        _option("What --fit map-reduce does with the answers of sections. (default: --instruction)", _PROMPT),
    ] = None


@dataclass(frozen=True)
class JobSettings:
    """A whole job.

    Attributes:
        engine: keyword arguments of vLLM's `AsyncEngineArgs`; unused with a server.
        model: name of the model; None takes the first that the server has.
        template: source of the Jinja template.
    """

    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Folders, files or patterns of .txt, .md, .html, .pdf, .jsonl and .parquet files (all but .parquet "
            "also with .gz or .zst), or - for standard input."
        ),
    ]
    output: Annotated[Path, _option("Output file: its name ends with .jsonl or .parquet.", _SOURCE, "--output", "-o")]
    text_column: Annotated[str, _option("Name of the column that holds the document.", _SOURCE)] = "text"
    id_column: Annotated[
        str | None,
        _option("Name of the column that holds the id. (default: id where a row has one, else file#row)", _SOURCE),
    ] = None
    encoding: Annotated[str, _option("Encoding of text files.", _SOURCE)] = "utf-8"
    max_bytes: Annotated[
        int, _option("Maximum number of bytes in a document; larger ones become error rows.", _SOURCE, min=1)
    ] = 256 * 2**20
    model: Annotated[str | None, _option("Name or folder of the model, as for vllm serve.", "Engine")] = None
    instruction: Annotated[str | None, _option("What to do with each document. (default: summarize it)", _PROMPT)] = (
        None
    )
    prompt_kind: Annotated[
        Literal["auto", "base", "chat"],
        _option("Kind of prompt: base, chat, or auto (chat if there is a chat template).", _PROMPT, "--prompt"),
    ] = "auto"
    template: Annotated[
        str | None,
        _option("Jinja file, with {{ document }} and {{ instruction }}.", _PROMPT, parser=_content, metavar="FILE"),
    ] = None
    overwrite: Annotated[
        bool, _option("Begin the output anew, or go on where it ends.", _JOB, "--overwrite/--resume")
    ] = False
    retry_errors: Annotated[bool, _option("Try documents with error rows again.", _JOB, "--retry-errors")] = False
    concurrency: Annotated[
        int | None,
        _option("Number of prompts under way at a time. (default: fills the engine; server: 64)", _JOB, min=1),
    ] = None
    limit: Annotated[int | None, _option("Number of records to look at. (default: all)", _JOB, min=1)] = None
    base_url: Annotated[str | None, _option("Address of an OpenAI-compatible server, up to and with /v1.", _FLEET)] = (
        None
    )
    api_key: Annotated[
        str | None, _option("Key for the server.", _FLEET, envvar="OPENAI_API_KEY", show_default=False)
    ] = None
    timeout_s: Annotated[float, _option("Seconds that an answer may take.", _FLEET, "--timeout", min=0.1)] = 3600.0
    retry_for_s: Annotated[float, _option("Seconds that the server may be away.", _FLEET, "--retry-for", min=0)] = 600.0
    ray_address: Annotated[
        str | None, _option("Address of a Ray cluster, auto, or local to start one on this machine.", _FLEET, "--ray")
    ] = None
    replicas: Annotated[int, _option("Number of engines on Ray.", _FLEET, min=1)] = 1
    fit: Fit = field(default_factory=Fit)
    sampling: Sampling = field(default_factory=Sampling)
    engine: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    max_model_len: int | None = None

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
        job = {name: getattr(self, name) for name in _ANSWERS}
        return engine | job | asdict(self.fit) | asdict(self.sampling)

    def answer_hash(self) -> bytes:
        """16 bytes that differ where `answer_settings` do."""
        return blake3(repr(sorted(self.answer_settings().items())).encode()).digest(16)
