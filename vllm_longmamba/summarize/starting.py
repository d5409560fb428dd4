"""Starts the backend that a job's settings name."""

from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_longmamba.summarize.backends import Backend
from vllm_longmamba.summarize.settings import JobSettings

DEFAULT_SERVER_CONCURRENCY = 64
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


async def start_backend(settings: JobSettings, console: Console) -> Backend:
    """Start the engine, reach the server, or start the replicas.

    Args:
        settings: of the job.
        console: is told what takes long.

    Raises:
        ValueError: vLLM refuses the arguments.
        JobStoppedError: server or cluster cannot be reached.
    """
    if settings.base_url is not None:
        return await _connect(settings, console)
    arguments = arguments_of(settings)
    if settings.ray_address is not None:
        from vllm_longmamba.summarize.ray_data import RayBackend, RayOptions

        options = RayOptions(settings.ray_address, settings.replicas, settings.replica_resources, settings.timeout_s)
        console.print(f"starting {settings.replicas} engines on Ray ({settings.ray_address})", highlight=False)
        return RayBackend(arguments, settings.sampling, options, settings.concurrency)
    from vllm_longmamba.summarize.engine import EngineBackend

    console.print(f"starting the engine with {settings.model}", highlight=False)
    return EngineBackend(arguments, settings.sampling, settings.concurrency)


def arguments_of(settings: JobSettings) -> dict[str, Any]:
    """Arguments of the engine for a job."""
    from vllm_longmamba.summarize.engine import engine_arguments

    assert settings.model is not None
    return engine_arguments(
        settings.model,
        {"table": settings.table, "min_retention": settings.min_retention},
        settings.max_model_len,
        settings.dtype,
        settings.tensor_parallel_size,
        settings.tokenizer,
        settings.engine_args,
    )


async def _connect(settings: JobSettings, console: Console) -> Backend:
    from vllm_longmamba.summarize.server import ServerOptions, connect

    assert settings.base_url is not None
    options = ServerOptions(
        settings.base_url, settings.model, settings.api_key, settings.timeout_s, settings.retry_for_s
    )
    backend, root = await connect(options, settings.sampling, settings.concurrency or DEFAULT_SERVER_CONCURRENCY)
    backend.tokenizer = load_tokenizer(settings.tokenizer, root, console)
    return backend


def load_tokenizer(given: str | None, guess: str, console: Console) -> Any:
    """A tokenizer by name or folder.

    Args:
        given: what the user named; it must be there.
        guess: where it may be otherwise; without it, nobody counts tokens.
        console: is told if it is not there.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    if given is None and not _is_here(guess):
        console.print(f"no tokenizer at {guess!r}: tokens are counted by the server only", highlight=False)
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given or guess, local_files_only=given is None)
    except Exception as error:
        option = "--tokenizer" if given is not None else "the tokenizer of the served model,"
        raise ValueError(f"{option} {given or guess}: {error}") from None


def _is_here(name: str) -> bool:
    """Whether a tokenizer is a folder on this machine, or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in _TOKENIZER_FILES)
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _TOKENIZER_FILES)
    except ValueError:
        # Not the form of a name on the hub.
        return False
