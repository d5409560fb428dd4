"""How much the heads of Mamba-2 forget: set before a training, and kept as it is during one."""

import math

import torch
from torch import nn

from .books import windows
from .mixers import Mamba2Mixer
from .settings import Settings

MEASURED_SEQUENCES = 32


def mamba2_mixers(model: nn.Module) -> list[Mamba2Mixer]:
    """From the first layer to the last."""
    return [part for part in model.modules() if isinstance(part, Mamba2Mixer)]


@torch.no_grad()
def raise_decays(model: nn.Module, settings: Settings, text: torch.Tensor, generator: torch.Generator) -> None:
    """Raises A, in place, of every head that keeps more than the ceiling of its state over a training length of text.

    dt stays what it is, and with it how far the dt of one token is from that of another, which the filter goes by. A
    ceiling that is met by the weights of dt instead (`retention_ceiling`) brings them closer together.

    Args:
        model: with Mamba-2 mixers; layers are measured as they are before any A is raised.
        settings: with `start_ceiling`, the share of the state.
        text: (bytes,) uint8.
        generator: of the device of the text.
    """
    sums: dict[Mamba2Mixer, torch.Tensor] = {}

    def measure(mixer: Mamba2Mixer, inputs: tuple[torch.Tensor]) -> None:
        sums[mixer] = mixer.forgetting(*inputs).sum(1).mean(0)

    hooks = [mixer.register_forward_pre_hook(measure) for mixer in mamba2_mixers(model)]
    model(windows(text, MEASURED_SEQUENCES, settings.length, generator))
    for hook in hooks:
        hook.remove()
    for mixer, forgotten in sums.items():
        mixer.A_log += (-math.log(settings.start_ceiling) / forgotten).clamp(min=1).log()


class FixedDecays:
    """Undoes what an optimiser's step has done to A and to the weights of dt.

    They are part of matrices that are trained, and have a weight decay with them, so that no gradient is not enough.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [part.detach() for mixer in mamba2_mixers(model) for part in mixer.decay_parameters()]
        self._values = [part.clone() for part in self._parameters]

    def restore(self) -> None:
        """To what they were when this was made."""
        torch._foreach_copy_(self._parameters, self._values)
