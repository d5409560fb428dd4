"""Calibration files in exactly the form in which LongMamba's authors released theirs."""

from pathlib import Path

import torch

# selected_len in load_align_target.py of GATECH-EIC/LongMamba.
THOUSANDS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 30, 36, 44, 54, 64, 80, 96, 120, 144, 168, 192)


def write_release(
    folder: Path, channels: list[int], *, seed: int = 0
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Write random files.

    Args:
        folder: gets `tA_prod/` and `delta_t-thre/`, and `alpha/` and `decay/` beside them, as in the release.
        channels: of each layer.

    Returns:
        What the files of each layer hold.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in ("tA_prod", "delta_t-thre", "alpha", "decay"):
        (folder / name).mkdir(parents=True)
    layers = []
    for layer, count in enumerate(channels):
        retention = 10.0 ** (-30 * torch.rand(count, generator=generator) ** 3)
        rising = torch.rand(len(THOUSANDS), count, generator=generator).sort(dim=0).values
        thresholds = {f"{k}k": torch.zeros(count) if k <= 2 else rising[row] for row, k in enumerate(THOUSANDS)}
        torch.save(retention, folder / "tA_prod" / f"tA_prod_layer_{layer}.pt")
        torch.save(thresholds, folder / "delta_t-thre" / f"delta_t-thre_layer_{layer}.pt")
        torch.save({key: torch.ones(count) for key in thresholds}, folder / "alpha" / f"alpha_layer_{layer}.pt")
        torch.save(torch.ones(count), folder / "decay" / f"decay_layer_{layer}.pt")
        layers.append((retention, thresholds))
    return layers
