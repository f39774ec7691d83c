"""Does `generate` follow what is done to a model, and refuse what it cannot do?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.lean.network import LeanNetwork
from latentdiff.pipeline import Pipeline
from latentdiff.speed import Speed


def drawn(model: Pipeline, **options: Any) -> np.ndarray:
    images = model.generate("a cat", steps=3, **options)
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


@pytest.fixture
def model(tiny_model: Path) -> Pipeline:
    return Pipeline.load(tiny_model)


def test_generate_loads_no_modules_until_they_are_asked_for(model: Pipeline) -> None:
    before = drawn(model)
    assert not model.has_modules
    assert model.unet.config.in_channels == 4 and model.has_modules
    assert np.abs(drawn(model) - before).max() <= 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_of_an_optimiser_is_seen(model: Pipeline, fused: bool) -> None:
    """Fused optimisers leave torch's count of writes as it was."""
    weights = list(model.unet.parameters())
    optimizer = torch.optim.AdamW(weights, lr=0.05, fused=fused)
    before = drawn(model)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    after = drawn(model)
    assert np.abs(after - before).mean() > 1
    model._inference = None
    assert np.array_equal(drawn(model), after)


def test_a_write_through_data_is_seen(model: Pipeline) -> None:
    assert model.text is not None
    before = drawn(model)
    for weight in model.text.model.parameters():
        weight.data.mul_(1.5)
    assert np.abs(drawn(model) - before).max() > 1


def test_what_has_not_changed_is_not_made_again(model: Pipeline) -> None:
    assert model.inference() is model.inference()
    assert model.modules is not None
    assert model.inference() is model.inference()


@pytest.fixture
def foreign_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A U-Net that the lean one is not: with an embedding of the guidance's scale."""
    from diffusers import UNet2DConditionModel

    directory = tmp_path / "foreign"
    shutil.copytree(tiny_model, directory)
    unet: Any = UNet2DConditionModel.from_pretrained(str(tiny_model / "unet"))
    config = {**unet.config, "resnet_time_scale_shift": "scale_shift"}
    torch.manual_seed(0)
    other: Any = UNet2DConditionModel.from_config(config)
    other.save_pretrained(directory / "unet")
    return directory


def test_modules_that_generate_loads_can_be_trained(foreign_model: Path) -> None:
    model = Pipeline.load(foreign_model)
    before = drawn(model)
    assert not isinstance(model.inference().network, LeanNetwork)
    weight = next(model.unet.parameters())
    weight.sum().backward()
    with torch.no_grad():
        weight.mul_(3)
    assert np.abs(drawn(model) - before).max() > 0
    assert model.inference() is model.inference()


def test_the_librarys_network_takes_what_it_can_and_refuses_the_rest(foreign_model: Path) -> None:
    model = Pipeline.load(foreign_model)
    plain = drawn(model)
    model.speed = Speed(attention="sliced")
    assert np.abs(drawn(model) - plain).max() <= 1
    kinds = {type(p).__name__ for p in model.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}  # its owner's is as it was
    for wish in (Speed(reuse=2), Speed(compile=True), Speed(low_memory=True)):
        model.speed = wish
        with pytest.raises(ValueError, match="is for U-Nets like Stable Diffusion's; this model's"):
            model.generate("a cat")
    model.speed = Speed(backend="openvino")
    with pytest.raises(ValueError, match="use --backend torch"):
        model.generate("a cat")


@pytest.mark.parametrize("wish", [Speed(sliced=True), Speed(tiled=True), Speed(low_memory=True)])
def test_wishes_leave_the_owners_modules_alone(model: Pipeline, wish: Speed) -> None:
    autoencoder, parameters = model.autoencoder, list(model.unet.parameters())
    plain = drawn(model)
    model.speed = wish
    assert np.abs(drawn(model) - plain).max() <= 1
    assert model.autoencoder is autoencoder
    assert not (autoencoder.model.use_slicing or autoencoder.model.use_tiling)
    assert all(a is b for a, b in zip(model.unet.parameters(), parameters, strict=True))


@pytest.mark.parametrize("with_modules", [False, True])
def test_half_precision_that_overflows_is_drawn_in_float32(
    tiny_model: Path, with_modules: bool
) -> None:
    expected = drawn(Pipeline.load(tiny_model))
    model = Pipeline.load(tiny_model).to("cpu", torch.bfloat16)
    if with_modules:
        assert model.unet.dtype == torch.bfloat16
    network = model.inference().network
    assert isinstance(network, LeanNetwork)
    network._run = lambda noisy, time, text: torch.full((len(text), *noisy.shape[1:]), torch.nan)
    with pytest.warns(UserWarning, match="overflowed in bfloat16; drawn again in float32"):
        again = drawn(model)
    # the decoder is bfloat16; modules were rounded to it when they were moved
    assert np.abs(again - expected).mean() <= (16 if with_modules else 1)
    if with_modules:
        assert model.unet.dtype == torch.bfloat16


def test_loras_that_cannot_be_merged_are_not_kept(model: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        model.add_lora(tmp_path / "nowhere.safetensors")
    assert model.loras == []
    drawn(model)


def test_saving_in_half_precision_leaves_the_model_as_it_was(
    model: Pipeline, tmp_path: Path
) -> None:
    before = [weight.clone() for weight in model.unet.parameters()]
    model.save(tmp_path / "half", torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(before, model.unet.parameters(), strict=True))
    assert Pipeline.load(tmp_path / "half").inference() is not None


def test_pickled_weights_are_not_opened(tiny_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(tiny_model, directory)
    weights = next((directory / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin"):
        Pipeline.load(directory).generate("a cat")


def test_an_export_of_another_model_changes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")  # it is in the extra of that name
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    (tmp_path / "openvino" / "another").mkdir(parents=True)
    for dtype in (torch.bfloat16, torch.float16):
        model = Pipeline.load(tiny_model).to("cpu", dtype)
        network = model.inference().network
        assert isinstance(network, LeanNetwork) and network.unet.dtype == dtype


def test_an_export_of_this_model_is_taken(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("latentdiff.backends.openvino")
    pytest.importorskip("openvino")  # it is in the extra of that name
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    model = Pipeline.load(directory)
    expected = drawn(model)
    model.speed = Speed(backend="openvino")
    assert np.abs(drawn(model) - expected).max() <= 1
    again = Pipeline.load(directory)
    assert np.abs(drawn(again) - expected).max() <= 1
    network: Any = again.inference().network
    assert isinstance(network._run._run, openvino.OpenVINO)
    weights = next((directory / "unet").glob("*.safetensors"))
    weights.touch()  # as if they were others
    other: Any = Pipeline.load(directory).inference().network
    assert other._run is other.unet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 3.0}, "unknown option of generate 'guidance'; did you mean guidance_"),
        ({"seed": -1}, r"a seed must be a whole number from 0 to 2\^64 - 1; got -1"),
        ({"seed": 1.5}, "got 1.5"),
        ({"variation_seed": 3}, "variation_seed 3 needs a variation_strength"),
        ({"upscale_strength": 0.5}, "upscale_strength is for the second pass; give upscale too"),
        (
            {"variation_seed": 3, "variation_strength": 0.5, "latents": torch.zeros(1, 4, 8, 8)},
            "latents are a start of their own",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tiny_pipeline: Pipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.generate("a cat", **options)


def test_pictures_that_are_not_of_the_call(tiny_pipeline: Pipeline) -> None:
    with pytest.raises(
        ValueError, match=r"indices must be in 0\.\.0, the pictures of the call; got 5"
    ):
        list(tiny_pipeline.stream("a cat", indices=[5]))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("cuda:7", torch.float32), "cuda:7"),
        (("cpu", torch.int8), "dtype torch.int8 is not for networks; use float32, bfloat16"),
    ],
)
def test_places_where_no_model_runs(model: Pipeline, place: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.to(*place)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"compile": True, "reuse": 2}, "--compile and --reuse exclude each other"),
        ({"compile": True, "low_memory": True}, "--compile and --low-memory exclude each other"),
        ({"backend": "openvino", "attention": "sliced"}, "--attention is of --backend torch"),
        ({"reuse": 2.5}, "--reuse must be a whole number from 1 on; got 2.5"),
    ],
)
def test_wishes_that_exclude_each_other(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speed(**wishes)


def test_a_tiny_decoder_is_for_its_latents(
    model: Pipeline, tmp_path: Path, tiny_model: Path
) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    for name, channels in ("fits", 4), ("other", 8):
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            latent_channels=channels,
        ).save_pretrained(tmp_path / name)
    plain = drawn(model)
    model.speed = Speed(tiny_decoder=str(tmp_path / "fits"))
    assert drawn(model).shape == plain.shape and np.abs(drawn(model) - plain).mean() > 1
    begin = Image.new("RGB", (32, 32), "red")
    assert drawn(model, image=begin).shape == plain.shape  # which the model's own one encodes
    model.speed = Speed(tiny_decoder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="is for latents of 8 channels, 4 px a cell"):
        model.generate("a cat")
