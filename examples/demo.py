"""Asks a small Mamba-2 model for a key hidden in long documents: plain, then with LongMamba.

    python examples/demo.py [--lengths 512,1024,2048,4096,8192] [--depths 6] [--trials 1] [--out out]

Starts `vllm serve` twice, one server after the other, asks both the same questions over HTTP with the OpenAI client,
prints a table and saves a picture, depth by length. Runs on a GPU or a CPU. What it started it also ends.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from openai import AsyncOpenAI, OpenAIError
from passkey import KEY_DIGITS, QUESTION, PasskeyTask, passkey_tasks, read_haystack
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from serving import ServerError, log_tail, running_server

MODEL = Path(__file__).resolve().parent / "passkey-mamba2-4m"
PLAIN, LONGMAMBA = "plain", "LongMamba"
SERVERS = {PLAIN: ["--additional-config", '{"longmamba": {"filter": false}}'], LONGMAMBA: []}
ARGUMENTS = [
    "--model-impl", "longmamba",
    "--dtype", "float32",
    "--max-model-len", "16384",
    "--max-num-seqs", "32",
    # Starts faster; a model this small gains nothing from compilation.
    "--enforce-eager",
]  # fmt: skip
console = Console(highlight=False)


def main() -> int:
    options = _parse_arguments()
    lengths = [int(length) for length in options.lengths.split(",")]
    depths = np.linspace(0.0, 1.0, options.depths).tolist()
    tasks = passkey_tasks(read_haystack(), lengths, depths, options.trials)
    # `kill` is to clean up as ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console.print(
        f"[bold]Passkey demo.[/] {MODEL.name} was trained on sequences of 512 bytes. A five-digit key is hidden in "
        f"book text of {lengths[0]} to {lengths[-1]} bytes, and a real `vllm serve` is asked for it: {len(tasks)} "
        "questions to the plain model, then the same to LongMamba.\n"
    )
    started = time.monotonic()
    answers: dict[str, list[str]] = {}
    for name, extra in SERVERS.items():
        log = options.out / f"server-{name.lower()}.log"
        try:
            answers[name] = _ask_server(name, [*ARGUMENTS, *extra, *options.server_argument], tasks, log)
        except ServerError as error:
            console.print(f"[bold red]demo:[/] {escape(str(error))}", soft_wrap=True)
            return 1
        except OpenAIError as error:
            message = f"{error}; {log} ends with\n{log_tail(log)}"
            console.print(f"[bold red]demo:[/] {escape(message)}", soft_wrap=True)
            return 1
        except KeyboardInterrupt:
            console.print("[bold red]demo:[/] interrupted; the server has been stopped")
            return 130
    _print_accuracy(tasks, lengths, answers)
    _print_example(tasks, answers)
    picture = options.out / "demo.png"
    _draw(picture, tasks, lengths, depths, answers)
    console.print(f"\nPicture: {picture}. Time: {time.monotonic() - started:.0f} s.")
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="prompt lengths in bytes [%(default)s]")
    parser.add_argument("--depths", type=int, default=6, help="number of places of the key [%(default)s]")
    parser.add_argument("--trials", type=int, default=1, help="questions per length and depth [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for picture and logs [%(default)s]")
    parser.add_argument(
        "--server-argument", action="append", default=[], help="further argument of vllm serve (=VALUE); repeatable"
    )
    return parser.parse_args()


def _ask_server(name: str, arguments: list[str], tasks: list[PasskeyTask], log: Path) -> list[str]:
    """Start a server, ask it all questions, and stop it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        step = progress.add_task(f"{name}: starting vllm serve (log: {log})", total=1)
        with running_server(str(MODEL), arguments, log) as address:
            progress.update(step, completed=1, description=f"{name}: vllm serve is up at {address}")
            step = progress.add_task("", total=len(tasks))

            def show(done: int) -> None:
                progress.update(step, completed=done, description=f"{name}: {done} of {len(tasks)} questions answered")

            show(0)
            answers = asyncio.run(_ask_all(address, tasks, show))
            step = progress.add_task(f"{name}: stopping the server", total=1)
        progress.update(step, completed=1, description=f"{name}: server stopped")
    return answers


async def _ask_all(address: str, tasks: list[PasskeyTask], show: Callable[[int], None]) -> list[str]:
    """Ask all questions at once; the server batches them."""
    done = 0
    async with AsyncOpenAI(base_url=address, api_key="none", timeout=600, max_retries=0) as client:

        async def ask(task: PasskeyTask) -> str:
            nonlocal done
            completion = await client.completions.create(
                model=str(MODEL), prompt=task.prompt, max_tokens=KEY_DIGITS, temperature=0.0
            )
            done += 1
            show(done)
            return completion.choices[0].text

        return await asyncio.gather(*map(ask, tasks))


def _print_accuracy(tasks: list[PasskeyTask], lengths: list[int], answers: dict[str, list[str]]) -> None:
    table = Table(title="Keys found", title_justify="left")
    table.add_column("prompt (bytes)", justify="right")
    for name in answers:
        table.add_column(name, justify="right")
    for length in lengths:
        cells = []
        for given in answers.values():
            hits = [task.is_answered_by(text) for task, text in zip(tasks, given, strict=True) if task.length == length]
            cells.append(f"{sum(hits)} of {len(hits)} ({np.mean(hits):4.0%})")
        table.add_row(str(length), *cells)
    console.print()
    console.print(table)


def _print_example(tasks: list[PasskeyTask], answers: dict[str, list[str]]) -> None:
    """Show the longest question that only LongMamba answered; failing that, the longest that it answered."""

    def rank(index: int) -> tuple[bool, bool, int]:
        task = tasks[index]
        found = task.is_answered_by(answers[LONGMAMBA][index])
        return found, found and not task.is_answered_by(answers[PLAIN][index]), task.length

    example = max(range(len(tasks)), key=rank)
    task = tasks[example]
    console.print(f"\nFor example: {task.length} bytes of text, at {task.depth:.0%} of it the key {task.key}.")
    console.print(f"  {escape(QUESTION.strip())} ...")
    for name, given in answers.items():
        console.print(f"  {name:>10}: {escape(repr(given[example]))}")


def _draw(
    path: Path, tasks: list[PasskeyTask], lengths: list[int], depths: list[float], answers: dict[str, list[str]]
) -> None:
    """Save the share of keys found, depth by length, one heat map per server."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(answers), figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (name, given) in zip(panels, answers.items(), strict=True):
        found = np.zeros((len(depths), len(lengths)))
        asked = np.zeros_like(found)
        for task, text in zip(tasks, given, strict=True):
            cell = depths.index(task.depth), lengths.index(task.length)
            found[cell] += task.is_answered_by(text)
            asked[cell] += 1
        image = panel.imshow(found / asked, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        panel.set_title(f"{name}: {found.sum() / asked.sum():.0%} found")
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        panel.set_xlabel("prompt (bytes)")
    panels[0].set_ylabel("depth of the key in the text")
    figure.colorbar(image, ax=panels, label="share of keys found")
    figure.suptitle(f"{MODEL.name}, trained on 512 bytes: passkey through vllm serve")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
