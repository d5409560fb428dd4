"""The `longmamba eval` commands: passkey, needles and perplexity, several methods side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_longmamba.commands.engine_errors import explained_start
from vllm_longmamba.commands.engine_options import EngineOptions, engine_arguments, json_object, with_options
from vllm_longmamba.evaluate.terminal import numbers, progress_bars

if TYPE_CHECKING:
    from vllm_longmamba.evaluate.comparison import Comparison
    from vllm_longmamba.evaluate.methods import ModelSettings
    from vllm_longmamba.evaluate.needles import Question

app = typer.Typer(
    help="Measure what LongMamba does for a model, with real text, through the real engine.", no_args_is_help=True
)

Model = Annotated[str, typer.Argument(help="Name or folder of the model, as for vllm serve.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the results. A run that was interrupted goes on from there.")
]
Haystack = Annotated[
    list[Path],
    typer.Option(exists=True, help="Text to hide the numbers in, a file or a folder. May be given several times."),
]
Lengths = Annotated[str, typer.Option(help="Numbers of tokens in the prompts, separated by commas.")]
Depths = Annotated[int, typer.Option(min=1, help="Number of places of the number asked for, from begin to end.")]
Seeds = Annotated[str, typer.Option(help="Seeds, separated by commas: one question each, of every length and depth.")]
Windows = Annotated[int, typer.Option(min=1, help="Maximum number of windows of each length in each text.")]
ScoredTokens = Annotated[int, typer.Option(min=1, help="Number of tokens scored at the end of each window.")]


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
        self, model: str, engine: EngineOptions, output: Path, longest: int, settings: dict[str, Any]
    ) -> Iterator["Comparison"]:
        """Prepare all methods; nothing is started yet.

        Args:
            model: name or folder.
            engine: options of every engine.
            output: folder of the results.
            longest: tokens of the longest prompt and its answer.
            settings: of the task.

        Raises:
            ValueError: unknown methods, or files of others in the folder.
        """
        from vllm_longmamba.evaluate.comparison import Comparison
        from vllm_longmamba.evaluate.methods import METHODS, parse_methods
        from vllm_longmamba.evaluate.report import FILES
        from vllm_longmamba.evaluate.store import Store

        methods = parse_methods(self.method)
        if self.decimamba and "decimamba" not in methods:
            raise ValueError(f"--decimamba: its settings have a part with --method decimamba only, got {self.method}")
        own = model_settings(model, engine, self.unfiltered_end, self.decimamba).with_room(longest)
        with Store(output) as store:
            # Before hours of work.
            store.check_files(FILES)
            contestants = {name: METHODS[name](own) for name in methods}
            with progress_bars() as progress:
                yield Comparison(contestants, settings, store, progress)


@app.command()
@with_options(under="eval ", engine=EngineOptions, compared=Compared)
def passkey(
    model: Model,
    haystack: Haystack,
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/passkey"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    depths: Depths = 12,
    seeds: Seeds = "0,1,2",
) -> None:
    """Ask for one five-digit key, hidden in long text."""
    from vllm_longmamba.evaluate.needles import PASSKEY_NEEDLE, PASSKEY_QUESTION, middles, passkey_questions

    questions = list(passkey_questions(numbers(lengths), middles(depths), numbers(seeds)))
    settings = {"wording": [PASSKEY_NEEDLE, PASSKEY_QUESTION]}
    conditions = {"depths": depths, "seeds": numbers(seeds)}
    compare = partial(compared.comparison, model, engine, output)
    _ask(model, compare, questions, haystack, settings, conditions, "Passkey")


@app.command()
@with_options(under="eval ", engine=EngineOptions, compared=Compared)
def needles(
    model: Model,
    haystack: Haystack,
    engine: EngineOptions,
    compared: Compared,
    output: Output = Path("out/needles"),
    lengths: Lengths = "1024,2048,4096,8192,16384",
    depths: Depths = 12,
    seeds: Seeds = "0,1,2",
    count: Annotated[int, typer.Option("--needles", min=1, help="Number of numbers hidden in each text.")] = 4,
) -> None:
    """Ask for one of several numbers with names, hidden in long text."""
    from vllm_longmamba.evaluate.needles import NEEDLE, ONE_QUESTION, middles, needle_questions

    questions = list(needle_questions(numbers(lengths), middles(depths), numbers(seeds), count))
    settings = {"needles": count, "wording": [NEEDLE, ONE_QUESTION]}
    conditions, title = {"depths": depths, "seeds": numbers(seeds)}, f"One of {count} needles"
    compare = partial(compared.comparison, model, engine, output)
    _ask(model, compare, questions, haystack, settings, conditions, title)


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
    lengths: Lengths = "1024,2048,4096,8192,16384",
    windows: Windows = 10,
    scored_tokens: ScoredTokens = 100,
) -> None:
    """Score the last tokens of growing windows of text."""
    from vllm_longmamba.evaluate import perplexity
    from vllm_longmamba.evaluate.markdown import perplexity_markdown
    from vllm_longmamba.evaluate.pictures import draw_perplexity
    from vllm_longmamba.evaluate.report import provenance, summarize_perplexity, write_report
    from vllm_longmamba.evaluate.texts import read_books

    books = read_books(text)
    wanted = numbers(lengths)
    settings = {"scored_tokens": scored_tokens, "texts": {book.name: book.digest for book in books}}

    def choose(book_tokens: Mapping[str, int]) -> Iterator[perplexity.Window]:
        return perplexity.windows(book_tokens, wanted, windows, scored_tokens)

    with compared.comparison(model, engine, output, max(wanted) + 1, settings) as comparison:
        losses = comparison.score(books, choose, scored_tokens)
        head = provenance("perplexity", model, comparison.contestants, {"windows": windows, **settings})
        report = head | summarize_perplexity(losses)
        write_report(comparison.store, report, "Perplexity", perplexity_markdown, draw_perplexity)


def model_settings(
    model: str,
    engine: EngineOptions,
    unfiltered_end: int | None = None,
    decimamba: Mapping[str, Any] | None = None,
    **set_by_command: Any,
) -> "ModelSettings":
    """The arguments of an engine for each method, from the options of a command.

    Args:
        model: name or folder.
        engine: the options.
        unfiltered_end: another one.
        decimamba: options of DeciMamba.
        set_by_command: arguments of vLLM that the filtering engine gets, and no user may set.

    Raises:
        ValueError: --engine-args contradicts what the command sets.
    """
    from vllm_longmamba.evaluate.methods import ModelSettings

    # The table and theta are of the filter.
    plain = replace(engine, table=None, min_retention=None)
    return ModelSettings(
        plain=engine_arguments(model, plain, longmamba={"filter": False}),
        longmamba=engine_arguments(
            model, engine, longmamba={"filter": True, "unfiltered_end": unfiltered_end}, **set_by_command
        ),
        starting=partial(explained_start, engine.verbose),
        decimamba=decimamba or {},
    )


def _ask(
    model: str,
    compare: Callable[..., AbstractContextManager["Comparison"]],
    questions: Sequence["Question"],
    haystack: list[Path],
    settings: dict[str, Any],
    conditions: dict[str, Any],
    title: str,
) -> None:
    """Ask every method all questions; `conditions` tell the number of questions, which is no part of a question."""
    from vllm_longmamba.evaluate.markdown import questions_markdown
    from vllm_longmamba.evaluate.needles import ANSWER_TOKENS
    from vllm_longmamba.evaluate.pictures import draw_questions
    from vllm_longmamba.evaluate.report import provenance, summarize_questions, write_report
    from vllm_longmamba.evaluate.texts import read_books

    books = read_books(haystack)
    settings = {**settings, "haystack": {book.name: book.digest for book in books}}
    with compare(max(question.length for question in questions) + ANSWER_TOKENS, settings) as comparison:
        answers = comparison.ask(questions, books)
        head = provenance(questions[0].task, model, comparison.contestants, {**conditions, **settings})
        write_report(comparison.store, head | summarize_questions(answers), title, questions_markdown, draw_questions)
