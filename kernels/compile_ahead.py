"""Compiles in the background what longer prompts will need, while an engine starts.

Triton compiles a kernel at its first launch, for some seconds each, and a prompt of thousands of tokens needs others
than the few tokens of vLLM's warm-up. A call of one of this package's wrappers on meta tensors launches nothing and
compiles what the same call would launch on a GPU; compilers run in threads and hardly hold the interpreter's lock.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

# Names of arguments with a row per token.
PER_PROMPT_TOKEN = frozenset({"x", "dt", "B", "C", "z", "out"})
PER_DECODE_TOKEN = PER_PROMPT_TOKEN | {"state_indices", "token_rows"}

# Elements of a meta tensor that stands for any storage.
_ANY = 1 << 40
_MOST_THREADS = 4

# What is being compiled, by kernel, types of its arguments and compile-time constants.
_pending: dict[tuple[Any, ...], Future[None]] = {}
_scheduled: set[tuple[Any, ...]] = set()


def compile_ahead(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    most_tokens: int,
    per_token: Collection[str] = PER_PROMPT_TOKEN,
) -> None:
    """Start to compile what a wrapper would launch for 1 to `most_tokens` tokens; returns at once.

    Does nothing for tensors that are not on a GPU, nor for a second call with arguments of the same layout.

    Args:
        function: a wrapper of this package whose kernels go through `launch.launch`.
        arguments: of a call of it, by name.
        most_tokens: the most that a call will have.
        per_token: names of the arguments with a row per token.
    """
    if not arguments["x"].is_cuda:
        return
    layout = (function, most_tokens, *(_layout(argument) for argument in arguments.values()))
    if layout in _scheduled:
        return
    _scheduled.add(layout)
    for call in meta_calls(arguments, most_tokens, per_token):
        function(**call)


def meta_calls(
    arguments: Mapping[str, Any], most_tokens: int, per_token: Collection[str] = PER_PROMPT_TOKEN
) -> Iterator[dict[str, Any]]:
    """The arguments of `compile_ahead` without memory, for all powers of two and the most tokens of a call."""
    for tokens in sorted({*(1 << power for power in range(most_tokens.bit_length())), most_tokens}):
        bases: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        rows = {name: tokens if name in per_token else None for name in arguments}
        yield {name: _on_meta(argument, rows[name], bases) for name, argument in arguments.items()}


def schedule(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start to compile a kernel for such arguments, unless that was begun before.

    Args:
        kernel: made by ``triton.jit``.
        grid: of the launch.
        arguments: of the kernel; meta tensors, or tensors of the GPU.
        constants: compile-time constants and launch options.
    """
    key = _key(kernel, arguments, constants)
    if key not in _scheduled:
        _scheduled.add(key)
        _pending[key] = _threads().submit(_compile, kernel, grid, torch.cuda.current_device(), arguments, constants)


def _compile(kernel: Any, grid: tuple[int, ...], device: int, arguments: tuple[Any, ...], constants: Any) -> None:
    # A thread starts on the first GPU, and compiled kernels belong to one.
    torch.cuda.set_device(device)
    kernel.warmup(*arguments, grid=grid, **constants)


def is_compiling() -> bool:
    """Whether something is, so that a launch has to `wait_for` it."""
    return bool(_pending)


def wait_for(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
    """Wait until a kernel is compiled for such arguments, if that has begun."""
    future = _pending.get(_key(kernel, arguments, constants))
    if future is not None:
        # If it failed, the launch compiles again, and says why.
        future.exception()
    for key in [key for key, future in _pending.items() if future.done()]:
        del _pending[key]


def _key(kernel: Any, arguments: tuple[Any, ...], constants: Mapping[str, Any]) -> tuple[Any, ...]:
    types = (argument.dtype if isinstance(argument, torch.Tensor) else type(argument) for argument in arguments)
    return (kernel, *types, *sorted(constants.items()))


def _layout(argument: Any) -> tuple[Any, ...] | None:
    """All of a tensor that kernels are compiled for, but for how many tokens, sequences, rows or slots there are."""
    if not isinstance(argument, torch.Tensor):
        return None
    return (argument.dtype, *argument.shape[1:], *argument.stride())


def _on_meta(argument: Any, rows: int | None, bases: dict[tuple[int, torch.dtype], torch.Tensor]) -> Any:
    """A tensor without memory, of another number of rows if given; parts of one tensor stay so."""
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = (argument.untyped_storage().data_ptr(), argument.dtype)
    if storage not in bases:
        bases[storage] = torch.empty(_ANY, dtype=argument.dtype, device="meta")
    shape = argument.shape if rows is None else (rows, *argument.shape[1:])
    return bases[storage].as_strided(shape, argument.stride(), argument.storage_offset())


@cache
def _threads() -> ThreadPoolExecutor:
    count = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))
    return ThreadPoolExecutor(count, thread_name_prefix="longmamba-compile")
