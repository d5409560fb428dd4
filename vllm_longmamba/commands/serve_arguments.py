"""The arguments of `vllm serve`, read by vLLM's own parser."""

import re
from typing import Any, NoReturn

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


class _Parser(FlexibleArgumentParser):  # type: ignore[misc]
    """Raises what argparse would print behind a page of usage. Its parsers of subcommands are of this class, too."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            message = f"{message.partition(':')[0]}: {', '.join(word for word in message.split() if word[0] == '-')}"
        # A value may be a key.
        message = re.sub(r"(--?[\w.-]+)=\S*", r"\1", message)
        raise ValueError(f"vllm serve: {message}; `vllm serve --help=all` lists its arguments")


def parse_serve_arguments(arguments: list[str]) -> Any:
    """Parse what follows `vllm serve`.

    Args:
        arguments: the model first, unless a file behind --config names it.

    Returns:
        Namespace, with the model as `model`.

    Raises:
        ValueError: no model, an unknown argument, or a value that cannot be read.
    """
    parser = _Parser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers())
    given = parser.parse_args(["serve", *arguments])
    # A file behind --config may name it, too.
    given.model = given.model_tag or given.model
    if given.model == EngineArgs.model:
        raise ValueError("name the model first, as for `vllm serve`")
    # vLLM takes JSON that it cannot read for a string.
    if not isinstance(given.additional_config, dict):
        raise ValueError(f"--additional-config must be a JSON object, but is {given.additional_config!r}")
    return given
