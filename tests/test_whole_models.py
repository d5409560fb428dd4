"""benchmarks/whole_models.py: what its profiler counts, its report, and kernels against their floors."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Names that the profiler had on an H200.
SEEN = {
    "nvjet_sm90_tst_128x8_64x12_4x1_v_bz_TNT": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, ...>": "products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>": "products",
    "_layer_norm_fwd_1pass_kernel": "gated norm",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_silu_0": "gated norm",
    "triton_red_fused_fused_add_rms_norm_0": "add and norm",
    "triton_red_fused_fused_add_rms_norm_1": "add and norm",
    "Memcpy DtoH (Device -> Pinned)": "rest",
    "memcpy32_post": "rest",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>": "rest",
    "_gumbel_sample_kernel": "rest",
    "_combine_sampled_and_draft_tokens_kernel": "rest",
}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def own_kernels() -> dict[str, str]:
    """Names of this project's kernels, and the class that its file says."""
    classes = {"causal": "convolution", "small": "products", "gated": "gated norm", "norm": "rest"}
    found = {}
    for file in (ROOT / "kernels").glob("*_triton.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found[node.name] = classes.get(file.name.partition("_")[0], "scan or SSD")
    return found


def test_names_of_kernels_have_classes() -> None:
    from support.prefill_floors import kernel_class

    expected = SEEN | own_kernels()
    assert "_ssd_segment_state_kernel" in expected
    assert {name: kernel_class(name, 1.0) for name in expected} == expected


def test_products_that_not_every_layer_has_are_rest() -> None:
    from support.prefill_floors import by_class

    # Two steps of four layers: every layer's, attention's, the lm head's; norms of most layers, and of few.
    kernels = {"nvjet_a": (80.0, 16), "nvjet_b": (40.0, 6), "nvjet_c": (20.0, 2)}
    kernels |= {"triton_red_fused_add_rms_norm_0": (12.0, 6), "triton_red_fused_add_rms_norm_1": (4.0, 2)}
    kernels |= {"_ssd_scan_kernel": (8.0, 8), "_causal_conv1d_kernel": (2.0, 8), "copy": (1.0, 1)}
    times = by_class(kernels, layers=4, steps=2)
    assert times == {
        "products": 20.0, "scan or SSD": 2.0, "convolution": 0.5, "gated norm": 0.0, "add and norm": 3.0, "rest": 16.25,
    }  # fmt: skip
    assert sum(times.values()) == pytest.approx(sum(time for time, _ in kernels.values()) / 4)


def test_floors_of_mamba1() -> None:
    from support.prefill_floors import LayerShape, floors

    found = floors(LayerShape(layers=3, d_model=2, d_inner=4, d_state=3, dt_rank=1), tokens=10, steps=2)
    # in_proj 2 -> 8, x_proj 4 -> 7, dt_proj 1 -> 4, out_proj 4 -> 2: 16 + 28 + 4 + 8 weights, read twice
    assert found["products"].bytes == pytest.approx(2 * (10 * (10 + 11 + 5 + 6) + 2 * 56) / 4.3e6)
    assert found["products"].arithmetic == pytest.approx(2 * 10 * 56 / 790e6)
    # x, dt, z, out: 4 each; B, C: 3 each
    assert found["scan or SSD"].bytes == pytest.approx(2 * 10 * 22 / 4.3e6)
    assert found["scan or SSD"].arithmetic == pytest.approx(10 * 4 * 3 / (132 * 16 * 1980))
    assert found["convolution"] == (pytest.approx(2 * 10 * 8 / 4.3e6), 0.0)
    assert found["add and norm"] == (pytest.approx(2 * 10 * 8 / 4.3e6), 0.0)
    assert set(found) == {"products", "scan or SSD", "convolution", "add and norm"}


def test_floors_of_mamba2() -> None:
    from support.prefill_floors import LayerShape, floors

    shape = LayerShape(layers=3, d_model=2, d_inner=8, d_state=3, nheads=4, ngroups=2)
    found = floors(shape, tokens=10, steps=1)
    # in_proj 2 -> 8 + 8 + 12 + 4, out_proj 8 -> 2
    assert found["products"].bytes == pytest.approx(2 * (10 * (34 + 10) + 64 + 16) / 4.3e6)
    assert found["products"].arithmetic == pytest.approx(2 * 10 * 80 / 790e6)
    # x and out: 8 each; B, C: 6 each; dt: 4
    assert found["scan or SSD"].bytes == pytest.approx(2 * 10 * 32 / 4.3e6)
    # into the state and out of it: 2 x 8 x 3 each; with the 32 tokens of a block: C B^T of 2 groups, its product with x
    assert found["scan or SSD"].arithmetic == pytest.approx(10 * (48 + 48 + 2 * 32 * 6 + 2 * 32 * 8) / 790e6)
    assert found["convolution"].bytes == pytest.approx(2 * 10 * 40 / 4.3e6)
    assert found["gated norm"] == (pytest.approx(2 * 10 * 24 / 4.3e6), 0.0)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mamba-1.4b", (48, 2048, 4096, 16, 128, 0, 1)),
        ("falcon-mamba-7b", (64, 4096, 8192, 16, 256, 0, 1)),
        ("mamba2-1.3b", (48, 2048, 4096, 128, 0, 64, 1)),
        ("zamba2-1.2b", (38, 2048, 4096, 64, 0, 64, 1)),
    ],
)
def test_shapes_of_the_models(model: str, expected: tuple[int, ...]) -> None:
    from support.prefill_floors import layer_shape
    from support.shapes import model_config

    assert layer_shape(model_config(model)) == expected


def test_kernels_that_overlap_count_once() -> None:
    from support.step_recorder import kernel_times

    events = [("b", 4.0, 10.0), ("a", 0.0, 6.0), ("a", 20.0, 22.0)]
    figures = kernel_times(events, 2)
    assert figures["gpu"] == pytest.approx(6e-6)
    assert figures["kernels"] == {"a": (4.0, 1.0), "b": (3.0, 0.5)}
    assert kernel_times([], 1) == {"gpu": 0.0, "kernels": {}}


class Runner:
    """Stands for a model runner; notes what it runs, and replays CUDA graphs."""

    def __init__(self, log: list[str], replays: int = 0) -> None:
        self._log, self._replays = log, replays

    def execute_model(self, scheduler_output: Any) -> str:
        tokens = scheduler_output.total_num_scheduled_tokens
        self._log.append(f"step of {tokens}")
        for _ in range(self._replays):
            torch.cuda.CUDAGraph.replay(f"graph of {tokens}")
        return "output"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a worker runs, with the begin and the end of a profile of one kernel; there is no GPU."""
    from support import step_recorder

    lines: list[str] = []

    def stop(profile: Any) -> list[tuple[str, float, float]]:
        lines.append(f"stop {profile}")
        return [("a", 0.0, 5.0)]

    monkeypatch.setattr(step_recorder, "start_profile", lambda: lines.append("start") or "profile")
    monkeypatch.setattr(step_recorder, "stop_profile", stop)
    return lines


def run_steps(worker: Any, *steps: int) -> None:
    for tokens in steps:
        step = SimpleNamespace(total_num_scheduled_tokens=tokens)
        assert worker.model_runner.execute_model(step) == "output"


def test_profile_holds_every_step_of_a_prompt(log: list[str]) -> None:
    from support.step_recorder import start_prompts, stop_prompts

    worker = SimpleNamespace(model_runner=Runner(log))
    start_prompts(worker)
    run_steps(worker, 8, 8, 4, 0)
    assert stop_prompts(worker, 20) == {"steps": 3, "gpu": pytest.approx(5e-6), "kernels": {"a": (5.0, 1.0)}}
    run_steps(worker, 1)
    assert log == ["start", "step of 8", "step of 8", "step of 4", "step of 0", "stop profile", "step of 1"]


def test_other_tokens_in_a_profile(log: list[str]) -> None:
    from support.step_recorder import start_prompts, stop_prompts

    worker = SimpleNamespace(model_runner=Runner(log))
    start_prompts(worker)
    run_steps(worker, 8, 8, 1)
    with pytest.raises(RuntimeError, match="3 steps held 17 tokens; the prompts have 16"):
        stop_prompts(worker, 16)


def test_decode_steps_are_timed_and_then_profiled(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from support import step_recorder
    from support.step_recorder import PROFILED, SKIPPED, start_recording, stop_recording

    replayed: list[Any] = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed.append)
    monkeypatch.setattr(step_recorder, "graph_seconds", {"graph of 2": 0.25}.__getitem__)
    worker = SimpleNamespace(model_runner=Runner(log, replays=1))
    start_recording(worker, 2, 3, is_profiled=True)
    run_steps(worker, 32, *[2] * (SKIPPED + 3 + PROFILED + 5))
    recorded = stop_recording(worker)
    assert recorded["gpu"] == 0.25
    assert recorded["kernels"] == {"a": (5.0 / PROFILED, 1 / PROFILED)}
    assert log.index("start") == 1 + SKIPPED + 3
    assert log.index("stop profile") == log.index("start") + PROFILED + 1
    assert (log.count("start"), log.count("stop profile")) == (1, 1)
    # Noted, and replayed all the same; the method is as it was.
    assert replayed == ["graph of 32"] + ["graph of 2"] * (SKIPPED + 3 + PROFILED + 5)
    assert torch.cuda.CUDAGraph.replay == replayed.append


def test_decode_steps_that_are_not_profiled(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from support import step_recorder
    from support.step_recorder import SKIPPED, start_recording, stop_recording

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    monkeypatch.setattr(step_recorder, "graph_seconds", lambda graph: log.append(f"time {graph}") or 0.25)
    worker = SimpleNamespace(model_runner=Runner(log, replays=1))
    start_recording(worker, 2, 3, is_profiled=False)
    run_steps(worker, *[2] * (SKIPPED + 5), 1)
    recorded = stop_recording(worker)
    assert (recorded["gpu"], recorded["kernels"]) == (0.25, {})
    # The graph is timed while its buffers hold all requests, not those of a last step.
    assert log == [*["step of 2"] * (SKIPPED + 4), "time graph of 2", "step of 2", "step of 1"]


def test_medians_of_runs_have_the_kernels_of_the_last() -> None:
    from whole_models import middle

    runs: list[dict[str, Any]] = [
        {"clock": clock, "gpu": gpu, "kernels": {}} for clock, gpu in [(5, 3), (1, 9), (2, 4)]
    ]
    runs[-1]["kernels"] = {"a": (1.0, 1.0)}
    assert middle(runs) == {"clock": 2, "gpu": 4, "kernels": {"a": (1.0, 1.0)}, "clocks": [5, 1, 2]}


def test_decode_steps_in_more_than_one_graph(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from support.step_recorder import PROFILED, SKIPPED, start_recording, stop_recording

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    worker = SimpleNamespace(model_runner=Runner(log, replays=2))
    start_recording(worker, 2, 3, is_profiled=True)
    run_steps(worker, *[2] * (SKIPPED + 3 + PROFILED + 1))
    with pytest.raises(RuntimeError, match="one CUDA graph by default, but it replayed 2"):
        stop_recording(worker)


def figure(stock: float, on: float, off: float | None = None, **more: Any) -> dict[str, Any]:
    times = {"stock": stock, "on": on} | ({} if off is None else {"off": off})
    return {mode: {"median": time, "all": [time], **more} for mode, time in times.items()}


def document(**result: Any) -> dict[str, Any]:
    environment = json.loads((RESULTS / "whole_models.json").read_text())["environment"]
    return {"environment": environment, "settings": {"tiny": False}, "models": {"mamba-1.4b": result}}


def test_report_of_figures_without_a_profile() -> None:
    from support.report import markdown

    record = RESULTS / "whole_models.json"
    assert markdown(json.loads(record.read_text())) == record.with_suffix(".md").read_text()


def test_report_has_clock_and_gpu() -> None:
    from support.report import markdown

    timed = {"4096": figure(0.2, 0.1), "8192": figure(0.3, 0.2, 0.1)}
    batch = figure(4.0, 2.0)
    for mode, gpu in (("stock", 0.09), ("on", 0.03), ("off", 0.02)):
        kernels = {"nvjet_x": (3000.0, 192), "_selective_scan_kernel": (4800.0, 96), "_gumbel_sample_kernel": (48.0, 1)}
        timed["8192"][mode] |= {"gpu": gpu, "steps": 1, "kernels": kernels}
    for mode in batch:
        batch[mode] |= {"gpu": 1.5, "steps": 16}
    peak = {"stock": 3.0, "on": 2.0}
    lines = markdown(document(prefill=timed, batch=batch, peak_gib=peak)).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| | clock"))
    cells = "stock ms | on ms | x | off ms | x | on / off"
    assert lines[first : first + 6] == [
        f"| | clock: {cells} | GPU: {cells} |",
        "|" + "---|" * 13,
        "| prefill 4,096 | 200.0 | 100.0 | 2.00 | | | | | | | | | |",
        "| prefill 8,192 | 300.0 | 200.0 | 1.50 | 100.0 | 3.00 | +100.0 % | 90.00 | 30.00 | 3.00 | 20.00 | 4.50 | "
        "+50.0 % |",
        "| prefill 32 x 8,192 | 4000.0 | 2000.0 | 2.00 | | | | 1500.00 | 1500.00 | 1.00 | | | |",
        "| peak memory, 65,536 tokens, GiB | 3.00 | 2.00 | | | | | | | | | | |",
    ]
    assert len({line.count("|") for line in lines[first : first + 6]}) == 1
    assert "| _selective_scan_kernel | 4800.0 | 96 | 4800.0 | 96 |" in lines
    floors = lines.index("| our kernels against their floors, prefill 8,192 | us a layer | bytes us | arithmetic us |")
    rows = [line.strip("| ").split(" | ") for line in lines[floors + 2 : floors + 8]]
    assert [row[0] for row in rows] == ["products", "scan or SSD", "convolution", "add and norm", "rest", "all"]
    assert [row[1].rstrip(" |") for row in rows] == ["62.5", "100.0", "0.0", "0.0", "1.0", "163.5"]
    # 8192 tokens: 4 x 4096 + 2 x 16 numbers each; 4096 channels x 16 states each
    assert rows[1][2:] == ["62.5", "128.4"]


def test_profile_that_does_not_run_while_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import whole_models

    calls: list[tuple[Any, ...]] = []

    class Pair:
        def run(self, mode: str, method: str, *args: Any) -> Any:
            calls.append((mode, method, *args))
            if method == "generate":
                return 1.0
            return {"steps": 1, "gpu": 0.5, "kernels": {"a": (5e5, 1)}}

    given = SimpleNamespace(tiny=False, lengths=[4096, 8192], repeats=1)
    result: dict[str, Any] = {}
    monkeypatch.setattr(whole_models, "measure_batch", lambda pair, result: iter(()))
    names = [what for what, _ in whole_models.measure_prefill(Pair(), given, result)]  # type: ignore[arg-type]
    assert names == ["prefill 4096", "prefill 8192"] * 2
    methods = [method for _, method, *_ in calls]
    assert methods == sorted(methods)
    profiled = [(mode, *args) for mode, method, *args in calls if method == "profile_prompts"]
    assert profiled == [
        ("stock", 1, 4096), ("on", 1, 4096), ("stock", 1, 8192), ("on", 1, 8192), ("off", 1, 8192),
    ]  # fmt: skip
    assert "kernels" not in result["prefill"]["4096"]["on"]
    assert result["prefill"]["8192"]["off"]["kernels"] == {"a": (5e5, 1)}
    assert whole_models.describe(result["prefill"]["4096"]) == (
        "stock 1000.00 ms GPU 500.00 ms, on 1000.00 ms (1.000 x) GPU 500.00 ms (1.000 x)"
    )
