"""Tables of the pages."""

from collections.abc import Iterable, Sequence

from vllm_longmamba.evaluate.markdown import table


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, aligned to the left."""
    return table(head, rows, "---")
