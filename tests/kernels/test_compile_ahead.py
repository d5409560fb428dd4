"""Kernels for longer prompts are compiled in the background, for just what their launches will ask for."""

import importlib
import os
import threading
from typing import Any

import pytest
import torch

from vllm_longmamba.kernels import (
    PER_DECODE_TOKEN,
    causal_conv1d_update,
    compile_ahead,
    selective_scan,
    selective_state_update,
    ssd,
)
from vllm_longmamba.kernels.compile_ahead import PER_PROMPT_TOKEN, meta_calls
from vllm_longmamba.kernels.dispatch import UNALIGNED
from vllm_longmamba.kernels.launch import launch

pytest.importorskip("triton")
ahead = importlib.import_module("vllm_longmamba.kernels.compile_ahead")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def scan_arguments(tokens: int, device: str = "cpu") -> dict[str, Any]:
    """As a Mamba-1 mixer has them: x of its own, z half of a projection, B and C parts of another."""
    d_inner, d_state, rank = 256, 16, 32
    projection = torch.zeros(tokens, rank + 2 * d_state, dtype=torch.bfloat16, device=device)
    _, B, C = projection.split([rank, d_state, d_state], dim=-1)
    x, dt, out = torch.zeros(3, tokens, d_inner, dtype=torch.bfloat16, device=device)
    return {
        "x": x, "dt": dt, "A": -torch.ones(d_inner, d_state, device=device), "B": B, "C": C,
        "D": torch.ones(d_inner, device=device),
        "z": torch.zeros(tokens, 2 * d_inner, dtype=torch.bfloat16, device=device)[:, d_inner:],
        "dt_bias": torch.zeros(d_inner, device=device), "state": torch.zeros(3, d_inner, d_state, device=device),
        **where(tokens, d_inner, device), "out": out,
    }  # fmt: skip


def ssd_arguments(tokens: int, device: str = "cpu") -> dict[str, Any]:
    """As a Mamba-2 mixer has them: x, B and C parts of the convolution's result, dt of the projection."""
    nheads, headdim, d_state = 8, 64, 128
    inner = nheads * headdim
    x, B, C = torch.zeros(tokens, inner + 2 * d_state, dtype=torch.bfloat16, device=device).split(
        [inner, d_state, d_state], dim=-1
    )
    return {
        "x": x.view(tokens, nheads, headdim),
        "dt": torch.zeros(tokens, 3 * inner, dtype=torch.bfloat16, device=device)[:, -nheads:],
        "A": -torch.ones(nheads, device=device), "B": B.view(tokens, 1, -1), "C": C.view(tokens, 1, -1),
        "D": torch.ones(nheads, device=device), "dt_bias": torch.zeros(nheads, device=device),
        "state": torch.zeros(3, nheads, headdim, d_state, device=device), **where(tokens, nheads, device),
        "checkpoints": torch.zeros(1, dtype=torch.int32, device=device),
        "checkpoint_state": torch.zeros(1, nheads, headdim, d_state, device=device),
        "out": torch.zeros(tokens, nheads, headdim, dtype=torch.bfloat16, device=device),
    }  # fmt: skip


def where(tokens: int, channels: int, device: str) -> dict[str, torch.Tensor]:
    """One sequence, in slot 1, that is filtered by row 1."""
    integers = {"dtype": torch.int32, "device": device}
    return {
        "query_start_loc": torch.tensor([0, tokens], **integers),
        "state_indices": torch.tensor([1], **integers),
        "has_initial_state": torch.zeros(1, dtype=torch.bool, device=device),
        "dt_threshold": torch.zeros(4, channels, device=device),
        "seq_rows": torch.tensor([1], **integers),
        "seq_prompt_tokens": torch.tensor([tokens], **integers),
    }


def update_arguments(tokens: int, device: str = "cpu") -> dict[str, Any]:
    """As a Mamba-1 mixer has them at decode: slots are a column of a table of blocks."""
    arguments = scan_arguments(tokens, device)
    slots = torch.zeros(tokens, 3, dtype=torch.int32, device=device)
    for name in ("query_start_loc", "has_initial_state", "seq_rows", "seq_prompt_tokens"):
        del arguments[name]
    rows = torch.zeros(tokens, dtype=torch.int32, device=device)
    return arguments | {"state_indices": slots[:, 0], "token_rows": rows}


def conv_update_arguments(tokens: int, device: str = "cpu") -> dict[str, Any]:
    """As a Mamba-2 mixer has them at decode: x is part of a projection, slots are a column of a table of blocks."""
    channels, kind = 4352, {"dtype": torch.bfloat16, "device": device}
    return {
        "x": torch.zeros(tokens, 2 * channels, **kind)[:, channels:], "weight": torch.zeros(channels, 4, **kind),
        "bias": torch.zeros(channels, **kind), "conv_state": torch.zeros(3, 3, channels, **kind).transpose(1, 2),
        "state_indices": torch.zeros(tokens, 3, dtype=torch.int32, device=device)[:, 0],
    }  # fmt: skip


METADATA = ("query_start_loc", "has_initial_state", "seq_rows", "seq_prompt_tokens", "token_rows", "checkpoints")
OPERATIONS = {
    selective_scan: (scan_arguments, PER_PROMPT_TOKEN),
    ssd: (ssd_arguments, PER_PROMPT_TOKEN),
    selective_state_update: (update_arguments, PER_DECODE_TOKEN),
    causal_conv1d_update: (conv_update_arguments, PER_DECODE_TOKEN),
}


class Kernel:
    """Stands for a Triton kernel; compiling waits until the test says so."""

    def __init__(self) -> None:
        self.go_on, self.compiled, self.launched = threading.Event(), [], []

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> None:
        """Compile."""
        assert self.go_on.wait(10)
        self.compiled.append((arguments, grid, constants))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.launched.append((len(self.compiled), arguments, grid, constants))


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines without a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.usefixtures("no_device")
def test_a_launch_waits_for_what_is_being_compiled() -> None:
    kernel, other = Kernel(), Kernel()
    x, missing = torch.zeros(4), torch.zeros(4, device="meta")
    for BLOCK in (1, 2, 1):
        launch(kernel, (1,), missing)(missing, 3, BLOCK=BLOCK)
    launch(other, (5,), x)(x, 3, BLOCK=1)
    assert [entry[0] for entry in other.launched] == [0]

    threading.Timer(0.2, kernel.go_on.set).start()
    launch(kernel, (7,), x)(x, 3, BLOCK=2)
    launch(kernel, (8,), x)(x, 3, BLOCK=1)
    assert kernel.launched[0][0] >= 1
    assert [entry[1:] for entry in kernel.launched] == [((x, 3), (7,), {"BLOCK": 2}), ((x, 3), (8,), {"BLOCK": 1})]
    assert sorted(constants["BLOCK"] for _, _, constants in kernel.compiled) == [1, 2]
    assert not ahead._pending


@pytest.mark.usefixtures("no_device")
def test_a_failed_compilation_is_left_to_the_launch() -> None:
    kernel, missing = Kernel(), torch.zeros(4, device="meta")
    kernel.warmup = lambda *arguments, **constants: 1 / 0  # type: ignore[method-assign]
    launch(kernel, (1,), missing)(missing)
    launch(kernel, (1,), torch.zeros(4))(torch.zeros(4))
    assert len(kernel.launched) == 1


@pytest.mark.parametrize("function", OPERATIONS)
def test_calls_on_meta_tensors_ask_for_what_real_ones_do(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernel, constants, types, strides and which tensor begins where another ends: for all lengths, from one."""
    arguments, per_token = OPERATIONS[function]
    module = importlib.import_module(f"vllm_longmamba.kernels.{function.__name__}_triton")
    asked: list[tuple[Any, ...]] = []

    def ask(kernel: Any, grid: tuple[int, ...], x: torch.Tensor) -> Any:
        def record(*given: Any, **constants: Any) -> None:
            kinds = (one.dtype if isinstance(one, torch.Tensor) else type(one) for one in given)
            asked.append((kernel, *kinds, *sorted(constants.items())))

        return record

    monkeypatch.setattr(module, "launch", ask)
    monkeypatch.setattr(module, "is_nvidia", lambda device: False, raising=False)
    monkeypatch.setattr(module, "supports_dependent_launch", lambda device: False, raising=False)
    monkeypatch.setattr(
        importlib.import_module(f"vllm_longmamba.kernels.{function.__name__}"), "uses_triton", lambda x: True
    )
    for call in meta_calls(arguments(20), 5000, per_token):
        function(**call)
    expected, asked = set(asked), []
    assert len(expected) >= 2
    for tokens in (1, 2, 64, 65, 300, 1025, 4096, 5000):
        function(**arguments(tokens))
    assert set(asked) == expected


def test_nothing_is_compiled_for_a_cpu() -> None:
    compile_ahead(lambda **call: pytest.fail("called"), scan_arguments(4), 100)


def test_kernels_do_not_depend_on_where_metadata_begins() -> None:
    """They would be compiled again while requests wait: a step's metadata are parts of longer tensors."""
    seen = set()
    for name in (
        "causal_conv1d_triton", "causal_conv1d_update_triton", "filter_dt_triton", "selective_scan_triton",
        "selective_scan_chunks_triton", "selective_state_update_triton", "ssd_blocks_triton", "ssd_checkpoint_triton",
        "ssd_scan_triton",
    ):  # fmt: skip
        for kernel in vars(importlib.import_module(f"vllm_longmamba.kernels.{name}")).values():
            if getattr(kernel, "__name__", "").endswith("_kernel") and hasattr(kernel, "params"):
                unaligned = {one.name for one in kernel.params if one.do_not_specialize_on_alignment}
                metadata = {one.name for one in kernel.params} & set(UNALIGNED)
                assert unaligned == metadata, kernel.__name__
                seen |= metadata
    assert seen == set(UNALIGNED) or os.environ.get("TRITON_INTERPRET") == "1"


@needs_gpu
@pytest.mark.parametrize("function", OPERATIONS)
def test_nothing_is_left_to_compile(function: Any) -> None:
    """On a GPU: after `compile_ahead`, calls of any length find all kernels, wherever their metadata begin."""
    from triton import knobs

    arguments, per_token = OPERATIONS[function]
    compile_ahead(function, arguments(20, "cuda"), 5000, per_token)
    for future in list(ahead._pending.values()):
        assert future.exception() is None
    compiled = []
    hook, knobs.runtime.jit_post_compile_hook = (
        knobs.runtime.jit_post_compile_hook,
        lambda **what: compiled.append(what),
    )
    try:
        for tokens in (1, 20, 65, 1025, 5000):
            call = arguments(tokens, "cuda")
            for name in METADATA:
                if name in call:
                    call[name] = torch.cat([call[name][:1], call[name]])[1:]
            function(**call)
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    torch.cuda.synchronize()
    assert not compiled
