"""`python -m train prepare TEXT... --out DATA`, `python -m train FAMILY --data DATA --out FOLDER`; see README.md."""

import argparse
import json
import platform
import signal
import threading
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()

import torch  # noqa: E402

from .corpus import load_corpus, prepare  # noqa: E402
from .export import export_model  # noqa: E402
from .settings import FAMILIES, family_settings  # noqa: E402
from .training import make_model, train  # noqa: E402

VOCABULARY_MULTIPLE = 16


def main(arguments: list[str] | None = None) -> None:
    """Runs one command."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "prepare":
            count = prepare(options.texts, options.out, options.vocabulary, options.tokens)
            print(f"wrote {count:,} tokens and their tokenizer to {options.out}")
        else:
            run(options)
    except (ValueError, OSError) as error:
        raise SystemExit(f"python -m train {options.command}: {error}") from error


def run(options: argparse.Namespace) -> None:
    """Trains a model and exports it in its family's format."""
    corpus = load_corpus(options.data)
    vocabulary = -(-corpus.tokenizer.get_vocab_size() // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    changes = dict(map(_change, options.change))
    limits = {name: value for name in ("minutes", "steps") if (value := getattr(options, name)) is not None}
    settings = family_settings(options.command, vocabulary, **changes, **limits, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    settings.save(options.out / "settings.json")

    stop = threading.Event()
    for of in (signal.SIGTERM, signal.SIGINT):
        signal.signal(of, lambda *_: stop.set())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(settings).to(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{settings.family}: {count:,} parameters, {name}, torch {torch.__version__}", flush=True)
    curves = train(
        model,
        settings,
        corpus,
        workers=options.workers,
        started=STARTED,
        report=lambda line: print(line, flush=True),
        export=lambda: print(f"wrote {export_model(model, settings, corpus.tokenizer, options.out)}", flush=True),
        stopped=stop.is_set,
    )
    (options.out / "curves.json").write_text(json.dumps(curves) + "\n")
    print(f"done after {time.monotonic() - STARTED:.0f} s", flush=True)


def _change(item: str) -> tuple[str, Any]:
    """Reads the value of --set."""
    name, _, value = item.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {item}: must be name=JSON value, such as d_model=768 ({error})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a tokenizer, and the tokens of texts")
    command.add_argument("texts", type=Path, nargs="+", help="text, .xz or plain; documents separated by <|doc|> lines")
    command.add_argument("--out", type=Path, required=True, help="folder for tokenizer and tokens")
    command.add_argument("--vocabulary", type=int, default=16_384, help="tokens of the tokenizer")
    command.add_argument("--tokens", type=int, default=40_000_000, help="most tokens of text")
    for family in FAMILIES:
        command = commands.add_parser(family, help=f"train a model of the family {family}")
        command.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
        command.add_argument("--out", type=Path, required=True, help="folder for checkpoint, settings and curves")
        command.add_argument("--minutes", type=float, help="wall clock of everything, compilation and export too")
        command.add_argument("--steps", type=int, help="most steps")
        command.add_argument("--seed", type=int, default=0, help="of weights and data")
        command.add_argument("--workers", type=int, default=8, help="processes that draw sequences")
        command.add_argument("--set", dest="change", action="append", default=[], help="a setting, name=JSON value")
    return parser


if __name__ == "__main__":
    main()
