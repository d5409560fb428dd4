"""What acts on a model while it reads a prompt; one file a method."""

from .decimamba import DeciMamba
from .longmamba import LongMamba
from .plain import LayerPlan, LayerView, Plain, Prompt, ReadingMethod

__all__ = ["DeciMamba", "LayerPlan", "LayerView", "LongMamba", "Plain", "Prompt", "ReadingMethod"]
