"""The `longmamba eval` commands: passkey, needles and perplexity, several methods side by side."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba import decimamba_options
from vllm_longmamba.architectures import DECIMAMBA
from vllm_longmamba.commands.engine_errors import explained_start
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, json_object, with_options
from vllm_longmamba.evaluate.terminal import progress_bars, read_lengths, read_names, read_numbers

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.comparison import Comparison
    from vllm_longmamba.evaluate.needles import Question
    from vllm_longmamba.evaluate.perplexity import Window

app = typer.Typer(
    help="Measure what LongMamba does for a model, with real text, through the real engine.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the results. A run that was interrupted goes on from there.")
]
Lengths = Annotated[str, typer.Option(help="Numbers of tokens in the prompts, separated by commas.")]
Depths = Annotated[int, typer.Option(min=1, help="Number of places of the number asked for, from begin to end.")]
Windows = Annotated[int, typer.Option(min=1, help="Maximum number of windows of each length in each text.")]

_LENGTHS = "1024,2048,4096,8192,16384"


@dataclass(frozen=True)
class Grid:
    """The options of commands that hide numbers in text."""

    haystack: Annotated[
        list[Path],
        typer.Option(exists=True, help="Text to hide the numbers in, a file or a folder. May be given several times."),
    ]
    lengths: Lengths = _LENGTHS
    depths: Depths = 12
    seeds: Annotated[
        str, typer.Option(help="Seeds, separated by commas: one question each, of every length and depth.")
    ] = "0,1,2"

    def places(self) -> tuple[list[int], list[float], list[int]]:
        """Lengths, depths and seeds: one question for each combination."""
        from vllm_longmamba.evaluate.needles import middles

        seeds = read_numbers("--seeds", self.seeds, int)
        return read_lengths("--lengths", self.lengths), middles(self.depths), seeds


@dataclass(frozen=True)
class Compared:
    """The options of commands that compare methods."""

    method: Annotated[
        str,
        typer.Option(
            help="Methods to compare, separated by commas: plain, longmamba, and decimamba for Mamba-1, Mamba-2 and "
            "FalconMamba."
        ),
    ] = "plain,longmamba"
    decimamba: Annotated[
        dict[str, Any],
        typer.Option(
            help='Options of DeciMamba as a JSON object, such as \'{"layers": [12], "L_base": 4000}\'.',
            metavar="JSON",
            parser=json_object,
            show_default="the published ones of the model",
        ),
    ] = field(default_factory=dict)
    unfiltered_end: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of last tokens of a prompt that are not filtered.", show_default="the table's"
        ),
    ] = None

    @contextmanager
    def comparison(
        self,
        model: str,
        engine: EngineOptions,
        output: Path,
        longest: int | None,
        settings: dict[str, Any],
        known: Collection[str] | None = None,
    ) -> Iterator["Comparison"]:
        """Prepare all methods; nothing is started yet.

        Args:
            model: name or folder.
            engine: options of every engine.
            output: folder of the results.
            longest: tokens of the longest prompt and its answer; None where they are not known yet.
            settings: of the task.
            known: methods that may be named; all by default.

        Raises:
            ValueError: unknown methods, a --max-model-len below `longest`, or files of others in the folder.
        """
        from vllm_longmamba.evaluate.comparison import Comparison
        from vllm_longmamba.evaluate.engine import LABELS, EngineContestant
        from vllm_longmamba.evaluate.report import FILES
        from vllm_longmamba.evaluate.store import Store

        methods = read_names("--method", self.method, known or LABELS)
        if self.decimamba and "decimamba" not in methods:
            raise ValueError(f"--decimamba: its settings have a part with --method decimamba only, got {self.method}")
        room = {}
        if longest is not None:
            check_room(engine, longest)
            room = {"max_model_len": longest}
        arguments = {
            method: room | method_arguments(method, model, engine, self.unfiltered_end, self.decimamba)
            for method in methods
        }
        starting = partial(explained_start, engine.verbose)
        with Store(output) as store:
            # Before hours of work.
            store.check_files(FILES)
            contestants = {name: EngineContestant(of, name, starting) for name, of in arguments.items()}
            with progress_bars() as progress:
                yield Comparison(contestants, settings, store, progress)


def check_room(engine: EngineOptions, longest: int) -> None:
    """Refuse a --max-model-len below `longest`, the tokens of the longest prompt and its answer, before hours of work.

    Raises:
        ValueError: it is below.
    """
    if engine.max_model_len is not None and engine.max_model_len < longest:
        raise ValueError(
            f"the longest prompt and its answer are {longest} tokens, but --max-model-len is {engine.max_model_len}; "
            "raise it, or leave it out"
        )


def method_arguments(
    method: str,
    model: str,
    engine: EngineOptions,
    unfiltered_end: int | None = None,
    decimamba: Mapping[str, Any] | None = None,
    **set_by_command: Any,
) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for a method, from the options of a command.

    Args:
        method: its name.
        model: name or folder.
        engine: the options.
        unfiltered_end: another one than the table's.
        decimamba: options of DeciMamba, whose engine has the arguments of the plain one otherwise.
        set_by_command: arguments of vLLM that the filtering engine gets, and no user may set.

    Raises:
        ValueError: --engine-args contradicts what the command sets.
    """
    if method == "longmamba":
        own = {"filter": True, "unfiltered_end": unfiltered_end}
        return engine_arguments(model, engine, longmamba=own, **set_by_command)
    # The table and theta are of the filter.
    engine = replace(engine, table=None, min_retention=None)
    arguments = engine_arguments(model, engine, longmamba={"filter": False})
    if method == "decimamba":
        arguments["model_impl"] = DECIMAMBA
        arguments["additional_config"] |= {decimamba_options.KEY: decimamba} if decimamba else {}
    return arguments


@app.command()
@with_options(under="eval ", grid=Grid, engine=EngineOptions, compared=Compared)
def passkey(
    model: Model, grid: Grid, engine: EngineOptions, compared: Compared, output: Output = Path("out/passkey")
) -> None:
    """Ask for one five-digit key, hidden in long text."""
    from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION, passkey_questions

    questions = list(passkey_questions(*grid.places()))
    settings = {"wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION]}
    _ask(model, grid, engine, compared, output, questions, settings, "Passkey")


@app.command()
@with_options(under="eval ", grid=Grid, engine=EngineOptions, compared=Compared)
def needles(
    model: Model,
    grid: Grid,
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/needles"),
    count: Annotated[int, typer.Option("--needles", min=1, help="Number of numbers hidden in each text.")] = 4,
) -> None:
    """Ask for one of several numbers with names, hidden in long text."""
    from vllm_longmamba.evaluate.needles import NEEDLE, ONE_QUESTION, needle_questions

    questions = list(needle_questions(*grid.places(), count))
    settings = {"needles": count, "wording": [NEEDLE, ONE_QUESTION]}
    _ask(model, grid, engine, compared, output, questions, settings, f"One of {count} needles")


def _ask(
    model: str,
    grid: Grid,
    engine: EngineOptions,
    compared: Compared,
    output: Path,
    questions: Sequence["Question"],
    settings: dict[str, Any],
    title: str,
) -> None:
    """Ask every method all questions, and write the report."""
    from vllm_longmamba.evaluate.markdown import questions_markdown
    from vllm_longmamba.evaluate.needles import ANSWER_TOKENS
    from vllm_longmamba.evaluate.pictures import draw_questions
    from vllm_longmamba.evaluate.report import provenance, summarize_questions, write_report
    from vllm_longmamba.evaluate.texts import read_books

    books = read_books(grid.haystack)
    settings = {**settings, "haystack": {book.name: book.digest for book in books}}
    longest = max(question.length for question in questions) + ANSWER_TOKENS
    with compared.comparison(model, engine, output, longest, settings) as comparison:
        answers = comparison.ask(questions, books)
        # The number of questions is no part of a question.
        conditions = {"depths": grid.depths, "seeds": read_numbers("--seeds", grid.seeds, int), **settings}
        head = provenance(questions[0].task, model, comparison.contestants, conditions)
        write_report(comparison.store, head | summarize_questions(answers), title, questions_markdown, draw_questions)


@app.command()
@with_options(under="eval ", engine=EngineOptions, compared=Compared)
def perplexity(
    model: Model,
    text: Annotated[
        list[Path],
        typer.Option(exists=True, help="Text, a file or a folder of *.txt. May be given several times."),
    ],
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/perplexity"),
    lengths: Lengths = _LENGTHS,
    windows: Windows = 10,
    scored_tokens: Annotated[int, typer.Option(min=1, help="Number of tokens scored at the end of each window.")] = 100,
) -> None:
    """Score the last tokens of growing windows of text."""
    from vllm_longmamba.evaluate import perplexity
    from vllm_longmamba.evaluate.markdown import perplexity_markdown
    from vllm_longmamba.evaluate.pictures import draw_perplexity
    from vllm_longmamba.evaluate.report import provenance, summarize_perplexity, write_report
    from vllm_longmamba.evaluate.texts import read_books

    books, wanted = read_books(text), read_lengths("--lengths", lengths)
    settings = {"scored_tokens": scored_tokens, "texts": {book.name: book.digest for book in books}}

    def choose(book_tokens: Mapping[str, int]) -> Iterator["Window"]:
        return perplexity.windows(book_tokens, wanted, windows, scored_tokens)

    with compared.comparison(model, engine, output, max(wanted) + 1, settings) as comparison:
        losses = comparison.score(books, choose, scored_tokens)
        head = provenance("perplexity", model, comparison.contestants, {"windows": windows, **settings})
        report = head | summarize_perplexity(losses)
        write_report(comparison.store, report, "Perplexity", perplexity_markdown, draw_perplexity)
