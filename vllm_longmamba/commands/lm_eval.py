"""The commands `longmamba eval ruler` and `longmamba eval longbench-e`: lm-eval's tasks, plain and LongMamba."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba.commands.evaluate import (
    Dtype,
    EngineArg,
    Method,
    MinRetention,
    Model,
    Output,
    TableFile,
    TensorParallel,
    Tokenizer,
    UnfilteredEnd,
)
from vllm_longmamba.evaluate.command_line import (
    console,
    drawn,
    engine_arguments,
    longmamba_options,
    numbers,
    user_errors,
    write_report,
)

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.harness.benchmarks import Benchmark
    from vllm_longmamba.evaluate.methods import ModelSettings

Tasks = Annotated[
    str | None, typer.Option(help="Tasks, separated by commas. [default: all of the paper's table]", show_default=False)
]
Printed = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="Figures to lay beside (JSON, see docs). [default: the paper's, where known]"
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="As for vllm serve; no prompt is ever cut. [default: the longest prompt's]", show_default=False),
]
Copy = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Local copy, instead of a download.")]


def ruler(
    model: Model,
    output: Output = Path("out/ruler"),
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer together, separated by commas.")
    ] = "16384,24576,32768",
    tasks: Tasks = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Prompts of each task and length.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    essays: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="Text for the haystack instead of a download, file or folder; repeatable."),
    ] = None,
    squad: Copy = None,
    hotpot: Copy = None,
    printed: Printed = None,
    method: Method = "plain,longmamba",
    table: TableFile = None,
    min_retention: MinRetention = None,
    unfiltered_end: UnfilteredEnd = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """RULER through lm-eval: needles, variables, frequent words and questions in long synthetic text."""
    with user_errors("eval ruler"):
        from vllm_longmamba.evaluate.harness.benchmarks import RULER
        from vllm_longmamba.evaluate.harness.local_data import ruler_overrides
        from vllm_longmamba.evaluate.methods import ModelSettings

        chosen, wanted = RULER.chosen(tasks), numbers(lengths)
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        settings = ModelSettings(model, longmamba_options(table, min_retention, unfiltered_end), engine_args)
        changes = ruler_overrides(essays, squad, hotpot)
        _run(RULER, settings, method, chosen, wanted, limit, seed, changes, printed, output)


def longbench_e(
    model: Model,
    output: Output = Path("out/longbench-e"),
    tasks: Tasks = None,
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of *_e.jsonl (LongBench's data.zip, unpacked)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each task. [default: all]")] = None,
    printed: Printed = None,
    method: Method = "plain,longmamba",
    table: TableFile = None,
    min_retention: MinRetention = None,
    unfiltered_end: UnfilteredEnd = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """LongBench-E through lm-eval: 13 sets of questions, summaries, classification, retrieval and code."""
    with user_errors("eval longbench-e"):
        from vllm_longmamba.evaluate.harness.benchmarks import LONGBENCH_E
        from vllm_longmamba.evaluate.harness.local_data import longbench_overrides
        from vllm_longmamba.evaluate.methods import ModelSettings

        chosen = LONGBENCH_E.chosen(tasks)
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        settings = ModelSettings(model, longmamba_options(table, min_retention, unfiltered_end), engine_args)
        changes = longbench_overrides(data, {task: LONGBENCH_E.tasks[task] for task in chosen}) if data else {}
        _run(LONGBENCH_E, settings, method, chosen, [], limit, 0, changes, printed, output)


def _run(
    benchmark: "Benchmark",
    model: "ModelSettings",
    method: str,
    tasks: list[str],
    lengths: list[int],
    limit: int | None,
    seed: int,
    changes: dict[str, dict[str, Any]],
    printed: Path | None,
    output: Path,
) -> None:
    from vllm_longmamba.evaluate.harness.loading import load_cells, longest, require
    from vllm_longmamba.evaluate.harness.printed import printed_figures

    require(benchmark)
    figures = printed_figures(benchmark, model.model, printed)

    from vllm_longmamba.evaluate.harness.model import harness_contestants
    from vllm_longmamba.evaluate.harness.pictures import draw_harness
    from vllm_longmamba.evaluate.harness.reporting import harness_markdown, summarize_harness
    from vllm_longmamba.evaluate.harness.running import run_cells
    from vllm_longmamba.evaluate.methods import parse_methods
    from vllm_longmamba.evaluate.records import Records
    from vllm_longmamba.evaluate.report import provenance

    contestants = harness_contestants(parse_methods(method), model)
    tokenizer = next(iter(contestants.values())).tokenizer
    cells = load_cells(benchmark, tasks, lengths, tokenizer, seed, limit, changes)
    needed = longest(cells, tokenizer, bool(model.engine_args.get("trust_remote_code", False)))
    room = model.engine_args.get("max_model_len", needed)
    if room < needed:
        raise ValueError(
            f"the longest prompt and its answer are {needed} tokens, but --max-model-len is {room}, and prompts are "
            "not cut here; raise it, or leave it out"
        )
    records = Records(output / "records.jsonl")
    try:
        results = run_cells(contestants, cells, room, records, lambda text: console.print(text, markup=False))
    finally:
        records.close()
    settings: dict[str, Any] = {"tasks": {cell.full_name: cell.loaded.VERSION for cell in cells}, "limit": limit}
    settings |= {"longest prompt and answer": needed, "local data": sorted(changes)}
    if benchmark.has_lengths:
        settings |= {"lengths": lengths, "seed": seed}
    report = {
        "task": benchmark.name,
        **provenance(model.model, contestants, settings),
        **summarize_harness(results, figures),
    }
    title = f"{benchmark.title}: {Path(model.model).name}"
    pictures = drawn(lambda: draw_harness(report, output, title))
    write_report(output, report, harness_markdown(report, title, pictures))
