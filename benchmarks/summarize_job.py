"""A whole job of long documents with dummy weights: documents a minute of `longmamba summarize` and of `LLM.generate`.

    python benchmarks/summarize_job.py --out benchmarks/results/summarize_job [--models NAME ...] [--documents 200]

Documents of random words, 4k to 64k tokens (their logarithm uniform), and 128 tokens of answer to each. The same
documents in the same order go through `longmamba summarize`, `LLM.generate` with --model-impl longmamba, and
`LLM.generate` with stock vLLM, one after the other, each in a process of its own and alone on the GPU, with vLLM's
defaults and the command's. Each engine first answers 24 other documents together, the shortest and the longest possible
among them, so that no kernel is compiled while the clock runs.

The clock runs from the first document's start to the last answer, reading and tokenizing included: around
`LLM.generate` with a list of strings; in the command from where its progress bar begins until its last row is in the
store. The engine's start is reported apart, with imports; it is longer where nothing is in the compilation caches.
Prints a table; --out NAME writes NAME.json and NAME.md, anew after each engine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from support.byte_documents import add_tokenizer, log_uniform_lengths, make_documents, prompt_of, remove_end_token
from support.environment import environment, environment_line
from support.markdown import markdown
from support.shapes import write_model

MODELS = ("mamba-1.4b", "mamba2-1.3b")
WAYS = {
    "command": "`longmamba summarize`",
    "longmamba": "`LLM.generate`, longmamba",
    "stock": "`LLM.generate`, stock vLLM",
}
TOKENS = (4096, 65536)
TINY_TOKENS = (200, 600)
ANSWER_TOKENS = 128
WARM_UP_DOCUMENTS, TINY_WARM_UP_DOCUMENTS = 24, 3
SEED = 0
PROCESS = Path(__file__).resolve().parent / "support" / "job_process.py"
HEAD = ["model", "through", "engine's start", "job", "documents a minute", "tokens a second", "than stock"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--documents", type=int, help="[200; with --tiny 5]")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny models and short documents, to try the script out; without a GPU, stock vLLM has mamba2-1.3b only",
    )
    parser.add_argument("--out", type=Path, help="name of the results, without suffix")
    given = parser.parse_args()
    given.documents = given.documents or (5 if given.tiny else 200)
    return given


def job_settings(name: str, folder: Path, count: int, is_tiny: bool) -> dict[str, Any]:
    """Write a model; what all ways through its job have in common, see support/job_process.py."""
    shortest, longest = TINY_TOKENS if is_tiny else TOKENS
    model = write_model(name, folder / name, is_tiny)
    add_tokenizer(model)
    remove_end_token(model)
    warm_up = TINY_WARM_UP_DOCUMENTS if is_tiny else WARM_UP_DOCUMENTS
    lengths = [shortest, longest, *log_uniform_lengths(count + warm_up - 2, shortest, longest, SEED)]
    documents = make_documents(lengths, SEED)
    return {
        "model": str(model),
        "table": str(model / "table.safetensors"),
        "dtype": "float32" if is_tiny else "bfloat16",
        "max_model_len": longest + len(prompt_of("")) + ANSWER_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "engine": {"load_format": "dummy", **({"enforce_eager": True, "max_num_seqs": 4} if is_tiny else {})},
        "warm_up": documents[:warm_up],
        "documents": documents[warm_up:],
    }


def run(way: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Send the documents one way; figures for the report.

    Raises:
        RuntimeError: the process failed, or answered other prompts or with answers of another length.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "settings.json", Path(folder) / "result.json"]
        files[0].write_text(json.dumps(settings | {"way": way}))
        if code := subprocess.run([sys.executable, str(PROCESS), *map(str, files)], check=False).returncode:
            raise RuntimeError(f"its process ended with exit code {code}")
        return figures(settings, json.loads(files[1].read_text()))


def figures(settings: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Totals and rates of what a process measured.

    Raises:
        RuntimeError: it answered other prompts or with answers of another length.
    """
    prompts = [len(prompt_of(document)) for document in settings["documents"]]
    if measured["prompt_tokens"] != prompts:
        raise RuntimeError(f"the prompts must have {prompts} tokens, and had {measured['prompt_tokens']}")
    if measured["output_tokens"] != [settings["answer_tokens"]] * len(prompts):
        raise RuntimeError(f"the answers must have {settings['answer_tokens']} tokens: {measured['output_tokens']}")
    tokens = {name: sum(measured[name]) for name in ("prompt_tokens", "output_tokens")}
    seconds = measured["seconds"]
    return {
        "start_seconds": round(measured["start_seconds"], 2),
        "seconds": round(seconds, 3),
        "documents_per_minute": 60 * len(prompts) / seconds,
        **tokens,
        "tokens_per_second": sum(tokens.values()) / seconds,
    }


def table(models: dict[str, Any]) -> str:
    """A row for each model and way; the last column is the ratio of the documents a minute."""
    rows = []
    for name, ways in models.items():
        for way, figure in ways.items():
            rate = figure["documents_per_minute"]
            than_stock = f"{rate / ways['stock']['documents_per_minute']:.2f} x" if "stock" in ways else ""
            start, seconds = f"{figure['start_seconds']:.1f} s", f"{figure['seconds']:.1f} s"
            rows.append([name, WAYS[way], start, seconds, f"{rate:.1f}", f"{figure['tokens_per_second']:,.0f}"])
            rows[-1].append(than_stock)
    return markdown(HEAD, rows)


def report(document: dict[str, Any]) -> str:
    """The Markdown file."""
    settings = document["settings"]
    shortest, longest = settings["tokens"]
    sizes = "tiny models" if settings["tiny"] else "published shapes"
    text = (
        f"Dummy weights, {sizes}; {settings['documents']} documents of {shortest:,} to {longest:,} tokens, "
        f"{settings['answer_tokens']} tokens of answer each. The same documents in the same order, one engine after "
        "the other, vLLM's defaults. The time of the job has no start of an engine in it, nor the documents that "
        "each engine answers first."
    )
    title = "# A job of long documents"
    return "\n\n".join([title, environment_line(document["environment"]), text, table(document["models"])]) + "\n"


def write(out: Path, document: dict[str, Any]) -> None:
    """Write the JSON and the Markdown file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # A name may have a dot in it, as those of the models do.
    out.with_name(f"{out.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    out.with_name(f"{out.name}.md").write_text(report(document))


def main() -> None:
    given = arguments()
    settings = {
        "documents": given.documents,
        "tokens": TINY_TOKENS if given.tiny else TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "seed": SEED,
        "tiny": given.tiny,
    }
    document: dict[str, Any] = {"environment": environment(), "settings": settings, "models": {}}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models:
            job = job_settings(name, Path(folder), given.documents, given.tiny)
            settings |= {setting: job[setting] for setting in ("dtype", "max_model_len", "engine")}
            ways = document["models"].setdefault(name, {})
            for way, title in WAYS.items():
                try:
                    ways[way] = run(way, job)
                except RuntimeError as error:
                    failures.append(f"{name}, {way}: {error}")
                    print(failures[-1], flush=True)
                    continue
                print(f"{name}, {title}: {ways[way]['documents_per_minute']:.1f} documents a minute", flush=True)
                if given.out is not None:
                    write(given.out, document)
    print(table(document["models"]))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
