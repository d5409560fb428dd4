"""Compiles many launches of this project's kernels at once, before they are timed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_longmamba.kernels import compile_ahead


@contextmanager
def compile_together() -> Iterator[None]:
    """Within it, launches on meta tensors compile in many threads; at its end it waits, and prints failures."""
    module = sys.modules[compile_ahead.__module__]
    module._MOST_THREADS = 32
    yield
    for future in list(module._pending.values()):
        if future.exception() is not None:
            print(f"not compiled: {future.exception()!r}"[:300])
    module._pending.clear()
