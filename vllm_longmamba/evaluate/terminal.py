"""What the commands that evaluate say on the terminal, and how they read lists of numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
