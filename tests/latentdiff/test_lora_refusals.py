"""Which LoRA files are refused, and does the message say what to do?"""

from __future__ import annotations

import copy
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_rig import CONV, CROSS, QUERY, factors, kohya, tiny_stable_diffusion
from safetensors.torch import save, save_file
from torch import Tensor

from latentdiff.lora import merge, merge_into, parse_lora_argument, read_lora

LAYER = "lora_unet_" + QUERY.replace(".", "_")


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_stable_diffusion()


def pair(layer: str = LAYER, out: int = 16, inner: int = 16) -> dict[str, Tensor]:
    """A layer's tensors."""
    return {
        f"{layer}.lora_down.weight": torch.ones(2, inner),
        f"{layer}.lora_up.weight": torch.ones(out, 2),
    }


def refusal(base: Any, path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    """What is said of a file of these tensors."""
    save_file(tensors, path, metadata or None)
    with pytest.raises(ValueError) as caught:
        merge(read_lora(path), 1.0, base.unet.state_dict(), base.text_encoder.state_dict())
    assert str(path) in str(caught.value)
    return str(caught.value)


# The command line's argument


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", (Path("a.safetensors"), 1.0)),
        ("a.safetensors:0.7", (Path("a.safetensors"), 0.7)),
        ("a.safetensors:-1e-1", (Path("a.safetensors"), -0.1)),
        ("peft/:2", (Path("peft"), 2.0)),
        (r"C:\loras\a.safetensors", (Path(r"C:\loras\a.safetensors"), 1.0)),
        (r"C:\loras\a.safetensors:0.5", (Path(r"C:\loras\a.safetensors"), 0.5)),
        ("style:red/a.safetensors", (Path("style:red/a.safetensors"), 1.0)),
        ("style:red/a.safetensors:0", (Path("style:red/a.safetensors"), 0.0)),
    ],
)
def test_argument(text: str, expected: tuple[Path, float]) -> None:
    assert parse_lora_argument(text) == expected


def test_argument_that_is_a_file_with_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "v:2"
    assert parse_lora_argument(str(path)) == (tmp_path / "v", 2.0)
    path.touch()
    assert parse_lora_argument(str(path)) == (path, 1.0)
    assert parse_lora_argument(f"{path}:0.5") == (path, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a LoRA needs a file: FILE or FILE:WEIGHT; got an empty text"),
        (" ", "a LoRA needs a file"),
        (":0.5", "a LoRA is FILE or FILE:WEIGHT with a finite weight; got ':0.5'"),
        ("a.safetensors:nan", "with a finite weight; got 'a.safetensors:nan'"),
        ("a.safetensors:1e999", "with a finite weight"),
        ("a.safetensors:", "the weight of LoRA a.safetensors must be a number; got ''"),
        ("a.safetensors:0,7", r"must be a number; got '0,7'; write a.safetensors:0.7"),
    ],
)
def test_bad_argument(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_lora_argument(text)


# The file


@pytest.mark.parametrize("end", ["pt", "bin", "ckpt", "pth", "PT"])
def test_pickles_are_not_opened(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"lora.{end}"
    path.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* \.safetensors"):
        read_lora(path)
    disguised = path.rename(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is damaged or not in safetensors' format"):
        read_lora(disguised)


def test_missing_and_ambiguous(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LoRA .*x.safetensors not found; give a .safetensors"):
        read_lora(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors .* it holds 0"):
        read_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds 0; give the file itself"):
        read_lora(tmp_path)
    for name in "ab":
        save_file(pair(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"it holds 2; give the file itself \(a whole model"):
        read_lora(tmp_path)


def test_damage_is_told_whatever_it_is(base: Any, tmp_path: Path) -> None:
    whole = save(kohya(factors(base, "mid_block")))
    path = tmp_path / "x.safetensors"
    rng = random.Random(0)
    cuts = [0, 1, 7, 8, 9, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is damaged or not in safetensors' format"):
            read_lora(path)
    states = base.unet.state_dict(), base.text_encoder.state_dict()
    refused = 0
    for _ in range(200):  # bits of the header; those of the numbers have no check sum
        bits = bytearray(whole)
        bits[rng.randrange(4_000)] ^= 1 << rng.randrange(8)
        path.write_bytes(bits)
        try:
            merge(read_lora(path), 1.0, *states)
        except ValueError:
            refused += 1
    assert refused > 150


def test_no_lora_in_it(base: Any, tmp_path: Path) -> None:
    said = refusal(base, tmp_path / "x.safetensors", base.unet.state_dict())
    assert "holds no LoRA but conv_in.bias, conv_in.weight, conv_norm_out.bias and " in said
    assert "expected keys such as X.lora_down.weight or X.lora_A.weight; a whole model" in said
    assert "holds no LoRA but nothing" in refusal(base, tmp_path / "x.safetensors", {})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("oft_blocks", "OFT"),
        ("on_input", "(IA)^3"),
        ("diff", "full differences"),
        ("lora_up.bias", "biases"),
    ],
)
def test_other_kinds_are_named(base: Any, tmp_path: Path, key: str, kind: str) -> None:
    tensors = pair() | {f"{LAYER}.{key}": torch.ones(16, 16)}
    said = refusal(base, tmp_path / "x.safetensors", tensors)
    assert f"holds more than is read here: {LAYER}.{key} ({kind}); LoRA, LoCon, LoHa" in said
    said = refusal(base, tmp_path / "x.safetensors", {f"{LAYER}.{key}": torch.ones(16, 16)})
    assert f"holds no LoRA but {LAYER}.{key} ({kind})" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_up.weight": None}, "is incomplete: {layer} has down but no up"),
        ({"lora_down.weight": None}, "is incomplete: {layer} has up but no down"),
        (
            {"lora_down.weight": None, "lora_up.weight": None, "alpha": torch.tensor(1.0)},
            "is incomplete: {layer} has an alpha but no down",
        ),
        (
            {"lora_up.weight": torch.ones(16, 3)},
            "the factors of {layer} do not fit each other: {{'down': [2, 16], 'up': [16, 3]}}",
        ),
        ({"lora_up.weight": torch.tensor(1.0)}, "do not fit each other"),
        ({"lora_down.weight": torch.ones(16)}, "do not fit each other"),
        ({"lora_up.weight": torch.ones(16, 2, 3, 3)}, "do not fit each other"),
        ({"lora_mid.weight": torch.ones(2, 2)}, "do not fit each other"),
        (
            {"lora_down.weight": torch.ones(0, 16), "lora_up.weight": torch.ones(16, 0)},
            "{layer} has rank 0; it is damaged",
        ),
        ({"alpha": torch.ones(2)}, "alpha of {layer} is not one number"),
        ({"alpha": torch.tensor(torch.inf)}, "{layer}.alpha is not finite; its training"),
        (
            {"lora_up.weight": torch.full((16, 2), torch.nan)},
            "{layer}.lora_up.weight is not finite; its training went wrong",
        ),
        (
            {"lora_up.weight": torch.ones(16, 2, dtype=torch.int8)},
            "{layer}.lora_up.weight is torch.int8; expected floating point",
        ),
        ({"hada_w1_a": torch.ones(16, 2)}, "{layer} is of several kinds: LoHa, LoRA"),
        (
            {"dora_scale": torch.ones(3)},
            "dora_scale of {layer} has shape [3]; expected one number for each of 16 outputs",
        ),
        ({"dora_scale": torch.ones(1, 3)}, "expected one number for each of 16 inputs"),
        (
            {"lora_A.weight": torch.ones(2, 16)},
            "twice, in two ways of naming it",
        ),
    ],
)
def test_broken_layers(
    base: Any, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = pair()
    for name, value in change.items():
        tensors.pop(f"{LAYER}.{name}", None)
        if value is not None:
            tensors[f"{LAYER}.{name}"] = value
    said = refusal(base, tmp_path / "x.safetensors", tensors)
    assert message.format(layer=LAYER) in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "does not hold peft's settings of a LoRA"),
        ("[]", "does not hold peft's settings"),
        ("[" * 100_000, "does not hold peft's settings"),
        ('{"lora_alpha": "8"}', "does not hold peft's settings"),
        ('{"lora_alpha": NaN}', "an alpha is not finite"),
        ('{"alpha_pattern": 3}', "does not hold peft's settings"),
        ('{"peft_type": "VERA"}', "is of peft's VERA; expected LORA"),
        ('{"fan_in_fan_out": true}', "fan_in_fan_out is not read here"),
        ('{"init_lora_weights": "pissa_niter_4"}', "pissa_niter_4 changed the base model too"),
        ('{"alpha_pattern": {"(a+)+$": 2}}', "alpha_pattern '(a+)+' is no module's name"),
    ],
)
def test_bad_settings_of_peft(base: Any, tmp_path: Path, settings: str, message: str) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(settings)
    save_file(pair(f"base_model.model.{QUERY}"), folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_lora(folder)
    assert "adapter_config.json" in str(caught.value)
    if settings.startswith("{") and settings.endswith("}"):  # the same within diffusers' file
        named = re.sub(r'\{"(\w+)":', r'{"unet.\1":', settings, count=1)
        said = refusal(
            base, tmp_path / "x.safetensors", pair(f"unet.{QUERY}"), lora_adapter_metadata=named
        )
        assert message in said


# The model


def test_layers_that_are_not_here_are_named(base: Any, tmp_path: Path) -> None:
    tensors = pair()
    for i in range(5):
        tensors |= pair(f"lora_unet_down_blocks_{7 + i}_resnets_0_conv1")
    said = refusal(base, tmp_path / "x.safetensors", tensors, ss_base_model_version="sd_v2")
    assert "is of another model: 5 of its 6 layers are not here: lora_unet_down_blocks_10_" in said
    assert "_resnets_0_conv1 and 2 more. It was made for another model (its metadata say " in said
    assert "sd_v2). This model's text is 24 wide; use a LoRA of the same base model" in said


def test_other_shapes_are_told(base: Any, tmp_path: Path) -> None:
    cross = "lora_unet_" + CROSS.replace(".", "_")
    for width, name in ((768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL"), (256, "the model in ")):
        said = refusal(base, tmp_path / "x.safetensors", pair(cross, 16, width))
        assert (
            f"1 of its 1 layers have other shapes: {cross} is [16, {width}], here [16, 24]." in said
        )
        assert f"It was made for a text {width} wide, as {name}" in said
    wide = {
        name: torch.zeros(value.shape[0], 768) if "attn2.to_k" in name else value
        for name, value in base.unet.state_dict().items()
    }
    save_file(pair(cross, 16, 1024), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"This model's text is 768 wide, as SD 1.x's; use a LoRA"):
        merge(read_lora(tmp_path / "x.safetensors"), 1.0, wide)


def test_a_3x3_is_not_a_linear_layer(base: Any, tmp_path: Path) -> None:
    layer = "lora_unet_" + CONV.replace(".", "_")
    said = refusal(base, tmp_path / "x.safetensors", pair(layer, 8, 8))
    assert "is [8, 8], here [8, 8, 3, 3]" in said
    tensors = pair() | {f"{LAYER}.lora_down.weight": torch.ones(2, 4, 2, 2)}
    said = refusal(base, tmp_path / "x.safetensors", tensors)
    assert "is [16, 4, 2, 2], here [16, 16]" in said


@pytest.mark.parametrize(
    ("layer", "family"),
    [
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "SDXL"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", "SDXL"),
        ("unet.down_blocks.2.attentions.0.transformer_blocks.9.attn1.to_q", "SDXL"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "Flux"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "SD 3"),
        ("transformer.transformer_blocks.1.attn.to_q", "a transformer"),
        ("diffusion_model.blocks.3.self_attn.q", "a transformer"),
        ("unet.down_blocks.0.motion_modules.0.proj_in", "AnimateDiff"),
    ],
)
def test_other_families_are_recognised(base: Any, tmp_path: Path, layer: str, family: str) -> None:
    said = refusal(base, tmp_path / "x.safetensors", pair() | pair(layer))
    assert f"1 of its 2 layers are not here: {layer}. It was made for {family}. This" in said


def test_a_tower_that_is_not_given(base: Any, tmp_path: Path) -> None:
    save_file(kohya(factors(base, "fc1")), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="2 of its 2 layers are not here: lora_te_text_model_enc"):
        merge(lora, 1.0, base.unet.state_dict())
    unconditional = {"conv_in.weight": torch.zeros(8, 3, 3, 3)}
    with pytest.raises(ValueError, match="This model has no text; use a LoRA of the same base"):
        merge(lora, 1.0, unconditional)
    assert merge(lora.part("unet"), 1.0, unconditional) == (unconditional, {})


def test_bad_weights(base: Any, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"x.safetensors must be finite; got {weight}"):
            merge(lora, weight, base.unet.state_dict())


def test_half_precision_that_overflows(base: Any, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    unet = copy.deepcopy(base.unet).half()
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match=r"to_q.weight .* is too large for torch.float16; use a"):
        merge_into(lora, 60_000.0, unet)
    torch.testing.assert_close(dict(unet.state_dict()), dict(before), rtol=0, atol=0)
    merge_into(lora, 60_000.0, unet.bfloat16())


def test_quantised_weights(base: Any, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    for dtype in (torch.int8, torch.float8_e4m3fn):
        unet = base.unet.state_dict()
        unet[f"{QUERY}.weight"] = unet[f"{QUERY}.weight"].to(dtype)
        with pytest.raises(ValueError, match="quantised weights take no LoRA; merge first, then"):
            merge(lora, 1.0, unet)


def test_nothing_is_run_or_written(base: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A file's names and notes stay texts."""
    monkeypatch.chdir(tmp_path)
    notes = {"ss_network_module": "os", "ss_network_args": json.dumps({"x": "__import__('os')"})}
    save_file(pair() | pair("../../etc/x"), tmp_path / "x.safetensors", notes)
    with pytest.raises(ValueError, match=r"are not here: \.\./\.\./etc/x"):
        merge(read_lora("x.safetensors"), 1.0, base.unet.state_dict())
    assert os.listdir() == ["x.safetensors"]
