"""Counts what a job does, shows it while it runs, and reports it in the end."""

import time
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

from vllm_longmamba.summarize.records import Row

_LINE_INTERVAL_S = 60.0


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: names may look like markup."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


class Progress:
    """Counters of a job, and the bar or lines that show them.

    Args:
        console: where to show.

    Attributes:
        total_bytes: size of all input files; 0 where nobody knows.
        documents: rows written, error rows included.
        dropped: records under way that were given up.
        done_before: records that had a row already.
        repetitions: records that came again, with the same id and content.
    """

    def __init__(self, console: Console) -> None:
        self.documents = self.dropped = self.done_before = self.repetitions = 0
        self._tokens: Counter[str] = Counter()
        self._fitted: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._console, self.total_bytes = console, 0
        self._answered_bytes = self._passed_bytes = 0.0
        self._started: float | None = None
        self._ended: float | None = None
        self._line_due = time.monotonic() + _LINE_INTERVAL_S
        self._bar: RichProgress | None = None

    def begin(self) -> None:
        """Start the clock, and show the bar where there is a terminal."""
        self._started = time.monotonic()
        if self._console.is_terminal:
            columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
            self._bar = RichProgress(*columns, console=self._console, refresh_per_second=2)
            self._bar.add_task(self.state(), total=self.total_bytes or None)
            self._bar.start()

    def end(self) -> None:
        """Stop the clock, and take the bar away."""
        self._ended = time.monotonic()
        if self._bar is not None:
            self._bar.stop()

    def answered(self, row: Row, weight: float) -> None:
        """Count a row that was written.

        Args:
            row: the row.
            weight: bytes of the input that it stands for.
        """
        self.documents += 1
        self._tokens.update(prompt=row.prompt_tokens, output=row.output_tokens)
        self._fitted.update(truncated=row.dropped_tokens > 0, reduced=row.steps is not None)
        if row.error is not None:
            self._errors[row.error.partition(":")[0]] += 1
        self._answered_bytes += weight
        if self._bar is not None:
            done = self._answered_bytes + self._passed_bytes
            self._bar.update(self._bar.task_ids[0], completed=done, description=self.state())
        elif time.monotonic() > self._line_due:
            self._line_due = time.monotonic() + _LINE_INTERVAL_S
            say(self._console, self.state())

    def skipped(self, weight: float, *, repeated: bool) -> None:
        """Count a record that has a row already, or that came again."""
        self.repetitions += repeated
        self.done_before += not repeated
        self._passed_bytes += weight

    def state(self) -> str:
        """One line: how much is done, how fast, and how long it will take."""
        seconds = self._seconds()
        rate = self.documents / max(seconds, 1e-9)
        parts = [f"{self.documents:,} documents", f"{rate:.3g}/s", f"{self._tokens_per_second():,.0f} tokens/s"]
        if self._errors:
            parts.append(f"{self._errors.total():,} errors")
        if self.done_before:
            parts.append(f"{self.done_before:,} done before")
        left = self.total_bytes - self._answered_bytes - self._passed_bytes
        if self.total_bytes and self._answered_bytes:
            parts.append(f"ETA {duration(max(left, 0.0) / self._answered_bytes * seconds)}")
        return ", ".join(parts)

    def report(self) -> list[str]:
        """Closing lines: counts, and errors by kind."""
        lines = [
            f"{self.documents:,} rows written in {duration(self._seconds())}: {self._tokens['prompt']:,} prompt and "
            f"{self._tokens['output']:,} output tokens, {self._tokens_per_second():,.0f} tokens/s"
        ]
        for count, what in (
            (self.done_before, "done before"),
            (self.repetitions, "left out: the same id and text once more"),
            (self._fitted["truncated"], "cut off to fit"),
            (self._fitted["reduced"], "answered by map-reduce"),
            (self.dropped, "given up while under way"),
        ):
            if count:
                lines.append(f"{count:,} {what}")
        if self._errors:
            lines.append(f"{self._errors.total():,} error rows: {counts(self._errors)}")
        return lines

    def _seconds(self) -> float:
        return 0.0 if self._started is None else (self._ended or time.monotonic()) - self._started

    def _tokens_per_second(self) -> float:
        return self._tokens.total() / max(self._seconds(), 1e-9)


def counts(kinds: Counter[str]) -> str:
    """Such as "3 unreadable, 1 refused"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def duration(seconds: float) -> str:
    """Seconds as "1 h 02 min", "3 min 04 s" or "5.6 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"
