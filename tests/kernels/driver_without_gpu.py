"""A driver for Triton that compiles for an H200, and notes launches instead of making them."""

from itertools import count
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Name of the kernel and all arguments that Triton's launcher was given, grid and stream in front, of each launch.
launched: list[tuple[str, tuple[Any, ...]]] = []


class Launcher:
    """In the place of the compiled code that hands arguments to the GPU."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        """Launch."""
        launched.append((self._name, arguments))


class Utilities:
    """Of the GPU's runtime."""

    _functions = count()

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Module, function (another for each compiled kernel), registers, spilled registers and the most threads."""
        return 1, next(self._functions), 32, 0, 1024

    def unload_module(self, _: int) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, _: int) -> dict[str, int]:
        """Those that Triton asks for."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    """As far as Triton needs one to compile and launch."""

    launcher_cls, utils = Launcher, Utilities()

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The only one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H200."""
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("cpu")


def use() -> None:
    """Have this process launch by it."""
    driver.set_active(Driver())
