"""The `longmamba eval` commands: passkey, needles and perplexity, plain and LongMamba side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba.evaluate.command_line import (
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
    from vllm_longmamba.evaluate.needles import Question

app = typer.Typer(
    help="Measure what LongMamba does for a model, with real text, through the real engine.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the results. A run that was interrupted goes on from there.")
]
Method = Annotated[str, typer.Option("--method", help="Methods to compare, separated by commas: plain, longmamba.")]
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


@app.command()
def passkey(
    model: Model,
    haystack: Haystack,
    output: Output = Path("out/passkey"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    depths: Depths = 12,
    seeds: Seeds = "0,1,2",
    method: Method = "plain,longmamba",
    table: TableFile = None,
    min_retention: MinRetention = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Ask for one five-digit key, hidden in long text."""
    with user_errors("eval passkey"):
        from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION, middles, passkey_questions

        questions = list(passkey_questions(numbers(lengths), middles(depths), numbers(seeds)))
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        settings = {"wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION]}
        options = longmamba_options(table, min_retention)
        _ask(model, method, options, engine_args, questions, haystack, settings, output, "Passkey")


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
    table: TableFile = None,
    min_retention: MinRetention = None,
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
        places, ask_all = middles(depths), ask == "all"
        questions = list(needle_questions(numbers(lengths), places, numbers(seeds), count, ask_all))
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        settings = {"needles": count, "ask": ask, "wording": [NEEDLE, ALL_QUESTION if ask_all else ONE_QUESTION]}
        options = longmamba_options(table, min_retention)
        _ask(model, method, options, engine_args, questions, haystack, settings, output, f"{count} needles, ask {ask}")


@app.command()
def perplexity(
    model: Model,
    text: Annotated[list[Path], typer.Option(exists=True, help="Text, a file or a folder of *.txt; repeatable.")],
    output: Output = Path("out/perplexity"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    windows: Annotated[int, typer.Option(min=1, help="At most so many windows of each length in each text.")] = 10,
    scored_tokens: Annotated[int, typer.Option(min=1, help="Tokens scored at the end of each window.")] = 100,
    method: Method = "plain,longmamba",
    table: TableFile = None,
    min_retention: MinRetention = None,
    dtype: Dtype = "auto",
    tokenizer: Tokenizer = None,
    tensor_parallel_size: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    engine_arg: EngineArg = None,
) -> None:
    """Score the last tokens of growing windows of text."""
    with user_errors("eval perplexity"):
        from vllm_longmamba.evaluate import perplexity
        from vllm_longmamba.evaluate.markdown import perplexity_markdown
        from vllm_longmamba.evaluate.pictures import draw_perplexity
        from vllm_longmamba.evaluate.report import provenance, summarize_perplexity
        from vllm_longmamba.evaluate.texts import read_books

        books = read_books(text)
        wanted = numbers(lengths)
        engine_args = engine_arguments(dtype, tokenizer, tensor_parallel_size, max_model_len, engine_arg)
        settings = {"scored_tokens": scored_tokens, "texts": {book.name: book.digest for book in books}}

        def choose(book_tokens: Mapping[str, int]) -> Iterator[perplexity.Window]:
            return perplexity.windows(book_tokens, wanted, windows, scored_tokens)

        options = longmamba_options(table, min_retention)
        with _comparison(model, method, options, engine_args, settings, output, max(wanted) + 1) as comparison:
            losses = comparison.score(books, choose, scored_tokens)
            report = {
                "task": "perplexity",
                **provenance(model, comparison.contestants, {"windows": windows, **settings}),
                **summarize_perplexity(losses),
            }
        pictures = drawn(lambda: draw_perplexity(report, output, f"Perplexity: {Path(model).name}"))
        write_report(output, report, perplexity_markdown(report, pictures))


def _ask(
    model: str,
    method: str,
    options: dict[str, Any],
    engine_args: dict[str, Any],
    questions: Sequence["Question"],
    haystack: list[Path],
    settings: dict[str, Any],
    output: Path,
    title: str,
) -> None:
    from vllm_longmamba.evaluate.markdown import questions_markdown
    from vllm_longmamba.evaluate.pictures import draw_questions
    from vllm_longmamba.evaluate.report import provenance, summarize_questions
    from vllm_longmamba.evaluate.texts import read_books

    books = read_books(haystack)
    settings = {**settings, "haystack": {book.name: book.digest for book in books}}
    longest = max(question.length + question.max_answer_tokens() for question in questions)
    with _comparison(model, method, options, engine_args, settings, output, longest) as comparison:
        answers = comparison.ask(questions, books)
        report = {
            "task": questions[0].task,
            **provenance(model, comparison.contestants, settings),
            **summarize_questions(answers),
        }
    title = f"{title}: {Path(model).name}"
    write_report(
        output, report, questions_markdown(report, title, drawn(lambda: draw_questions(report, output, title)))
    )


@contextmanager
def _comparison(
    model: str,
    method: str,
    options: dict[str, Any],
    engine_args: dict[str, Any],
    settings: dict[str, Any],
    output: Path,
    longest: int,
) -> Iterator["Comparison"]:
    from vllm_longmamba.evaluate.comparison import Comparison, contestants
    from vllm_longmamba.evaluate.methods import ModelSettings, parse_methods
    from vllm_longmamba.evaluate.records import Records

    engine_args = {"max_model_len": longest, **engine_args}
    prepared = contestants(parse_methods(method), ModelSettings(model, options, engine_args))
    records = Records(output / "records.jsonl")
    try:
        with progress_bars() as progress:
            yield Comparison(prepared, settings, records, progress)
    finally:
        records.close()
