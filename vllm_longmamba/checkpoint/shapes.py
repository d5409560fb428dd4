"""What a checkpoint on disk says about its Mamba layers, without loading the model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_longmamba.architectures import MODEL_IMPL, supported_architecture
from vllm_longmamba.checkpoint.table_lookup import Weights, locate_weights, safetensors_weights
from vllm_longmamba.checkpoint.train_length import train_length
from vllm_longmamba.options import LongMambaOptions

# Every Mamba mixer of every family has this parameter: (channels, d_state) in Mamba-1, (channels,) in Mamba-2.
_A_LOG = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:.+\.)?A_log")


@dataclass(frozen=True)
class ModelFiles:
    """A checkpoint as vLLM would load it.

    Attributes:
        name: the name or folder that was given.
        model_config: vLLM's `ModelConfig`.
        weights: the weight files.
    """

    name: str
    model_config: Any
    weights: Weights

    @property
    def architecture(self) -> str:
        """vLLM's name of its architecture.

        Raises:
            ValueError: it has no LongMamba variant.
        """
        return supported_architecture(self.model_config.architectures)

    def train_length(self) -> int:
        """Tokens of the sequences the model was trained on, as far as that is known.

        Raises:
            ValueError: nobody knows.
        """
        return train_length(self.model_config.hf_text_config, LongMambaOptions())

    def channels(self) -> dict[int, int]:
        """Channels of each Mamba layer, by the index of the layer, ascending.

        Raises:
            ValueError: dummy weights, or a checkpoint without Mamba layers.
        """
        found: dict[int, int] = {}
        if self.weights.folder is not None:
            for file in _weight_files(self.weights.folder):
                for name, shape in _shapes(file):
                    if match := _A_LOG.search(name):
                        found[int(match[1])] = shape[0]
        if not found:
            raise ValueError(
                f"the weights of {self.name!r} hold no Mamba layer (no tensor layers.N...A_log); name a Mamba model"
            )
        return dict(sorted(found.items()))


def open_model(model: str, **engine_args: Any) -> ModelFiles:
    """Read a model's config and find (and for a model on the hub, download) its weights.

    Args:
        model: name or folder, as for `vllm serve`.
        engine_args: further arguments of vLLM's `EngineArgs`, such as `revision`.

    Raises:
        ValueError: no such model, or one that has no LongMamba variant.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    # Ours makes original checkpoints readable.
    load_general_plugins()
    arguments = EngineArgs(model=model, model_impl=MODEL_IMPL, **engine_args)
    model_config = arguments.create_model_config()
    return ModelFiles(model, model_config, locate_weights(model_config, arguments.create_load_config()))


def _weight_files(folder: Path) -> list[Path]:
    return safetensors_weights(folder) or sorted([*folder.glob("*.bin"), *folder.glob("*.pt")])


def _shapes(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 - not a dict
                yield name, tuple(checkpoint.get_slice(name).get_shape())
        return
    from vllm_longmamba.checkpoint.torch_files import load_weights_file

    for name, tensor in load_weights_file(file, on_meta=True).items():
        yield name, tuple(tensor.shape)
