"""That a remembered launch is the one Triton itself would make: python tests/kernels/launches_without_gpu.py"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import driver_without_gpu
import torch
from test_compile_ahead import OPERATIONS, where

from vllm_longmamba.kernels import causal_conv1d, filter_dt_, gated_norm, norm_parts_, small_product
from vllm_longmamba.kernels.launch import _kernels, _key, _know

BFLOAT16 = {"dtype": torch.bfloat16}


def gated_norm_arguments(tokens: int) -> dict[str, Any]:
    """Gate: part of a projection."""
    x, weight = torch.zeros(tokens, 256, **BFLOAT16), torch.zeros(256, **BFLOAT16)
    return {"x": x, "gate": torch.zeros(tokens, 600, **BFLOAT16)[:, :256], "weight": weight}


def norm_parts_arguments(tokens: int) -> dict[str, Any]:
    """Without weights, as Falcon Mamba's."""
    return {"x": torch.zeros(tokens, 48, **BFLOAT16), "rank": 16}


def small_product_arguments(tokens: int) -> dict[str, Any]:
    """Without norm and convolution."""
    return {"x": torch.zeros(min(tokens, 2), 256, **BFLOAT16), "weight": torch.zeros(512, 256, **BFLOAT16)}


def convolution_arguments(tokens: int) -> dict[str, Any]:
    """With the filter."""
    channels, nheads = 256, 4
    filters = where(tokens, nheads, "cpu")
    return {
        "x": torch.zeros(tokens, channels, **BFLOAT16), "weight": torch.zeros(channels, 4, **BFLOAT16), "bias": None,
        "conv_state": torch.zeros(3, 3, channels, **BFLOAT16).transpose(1, 2), **filters,
        "dt": torch.zeros(tokens, nheads, **BFLOAT16), "dt_bias": torch.zeros(nheads),
    }  # fmt: skip


def filter_arguments(tokens: int) -> dict[str, Any]:
    """A row for each token."""
    dt, rows = torch.zeros(tokens, 32, **BFLOAT16), torch.zeros(tokens, dtype=torch.int32)
    return {"dt": dt, "dt_bias": torch.zeros(32), "dt_threshold": torch.zeros(4, 32), "token_rows": rows}


WRAPPERS: dict[Callable[..., Any], Callable[[int], dict[str, Any]]] = {
    **{function: arguments for function, (arguments, _) in OPERATIONS.items()},
    causal_conv1d: convolution_arguments,
    filter_dt_: filter_arguments,
    gated_norm: gated_norm_arguments,
    norm_parts_: norm_parts_arguments,
    small_product: small_product_arguments,
}


def variants(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments, and some for which Triton compiles a kernel of its own: a start or rows off 16 bytes, a dtype."""
    name = "x" if "x" in arguments else "dt"
    x = arguments[name]
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    rows = torch.zeros(len(x), x[0].numel() + 1, dtype=x.dtype)
    apart = rows.as_strided(x.shape, (rows.stride(0), *x.stride()[1:]))
    as_float32 = {name: arguments[name].float() for name in ("x", "z", "B", "C", "dt", "out") if name in arguments}
    without = {"dt_threshold": None} if "dt_threshold" in arguments and name == "x" else {}
    return [
        arguments, arguments | {name: shifted}, arguments | {name: apart}, arguments | as_float32, arguments | without,
    ]  # fmt: skip


class KeyCheck:
    """Launches nothing: arguments with one key must be of one kind for Triton, and in the order that it hands over."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[Any, ...], str] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], x: torch.Tensor) -> Callable[..., None]:
        """In the place of `launch.launch`."""
        return partial(self._compare, kernel, x)

    def _compare(self, kernel: Any, x: torch.Tensor, *given: Any, **constants: Any) -> None:
        known = _know(kernel)
        bound, specialized, options = kernel.device_caches[0][4](*given, **constants)
        handed = (*given, *(constants[name] for name in known.constants))
        assert all(one is other for one, other in zip(handed, bound.values(), strict=True)), kernel.__name__
        kind = f"{specialized} {options}"
        if key := _key(known, x, given, constants):
            assert self.kinds.setdefault((id(kernel), *key), kind) == kind, kernel.__name__


def check_keys() -> None:
    """Of every wrapper."""
    for function, arguments in WRAPPERS.items():
        name, check = function.__name__.strip("_"), KeyCheck()
        launches_of = importlib.import_module(f"vllm_longmamba.kernels.{name}_triton")
        real, launches_of.launch = launches_of.launch, check.launch
        for tokens in (1, 20, 300):
            for given in variants(arguments(tokens)):
                function(**given)
        launches_of.launch = real
        kinds = len(set(check.kinds.values()))
        print(f"{name}: {len(check.kinds)} keys, {kinds} kinds")
        assert kinds > 2, name


def kind(argument: Any) -> Any:
    """What two launches must have in common: of a tensor, which may be scratch memory, type and layout."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, tuple(argument.shape), argument.stride())
    return argument if isinstance(argument, int | float | tuple | str | None) else type(argument)


def launched(call: Callable[[], Any]) -> list[tuple[str, list[Any]]]:
    """Names and arguments of what a call launches."""
    driver_without_gpu.launched.clear()
    call()
    return [(name, [kind(argument) for argument in given]) for name, given in driver_without_gpu.launched]


def check_launches() -> None:
    """The second launch must hand the driver what the first did, which was Triton's own."""
    for function in (gated_norm, norm_parts_):
        calls = [partial(function, **given) for given in (WRAPPERS[function](20), *variants(WRAPPERS[function](300)))]
        expected = []
        for call in calls:
            _kernels.clear()
            expected.append(launched(call))
        _kernels.clear()
        for _ in range(2):
            found = [launched(call) for call in calls]
        assert found == expected, function
        kept = sum(len(known.compiled) for known in _kernels.values())
        print(f"{function.__name__}: {kept} kernels kept")
        assert kept == 3, function


if __name__ == "__main__":
    driver_without_gpu.use()
    for wrapper in WRAPPERS:
        module = importlib.import_module(f"vllm_longmamba.kernels.{wrapper.__name__.strip('_')}")
        module.uses_triton = lambda x: True
    check_keys()
    check_launches()
