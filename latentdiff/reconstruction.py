"""How faithful is an autoencoder? PSNR, SSIM and a sheet on held-out pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader
from data_pipelines.pixels import to_image
from latentdiff.pictures import grid
from vae.autoencoder import Autoencoder


@dataclass(frozen=True)
class ReconstructionScore:
    """Means over pictures in [0, 1]: PSNR in dB, SSIM; and how many pictures."""

    psnr_db: float
    ssim: float
    num_images: int


@torch.no_grad()
def score_reconstructions(
    autoencoder: Autoencoder,
    data: DataConfig,
    device: torch.device,
    num_shown: int = 32,
    batch_size: int = 64,
    max_images: int | None = None,
) -> tuple[ReconstructionScore, Image.Image]:
    """Encode (posterior mean) and decode every picture of `data` once.

    Returns:
        The score, and a sheet of the first `num_shown`: originals over their reconstructions.

    Raises:
        ValueError: `num_shown` is below 1, or the pictures' size does not fit the autoencoder.
    """
    if num_shown < 1:
        raise ValueError(f"num_shown must be at least 1; got {num_shown}")
    from torchmetrics.functional.image import structural_similarity_index_measure

    loader = Loader(data, seed=0, batch_size=1)
    count = min(len(loader), max_images or len(loader))
    psnr = ssim = 0.0
    shown: list[tuple[Image.Image, Image.Image]] = []
    for start in range(0, count, batch_size):
        images = torch.stack(
            [loader.image(i) for i in range(start, min(start + batch_size, count))]
        )
        output = (
            autoencoder.decode(autoencoder.encode(images.to(device))).float().cpu().clamp(-1, 1)
        )
        psnr += peak_signal_to_noise(output, images).sum().item()
        per_image = structural_similarity_index_measure(
            (output + 1) / 2, (images + 1) / 2, data_range=1.0, reduction="none"
        )
        ssim += torch.as_tensor(per_image).sum().item()
        for original, reconstructed in zip(images, output, strict=True):
            if len(shown) < num_shown:
                shown.append((to_image(original), to_image(reconstructed)))
    return ReconstructionScore(psnr / count, ssim / count, count), _sheet(shown)


def peak_signal_to_noise(output: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB [b] of pictures in [-1, 1]: `-10 log10(MSE)` in units of [0, 1]."""
    mse = ((output - target) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)
    return -10 * mse.log10()


def _sheet(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    columns = min(16, len(pairs))
    cells: list[Image.Image] = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        blank = [Image.new("RGB", row[0][0].size, "white")] * (columns - len(row))
        cells += [a for a, _ in row] + blank + [b for _, b in row] + blank
    return grid(cells, columns)
