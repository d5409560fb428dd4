"""What the commands that evaluate say on the terminal, and how they read lists."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Number = TypeVar("Number", int, float)

console = Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """Bars on the terminal: a function that begins one and returns what to call after each step."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:

        def begin(description: str, total: int) -> Callable[[], None]:
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        yield begin


def read_numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Read "1024,2048" (int) or "1e-40,0.1" (float), the value of an option.

    Raises:
        ValueError: something else than such numbers, none, or a whole number that comes twice.
    """
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers separated by commas, such as 1024,2048"
        if kind is float:
            what = "numbers separated by commas, such as 1e-3,0.1"
        raise ValueError(f"{option}: expected {what}, got {text!r}") from None
    # It would count twice in the totals. Of real numbers one may be the smallest and the largest.
    if kind is int and len(set(numbers)) < len(numbers):
        raise ValueError(f"{option}: every number may be given once, got {text}")
    return numbers


def read_lengths(option: str, text: str) -> list[int]:
    """Read numbers of tokens, such as "1024,2048", the value of an option.

    Raises:
        ValueError: as `read_numbers`, or a number below 1.
    """
    lengths = read_numbers(option, text, int)
    if min(lengths) < 1:
        raise ValueError(f"{option}: every length must be 1 token or more, got {text}")
    return lengths


def read_names(option: str, text: str, known: Collection[str]) -> list[str]:
    """Read "plain,longmamba", the value of an option.

    Raises:
        ValueError: a name that is not among the known ones, or one that comes twice.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown are {', '.join(unknown) or 'empty names'}; known are {', '.join(known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{option}: every name may be given once, got {text}")
    return names
