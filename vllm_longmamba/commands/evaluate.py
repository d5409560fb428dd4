"""The `longmamba eval` commands: passkey, needles and perplexity, several methods side by side."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba.evaluate.command_line import (
    console,
    drawn,
    engine_arguments,
    longmamba_options,
    numbers,
    progress_bars,
    user_errors,
    write_report,
)

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.comparison import Comparison
    from vllm_longmamba.evaluate.decimamba_settings import SearchTask
    from vllm_longmamba.evaluate.methods import ModelSettings
    from vllm_longmamba.evaluate.needles import Question

app = typer.Typer(
    help="Measure what LongMamba does for a model, with real text, through the real engine.", no_args_is_help=True
)

# A search for DeciMamba's settings asks fewer questions than a report.
_SEARCH_DEPTHS, _SEARCH_WINDOWS = 4, 2

Model = Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the results. A run that was interrupted goes on from there.")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="Methods to compare, separated by commas: plain and longmamba (in the engine); decimamba, torch-plain and "
        "torch-longmamba (in the torch reference, float32, Mamba-1, Mamba-2 and FalconMamba in a folder).",
    ),
]
Decimamba = Annotated[
    str | None,
    typer.Option(
        "--decimamba",
        help="Settings of DeciMamba: JSON, a file of it, or search.",
        show_default=False,
    ),
]
Haystack = Annotated[
    list[Path], typer.Option(exists=True, help="Text to hide the numbers in, a file or a folder; repeatable.")
]
Lengths = Annotated[str, typer.Option(help="Tokens of the prompts, separated by commas.")]
Depths = Annotated[int, typer.Option(min=1, help="Number of places of the number asked for, from begin to end.")]
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas: one question each, of every length and depth.")]
Dtype = Annotated[str, typer.Option(help="Data type of the model, as for vllm serve.")]
Tokenizer = Annotated[str | None, typer.Option(help="Tokenizer, as for vllm serve.")]
TensorParallel = Annotated[int, typer.Option("--tensor-parallel-size", "--tp", min=1)]
MaxModelLen = Annotated[
    int | None, typer.Option(help="As for vllm serve. [default: what the longest prompt needs]", show_default=False)
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option(help="Further argument of vLLM's LLM, NAME=VALUE, VALUE as JSON or text; repeatable."),
]
TableFile = Annotated[Path | None, typer.Option("--table", help="Threshold table. [default: searched, as in serving]")]
MinRetention = Annotated[float | None, typer.Option(help="The paper's theta. [default: the table's]")]
UnfilteredEnd = Annotated[
    int | None, typer.Option(min=0, help="Last tokens of prompts that are not filtered. [default: the table's]")
]


@app.command()
def passkey(
    model: Model,
    haystack: Haystack,
    output: Output = Path("out/passkey"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    depths: Depths = 12,
    seeds: Seeds = "0,1,2",
    method: Method = "plain,longmamba",
    decimamba: Decimamba = None,
    table: TableFile = None,
    min_retention: MinRetention = None,
    unfiltered_end: UnfilteredEnd = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Ask for one five-digit key, hidden in long text."""
    with user_errors("eval passkey"):
        from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION, middles, passkey_questions

        def questions(places: list[float], seeds: list[int]) -> list["Question"]:
            return list(passkey_questions(numbers(lengths), places, seeds))

        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        compared = _compared(
            model, method, longmamba_options(table, min_retention, unfiltered_end), engine_args, decimamba
        )
        settings = {"wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION]}
        _ask(compared, questions, middles(depths), numbers(seeds), haystack, settings, output, "Passkey")


@app.command()
def needles(
    model: Model,
    haystack: Haystack,
    output: Output = Path("out/needles"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    depths: Depths = 12,
    seeds: Seeds = "0,1,2",
    count: Annotated[int, typer.Option("--needles", min=1, help="Numbers in each text.")] = 4,
    ask: Annotated[str, typer.Option(help="one: ask for one of them; all: ask for all in one question.")] = "one",
    method: Method = "plain,longmamba",
    decimamba: Decimamba = None,
    table: TableFile = None,
    min_retention: MinRetention = None,
    unfiltered_end: UnfilteredEnd = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Ask for one or all of several numbers with names, hidden in long text."""
    with user_errors("eval needles"):
        from vllm_longmamba.evaluate.needles import ALL_QUESTION, NEEDLE, ONE_QUESTION, middles, needle_questions

        if ask not in ("one", "all"):
            raise ValueError(f"--ask must be one or all, got {ask!r}")
        ask_all = ask == "all"

        def questions(places: list[float], seeds: list[int]) -> list["Question"]:
            return list(needle_questions(numbers(lengths), places, seeds, count, ask_all))

        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        compared = _compared(
            model, method, longmamba_options(table, min_retention, unfiltered_end), engine_args, decimamba
        )
        settings = {"needles": count, "ask": ask, "wording": [NEEDLE, ALL_QUESTION if ask_all else ONE_QUESTION]}
        title = f"{count} needles, ask {ask}"
        _ask(compared, questions, middles(depths), numbers(seeds), haystack, settings, output, title)


@app.command()
def perplexity(
    model: Model,
    text: Annotated[list[Path], typer.Option(exists=True, help="Text, a file or a folder of *.txt; repeatable.")],
    output: Output = Path("out/perplexity"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of each length in each text.")] = 10,
    scored_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored at the end of each window.")] = 100,
    method: Method = "plain,longmamba",
    decimamba: Decimamba = None,
    table: TableFile = None,
    min_retention: MinRetention = None,
    unfiltered_end: UnfilteredEnd = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Score the last tokens of growing windows of text."""
    with user_errors("eval perplexity"):
        from vllm_longmamba.evaluate import perplexity
        from vllm_longmamba.evaluate.decimamba_settings import WindowsTask
        from vllm_longmamba.evaluate.markdown import perplexity_markdown
        from vllm_longmamba.evaluate.pictures import draw_perplexity
        from vllm_longmamba.evaluate.report import provenance, summarize_perplexity
        from vllm_longmamba.evaluate.texts import read_books

        books = read_books(text)
        wanted = numbers(lengths)
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        compared = _compared(
            model, method, longmamba_options(table, min_retention, unfiltered_end), engine_args, decimamba
        )
        settings = {"scored_tokens": scored_tokens, "texts": {book.name: book.digest for book in books}}

        def choose(book_tokens: Mapping[str, int]) -> Iterator[perplexity.Window]:
            return perplexity.windows(book_tokens, wanted, windows, scored_tokens)

        if compared.searches:
            compared = _with_search(compared, WindowsTask(wanted, _SEARCH_WINDOWS, scored_tokens), output)
        with _comparison(compared, settings, output, max(wanted) + 1) as comparison:
            losses = comparison.score(books, choose, scored_tokens)
            report = {
                "task": "perplexity",
                **provenance(model, comparison.contestants, {"windows": windows, **settings}),
                **summarize_perplexity(losses),
            }
        pictures = drawn(lambda: draw_perplexity(report, output, f"Perplexity: {Path(model).name}"))
        write_report(output, report, perplexity_markdown(report, pictures))


@dataclass(frozen=True)
class _Compared:
    """What a command compares.

    Attributes:
        methods: names, in order.
        settings: of the model.
        searches: whether DeciMamba's settings have to be searched for first.
    """

    methods: list[str]
    settings: "ModelSettings"
    searches: bool


def _compared(
    model: str, method: str, options: dict[str, Any], engine_args: dict[str, Any], decimamba: str | None
) -> _Compared:
    from vllm_longmamba.evaluate.decimamba_settings import SEARCH, read_decimamba
    from vllm_longmamba.evaluate.methods import ModelSettings, parse_methods

    methods = parse_methods(method)
    settings = ModelSettings(model, options, engine_args, read_decimamba(decimamba))
    return _Compared(methods, settings, searches=decimamba == SEARCH and "decimamba" in methods)


def _with_search(compared: _Compared, task: "SearchTask", output: Path) -> _Compared:
    from vllm_longmamba.evaluate.decimamba_settings import search_settings

    found = search_settings(compared.settings, task, output, console)
    return replace(compared, settings=replace(compared.settings, decimamba=found), searches=False)


def _ask(
    compared: _Compared,
    questions_for: Callable[[list[float], list[int]], list["Question"]],
    places: list[float],
    seeds: list[int],
    haystack: list[Path],
    settings: dict[str, Any],
    output: Path,
    title: str,
) -> None:
    from vllm_longmamba.evaluate.decimamba_settings import QuestionsTask
    from vllm_longmamba.evaluate.markdown import questions_markdown
    from vllm_longmamba.evaluate.needles import middles
    from vllm_longmamba.evaluate.pictures import draw_questions
    from vllm_longmamba.evaluate.report import provenance, summarize_questions
    from vllm_longmamba.evaluate.texts import read_books

    books = read_books(haystack)
    questions = questions_for(places, seeds)
    if compared.searches:
        # Other questions than those that are reported.
        others = questions_for(middles(_SEARCH_DEPTHS), [max(seeds) + 1])
        compared = _with_search(compared, QuestionsTask(others), output)
    settings = {**settings, "haystack": {book.name: book.digest for book in books}}
    longest = max(question.length + question.max_answer_tokens() for question in questions)
    with _comparison(compared, settings, output, longest) as comparison:
        answers = comparison.ask(questions, books)
        report = {
            "task": questions[0].task,
            **provenance(
                compared.settings.model,
                comparison.contestants,
                {"depths": len(places), "seeds": seeds, **settings},
            ),
            **summarize_questions(answers),
        }
    title = f"{title}: {Path(compared.settings.model).name}"
    write_report(
        output, report, questions_markdown(report, title, drawn(lambda: draw_questions(report, output, title)))
    )


@contextmanager
def _comparison(compared: _Compared, settings: dict[str, Any], output: Path, longest: int) -> Iterator["Comparison"]:
    from vllm_longmamba.evaluate.comparison import Comparison, contestants
    from vllm_longmamba.evaluate.records import Records

    engine_args = {"max_model_len": longest, **compared.settings.engine_args}
    prepared = contestants(compared.methods, replace(compared.settings, engine_args=engine_args))
    records = Records(output / "records.jsonl")
    try:
        with progress_bars() as progress:
            yield Comparison(prepared, settings, records, progress)
    finally:
        records.close()
