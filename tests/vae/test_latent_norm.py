"""Is the latent's shift and scale measured right, and does folding change nothing but units?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vae.autoencoder import Autoencoder
from vae.config import KLConfig
from vae.latent_norm import LatentNorm

SHAPE = KLConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
)


def latents(num: int = 6) -> Tensor:
    """Four channels of very different means and spreads."""
    spread = torch.tensor([0.1, 1.0, 7.0, 30.0]).view(1, 4, 1, 1)
    mean = torch.tensor([5.0, -0.3, 0.0, -40.0]).view(1, 4, 1, 1)
    return torch.randn(num, 4, 5, 7, generator=torch.Generator().manual_seed(0)) * spread + mean


@pytest.mark.parametrize(
    "norm",
    [
        LatentNorm.from_scalars(0.18215),
        LatentNorm.from_scalars(0.36, 0.116),
        LatentNorm.measure([latents()]),
    ],
    ids=["scale", "scale and shift", "per channel"],
)
def test_normalize_and_denormalize_are_inverse(norm: LatentNorm) -> None:
    raw = latents()
    torch.testing.assert_close(norm.denormalize(norm.normalize(raw)), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.normalize(norm.denormalize(raw)), raw, rtol=1e-5, atol=1e-4)


def test_half_precision_and_shape_are_kept() -> None:
    norm = LatentNorm.measure([latents()])
    z = norm.normalize(latents().bfloat16())
    assert z.dtype == torch.bfloat16 and z.shape == (6, 4, 5, 7)


def test_normalised_latents_have_zero_mean_and_unit_variance() -> None:
    raw = latents()
    z = LatentNorm.measure([raw]).normalize(raw).double()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-5)
    std = z.std((0, 2, 3), unbiased=False)
    torch.testing.assert_close(std, torch.ones(4).double(), rtol=1e-5, atol=0)


def test_batches_of_any_size_give_the_moments_of_the_whole() -> None:
    raw = latents(7)
    whole = LatentNorm.measure([raw])
    parts = LatentNorm.measure(iter(raw.split([1, 4, 2])))
    torch.testing.assert_close(parts.shift, whole.shift)
    torch.testing.assert_close(parts.scale, whole.scale)
    torch.testing.assert_close(whole.shift, raw.mean((0, 2, 3)))
    torch.testing.assert_close(1 / whole.scale, raw.std((0, 2, 3), unbiased=False))


def test_pooled_moments_are_those_of_all_channels_together() -> None:
    raw = latents()
    pooled = LatentNorm.measure([raw]).pooled()
    assert pooled.scale.shape == pooled.shift.shape == (1,)
    torch.testing.assert_close(pooled.shift[0], raw.mean())
    torch.testing.assert_close(1 / pooled.scale[0], raw.std(unbiased=False))


def test_folding_gives_the_normalised_posterior_and_keeps_reconstructions() -> None:
    torch.manual_seed(0)
    model: Any = Autoencoder.build(SHAPE).model.double().eval()
    image = torch.rand(3, 3, 8, 12, dtype=torch.float64) * 2 - 1
    norm = LatentNorm(torch.tensor([0.5, -2.0, 0.0, 30.0]), torch.tensor([4.0, 0.1, 1.0, 0.02]))
    scale = norm.scale.double().view(1, 4, 1, 1)
    with torch.no_grad():
        raw = model.encode(image).latent_dist
        mean, std = norm.normalize(raw.mean), raw.std * scale
        z = mean + 0.1 * torch.randn_like(mean)
        picture = model.decode(norm.denormalize(z)).sample

        norm.fold_into(model.quant_conv, model.post_quant_conv)

        folded = model.encode(image).latent_dist
        torch.testing.assert_close(folded.mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(folded.std, std, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.decode(z).sample, picture, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_measured_is_named() -> None:
    raw = latents()
    raw[:, 2] = 1.5
    with pytest.raises(ValueError, match=r"latent channels \[2\] are constant .* lower the KL"):
        LatentNorm.measure([raw])
    with pytest.raises(ValueError, match="on 0 latents; give at least one batch"):
        LatentNorm.measure([])
    raw[0, 1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="latents that are not finite; the autoencoder has div"):
        LatentNorm.measure([raw])
