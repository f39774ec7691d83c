"""Do all formats of LoRA files say the same, and are the original code's names right?"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_rig import QUERY, apply, assert_close, dotted, factors, kohya, tiny_stable_diffusion
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.lora import merge, read_lora
from latentdiff.lora_formats import model_targets, original_names, parse_key


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_stable_diffusion()


# The same from every format


def formats(base: Any, made: Any, directory: Path) -> dict[str, Path]:
    """The same factors as several programs would write them."""
    names = [n.removesuffix(".weight") for n in base.unet.state_dict() if n.endswith(".weight")]
    plain = " .lora_A.weight .lora_B.weight"
    files = {
        "kohya": kohya(made),
        "kohya with the original names": kohya(made, original_names(names)),
        "diffusers": dotted(made, ("unet.", "text_encoder.text_model."), plain),
        "diffusers' tower without text_model": dotted(made, ("unet.", "text_encoder."), plain),
        "diffusers' second": dotted(
            made, ("unet.", "text_encoder."), ".lora.down.weight .lora.up.weight"
        ),
        "diffusers' linear layers": dotted(
            made,
            ("unet.", "text_encoder."),
            ".lora_linear_layer.down.weight .lora_linear_layer.up.weight",
        ),
        "ComfyUI": dotted(
            made,
            ("diffusion_model.", "text_encoders.clip_l.transformer.text_model."),
            ".lora_down.weight .lora_up.weight",
        ),
    }
    paths = {}
    for i, (name, tensors) in enumerate(files.items()):
        paths[name] = directory / f"{i}.safetensors"
        save_file(tensors, paths[name])
    for name, adapter in (("peft", ""), ("peft with the adapter's name", ".default")):
        paths[name] = directory / name
        for part in ("unet", "text_encoder"):
            folder = paths[name] / part
            folder.mkdir(parents=True)
            mine = {k: v for k, v in made.items() if k.startswith(part[:4])}
            ends = f".lora_A{adapter}.weight .lora_B{adapter}.weight"
            # 6 / 3 here and half of it in the factors
            tensors = dotted({k: (d, u, a / 2) for k, (d, u, a) in mine.items()}, ("", ""), ends)
            named = {f"base_model.model.{k}": v for k, v in tensors.items()}
            save_file(named, folder / "adapter_model.safetensors")
            settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "alpha_pattern": {}}
            (folder / "adapter_config.json").write_text(json.dumps(settings))
    return paths


def test_every_format_says_the_same(base: Any, tmp_path: Path) -> None:
    made = factors(base)
    assert len(made) > 90
    states = base.unet.state_dict(), base.text_encoder.state_dict()
    expected = None
    for name, path in formats(base, made, tmp_path).items():
        lora = read_lora(path)
        assert len(lora.layers) == len(made), name
        merged = merge(lora, 0.8, *states)
        expected = expected or merged
        for ours, theirs in zip(merged, expected, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    assert expected is not None
    for name, (down, up, alpha) in made.items():
        part, _, module = name.partition(".")
        index = ("unet", "text").index(part)
        change = (up.flatten(1) @ down.flatten(1)) * alpha / 3 * 0.8
        weight = f"{module}.weight"
        got = expected[index][weight] - states[index][weight]
        torch.testing.assert_close(got, change.view(got.shape), rtol=1e-4, atol=1e-6)


def test_attention_processors_of_old_files(base: Any, tmp_path: Path) -> None:
    """`save_attn_procs` and `save_lora_weights` up to diffusers 0.20."""
    made = factors(base, "attn1.to_") | factors(base, "attn2.to_") | factors(base, "self_attn.")
    old: dict[str, Tensor] = {}
    for name, (down, up, alpha) in made.items():
        part, _, module = name.partition(".")
        module = module.replace(".attn1.", ".attn1.processor.").replace("to_out.0", "to_out")
        module = module.replace(".attn2.", ".attn2.processor.")
        module = module.replace("q_proj", "to_q").replace("k_proj", "to_k")
        module = module.replace("v_proj", "to_v").replace("out_proj", "to_out")
        prefix = "unet." if part == "unet" else "text_encoder.text_model."
        old[f"{prefix}{module}_lora.down.weight"] = down
        old[f"{prefix}{module}_lora.up.weight"] = up * (alpha / 3)
    assert f"unet.{QUERY.replace('to_q', 'processor.to_q_lora.down.weight')}" in old
    save_file(old, tmp_path / "old.safetensors")
    save_file(kohya(made), tmp_path / "kohya.safetensors")
    assert_close(
        apply(base, (tmp_path / "old.safetensors", 1.0)),
        apply(base, (tmp_path / "kohya.safetensors", 1.0)),
    )
    bare = {k.removeprefix("unet."): v for k, v in old.items() if k.startswith("unet.")}
    save_file(bare, tmp_path / "bare.safetensors")
    unet = read_lora(tmp_path / "old.safetensors").part("unet")
    assert unet.layers.keys() == read_lora(tmp_path / "bare.safetensors").layers.keys()


def test_a_tower_with_and_without_text_model(base: Any, tmp_path: Path) -> None:
    save_file(kohya(factors(base, "text.")), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    inner = base.text_encoder.state_dict()
    outer = {f"text_model.{name}": value for name, value in inner.items()}
    _, a = merge(lora, 1.0, {}, inner)
    _, b = merge(lora, 1.0, {}, outer)
    torch.testing.assert_close({f"text_model.{k}": v for k, v in a.items()}, b)


def test_linear_layers_and_1x1_convolutions_are_one(base: Any, tmp_path: Path) -> None:
    """SD 2.x projects by linear layers what SD 1.x projects by convolutions; files have either."""
    made = factors(base, "mid_block.attentions.0.proj_in")
    ((down, up, alpha),) = made.values()
    assert down.ndim == 4
    flat = {"unet.mid_block.attentions.0.proj_in": (down.flatten(1), up.flatten(1), alpha)}
    save_file(kohya(made), tmp_path / "conv.safetensors")
    save_file(kohya(flat), tmp_path / "linear.safetensors")
    conv = base.unet.state_dict()
    linear = {k: v.flatten(1) if k.endswith("proj_in.weight") else v for k, v in conv.items()}
    results = [
        merge(read_lora(tmp_path / f"{file}.safetensors"), 1.0, state)[0][
            "mid_block.attentions.0.proj_in.weight"
        ].flatten(1)
        for file in ("conv", "linear")
        for state in (conv, linear)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


# Names


def sd_unet(**changes: Any) -> Any:
    """A thin U-Net with the blocks of SD 1.x and 2.x."""
    from diffusers import UNet2DConditionModel

    attends, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 8, 16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "down_block_types": (attends, attends, attends, plain),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        **changes,
    }
    return UNet2DConditionModel(**settings)


@pytest.mark.parametrize("layers", [1, 2])
def test_original_names_are_those_that_diffusers_converts(layers: int) -> None:
    """diffusers reads the original checkpoints; so our names must lead it back to its own."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    unet = sd_unet(layers_per_block=layers)
    state = unet.state_dict()
    names = original_names(
        [name for name, module in unet.named_modules() if not len(list(module.children()))]
    )
    original = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        original[f"model.diffusion_model.{names[module]}.{kind}"] = value
    assert "model.diffusion_model.input_blocks.1.1.norm.weight" in original
    assert len(original) == len(state)
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)


def test_names_of_sd_1() -> None:
    """Facts, from a Stable Diffusion 1.x checkpoint."""
    unet = sd_unet(layers_per_block=2)
    names = original_names([n.removesuffix(".weight") for n in unet.state_dict()])
    assert names["conv_in"] == "input_blocks.0.0"
    assert names["down_blocks.0.attentions.0.proj_in"] == "input_blocks.1.1.proj_in"
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.3.resnets.1.conv2"] == "input_blocks.11.0.out_layers.3"
    assert names["mid_block.resnets.1.time_emb_proj"] == "middle_block.2.emb_layers.1"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert names["up_blocks.3.attentions.2.proj_out"] == "output_blocks.11.1.proj_out"
    assert names["time_embedding.linear_2"] == "time_embed.2"


def test_no_two_modules_have_one_target() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = sd_unet(layers_per_block=2).state_dict()
    tower = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1))
    weights = [n for n in unet if n.endswith(".weight")]
    text = [n for n in tower.state_dict() if n.endswith(".weight")]
    targets = model_targets(unet, tower.state_dict())
    # each weight by diffusers' name, and by the original one where that is another
    assert set(targets.values()) == {("unet", n) for n in weights} | {("text", n) for n in text}
    assert len(targets) == 2 * len(weights) + len(text)


@pytest.mark.parametrize(
    ("key", "target", "role"),
    [
        ("lora_unet_conv_in.alpha", "unet.conv_in", "alpha"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
         "text.encoder_layers_0_mlp_fc1", "up"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight",
         "other.lora_te2_text_model_encoder_layers_0_mlp_fc1", "up"),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight",
         "unet.up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0", "up"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora.down.weight",
         "text.encoder_layers_3_self_attn_out_proj", "down"),
        ("base_model.model.conv_in.lora_A.default.weight", "unet.conv_in", "down"),
        ("base_model.model.encoder.layers.1.mlp.fc2.lora_magnitude_vector",
         "text.encoder_layers_1_mlp_fc2", "magnitude"),
        ("unet.mid_block.resnets.0.conv1.lora_magnitude_vector.default.weight",
         "unet.mid_block_resnets_0_conv1", "magnitude"),
        ("lycoris_mid_block_resnets_0_conv1.lokr_w2_a",
         "unet.mid_block_resnets_0_conv1", "lokr_w2_a"),
        ("transformer.x.lora_A.weight", "other.transformer_x", "down"),
    ],
)  # fmt: skip
def test_keys(key: str, target: str, role: str) -> None:
    parsed = parse_key(key)
    assert parsed is not None
    assert (parsed.target, parsed.role) == (target, role)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "alpha",
        ".alpha",
        "lora_up.weight",
        "conv_in.weight",
        "x.lora_up.bias",
        "x.lora_up.weight ",
    ],
)
def test_keys_of_no_lora(key: str) -> None:
    parsed = parse_key(key)
    assert parsed is None or parsed.part == "other"


def test_long_keys_are_quick() -> None:
    """A key is a file's own text; none may take long."""
    for piece in (
        ".lora_A",
        "_lora",
        "a.",
        ".lora_magnitude_vector.a",
        "down_blocks_0_",
        ".lora.alpha",
    ):
        start = time.monotonic()
        if (parsed := parse_key(piece * 20_000 + ".alpha")) is not None:
            assert parsed.target
        assert time.monotonic() - start < 2
