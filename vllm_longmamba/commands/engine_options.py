"""One block of options for every command that starts an engine, and the arguments of vLLM that it makes."""

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

# Arguments of vLLM that have an option of their own, which --engine-args must not contradict.
_OWN_OPTIONS = {
    "model": "the model that the command names",
    "tokenizer": "--tokenizer",
    "max_model_len": "--max-model-len",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
}
_MIN_RETENTION = "Retention above which a channel is global (the paper's theta). (default: the table's)"
_TRAIN_LENGTH = "Number of tokens in the model's training sequences. (default: what is known of the model)"
_MAX_MODEL_LEN = "Maximum number of tokens in a prompt and its answer. (default: as for vllm serve)"
_GPUS = "Number of GPUs that share one model."
_ENGINE_ARGS = "Further arguments of vLLM's engine as a JSON object, such as '{\"max_num_seqs\": 16}'."
_OURS = "longmamba"
_STOCK = ("auto", "vllm")


def _option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Engine", **more)


def json_object(text: Any) -> Any:
    """Read the value of an option that is a JSON object, such as --engine-args; typer calls it."""
    try:
        value = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"must be a JSON object, got {text!r}")
    return value


@dataclass(frozen=True)
class EngineOptions:
    """The options, as a command gets them."""

    table: Annotated[Path | None, _option("Path of the threshold table. (default: searched, as in serving)")] = None
    min_retention: Annotated[float | None, _option(_MIN_RETENTION, min=0.0, max=1.0)] = None
    train_length: Annotated[int | None, _option(_TRAIN_LENGTH, min=2)] = None
    tokenizer: Annotated[str | None, _option("Name or folder of the tokenizer. (default: the model's)")] = None
    max_model_len: Annotated[int | None, _option(_MAX_MODEL_LEN, min=2)] = None
    dtype: Annotated[str, _option("Data type of the model, as for vllm serve.")] = "auto"
    tensor_parallel_size: Annotated[int, _option(_GPUS, "--tensor-parallel-size", "--tp", min=1)] = 1
    engine_args: Annotated[dict[str, Any], _option(_ENGINE_ARGS, metavar="JSON", parser=json_object)] = field(
        default_factory=dict
    )
    verbose: Annotated[bool, _option("Show the whole traceback if the engine does not start.", "--verbose")] = False


def with_options(
    *, without: Collection[str] = (), under: str = "", **groups: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of dataclasses, each of which it gets as one value; its errors become one line.

    Args:
        without: names of options that the command has no use for.
        under: what stands before the command's name, such as "eval ".
        groups: the command's parameter -> dataclass, whose fields with an annotation of typer's are the options.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        kind = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter.replace(kind=kind) for parameter in own if parameter.name not in groups]
        owners: dict[str, str] = {}
        for group, options in groups.items():
            hints = get_type_hints(options, include_extras=True)
            for each in fields(options):
                if each.name not in without and get_origin(hints[each.name]) is Annotated:
                    owners[each.name] = group
                    annotation = hints[each.name]
                    parameters.append(inspect.Parameter(each.name, kind, default=_default(each), annotation=annotation))

        @functools.wraps(command)
        def with_values(**given: Any) -> Any:
            values: dict[str, dict[str, Any]] = {group: {} for group in groups}
            for name, group in owners.items():
                values[group][name] = given.pop(name)
            try:
                return command(**{group: options(**values[group]) for group, options in groups.items()}, **given)
            except (ValueError, OSError, ImportError) as error:
                said, code = f"{error}{_missing_extra(error)}", 1
            except KeyboardInterrupt:
                said, code = "interrupted", 130
            said = f"longmamba {under}{command.__name__.replace('_', '-')}: {said}"
            Console(stderr=True).print(said, style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(code)

        with_values.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_values.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_values

    return decorate


def _missing_extra(error: Exception) -> str:
    """What to install where a package of an extra is missing."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        for line in metadata.requires("vllm-longmamba") or ():
            requirement = Requirement(line)
            extra = re.search(r'extra == "([^"]+)"', str(requirement.marker))
            if extra and canonicalize_name(requirement.name) == canonicalize_name(error.name.partition(".")[0]):
                return f"; install it with pip install 'vllm-longmamba[{extra[1]}]'"
    return ""


def _default(option: Any) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return inspect.Parameter.empty if option.default is MISSING else option.default


def engine_arguments(
    model: str,
    options: EngineOptions,
    *,
    longmamba: Mapping[str, Any] | None = None,
    stock_vllm: bool = False,
    **set_by_command: Any,
) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM`, `EngineArgs` and `AsyncEngineArgs`.

    What --engine-args says is merged where it adds to what the command sets (`additional_config`), and refused where it
    would undo it. Arguments that nobody set are left out.

    Args:
        model: name or folder.
        options: what the user said.
        longmamba: options of LongMamba that the command sets beside those of `options`, such as {"filter": False}.
        stock_vllm: whether --engine-args may choose vLLM's own model ({"model_impl": "auto"}).
        set_by_command: further arguments that the command sets itself.

    Raises:
        ValueError: --engine-args names what has an option of its own, what the command sets, or what vLLM has not.
    """
    given = {name.replace("-", "_"): value for name, value in options.engine_args.items()}
    if given:
        _check_names(given, set_by_command)
    implementation = given.pop("model_impl", _OURS)
    known = (_OURS, *_STOCK) if stock_vllm else (_OURS,)
    if implementation not in known:
        where = "" if stock_vllm else " here"
        raise ValueError(f"--engine-args: model_impl must be {', '.join(known)}{where}, got {implementation!r}")
    table = str(options.table) if options.table is not None else None
    ours = {"table": table, "min_retention": options.min_retention, "train_length": options.train_length}
    ours |= longmamba or {}
    config = _merged(given.pop("additional_config", {}), {name: ours[name] for name in ours if ours[name] is not None})
    if implementation != _OURS and config.get(_OURS):
        raise ValueError(
            f"--engine-args: model_impl {implementation!r} is vLLM's own model, which has no option "
            f"{', '.join(config[_OURS])}"
        )
    arguments = {
        "model": model,
        "model_impl": implementation,
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "tokenizer": options.tokenizer,
        "max_model_len": options.max_model_len,
        "additional_config": config,
        **set_by_command,
    }
    return {name: value for name, value in arguments.items() if value is not None} | given


def _merged(given: Any, own: dict[str, Any]) -> dict[str, Any]:
    """The user's `additional_config`, with options of LongMamba that are already settled."""
    theirs = given.get(_OURS, {}) if isinstance(given, dict) else None
    if not isinstance(theirs, dict):
        raise ValueError(
            f'--engine-args: additional_config must be an object such as {{"{_OURS}": {{"train_length": 2048}}}}, '
            f"got {given!r}"
        )
    for name in own.keys() & theirs.keys():
        if theirs[name] != own[name]:
            raise ValueError(
                f"--engine-args: additional_config says {name} {theirs[name]!r}, and this command has set it to "
                f"{own[name]!r}; leave it out"
            )
    merged = theirs | own
    return {name: value for name, value in given.items() if name != _OURS} | ({_OURS: merged} if merged else {})


def _check_names(given: Collection[str], set_by_command: Collection[str]) -> None:
    """Refuse names in --engine-args that have an option of their own, that a command sets, or that vLLM has not."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in given:
        if name in _OWN_OPTIONS or name in set_by_command:
            owner = _OWN_OPTIONS.get(name, "this command itself")
            raise ValueError(f"--engine-args: {name} is set by {owner}; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--engine-args: vLLM's engine has no argument {name!r}{hint}")
