"""Whole Mamba language models in plain torch, float32, for comparing and developing methods; knows nothing of vLLM.

Mamba-1, Mamba-2 and FalconMamba checkpoints, on a CPU or a GPU, with a method that acts while the prompt is read:
plain, LongMamba or DeciMamba.
"""

from .mean_distance import choose_layers, mean_distances
from .methods import DeciMamba, LayerPlan, LayerView, LongMamba, Plain, Prompt, ReadingMethod
from .model import Reading, TorchModel
from .search import Trial, search_decimamba

__all__ = [
    "DeciMamba",
    "LayerPlan",
    "LayerView",
    "LongMamba",
    "Plain",
    "Prompt",
    "Reading",
    "ReadingMethod",
    "TorchModel",
    "Trial",
    "choose_layers",
    "mean_distances",
    "search_decimamba",
]
