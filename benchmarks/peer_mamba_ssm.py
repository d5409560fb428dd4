"""The torch reference and the engine, both plain, against mamba_ssm's MambaLMHeadModel with causal-conv1d, in float32.

    python benchmarks/peer_mamba_ssm.py [FOLDER ...]

Needs a CUDA GPU, and mamba-ssm with causal-conv1d, which must be compiled for the torch that is installed:

    MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d mamba-ssm

compiles nine architectures. benchmarks/support/build_mamba_ssm.sh compiles what is needed here for one, offline.

The folders are checkpoints in the original state-spaces format with a pytorch_model.bin, Mamba-1 or Mamba-2. Without
one it takes the example model. Compared are the log-probabilities of the last tokens of random prompts. Where vLLM is
missing, or --no-engine is given, the engine is left out. Writes JSON and Markdown.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# float32 products as float32: Triton's default is tf32, good to about 1e-3.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
# mamba_ssm then takes one launch size for each kernel, instead of compiling them all to choose the fastest.
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main() -> None:
    """Compare, and write the report; fails where a difference exceeds the tolerance."""
    from support.agreement import PEER, TITLES, argument_parser, settings_of, write_agreement

    parser = argument_parser(__doc__, 8192, PEER)
    parser.add_argument("--no-engine", action="store_true", help="leave the engine out")
    options = parser.parse_args()
    if importlib.util.find_spec("mamba_ssm") is None:
        print("peer_mamba_ssm: mamba_ssm is not installed, nothing is compared; see the top of this file")
        return
    with_engine = not options.no_engine and importlib.util.find_spec("vllm") is not None
    models = {folder.name: _compare(folder, options, with_engine) for folder in options.folders}
    settings = settings_of(options) | {"tf32": os.environ["TRITON_F32_DEFAULT"] != "ieee"}
    document = {"environment": _environment(with_engine), "settings": settings, "models": models}
    write_agreement(document, TITLES[PEER], options.output)


def _compare(folder: Path, options: argparse.Namespace, with_engine: bool) -> dict[str, dict[str, float]]:
    from support.logprobs import difference, engine_logprobs, random_prompts, torch_logprobs
    from torch_models import TorchModel

    prompts = random_prompts(folder, options.prompts, options.shortest, options.longest, options.seed)
    results = {}
    # First, while this process has not touched the GPU.
    if with_engine:
        results["engine"] = engine_logprobs(folder, {"filter": False}, prompts, options.scored)
    results["mamba_ssm"] = _peer_logprobs(folder, prompts, options.scored)
    results["torch reference"] = torch_logprobs(TorchModel(folder, device="cuda"), prompts, options.scored)
    pairs = [("torch reference", "mamba_ssm"), ("engine", "mamba_ssm"), ("engine", "torch reference")]
    return {
        f"{ours} - {theirs}": difference(results[ours], results[theirs])
        for ours, theirs in pairs
        if ours in results and theirs in results
    }


def _peer_logprobs(folder: Path, prompts: Sequence[list[int]], scored: int) -> list[Any]:
    import torch

    model = _peer_class().from_pretrained(str(folder), device="cuda", dtype=torch.float32).eval()
    results = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt], device="cuda")
            logits = model(ids, num_last_tokens=scored + 1).logits[0, :-1]
            logprobs = logits.double().log_softmax(-1).gather(1, ids[0, -scored:, None])[:, 0]
            results.append(logprobs.cpu().numpy())
    return results


def _peer_class() -> Any:
    """MambaLMHeadModel. vLLM, once imported, sets a variable with which mamba_ssm compiles all launch sizes after all:
    minutes in float32."""
    name = "TRITON_CACHE_AUTOTUNING"
    of_vllm = os.environ.pop(name, None)
    try:
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    finally:
        if of_vllm is not None:
            os.environ[name] = of_vllm
    return MambaLMHeadModel


def _environment(with_engine: bool) -> dict[str, Any]:
    from importlib.metadata import version

    import torch

    packages = ["torch", "triton", "mamba_ssm", "causal_conv1d"] + (["vllm"] if with_engine else [])
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
