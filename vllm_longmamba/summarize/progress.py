"""Counts what a job does, shows it while it runs, and reports it in the end."""

import time
from collections import Counter
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from vllm_longmamba.summarize.records import Row

_LINE_INTERVAL_S = 60.0
# Of the bytes to answer, before which nobody can tell how long they take: the first documents may be tiny.
_ETA_SHARE = 0.01


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: names may look like markup. If it cannot be printed, a job goes on without it."""
    # A SystemExit: what rich makes of a reader that is gone.
    with suppress(OSError, SystemExit):
        console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


class Progress:
    """Counters of a job, and the bar that shows them; where there is no terminal, a line a minute.

    Attributes:
        total_bytes: size of all input files; 0 where nobody knows.
        counts: of rows, tokens, and what became of records.
        console: where it is shown.
        errors: error rows by kind.
    """

    def __init__(self, console: Console) -> None:
        self.total_bytes = 0
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.console = console
        self._answered_bytes = self._passed_bytes = 0.0
        self._started = self._line_due = time.monotonic()
        self._ended: float | None = None
        columns = (SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal)
        self._task = self._bar.add_task("")

    def begin(self) -> None:
        """Start the clock, and show the bar."""
        self._started = time.monotonic()
        self._line_due = self._started + _LINE_INTERVAL_S
        self._bar.update(self._task, total=self.total_bytes or None, description=self.state())
        self._bar.start()

    def end(self) -> None:
        """Stop the clock, and take the bar away."""
        self._ended = time.monotonic()
        self._bar.stop()

    def answered(self, row: Row, weight: float) -> None:
        """Count a row that was written."""
        counted = {"rows": 1, "prompt": row.prompt_tokens, "output": row.output_tokens}
        self.counts.update(counted, truncated=row.dropped_tokens > 0, reduced=row.steps is not None)
        if row.error is not None:
            self.errors[row.error.partition(":")[0]] += 1
        self._answered_bytes += weight
        if not self._bar.disable:
            done = self._answered_bytes + self._passed_bytes
            self._bar.update(self._task, completed=done, description=self.state())
        elif time.monotonic() > self._line_due:
            self._line_due = time.monotonic() + _LINE_INTERVAL_S
            say(self.console, self.state())

    def skipped(self, weight: float, *, repeated: bool) -> None:
        """Count a record that has a row already, or that came again."""
        self.counts["repeated" if repeated else "done before"] += 1
        self._passed_bytes += weight

    def state(self) -> str:
        """One line: how much is done, how fast, and how long it will take."""
        seconds, rows = self._seconds(), self.counts["rows"]
        parts = [f"{rows:,} documents", f"{rows / seconds:.3g}/s", f"{self._tokens_per_second():,.0f} tokens/s"]
        if self.errors:
            parts.append(f"{self.errors.total():,} errors")
        if self.counts["done before"]:
            parts.append(f"{self.counts['done before']:,} done before")
        to_answer = self.total_bytes - self._passed_bytes
        if self._answered_bytes > _ETA_SHARE * to_answer > 0:
            left = max(to_answer - self._answered_bytes, 0.0)
            parts.append(f"ETA {duration(left / self._answered_bytes * seconds)}")
        return ", ".join(parts)

    def report(self) -> list[str]:
        """Closing lines: counts, and errors by kind."""
        counts = self.counts
        lines = [
            f"{counts['rows']:,} rows written in {duration(self._seconds())}: {counts['prompt']:,} prompt and "
            f"{counts['output']:,} output tokens, {self._tokens_per_second():,.0f} tokens/s",
            *self.passed_over(),
        ]
        more = {
            "cut off to fit": counts["truncated"],
            "answered by map-reduce": counts["reduced"],
            "given up while under way": counts["dropped"],
            f"error rows: {listed(self.errors)}": self.errors.total(),
        }
        return lines + [f"{count:,} {what}" for what, count in more.items() if count]

    def passed_over(self) -> list[str]:
        """Lines about records that are not answered in this run."""
        names = {"done before": "done before", "repeated": "left out: the same id and text once more"}
        return [f"{self.counts[name]:,} {what}" for name, what in names.items() if self.counts[name]]

    def _seconds(self) -> float:
        return max((self._ended or time.monotonic()) - self._started, 1e-9)

    def _tokens_per_second(self) -> float:
        return (self.counts["prompt"] + self.counts["output"]) / self._seconds()


def listed(kinds: Counter[str]) -> str:
    """Such as "3 unreadable, 1 refused"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def duration(seconds: float) -> str:
    """Seconds as "1 h 02 min", "3 min 04 s" or "5.6 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
