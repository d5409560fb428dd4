"""One block of options for every command that starts an engine, and the arguments of vLLM that it makes."""

import difflib
import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_PANEL = "Engine"
# Arguments of vLLM that have an option of their own, which --engine-args must not contradict.
_OWN_OPTIONS = {
    "model": "the model that the command names",
    "tokenizer": "--tokenizer",
    "max_model_len": "--max-model-len",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
}
_OURS = "longmamba"
_STOCK = ("auto", "vllm")


def _json_object(text: Any) -> Any:
    """Read the value of --engine-args; typer calls it."""
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f'must be a JSON object such as {{"max_num_seqs": 16}}, got {text!r}')
    return value


@dataclass(frozen=True)
class EngineOptions:
    """The options, as a command gets them.

    Attributes:
        table: path of a threshold table; None searches, as serving does.
        min_retention: the paper's theta; None takes the table's.
        train_length: tokens of the sequences that the model was trained on; None takes what is known of the model.
        tokenizer: name or folder; None takes the model's.
        max_model_len: tokens of a prompt and its answer; None takes the model's.
        dtype: as for vllm serve.
        tensor_parallel_size: GPUs of one engine.
        engine_args: further arguments of vLLM's engine.
        verbose: whether a failed start shows the whole traceback.
    """

    table: Annotated[
        Path | None,
        typer.Option(
            "--table", help="Path of the threshold table. (default: searched, as in serving)", rich_help_panel=_PANEL
        ),
    ] = None
    min_retention: Annotated[
        float | None,
        typer.Option(
            "--min-retention",
            min=0.0,
            max=1.0,
            help="Retention above which a channel is global (the paper's theta). (default: the table's)",
            rich_help_panel=_PANEL,
        ),
    ] = None
    train_length: Annotated[
        int | None,
        typer.Option(
            "--train-length",
            min=2,
            help="Number of tokens in the model's training sequences. (default: what is known of the model)",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer", help="Name or folder of the tokenizer. (default: the model's)", rich_help_panel=_PANEL
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(
            "--max-model-len",
            min=2,
            help="Maximum number of tokens in a prompt and its answer. (default: as for vllm serve)",
            rich_help_panel=_PANEL,
        ),
    ] = None
    dtype: Annotated[
        str, typer.Option("--dtype", help="Data type of the model, as for vllm serve.", rich_help_panel=_PANEL)
    ] = "auto"
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "--tp",
            min=1,
            help="Number of GPUs that share one model.",
            rich_help_panel=_PANEL,
        ),
    ] = 1
    engine_args: Annotated[
        dict[str, Any],
        typer.Option(
            "--engine-args",
            metavar="JSON",
            parser=_json_object,
            help="Further arguments of vLLM's engine as a JSON object, such as '{\"max_num_seqs\": 16}'.",
            rich_help_panel=_PANEL,
        ),
    ] = field(default_factory=dict)
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", help="Show the whole traceback if the engine does not start.", rich_help_panel=_PANEL
        ),
    ] = False


def with_engine_options(*, without: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the options of `EngineOptions`; its parameter `engine` gets them as one value.

    Args:
        without: names of `EngineOptions` that the command has no use for, such as "table" where it makes one.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(EngineOptions, include_extras=True)
        names = [each.name for each in fields(EngineOptions) if each.name not in without]
        options = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default="{}" if name == "engine_args" else getattr(EngineOptions, name),
                annotation=hints[name],
            )
            for name in names
        ]

        @functools.wraps(command)
        def with_options(**given: Any) -> Any:
            engine = EngineOptions(**{name: given.pop(name) for name in names})
            return command(engine=engine, **given)

        own = inspect.signature(command, eval_str=True)
        kept = [parameter for parameter in own.parameters.values() if parameter.name != "engine"]
        with_options.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=[parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in kept] + options
        )
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in [*kept, *options]}
        del with_options.__wrapped__  # type: ignore[attr-defined]
        return with_options

    return decorate


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
    would undo it.

    Args:
        model: name or folder.
        options: what the user said.
        longmamba: options of LongMamba that the command sets beside those of `options`, such as {"filter": False}.
        stock_vllm: whether --engine-args may choose vLLM's own model ({"model_impl": "auto"}).
        set_by_command: further arguments that the command sets itself.

    Returns:
        The arguments; those that nobody set are left out.

    Raises:
        ValueError: --engine-args names what has an option of its own, what the command sets, or what vLLM has not.
    """
    given = {name.replace("-", "_"): value for name, value in options.engine_args.items()}
    _refuse_own(given, set_by_command)
    _refuse_unknown(given)
    implementation = given.pop("model_impl", _OURS)
    if implementation != _OURS and not (stock_vllm and implementation in _STOCK):
        known = f"{_OURS}, {', '.join(_STOCK)}" if stock_vllm else f"{_OURS} here"
        raise ValueError(f"--engine-args: model_impl must be {known}, got {implementation!r}")
    ours = {
        "table": str(options.table) if options.table is not None else None,
        "min_retention": options.min_retention,
        "train_length": options.train_length,
        **(longmamba or {}),
    }
    own = {name: value for name, value in ours.items() if value is not None}
    config = merged_config(given.pop("additional_config", {}), own)
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


def merged_config(given: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The `additional_config` of vLLM, with options of LongMamba that are already settled.

    Args:
        given: the user's `additional_config`.
        own: options of LongMamba.

    Raises:
        ValueError: it is no object, or says something else about one of these options.
    """
    if not isinstance(given, dict) or not isinstance(given.get(_OURS, {}), dict):
        raise ValueError(
            f'--engine-args: additional_config must be an object such as {{"{_OURS}": {{"train_length": 2048}}}}, '
            f"got {given!r}"
        )
    theirs = given.get(_OURS, {})
    contradicted = [name for name in own if name in theirs and theirs[name] != own[name]]
    if contradicted:
        name = contradicted[0]
        raise ValueError(
            f"--engine-args: additional_config says {name} {theirs[name]!r}, and this command has set it to "
            f"{own[name]!r}; leave it out"
        )
    merged = theirs | dict(own)
    return {**given, _OURS: merged} if merged else {name: value for name, value in given.items() if name != _OURS}


def _refuse_own(given: Mapping[str, Any], set_by_command: Mapping[str, Any]) -> None:
    for name in given:
        if name in _OWN_OPTIONS:
            raise ValueError(f"--engine-args: {name} is set by {_OWN_OPTIONS[name]}; leave it out")
        if name in set_by_command:
            raise ValueError(f"--engine-args: {name} is set by this command itself; leave it out")


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    if not given:
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--engine-args: vLLM's engine has no argument {name!r}{hint}")
