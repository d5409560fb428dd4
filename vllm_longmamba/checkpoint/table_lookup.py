"""Finds the threshold table of a model: the option, then beside the weights, then shipped, then the user's cache.

Tables that engines made for themselves lie in the cache, too, under names of their own (see calibration/prepare.py).
"""

import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_longmamba.checkpoint.fingerprint import DUMMY, weights_fingerprint
from vllm_longmamba.checkpoint.trusted_file import UntrustedFileError, check_trusted
from vllm_longmamba.options import LongMambaOptions, expand_home
from vllm_longmamba.tables import TableError, is_table_file, load_table, read_metadata

logger = logging.getLogger("vllm.longmamba")

FILE_NAME = "longmamba.safetensors"


def cache_folder() -> Path:
    """Folder of the tables a user made: $XDG_CACHE_HOME/vllm_longmamba, by default ~/.cache/vllm_longmamba."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm_longmamba"
    except RuntimeError:
        raise ValueError(
            "the cache of threshold tables must lie in a folder of the user, but this user has no home; set HOME or "
            "XDG_CACHE_HOME"
        ) from None


def cached_table_path(fingerprint: str, quantization: str | None = None) -> Path:
    """Where the cache keeps the table that a user made of weights.

    Quantization is what vLLM makes of them when it loads them; dt differs a little, so the table is another.
    """
    return cache_folder() / f"{'-'.join(filter(None, [fingerprint[:32], quantization]))}.safetensors"


def find_table(model: str, weights: "Weights", options: LongMambaOptions) -> Path:
    """The table of a model for a tool that runs no engine: as `search_table`, or else the one an engine made last.

    Raises:
        TableError: as `search_table`, or no table was found for the model, whose name the message says.
    """
    found = search_table(weights, options)
    if found is not None:
        return found
    stored = cache_folder().glob(f"{weights.fingerprint[:32]}-*.safetensors")
    made = [path for path in stored if _matches(path, weights.fingerprint, found_in_cache=True)]
    if not made:
        raise no_table(model)
    return max(made, key=lambda path: path.stat().st_mtime)


def search_table(weights: "Weights", options: LongMambaOptions, quantization: str | None = None) -> Path | None:
    """The threshold table of a model, those apart that engines make for themselves.

    Returns:
        `options.table`, or what lies in the other places with the right format and fingerprint; None if nothing does.

    Raises:
        TableError: the named table, or the one beside the weights, is unreadable or belongs to other weights.
    """
    if options.table is not None:
        path = expand_home(options.table, "table")
        _check(path, weights.fingerprint, options)
        return path
    beside = weights.folder / FILE_NAME if weights.folder is not None else None
    if beside is not None and beside.is_file():
        # It is meant for these weights: a wrong one is an error, not passed over.
        _check(beside, weights.fingerprint, options)
        return beside
    cached = cached_table_path(weights.fingerprint, quantization)
    for path in [*_shipped_tables(), cached]:
        if _matches(path, weights.fingerprint, found_in_cache=path == cached):
            _check(path, weights.fingerprint, options)
            return path
    return None


def no_table(model: str, obstacle: str | None = None) -> TableError:
    """The error where a model has no table; `obstacle` is why an engine does not make one itself."""
    return TableError(
        f"no threshold table for {model!r} (looked beside the weights, among the shipped tables and in "
        f"{cache_folder()}){f', and the engine makes none: {obstacle}' if obstacle else ''}; make one with "
        f"`longmamba calibrate {model}`, or serve the plain model with "
        """--additional-config '{"longmamba": {"filter": false}}'"""
    )


@dataclass(frozen=True)
class Weights:
    """The weight files of a model, as vLLM's loader will read them; for dummy weights no folder and no files."""

    folder: Path | None
    files: list[str]

    @cached_property
    def fingerprint(self) -> str:
        """See `weights_fingerprint`; `DUMMY` for dummy weights."""
        return weights_fingerprint(self.files) if self.files else DUMMY


def is_threshold_table(file: Path) -> bool:
    """Whether a file among the weights is a threshold table: by its name or, where it is on disk, by its header."""
    return file.name == FILE_NAME or (file.suffix == ".safetensors" and is_table_file(file))


def locate_weights(model_config: Any, load_config: Any) -> Weights:
    """Find (and for a model on the hub, download) the weight files that vLLM will load with these configs.

    Raises:
        ValueError: a load format whose files this plugin cannot read, or no weight files.
    """
    if load_config.load_format == "dummy":
        return Weights(None, [])
    if load_config.load_format not in ("auto", "hf", "safetensors", "pt"):
        raise ValueError(
            f"--model-impl longmamba cannot check the weights of --load-format {load_config.load_format} against a "
            "threshold table; use auto, safetensors or pt"
        )
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    try:
        folder, files, _, _ = DefaultModelLoader(load_config)._prepare_weights(
            model_config.model,
            None,
            model_config.revision,
            fall_back_to_pt=True,
            allow_patterns_overrides=weight_patterns(model_config),
        )
    except RuntimeError as error:
        raise ValueError(f"{error}; they must be .safetensors or .bin files there") from error
    if not Path(model_config.model).is_dir():
        _download_table(model_config, load_config)
    return Weights(Path(folder), [file for file in files if not is_threshold_table(Path(file))])


def _download_table(model_config: Any, load_config: Any) -> None:
    """Fetch the table of a model on the hub, if it has one, next to its weights: vLLM fetches only the weights."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(
            model_config.model, FILE_NAME, revision=model_config.revision, cache_dir=load_config.download_dir
        )
    except (EntryNotFoundError, LocalEntryNotFoundError):
        # Most models have none.
        return


def weight_patterns(model_config: Any) -> list[str] | None:
    """File patterns for vLLM's loader where its own would take the threshold table for the weights.

    vLLM prefers *.safetensors over *.bin, and tables beside a pytorch_model.bin are the only .safetensors files. On the
    hub only a table of the usual name is known to be one. None means vLLM's own choice.
    """
    from vllm.transformers_utils.repo_utils import list_filtered_repo_files

    names = list_filtered_repo_files(
        model_name_or_path=model_config.model,
        allow_patterns=["*.safetensors", "*.bin"],
        revision=model_config.revision,
    )
    safetensors = [name for name in names if name.endswith(".safetensors")]
    only_tables = bool(safetensors) and all(is_threshold_table(Path(model_config.model, name)) for name in safetensors)
    return ["*.bin"] if only_tables else None


def _shipped_tables() -> list[Path]:
    import vllm_longmamba.tables.shipped as shipped

    return [path for folder in shipped.__path__ for path in sorted(Path(folder).glob("*.safetensors"))]


def _matches(path: Path, fingerprint: str, found_in_cache: bool) -> bool:
    """Whether a table that nobody named is one of these weights, whole, and in the cache nobody else's."""
    try:
        if not path.is_file():
            return False
        if found_in_cache:
            check_trusted(path)
        if read_metadata(path).weights_fingerprint != fingerprint:
            return False
        load_table(path)
    except (OSError, TableError, UntrustedFileError) as error:
        # A broken file in the cache must not keep the engine from making a new table.
        logger.warning("LongMamba: a table is passed over: %s", error)
        return False
    return True


def _check(path: Path, fingerprint: str, options: LongMambaOptions) -> None:
    metadata = read_metadata(path)
    if metadata.weights_fingerprint != fingerprint:
        raise TableError(
            f"{path}: this table was made for {metadata.model_id!r} with weights {metadata.weights_fingerprint[:12]}, "
            f"but the weights to be loaded are {fingerprint[:12]}; make a table for them with `longmamba calibrate`"
        )
    if options.train_length is not None and options.train_length != metadata.train_length:
        raise TableError(
            f"{path}: this table is for a training length of {metadata.train_length} tokens, but the option "
            f"train_length says {options.train_length}; leave the option out or calibrate again"
        )
