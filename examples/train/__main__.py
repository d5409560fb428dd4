"""`python -m train FAMILY --text FILE --out FOLDER`, run in examples/; see README.md."""

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    family: Annotated[str, typer.Argument(help="mamba1, mamba2 or zamba2")],
    text: Annotated[Path, typer.Option(help="training text, .xz or plain; documents separated by <|doc|> lines")],
    out: Annotated[Path, typer.Option(help="folder for checkpoint, settings and curves")],
    minutes: Annotated[float | None, typer.Option(help="wall clock of everything, compilation and export too")] = None,
    steps: Annotated[int | None, typer.Option(help="most steps")] = None,
    seed: Annotated[int, typer.Option(help="of weights and data")] = 0,
    settings: Annotated[Path | None, typer.Option(help="JSON file with changes of settings")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="one change, name=JSON value; repeatable")] = None,
) -> None:
    """Train a reference model and export it in its family's format."""
    started = time.monotonic()
    import torch

    from .books import read_books
    from .curves import save_curves
    from .evaluation import final_evaluation
    from .export import export_model
    from .settings import family_settings, read_settings
    from .training import make_model, train

    changes: dict[str, Any] = read_settings(settings) if settings else {}
    changes.pop("family", None)
    for item in change or []:
        name, _, value = item.partition("=")
        changes[name] = json.loads(value)
    changes |= {"seed": seed} | ({"minutes": minutes} if minutes else {}) | ({"steps": steps} if steps else {})
    run = family_settings(family, **changes)

    out.mkdir(parents=True, exist_ok=True)
    run.save(out / "settings.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    model = make_model(run).to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{family}: {count:,} parameters, {name}, torch {torch.__version__}", flush=True)
    books = read_books(text, device)
    curves = train(
        model,
        run,
        books,
        started=started,
        report=lambda line: print(line, flush=True),
        export=lambda share: print(f"wrote {export_model(model, run, out / f'at-{share:g}')}", flush=True),
    )
    file = export_model(model, run, out)
    print(f"wrote {file} ({file.stat().st_size:,} bytes)", flush=True)
    final = {"device": name, "torch": torch.__version__} | final_evaluation(model, run, books.held_out)
    save_curves(curves, final | {"seconds": time.monotonic() - started}, out)
    print(json.dumps(final, indent=1))


if __name__ == "__main__":
    app()
