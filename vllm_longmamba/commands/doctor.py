"""The `longmamba doctor` command: what is installed, what a model would get, and what is wrong. No weight is loaded."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_longmamba import __version__
from vllm_longmamba.compatibility import check_vllm_version, installed_vllm_version, is_newer

_PACKAGES = ("torch", "triton", "transformers", "numpy")
# Variables that change what an engine does. Others are not shown: they may be secrets.
_VARIABLES = (
    "VLLM_PLUGINS", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_BATCH_INVARIANT",
    "VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_SSM_CONV_STATE_LAYOUT", "TRITON_F32_DEFAULT",
    "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "XDG_CACHE_HOME",
)  # fmt: skip


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL] [ARGUMENTS]...", help="What follows `vllm serve`, MODEL first."),
    ] = None,
) -> None:
    """Check the installation and, with MODEL, what `vllm serve` with these arguments would do.

    No weight is loaded. The report is text to paste into a bug report; it holds no keys. A model on the hub is
    downloaded, as for serving. The exit code is 1 where something is wrong.
    """
    # The report is the output; warnings are for the reader all the same.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm_longmamba.commands.engine_errors import explain

    try:
        for check in (_check_software, _check_plugin, _check_patches, _check_device):
            check()
        if arguments:
            _check_model(arguments)
    except Exception as error:
        _say("WRONG", explain(error, "").removesuffix(" (--verbose shows the whole traceback)"))
        raise typer.Exit(1) from None
    typer.echo("nothing wrong was found" if arguments else "nothing wrong was found; name a model to check it, too")


def _say(label: str, text: object) -> None:
    line = f"{label + ':':<17} {text}"
    home = os.path.expanduser("~")
    # Names of users are nobody's business.
    typer.echo(line.replace(home, "~") if len(home) > 1 else line)


def _check_software() -> None:
    _say("vllm-longmamba", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    _say("vLLM", installed_vllm_version())
    _say("packages", ", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    variables = " ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ)
    _say("variables", variables or "none that matter")
    check_vllm_version()
    if _version("vllm") == "missing":
        raise ValueError("No package metadata was found for vllm")


def _check_plugin() -> None:
    from vllm import envs

    if not metadata.entry_points(group="vllm.general_plugins", name="longmamba"):
        raise ValueError("vLLM finds no plugin of this name in this environment; install the package with pip here")
    if envs.VLLM_PLUGINS is not None and "longmamba" not in envs.VLLM_PLUGINS:
        raise ValueError(
            "VLLM_PLUGINS does not name longmamba, so that vLLM does not load it; add it, or unset the variable"
        )
    from vllm_longmamba.plugin import register

    register()
    _say("plugin", "vLLM finds it")


def _check_patches() -> None:
    from vllm_longmamba.engine.drift import check_newer_vllm
    from vllm_longmamba.engine.patches import PATCHES, apply_patches

    for patch in PATCHES:
        patch.check()
    apply_patches(in_worker=True)
    _say("patches", f"all {len(PATCHES)} fit this vLLM and are applied")
    check_newer_vllm(PATCHES)
    if is_newer(installed_vllm_version()):
        _say("newer vLLM", "not tested, but it has all that LongMamba relies on by name")


def _check_device() -> None:
    import torch
    from vllm.platforms import current_platform

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        major, minor = torch.cuda.get_device_capability()
        _say("device", f"{', '.join(names)} (compute capability {major}.{minor}, CUDA {torch.version.cuda})")
    else:
        _say("device", f"{current_platform.device_name or 'none'}, {os.cpu_count()} cores")
    if not current_platform.device_type:
        raise ValueError(
            "vLLM sees no device: this is its CUDA build, and torch finds no GPU. Check nvidia-smi and the driver, or "
            "install the CPU build (docs/serving.md)"
        )


def _check_model(arguments: list[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    from vllm_longmamba.architectures import MODEL_IMPL, stock_name
    from vllm_longmamba.commands.features import family_of, read_features
    from vllm_longmamba.commands.serve_arguments import parse_serve_arguments

    given = parse_serve_arguments(arguments)
    if given.model_impl not in ("auto", MODEL_IMPL):
        raise ValueError(f"longmamba doctor checks --model-impl {MODEL_IMPL}, got {given.model_impl}; leave it out")
    given.model_impl = MODEL_IMPL
    engine = AsyncEngineArgs.from_cli_args(given)
    _say("model", given.model)
    asked = dict(engine.additional_config or {})
    config = engine.create_engine_config()
    architecture = config.model_config.architecture
    _say("class", f"{stock_name(architecture)}, served as {architecture}")
    _say("longest prompt", f"{config.model_config.max_model_len} tokens with its answer")
    family = family_of(architecture)
    for feature in (feature for feature in read_features() if feature.is_on(config)):
        _say("feature on", f"{feature.name}: {feature.entries[family].words}")
    _check_filter(config, asked)


def _check_filter(config: Any, asked: Any) -> None:
    """Which table, why this one, and what it filters."""
    from vllm_longmamba.calibration.at_start import read_stored
    from vllm_longmamba.calibration.settings import from_config
    from vllm_longmamba.options import options_from_config
    from vllm_longmamba.tables import load_table

    options = options_from_config(config.additional_config)
    if not options_from_config(asked).filter:
        _say("filter", "off, as the option filter says: the plain model is served")
        return
    if not options.filter:
        raise ValueError(
            "no prompt can be filtered: the training length covers all that --max-model-len allows. Raise it, or give "
            """the right training length, --additional-config '{"longmamba": {"train_length": N}}'"""
        )
    if options.table is not None:
        table = load_table(options.table)
        rows, length, source = table.row_lengths, table.metadata.train_length, "the table's"
        _say("table", f"{options.table} ({_origin(Path(options.table), options_from_config(asked).table)})")
    else:
        (plan, *_) = from_config(config.additional_config)
        rows, length, source = plan.row_lengths, plan.train_length, _length_source(config, options)
        made = "made at an earlier start" if read_stored(plan) is not None else "the engine makes it at its start"
        _say("table", f"{plan.store} ({made})")
    _say("training length", f"{length} tokens ({source})")
    longest = config.model_config.max_model_len
    # A table of one row filters nothing.
    first = int(rows[0] + rows[1]) // 2 + 1 if len(rows) > 1 else longest + 1
    _say("filter", f"prompts of {first} tokens and more")
    if first > longest:
        raise ValueError(f"no prompt can be filtered: --max-model-len allows {longest} tokens. Raise it")


def _length_source(config: Any, options: Any) -> str:
    from vllm_longmamba.checkpoint.train_length import is_state_spaces

    text_config = config.model_config.hf_text_config
    if options.train_length is not None:
        return "the option train_length"
    known = is_state_spaces(text_config) or text_config.model_type == "falcon_mamba"
    return "known of this model" if known else "the config's max_position_embeddings"


def _origin(path: Path, named: str | None) -> str:
    import vllm_longmamba.tables.shipped as shipped
    from vllm_longmamba.checkpoint.table_lookup import cache_folder

    if named is not None:
        return "named by the option table"
    folders = {cache_folder(): "in your cache"} | {Path(path): "comes with the package" for path in shipped.__path__}
    return folders.get(path.parent, "beside the weights") + ", made for these weights"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
