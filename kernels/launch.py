"""Launches Triton kernels, those launched before without Triton's own preparation.

Triton looks at every argument of a launch in Python, which takes the host longer than many a kernel takes the GPU. Its
answer depends on little: types, strides and constants. So it is kept, and the compiled kernel started directly.
"""

from collections.abc import Callable
from functools import partial, reduce
from operator import attrgetter, itemgetter, or_
from typing import Any, NamedTuple

import torch

from .compile_ahead import is_compiling, schedule, wait_for

# Bytes that pointers are multiples of where Triton loads several values at once.
_ALIGNMENT = 16
# For AMD's GPUs, Triton also compiles a kernel for how much memory a tensor has; for Intel's, it is not known.
_REMEMBERS = torch.version.hip is None and not torch.xpu.is_available()
_dtype, _data_ptr = attrgetter("dtype"), torch.Tensor.data_ptr


class _Kernel(NamedTuple):
    """What is known of a kernel.

    Attributes:
        kernel: itself, which thereby keeps its identity.
        tensors: of its arguments, the tensors.
        aligned: of its arguments, the tensors whose alignment counts.
        numbers: of its arguments, the numbers that Triton compiles it for.
        constants: names of its compile-time constants.
        compiled: the compiled kernel and its constants, by device and all that decides how it is compiled.
    """

    kernel: Any
    tensors: Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]]
    aligned: Callable[[tuple[Any, ...]], tuple[torch.Tensor, ...]]
    numbers: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    constants: tuple[str, ...]
    compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]]


# By identity: Triton's own hash of a kernel takes longer than the rest.
_kernels: dict[int, _Kernel] = {}


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor) -> Callable[..., Any]:
    """What to call with a Triton kernel's arguments to launch it.

    Args:
        kernel: made by ``triton.jit``, with the compile-time constants behind all other parameters. Parameters that are
            tensors are named ``..._ptr``; numbers that change from call to call are in ``do_not_specialize``.
        grid: of the launch, up to three numbers.
        x: a tensor of the launch, on the current GPU; if it is a meta tensor, nothing is launched, but the kernel
            compiled.

    Returns:
        A function that takes the kernel's arguments in their order, constants and launch options by name.
    """
    if x.is_meta:
        return partial(schedule, kernel, grid)
    if is_compiling():
        return partial(_launch_when_compiled, kernel, grid, x)
    return partial(_launch, kernel, grid, x)


def _launch_when_compiled(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *arguments: Any, **constants: Any
) -> None:
    wait_for(kernel, arguments, constants)
    _launch(kernel, grid, x, *arguments, **constants)


def _launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *arguments: Any, **constants: Any) -> None:
    known = _kernels.get(id(kernel)) or _know(kernel)
    key = _key(known, x, arguments, constants)
    remembered = known.compiled.get(key) if key else None
    if remembered is not None:
        compiled, in_order = remembered
        compiled[(*grid, 1, 1)](*arguments, *in_order)
        return
    compiled = kernel[grid](*arguments, **constants)
    if key and compiled is not None:
        known.compiled[key] = compiled, tuple(constants[name] for name in known.constants)


def _key(
    known: _Kernel, x: torch.Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...] | None:
    """All that decides how the kernel is compiled, or None for a launch that is not to be remembered."""
    if not _REMEMBERS or reduce(or_, map(_data_ptr, known.aligned(arguments)), 0) % _ALIGNMENT:
        return None
    types = map(_dtype, known.tensors(arguments))
    return (x.get_device(), *constants, *constants.values(), *types, *known.numbers(arguments))


def _know(kernel: Any) -> _Kernel:
    tensors, aligned, numbers, constants = [], [], [], []
    # A kernel of Triton's interpreter has none, and is never kept.
    for place, parameter in enumerate(getattr(kernel, "params", ())):
        if parameter.is_constexpr:
            constants.append(parameter.name)
        elif parameter.name.endswith("_ptr"):
            tensors.append(place)
            if not parameter.do_not_specialize_on_alignment:
                aligned.append(place)
        elif not parameter.do_not_specialize:
            numbers.append(place)
    known = _Kernel(kernel, _getter(tensors), _getter(aligned), _getter(numbers), tuple(constants), {})
    _kernels[id(kernel)] = known
    return known


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the elements at some places of a tuple."""
    if len(places) < 2:
        return lambda arguments: tuple(arguments[place] for place in places)
    return itemgetter(*places)
