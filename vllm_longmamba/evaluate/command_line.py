"""What the commands `longmamba eval` and `longmamba tune` share."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextmanager
def user_errors(command: str) -> Iterator[None]:
    """Print what a user can do something about, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        console.print(f"longmamba {command}: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"longmamba {command}: interrupted; the same command goes on from here", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on the terminal: a function that begins one and returns what to call after each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def begin(description: str, total: int) -> Callable[[], None]:
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        yield begin


def numbers(text: str) -> list[int]:
    """Read "1024,2048".

    Raises:
        ValueError: something else than whole numbers, or none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected whole numbers separated by commas, such as 1024,2048, got {text!r}") from None


def real_numbers(text: str) -> list[float]:
    """Read "1e-40,0.1".

    Raises:
        ValueError: something else than numbers, or none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected numbers separated by commas, such as 1e-3,0.1, got {text!r}") from None


def longmamba_options(
    table: Path | None, min_retention: float | None, unfiltered_end: int | None = None
) -> dict[str, Any]:
    """Options of LongMamba, without those not given."""
    given = {
        "table": str(table) if table is not None else None,
        "min_retention": min_retention,
        "unfiltered_end": unfiltered_end,
    }
    return {name: value for name, value in given.items() if value is not None}


def engine_arguments(
    dtype: str,
    tokenizer: str | None,
    tensor_parallel_size: int,
    max_model_len: int | None,
    further: list[str] | None,
) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`.

    Args:
        further: "NAME=VALUE", where the value is JSON, or text if it is none; they win over the others.

    Raises:
        ValueError: one of them has no "=".
    """
    arguments: dict[str, Any] = {"dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
    if tokenizer is not None:
        arguments["tokenizer"] = tokenizer
    if max_model_len is not None:
        arguments["max_model_len"] = max_model_len
    for argument in further or []:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"--engine-arg must be NAME=VALUE, such as max_num_seqs=64, got {argument!r}")
        try:
            arguments[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            arguments[name.replace("-", "_")] = value
    return arguments


def drawn(draw: Callable[[], list[str]]) -> list[str]:
    """The pictures of a report; none, and a hint, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        console.print("no pictures: they need matplotlib (pip install 'vllm-longmamba[plot]')", markup=False)
        return []
    return draw()


def write_report(folder: Path, report: Mapping[str, Any], markdown: str) -> None:
    """Write report.json and report.md, and show the latter up to its conditions."""
    from rich.markdown import Markdown

    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    shown = markdown.partition("## Conditions")[0]
    text = "\n".join(line for line in shown.splitlines() if not line.startswith("!["))
    console.print(Markdown(text))
    console.print(f"written: {folder}/report.md, report.json, pictures", markup=False)
