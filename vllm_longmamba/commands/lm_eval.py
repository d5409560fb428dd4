"""The commands `longmamba eval ruler` and `longmamba eval longbench-e`: lm-eval's tasks, plain and LongMamba."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba.commands.engine_options import EngineOptions, with_options
from vllm_longmamba.commands.evaluate import Compared, Model, Output
from vllm_longmamba.evaluate.terminal import read_lengths

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.benchmarks import Benchmark
    from vllm_longmamba.evaluate.harness.tasks import Overrides

Tasks = Annotated[
    str | None,
    typer.Option(help="Names of tasks, separated by commas.", show_default="all of the paper's table"),
]
Copy = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Local copy to read instead of a download.")
]


@with_options(without=("decimamba",), under="eval ", engine=EngineOptions, compared=Compared)
def ruler(
    model: Model,
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/ruler"),
    lengths: Annotated[
        str, typer.Option(help="Numbers of tokens in a prompt and its answer together, separated by commas.")
    ] = "16384,24576,32768",
    tasks: Tasks = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Number of prompts of each task and length.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    essays: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            help="Text for the haystack instead of a download, a file or a folder. May be given several times.",
        ),
    ] = None,
    squad: Copy = None,
    hotpot: Copy = None,
) -> None:
    """RULER through lm-eval: needles, variables, frequent words and questions in long synthetic text."""
    from vllm_longmamba.evaluate.harness.benchmarks import RULER
    from vllm_longmamba.evaluate.harness.tasks import ruler_overrides

    chosen, wanted = RULER.chosen(tasks), read_lengths("--lengths", lengths)
    overrides = partial(ruler_overrides, essays, squad, hotpot)
    _run(RULER, model, engine, compared, output, chosen, wanted, limit, seed, overrides)


@with_options(without=("decimamba",), under="eval ", engine=EngineOptions, compared=Compared)
def longbench_e(
    model: Model,
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/longbench-e"),
    tasks: Tasks = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of *_e.jsonl (LongBench's data.zip, unpacked)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts of each task.", show_default="all")
    ] = None,
) -> None:
    """LongBench-E through lm-eval: 13 sets of questions, summaries, classification, retrieval and code."""
    from vllm_longmamba.evaluate.harness.benchmarks import LONGBENCH_E
    from vllm_longmamba.evaluate.harness.tasks import longbench_overrides

    chosen = LONGBENCH_E.chosen(tasks)
    names = {task: LONGBENCH_E.tasks[task] for task in chosen}
    overrides = dict if data is None else partial(longbench_overrides, data, names)
    _run(LONGBENCH_E, model, engine, compared, output, chosen, [], limit, 0, overrides)


def _run(
    benchmark: "Benchmark",
    model: str,
    engine: EngineOptions,
    compared: Compared,
    output: Path,
    tasks: list[str],
    lengths: list[int],
    limit: int | None,
    seed: int,
    overrides: "Callable[[], Overrides]",
) -> None:
    missing = [name for name in ("lm_eval", *benchmark.modules) if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; run pip install 'vllm-longmamba[lm-eval]'")

    from vllm_longmamba.evaluate.harness.lm import run_cells
    from vllm_longmamba.evaluate.harness.reporting import draw_harness, harness_markdown, summarize_harness
    from vllm_longmamba.evaluate.harness.tasks import load_cells
    from vllm_longmamba.evaluate.report import provenance, write_report

    changes = overrides()
    with compared.comparison(model, engine, output, None, {}, ["plain", "longmamba"]) as comparison:
        contestants = list(comparison.contestants.values())
        encoder = contestants[0].encoder
        cells = load_cells(benchmark, tasks, [*lengths] or [None], encoder.name, seed, limit, changes)
        needed = max(cell.longest(encoder) for cell in cells)
        if engine.max_model_len is not None and engine.max_model_len < needed:
            raise ValueError(
                f"the longest prompt and its answer are {needed} tokens, but --max-model-len is "
                f"{engine.max_model_len}, and prompts are not cut here; raise it, or leave it out"
            )
        for contestant in contestants:
            contestant.make_room(needed)
        results = run_cells(comparison, cells, limit)
        settings: dict[str, Any] = {"tasks": {cell.loaded.task_name: cell.loaded.VERSION for cell in cells}}
        settings |= {"limit": limit, "longest prompt and answer": needed, "local data": sorted(changes)}
        if lengths:
            settings |= {"lengths": lengths, "seed": seed}
        report = provenance(benchmark.name, model, comparison.contestants, settings) | summarize_harness(results)
        write_report(comparison.store, report, benchmark.title, harness_markdown, draw_harness)
