"""That a remembered launch hands the driver what Triton's own would: python tests/kernels/launches_without_gpu.py"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import driver_without_gpu
import torch
from test_compile_ahead import OPERATIONS

from vllm_longmamba.kernels import gated_norm, norm_parts_, small_product
from vllm_longmamba.kernels.launch import _kernels

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


def kind(argument: Any) -> Any:
    """What two launches must have in common: of a tensor, which may be scratch memory, type and layout."""
    if isinstance(argument, torch.Tensor):
        return (argument.dtype, tuple(argument.shape), argument.stride())
    return argument if isinstance(argument, int | float | tuple | str | None) else type(argument)


def launches(call: Callable[[], Any]) -> list[tuple[str, list[Any]]]:
    """Names and arguments of what a call launches."""
    driver_without_gpu.launched.clear()
    call()
    return [(name, [kind(argument) for argument in given]) for name, given in driver_without_gpu.launched]


def variants(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments, and some for which Triton compiles a kernel of its own: a start or rows off 16 bytes, a dtype."""
    x = arguments["x"]
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    rows = torch.zeros(len(x), x[0].numel() + 1, dtype=x.dtype)
    apart = rows.as_strided(x.shape, (rows.stride(0), *x.stride()[1:]))
    as_float32 = {name: arguments[name].float() for name in ("x", "z", "B", "C", "dt", "out") if name in arguments}
    without = {"dt_threshold": None} if "dt_threshold" in arguments else {}
    return [
        arguments, arguments | {"x": shifted}, arguments | {"x": apart}, arguments | as_float32, arguments | without,
    ]  # fmt: skip


def main() -> None:
    """Every variant through Triton's own launch, then through the one that remembers."""
    driver_without_gpu.use()
    operations: dict[Callable[..., Any], Callable[[int], dict[str, Any]]] = {
        **{function: arguments for function, (arguments, _) in OPERATIONS.items()},
        gated_norm: gated_norm_arguments,
        norm_parts_: norm_parts_arguments,
        small_product: small_product_arguments,
    }
    for function, arguments in operations.items():
        importlib.import_module(f"vllm_longmamba.kernels.{function.__name__.strip('_')}").uses_triton = lambda x: True
        calls = [partial(function, **given) for given in (arguments(20), *variants(arguments(300)))]
        expected = []
        for call in calls:
            _kernels.clear()
            expected.append(launches(call))
        _kernels.clear()
        for _ in range(2):
            found = [launches(call) for call in calls]
        different = {str(launched) for launched in expected}
        kept = sum(len(kernel.compiled) for kernel in _kernels.values())
        assert found == expected, function
        print(f"{function.__name__}: {len(calls)} calls, {len(different)} different, {kept} kernels kept")
        assert kept >= 3, function


if __name__ == "__main__":
    main()
