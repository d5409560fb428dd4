"""Do the engine and the torch reference agree? Log-probabilities in float32 on random prompts, plain and LongMamba.

    python benchmarks/engine_vs_torch.py [FOLDER ...]

The folders are checkpoints that the torch reference runs: Mamba-1, Mamba-2 or FalconMamba. Without one it takes the
example model. Both sides find LongMamba's table in the same way. Writes JSON and Markdown, and fails where a difference
exceeds 1e-3. One model takes a minute or two on a CPU core.
"""

import argparse
import os
from pathlib import Path
from typing import Any

# float32 products as float32: on a GPU, Triton's default is tf32, good to about 1e-3.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    """Compare, and write the report."""
    from support.agreement import ENGINE, TITLES, argument_parser, settings_of, write_agreement
    from support.environment import environment

    parser = argument_parser(__doc__, 4096, ENGINE)
    parser.add_argument("--table", help="threshold table, for a single folder [default: searched, as in serving]")
    options = parser.parse_args()
    models = {folder.name: _compare(folder, options) for folder in options.folders}
    document = {"environment": environment(), "settings": settings_of(options), "models": models}
    write_agreement(document, TITLES[ENGINE], options.output)


def _compare(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    from support.logprobs import difference, engine_logprobs, random_prompts, torch_logprobs
    from torch_models import LongMamba, TorchModel

    from vllm_longmamba.options import LongMambaOptions

    prompts = random_prompts(folder, options.prompts, options.shortest, options.longest, options.seed)
    given: dict[str, Any] = {"table": options.table} if options.table else {}
    # First, while this process has not touched a GPU; a table that the engine makes is then there for the reference.
    engine = {
        "plain": engine_logprobs(folder, {"filter": False}, prompts, options.scored),
        "longmamba": engine_logprobs(folder, given, prompts, options.scored),
    }
    plain = TorchModel(folder)
    models = {
        "plain": plain,
        "longmamba": plain.with_method(LongMamba.for_folder(folder, LongMambaOptions(**given))),
    }
    return {
        method: difference(engine[method], torch_logprobs(model, prompts, options.scored))
        for method, model in models.items()
    }


if __name__ == "__main__":
    main()
