"""Do the lean autoencoders give diffusers' numbers: in float32 and in half precision?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from kl_rig import (
    assert_near,
    assert_same_kl,
    config_of,
    lean_kl,
    lean_tiny,
    noise,
    their_kl,
    their_tiny,
)
from safetensors.torch import load_file
from torch import Tensor

from vae.autoencoder import Autoencoder, why_not_lean
from vae.lean import LeanKL
from vae.lean_tiny import LeanTiny

BOX = Path(__file__).parents[2] / "latentdiff" / "pretrained" / "vae"


# The same numbers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"widths": (16,)},
        {"widths": (8, 16, 16, 24), "layers_per_block": 2},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"latent_channels": 16, "in_channels": 4, "out_channels": 1, "act_fn": "swish"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_an_autoencoder_is_that_of_diffusers(settings: dict[str, Any]) -> None:
    theirs = their_kl(**settings)
    ours = lean_kl(theirs)
    config = theirs.config
    d = ours.downscale
    image = noise(2, config["in_channels"], 3 * d, 5 * d)
    assert_same_kl(ours, theirs, image, noise(2, config["latent_channels"], 3, 5))


@torch.inference_mode()
def test_the_box() -> None:
    theirs = AutoencoderKL.from_pretrained(str(BOX)).float().eval()
    config = json.loads((BOX / "config.json").read_text())
    ours = LeanKL.from_weights(config, load_file(BOX / "diffusion_pytorch_model.safetensors"))
    assert_same_kl(ours, theirs, noise(2, 3, 64, 96), noise(2, 4, 16, 24))


@torch.inference_mode()
def test_the_memory_format_of_what_is_given_changes_nothing() -> None:
    ours = lean_kl(their_kl())
    z = noise(2, 4, 6, 6)
    for given in (z.to(memory_format=torch.channels_last), z.transpose(2, 3).contiguous().mT):
        assert_near(ours.decode(given).sample, ours.decode(z).sample, 1e-6)
    before = z.clone()
    ours.decode(z)
    assert torch.equal(z, before)  # what writes over its input writes over its own


@torch.inference_mode()
def test_names_of_the_first_published_files() -> None:
    theirs = their_kl()
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old: dict[str, Tensor] = {}
    for name, value in theirs.state_dict().items():
        is_linear = False
        for new, before in old_names.items():
            is_linear |= f".{new}." in name
            name = name.replace(f".{new}.", f".{before}.")
        is_kernel = is_linear and value.ndim == 2
        old[name] = value[..., None, None] if is_kernel else value  # CompVis: 1x1 convolutions
    assert sum(".query." in name for name in old) == 4
    ours = LeanKL.from_weights(config_of(theirs), old)
    assert_same_kl(ours, theirs, noise(1, 3, 8, 8), noise(1, 4, 4, 4))


@pytest.mark.parametrize("levels", [1, 2, 4])
@torch.inference_mode()
def test_a_tiny_autoencoder_is_that_of_diffusers(levels: int) -> None:
    theirs = their_tiny(levels)
    ours = lean_tiny(theirs)
    image, z = noise(2, 3, 3 * ours.downscale, 5 * ours.downscale), noise(2, 4, 3, 5)
    assert_near(ours.encode(image).latents, theirs.encode(image).latents)
    assert_near(ours.decode(z).sample, theirs.decode(z).sample)


# In the place of diffusers'


def autoencoders(theirs: Any, directory: Path) -> tuple[Autoencoder, Autoencoder]:
    """The same one, lean and with diffusers."""
    theirs.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "diffusion_pytorch_model.safetensors")
    return Autoencoder.from_weights(config, weights), Autoencoder.load(directory).eval()


@pytest.mark.parametrize("make", [their_kl, their_tiny])
@torch.inference_mode()
def test_an_autoencoder_with_a_lean_network(make: Any, tmp_path: Path) -> None:
    settings = {"scaling_factor": 0.3, "shift_factor": -0.5}
    ours, theirs = autoencoders(make(**settings), tmp_path)
    assert isinstance(ours.model, LeanKL | LeanTiny) and not ours.training
    assert (ours.latent_channels, ours.downscale) == (theirs.latent_channels, theirs.downscale)
    assert (ours.norm.shift, ours.norm.scale) == (theirs.norm.shift, theirs.norm.scale)
    assert ours.folds_norm == theirs.folds_norm
    image, z = noise(2, 3, 16, 24), noise(2, 4, 4, 6)
    for mine, expected in zip(ours.moments(image), theirs.moments(image), strict=True):
        assert_near(mine, expected) if expected.any() else torch.equal(mine, expected)
    assert_near(ours.encode(image, z[:1, :, :1, :1]), theirs.encode(image, z[:1, :, :1, :1]))
    assert_near(ours.decode(z), theirs.decode(z))
    for enabled in (True, False):
        ours.enable_tiling(enabled)
        ours.enable_slicing(enabled)
        assert ours.model.use_tiling == ours.model.use_slicing == enabled
    with pytest.raises(ValueError, match=r"is for inference alone .* with Autoencoder\.load"):
        ours.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def overflowing() -> Any:
    """Its residual streams pass 65,504, the largest float16, on both ways."""
    model = their_kl(norm_num_groups=8)
    encoder, decoder = model.encoder, model.decoder
    for conv in (
        encoder.conv_in,
        encoder.down_blocks[0].resnets[0].conv2,
        decoder.conv_in,
        decoder.mid_block.resnets[0].conv2,
    ):
        conv.bias.data.fill_(6e4)
    return model


@torch.inference_mode()
def test_a_half_precision_overflow_is_computed_again_in_float32() -> None:
    theirs = overflowing().half().float()
    config, weights = config_of(theirs), theirs.state_dict()
    half = Autoencoder.from_weights(config, weights, dtype=torch.float16)
    kept = {name: value.clone() for name, value in half.state_dict().items()}
    image, z = noise(2, 3, 8, 8), noise(2, 4, 4, 4)
    assert not torch.isfinite(half.model.decode(z.half()).sample).all()  # it does overflow
    assert not torch.isfinite(half.model.encode(image.half()).latent_dist.mean).all()

    single = Autoencoder.from_weights(config, weights)
    # kernels of doublings are sums, which float16 rounds
    torch.testing.assert_close(half.decode(z), single.decode(z), rtol=0.01, atol=0.01)
    assert half.decode(z).dtype == torch.float32 and half.decode(z).std() > 0
    assert_near(half.encode(image), single.encode(image))
    for name, value in half.state_dict().items():  # the network itself is as it was
        assert value.dtype == torch.float16 and torch.equal(value, kept[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_that_fits_stays_half(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = their_kl()
    half = Autoencoder.from_weights(config_of(theirs), theirs.state_dict(), dtype=dtype)
    z, image = noise(2, 4, 4, 4), noise(2, 3, 8, 8)
    assert half.decode(z).dtype == half.encode(image).dtype == dtype
    assert_near(half.decode(z).float(), theirs.decode(z / 0.18215).sample, 0.05)


@torch.inference_mode()
def test_latents_that_are_not_finite_raise() -> None:
    theirs = their_kl()
    for dtype in (torch.float32, torch.float16):
        ours = Autoencoder.from_weights(config_of(theirs), theirs.state_dict(), dtype=dtype)
        with pytest.raises(FloatingPointError, match=r"not finite; expected finite .* float32"):
            ours.decode(torch.full((1, 4, 4, 4), float("nan")))


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_gives_the_numbers_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    theirs = their_kl((32, 64, 64))
    cpu, gpu = lean_kl(theirs), lean_kl(theirs, device="cuda")
    z, image = noise(2, 4, 8, 8), noise(2, 3, 32, 32)
    assert_near(gpu.decode(z.cuda()).sample.cpu(), cpu.decode(z).sample, 1e-4)
    mean = gpu.encode(image.cuda()).latent_dist.mean.cpu()
    assert_near(mean, cpu.encode(image).latent_dist.mean, 1e-4)


@pytest.mark.gpu
@torch.inference_mode()
def test_no_gpu_makes_a_black_picture_of_an_overflow() -> None:
    theirs = overflowing()
    config, weights = config_of(theirs), theirs.state_dict()
    half = Autoencoder.from_weights(config, weights, "cuda", torch.float16)
    z = noise(2, 4, 4, 4).cuda()
    assert not torch.isfinite(half.model.decode(z.half()).sample).all()
    single = Autoencoder.from_weights(config, weights, "cuda")
    torch.testing.assert_close(half.decode(z), single.decode(z), rtol=0.01, atol=0.01)


# What is not supported, or bad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "a AutoencoderDC is neither an AutoencoderKL nor"),
        ({"_class_name": None}, "a None is neither"),
        ({"act_fn": "gelu"}, "act_fn is gelu; supported: silu"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types is .'Attn"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types is "),
        ({"sample_size": [32, 64]}, r"sample_size is \[32, 64\]; supported: one number"),
    ],
)
def test_configs_for_diffusers(changed: dict[str, Any], message: str) -> None:
    config = config_of(their_kl())
    assert why_not_lean(config) is None
    with pytest.raises(ValueError, match=f"this autoencoder is for diffusers to open: {message}"):
        Autoencoder.from_weights(config | changed, {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is gelu; supported: relu"),
        ({"upsample_fn": "bilinear"}, "upsample_fn is bilinear; supported: nearest"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor is 3; supported: 2"),
        ({"num_decoder_blocks": [1, 1]}, "encoder and decoder have different numbers of levels"),
    ],
)
def test_tiny_configs_for_diffusers(changed: dict[str, Any], message: str) -> None:
    config = config_of(their_tiny())
    assert why_not_lean(config) is None
    assert why_not_lean(config | changed) == message


@pytest.mark.parametrize("make", [their_kl, their_tiny])
def test_weights_of_another_network(make: Any) -> None:
    theirs = make()
    config, weights = config_of(theirs), dict(theirs.state_dict())
    names = sorted(weights)
    for name in (names[0], names[-1], next(n for n in names if "up_blocks" in n or ".3." in n)):
        missing = {n: value for n, value in weights.items() if n != name}
        with pytest.raises(ValueError, match=rf"has {name} of shape .*; there is none; give the"):
            Autoencoder.from_weights(config, missing)
        wrong = weights | {name: torch.zeros(5)}
        with pytest.raises(ValueError, match=rf"has {name} of shape .*; it is \(5,\); give the"):
            Autoencoder.from_weights(config, wrong)
    with pytest.raises(ValueError, match=r"1 weights have no place .* among them a\.b; give"):
        Autoencoder.from_weights(config, weights | {"a.b": torch.zeros(1)})


def test_what_a_config_leaves_out_is_diffusers_default() -> None:
    for ours, theirs in ((LeanKL, AutoencoderKL), (LeanTiny, AutoencoderTiny)):
        with torch.device("meta"):
            expected = theirs().config
            config = ours({}).config
        assert {name: expected[name] for name in config} == config
