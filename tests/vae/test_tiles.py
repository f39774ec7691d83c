"""Are tiles large enough, and are tiles and slices those of diffusers?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kl_rig import assert_near, assert_same_kl, config_of, lean_kl, noise, their_kl, their_tiny
from torch import Tensor

import vae.lean_tiny
from vae.autoencoder import Autoencoder
from vae.latent_norm import LatentNorm
from vae.lean_tiny import LeanTiny


def set_tile(model: Any, side_px: int) -> None:
    """Smaller than it may be at first, so that tests need no large pictures."""
    model.tile_sample_min_size, model.tile_latent_min_size = side_px, side_px // 2
    model.enable_tiling()


@pytest.mark.parametrize(("sample_size", "side"), [(32, 512), (512, 512), (768, 768)])
@pytest.mark.parametrize("is_lean", [True, False])
@torch.inference_mode()
def test_a_tile_is_512_px_at_least(is_lean: bool, sample_size: int, side: int) -> None:
    network = their_kl(sample_size=sample_size)
    if is_lean:
        network = lean_kl(network)
    autoencoder = Autoencoder(network, LatentNorm.from_scalars(), 4, downscale=2).eval()
    seen: list[int] = []
    network.decoder.register_forward_hook(lambda _, given, out: seen.append(out.shape[-1]))
    network.encoder.register_forward_hook(lambda _, given, out: seen.append(2 * out.shape[-1]))
    fits, large = noise(1, 4, 4, side // 2), noise(1, 4, 4, side // 2 + 4)
    picture = noise(1, 3, 8, side)
    whole, latent = autoencoder.decode(fits), autoencoder.encode(picture)
    autoencoder.enable_tiling()
    assert (network.tile_sample_min_size, network.tile_latent_min_size) == (side, side // 2)
    assert torch.equal(autoencoder.decode(fits), whole)
    assert torch.equal(autoencoder.encode(picture), latent)
    assert seen == [side] * 4
    autoencoder.decode(large)
    assert seen[4:] == [side, side // 4 + 8]


@pytest.mark.parametrize("size", [(32, 32), (36, 60), (100, 34), (70, 128)])
@torch.inference_mode()
def test_tiles_are_those_of_diffusers(size: tuple[int, int]) -> None:
    theirs = their_kl()
    ours = lean_kl(theirs)
    image, z = noise(2, 3, *size), noise(2, 4, size[0] // 2, size[1] // 2)
    whole = ours.decode(z).sample
    for model in (ours, theirs):
        set_tile(model, 32)
    assert_same_kl(ours, theirs, image, z)
    assert torch.equal(ours.decode(z).sample, whole) == (size == (32, 32))
    ours.disable_tiling()
    assert torch.equal(ours.decode(z).sample, whole)


@torch.inference_mode()
def test_tiles_of_a_side_that_three_quarters_do_not_divide() -> None:
    """10 cells overlap by 3, where diffusers' own tiles no longer meet."""
    ours = lean_kl(their_kl())
    set_tile(ours, 20)
    z, image = noise(1, 4, 23, 31), noise(1, 3, 46, 62)
    assert ours.decode(z).sample.shape == image.shape
    assert ours.encode(image).latent_dist.mean.shape == z.shape


@torch.inference_mode()
def test_only_a_tile_is_in_memory_at_once() -> None:
    ours = lean_kl(their_kl())
    seen: list[int] = []
    ours.decoder.register_forward_hook(lambda _, given, out: seen.append(out.numel()))
    z = noise(3, 4, 40, 40)
    set_tile(ours, 32)
    ours.enable_slicing()
    ours.decode(z)
    assert len(seen) == 3 * 4 * 4 and max(seen) == 3 * 32 * 32


@torch.inference_mode()
def test_slices() -> None:
    theirs = their_kl()
    ours = lean_kl(theirs)
    ours.enable_slicing()
    assert_same_kl(ours, theirs, noise(3, 3, 8, 8), noise(3, 4, 4, 4))


@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.inference_mode()
def test_tiles_of_a_tiny_one_change_nothing(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae.lean_tiny, "_TILE_CELLS", 7)
    theirs = their_tiny(levels)  # in float64, where rounding hides no pixel that is missed
    ours = LeanTiny.from_weights(config_of(theirs), theirs.state_dict(), dtype=torch.float64)
    z = noise(2, 4, 40, 57).double()
    image = noise(2, 3, 40 * ours.downscale, 57 * ours.downscale).double()
    whole, latents = ours.decode(z).sample, ours.encode(image).latents
    seen: list[int] = []
    ours.decoder["layers"].register_forward_hook(lambda _, given, out: seen.append(out.shape[-1]))
    ours.enable_tiling()
    ours.enable_slicing()
    assert_near(ours.decode(z).sample, whole, 1e-13)
    assert_near(ours.encode(image).latents, latents, 1e-13)
    assert len(seen) == 2 * 6 * 9 and max(seen) < whole.shape[-1]
    tiled = vae.lean_tiny.exactly_tiled

    def short_sighted(network: Any, x: Tensor, tile: int, reach: int, *scales: int) -> Tensor:
        return tiled(network, x, tile, reach - 3, *scales)

    monkeypatch.setattr(vae.lean_tiny, "exactly_tiled", short_sighted)
    assert (ours.decode(z).sample - whole).abs().max() > 1e-12 * whole.abs().max()
    ours.disable_tiling()
    ours.disable_slicing()
    assert torch.equal(ours.decode(z).sample, whole)
