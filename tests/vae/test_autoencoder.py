"""Does every kind of autoencoder encode, decode, load and save, and say what is wrong?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DModel
from torch import Tensor

from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig, KLConfig, TinyConfig
from vae.latent_norm import LatentNorm

KL = KLConfig(
    block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
)
TINY = TinyConfig(block_out_channels=(8, 8, 8))
PER_CHANNEL = LatentNorm(torch.tensor([0.5, -2.0, 0.0, 3.0]), torch.tensor([4.0, 0.1, 1.0, 0.5]))


def build(config: KLConfig | TinyConfig) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder.build(config).eval()


def diffusers_kl(**changes: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    return AutoencoderKL(**shape, **changes).eval()


def picture(height: int = 16, width: int = 24, num: int = 2) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Encode and decode


@pytest.mark.parametrize(
    ("config", "downscale"), [(KL, 2), (TINY, 4), (IdentityConfig(), 1)], ids=lambda c: str(c)[:12]
)
@torch.no_grad()
def test_shapes(config: Any, downscale: int) -> None:
    autoencoder = Autoencoder.build(config).eval()
    assert autoencoder.downscale == config.downscale == downscale
    image = picture()
    z = autoencoder.encode(image)
    channels = 3 if autoencoder.is_identity else 4
    assert z.shape == (2, channels, 16 // downscale, 24 // downscale)
    assert autoencoder.latent_channels == channels
    assert autoencoder.decode(z).shape == image.shape
    mean, std = autoencoder.moments(image)
    assert torch.equal(mean, z) and std.shape == z.shape
    assert (std > 0).all() if isinstance(config, KLConfig) else (std == 0).all()


@torch.no_grad()
def test_noise_draws_from_the_posterior() -> None:
    autoencoder = build(KL)
    autoencoder.norm = PER_CHANNEL
    mean, std = autoencoder.moments(picture())
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(autoencoder.encode(picture(), noise), mean + std * noise)
    raw = autoencoder.model.encode(picture()).latent_dist
    torch.testing.assert_close(mean, PER_CHANNEL.normalize(raw.mean))
    torch.testing.assert_close(std, raw.std * PER_CHANNEL.scale.view(1, 4, 1, 1))


def test_pixel_space_is_the_identity() -> None:
    pixels = Autoencoder.build(IdentityConfig())
    image = picture(7, 9)
    assert torch.equal(pixels.encode(image), image)
    assert torch.equal(pixels.decode(image), image)
    pixels.enable_tiling()
    pixels.enable_slicing()
    with pytest.raises(ValueError, match="pixel space has no autoencoder to save"):
        pixels.save("nowhere")


def test_sizes_that_are_no_multiple() -> None:
    with pytest.raises(
        ValueError, match=r"image of 16x22 px: height and width must be multiples of 4; resize"
    ):
        build(TINY).encode(picture(16, 22))


# Load and save


@pytest.mark.parametrize("folder", ["", "vae"])
@torch.no_grad()
def test_opens_what_diffusers_saved(tmp_path: Path, folder: str) -> None:
    theirs = diffusers_kl(scaling_factor=0.5, shift_factor=0.25)
    theirs.save_pretrained(tmp_path / folder)
    ours = Autoencoder.load(tmp_path).eval()
    raw = theirs.encode(picture()).latent_dist.mean
    torch.testing.assert_close(ours.encode(picture()), (raw - 0.25) * 0.5)
    torch.testing.assert_close(ours.decode((raw - 0.25) * 0.5), theirs.decode(raw).sample)
    assert (ours.downscale, ours.latent_channels) == (2, 4)


@pytest.mark.parametrize("folder", ["", "vae"])
@torch.no_grad()
def test_opens_a_tiny_one_that_diffusers_saved(tmp_path: Path, folder: str) -> None:
    torch.manual_seed(0)
    theirs: Any = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=2.0,
    )
    theirs.save_pretrained(tmp_path / folder)
    ours = Autoencoder.build(TinyConfig(pretrained=str(tmp_path))).eval()
    raw = theirs.encode(picture()).latents
    torch.testing.assert_close(ours.encode(picture()), raw * 2)
    torch.testing.assert_close(ours.decode(raw * 2), theirs.decode(raw).sample)
    assert (ours.downscale, ours.latent_channels) == (4, 4)


@pytest.mark.parametrize(
    ("config", "norm"),
    [
        (KL, PER_CHANNEL),
        (KL, LatentNorm.from_scalars(0.3)),
        (KL, LatentNorm.from_scalars(0.3, -1.5)),
        (TINY, LatentNorm.from_scalars(0.3, -1.5)),
    ],
    ids=["per channel", "scale", "scale and shift", "tiny"],
)
@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path: Path, config: Any, norm: LatentNorm) -> None:
    before = build(config)
    before.norm = norm
    mean, std = before.moments(picture())
    output = before.decode(mean)
    before.save(tmp_path / "a" / "vae")
    for after in (before, Autoencoder.load(tmp_path / "a").eval()):
        again, spread = after.moments(picture())
        torch.testing.assert_close(again, mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(spread, std, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after.decode(mean), output, rtol=1e-4, atol=1e-5)
    files = {path.name for path in (tmp_path / "a" / "vae").iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["vae"]


@torch.no_grad()
def test_programs_that_know_a_scalar_factor_alone_get_the_normalised_latent(
    tmp_path: Path,
) -> None:
    ours = build(KL)
    ours.norm = PER_CHANNEL
    z = ours.encode(picture())
    ours.save(tmp_path)
    theirs: Any = AutoencoderKL.from_pretrained(str(tmp_path))
    assert theirs.config.scaling_factor == 1 and not theirs.config.shift_factor
    raw = theirs.encode(picture()).latent_dist.mean
    torch.testing.assert_close(raw, z, rtol=1e-4, atol=1e-5)


def test_an_old_shift_does_not_survive_a_new_norm(tmp_path: Path) -> None:
    diffusers_kl(scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path)
    ours = Autoencoder.load(tmp_path)
    ours.norm = PER_CHANNEL
    ours.save(tmp_path)
    again = Autoencoder.load(tmp_path).norm
    assert (again.shift.tolist(), again.scale.tolist()) == ([0], [1])


def test_a_per_channel_norm_needs_a_place(tmp_path: Path) -> None:
    bare = diffusers_kl(use_quant_conv=False, use_post_quant_conv=False)
    bare.save_pretrained(tmp_path / "bare")
    for ours, name in (
        (Autoencoder.load(tmp_path / "bare"), "AutoencoderKL"),
        (build(TINY), "AutoencoderTiny"),
    ):
        assert not ours.folds_norm
        ours.norm = PER_CHANNEL
        with pytest.raises(ValueError, match=rf"{name} has no 1x1 convolutions .* norm.pooled"):
            ours.save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert build(KL).folds_norm


def test_a_failed_save_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    ours = build(KL)
    ours.save(tmp_path / "vae")
    before = {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}

    def full(self: Any, directory: Path, **_: Any) -> None:
        Path(directory).mkdir(parents=True)
        (Path(directory) / "config.json").write_text("{")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", full)
    with pytest.raises(OSError, match=r"vae: No space left on device"):
        ours.save(tmp_path / "vae")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


@pytest.mark.parametrize(
    "name", ["nowhere", "owner/name", "a/b/c", "/nowhere/vae", "x.safetensors"]
)
def test_missing_directories_and_ids(name: str) -> None:
    with pytest.raises(ValueError, match=rf"autoencoder {name} not found; expected a directory"):
        Autoencoder.load(name)


def test_a_hub_id_may_name_a_pipeline_and_hold_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def load_config(
        pretrained_model_name_or_path: str, subfolder: str | None = None
    ) -> dict[str, Any]:
        asked.append((pretrained_model_name_or_path, subfolder))
        if subfolder is None:
            raise OSError("no config.json")
        return {"_class_name": "AutoencoderDC"}

    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    with pytest.raises(ValueError, match=r"holds a AutoencoderDC; expected AutoencoderKL or"):
        Autoencoder.load("black-forest-labs/FLUX.1-dev")
    assert asked == [("black-forest-labs/FLUX.1-dev", place) for place in (None, "vae")]


def test_directories_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not an autoencoder: expected a config"):
        Autoencoder.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file not found; expected a directory"):
        Autoencoder.load(tmp_path / "file")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="holds a UNet2DModel; expected AutoencoderKL or"):
        Autoencoder.load(tmp_path)
    assert UNet2DModel.__name__ == "UNet2DModel"  # such a network exists


@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_files_that_are_cut(tmp_path: Path, file: str) -> None:
    diffusers_kl().save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        Autoencoder.load(tmp_path)


# Half precision


def overflowing() -> Autoencoder:
    """Its residual streams pass 65,504, the largest float16, on both ways."""
    autoencoder = build(KL)
    encoder, decoder = autoencoder.model.encoder, autoencoder.model.decoder
    with torch.no_grad():
        for conv in (
            encoder.conv_in,
            encoder.down_blocks[0].resnets[0].conv2,
            decoder.conv_in,
            decoder.mid_block.resnets[0].conv2,
        ):
            conv.bias.fill_(6e4)
    return autoencoder.half()


@torch.no_grad()
def test_a_half_precision_overflow_is_computed_again_in_float32() -> None:
    half = overflowing()
    weights = {name: value.clone() for name, value in half.state_dict().items()}
    single = overflowing().float()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert not torch.isfinite(half.model.decode(z.half()).sample).all()  # it does overflow
    assert not torch.isfinite(half.model.encode(picture().half()).latent_dist.mean).all()

    assert torch.equal(half.decode(z), single.decode(z))
    assert half.decode(z).std() > 0
    assert torch.equal(half.encode(picture()), single.encode(picture()))
    for name, value in half.state_dict().items():  # the network itself is as it was
        assert value.dtype == torch.float16 and torch.equal(value, weights[name])


@torch.no_grad()
def test_half_precision_that_fits_stays_half() -> None:
    half = build(KL).half()
    z = half.encode(picture())
    assert z.dtype == half.decode(z).dtype == torch.float16
    torch.testing.assert_close(z.float(), build(KL).encode(picture()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", [KL, IdentityConfig()], ids=["kl", "identity"])
@torch.no_grad()
def test_latents_that_are_not_finite_raise(config: Any, dtype: torch.dtype) -> None:
    autoencoder = Autoencoder.build(config).to(dtype)
    z = torch.zeros(1, autoencoder.latent_channels, 4, 4)
    z[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"not finite; expected finite .* use float32"):
        autoencoder.decode(z)


# Slices and tiles


@torch.no_grad()
def test_slicing_changes_nothing() -> None:
    autoencoder = build(KL)
    z = autoencoder.encode(picture(num=3))
    whole = autoencoder.decode(z)
    autoencoder.enable_slicing()
    assert autoencoder.model.use_slicing
    torch.testing.assert_close(autoencoder.encode(picture(num=3)), z)
    torch.testing.assert_close(autoencoder.decode(z), whole)
    autoencoder.enable_slicing(False)
    assert not autoencoder.model.use_slicing


@torch.no_grad()
def test_tiling_is_for_large_pictures_alone() -> None:
    autoencoder = build(KL)
    image = picture(32, 48)
    z, small = autoencoder.encode(image), autoencoder.encode(picture())
    whole = autoencoder.decode(z)
    autoencoder.enable_tiling()
    assert autoencoder.model.tile_sample_min_size == 512
    assert torch.equal(autoencoder.encode(image), z)  # smaller than a tile

    autoencoder.model.tile_sample_min_size, autoencoder.model.tile_latent_min_size = 24, 12
    tiled = autoencoder.decode(z)
    assert tiled.shape == whole.shape and autoencoder.encode(image).shape == z.shape
    assert not torch.equal(tiled, whole)  # tiles were used
    both = torch.stack([tiled.flatten(), whole.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.7  # the same picture, up to each tile's group norms
    assert torch.equal(autoencoder.encode(picture()), small)

    autoencoder.enable_tiling(False)
    assert torch.equal(autoencoder.decode(z), whole)


@torch.no_grad()
def test_tiling_a_tiny_one() -> None:
    autoencoder = build(TINY)
    with pytest.raises(ValueError, match=r"4 latent channels and downscale 8 alone; got 4 and 4"):
        autoencoder.enable_tiling()
    autoencoder.enable_tiling(False)
    large = build(TinyConfig(block_out_channels=(8, 8, 8, 8)))
    large.enable_tiling()
    assert large.decode(large.encode(picture())).shape == (2, 3, 16, 24)


# Configs


def test_configs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"norm_num_groups must divide .* got 12 with 8 groups"):
        KLConfig(block_out_channels=(8, 12), norm_num_groups=8)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        KLConfig.model_validate({"latent_chanels": 4})
