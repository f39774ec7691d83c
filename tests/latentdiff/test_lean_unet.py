"""Does the lean U-Net predict what diffusers' U-Net predicts, with less work?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from leanrig import SHAPES, diffusers_unet, inputs, lean_twin, predict, relative
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import latentdiff
from latentdiff.lean.unet import LeanUNet, why_not

BOX = Path(latentdiff.__file__).parent / "pretrained" / "unet"
# of Stable Diffusion 1.x's unet/config.json, all that it holds
SD1: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


@pytest.fixture(scope="module")
def box() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(BOX).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_predicts_what_diffusers_does(name: str, size: tuple[int, int]) -> None:
    unet = diffusers_unet(name)
    noisy, tokens = inputs(unet, 2, size)
    want = unet(noisy, torch.tensor(431.5), tokens).sample
    got = predict(lean_twin(unet), noisy, 431.5, tokens)
    assert got.shape == want.shape
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_two_halves_of_guidance_are_as_the_same_samples_twice(name: str) -> None:
    unet = diffusers_unet(name)
    noisy, _ = inputs(unet, 3)
    _, tokens = inputs(unet, 6, seed=1)
    want = unet(torch.cat([noisy, noisy]), torch.tensor(20.0), tokens).sample
    assert relative(predict(lean_twin(unet), noisy, 20.0, tokens), want) < 1e-5


def test_the_model_in_the_box_predicts_what_diffusers_does(box: UNet2DConditionModel) -> None:
    noisy, tokens = inputs(box, 2, (16, 16))
    want = box(noisy, torch.tensor(700.0), tokens).sample
    assert relative(predict(lean_twin(box), noisy, 700.0, tokens), want) < 1e-5


def test_in_bfloat16_the_prediction_is_the_same_within_two_percent(
    box: UNet2DConditionModel,
) -> None:
    noisy, tokens = inputs(box, 2, (16, 16))
    want = box(noisy, torch.tensor(700.0), tokens).sample
    got = predict(lean_twin(box, torch.bfloat16), noisy, 700.0, tokens)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) < 2e-2


def test_samples_of_a_batch_do_not_see_one_another() -> None:
    lean = lean_twin(diffusers_unet())
    noisy, tokens = inputs(lean, 3)
    together = predict(lean, noisy, 9.0, tokens)
    alone = torch.cat([predict(lean, noisy[i : i + 1], 9.0, tokens[i : i + 1]) for i in range(3)])
    assert relative(alone, together) < 1e-5


def test_what_is_given_stays_as_it_was() -> None:
    lean = lean_twin(diffusers_unet())
    noisy, tokens = inputs(lean, 4)
    noisy = noisy[:2].contiguous(memory_format=torch.channels_last)  # the format it works in
    with torch.inference_mode():
        given = noisy, lean.times(torch.tensor([9.0])), lean.texts(tokens)
        before = [g.clone() for g in given]
        first = lean(*given)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
        assert torch.equal(lean(*given), first)


def test_times_are_one_row_a_timestep_and_texts_one_a_prompt() -> None:
    lean = lean_twin(diffusers_unet())
    _, tokens = inputs(lean, 3)
    times = lean.times(torch.tensor([3.0, 800.25]))
    assert relative(times[1:], lean.times(torch.tensor([800.25]))) < 1e-5
    assert relative(lean.texts(tokens)[2:], lean.texts(tokens[2:])) < 1e-5


def flops(lean: LeanUNet, noisy: Tensor, tokens: Tensor) -> int:
    time, text = lean.times(torch.tensor([9.0])), lean.texts(tokens)
    with FlopCounterMode(display=False) as counter:
        lean(noisy, time, text)
    return counter.get_total_flops()


def test_halves_of_guidance_share_what_comes_before_the_text() -> None:
    lean = lean_twin(diffusers_unet("text in the middle alone"))
    noisy, tokens = inputs(lean, 2)
    one, two = flops(lean, noisy[:1], tokens[:1]), flops(lean, noisy, tokens)
    assert two == 2 * one
    assert flops(lean, noisy[:1], tokens) < 0.9 * two


def test_one_function_computes_all_attention() -> None:
    unet = diffusers_unet(layers_per_block=1)
    lean = lean_twin(unet)
    seen: list[tuple[torch.Size, torch.Size]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape, k.shape))
        return scaled_dot_product_attention(q, k, v)

    lean.attend = attend
    assert lean.attend is attend
    noisy, tokens = inputs(lean, 2)
    predict(lean, noisy[:1], 9.0, tokens)
    wide, narrow = (64, 16), (16, 16)  # tokens and width of a head at the two sizes
    assert seen[0] == ((1, 2, *wide), (1, 2, *wide))  # before the text: one row
    assert seen[1] == ((2, 2, *wide), (2, 2, 7, 16))
    assert [q[2:] for q, _ in seen] == [wide, wide, narrow, narrow, wide, wide, wide, wide]
    assert all(q[0] == 2 for q, _ in seen[1:])


def test_scores_beyond_float16_do_not_overflow() -> None:
    unet = diffusers_unet()
    weights = unet.state_dict()
    large = {k: 300 * w for k, w in weights.items() if ".to_q." in k or ".to_k." in k}
    lean = LeanUNet.from_weights(unet.config, weights | large, "cpu", torch.float16)
    scores: list[float] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores.append((q.float() @ k.float().mT).abs().max().item())
        return scaled_dot_product_attention(q, k, v)

    lean.attend = attend
    noisy, tokens = inputs(unet, 2)
    assert predict(lean, noisy, 9.0, tokens).isfinite().all()
    assert max(scores) > torch.finfo(torch.float16).max


def test_stable_diffusion_1_has_a_place_for_each_of_its_weights() -> None:
    with torch.device("meta"):
        weights = UNet2DConditionModel(**SD1).state_dict()
    assert sum(w.numel() for w in weights.values()) == 859_520_964  # the paper's 860 M
    lean = LeanUNet.from_weights(SD1, weights, "meta", torch.float16)
    assert sum(w.numel() for w in lean.parameters()) == 859_520_964
    time, text = torch.empty(1, 1, device="meta"), torch.empty(2, 77, 768, device="meta")
    time, text = lean.times(time[0]), lean.texts(text)
    assert lean(torch.empty(1, 4, 64, 96, device="meta"), time, text).shape == (2, 4, 64, 96)


def test_weights_that_need_no_change_are_shared() -> None:
    unet = diffusers_unet()
    weights = unet.state_dict()
    lean = lean_twin(unet)
    own = {w.data_ptr() for w in lean.parameters()}
    changed = ("conv", "attn1.to_", "attn2.to_k", "attn2.to_v", "time_emb_proj", "samplers")
    for name, weight in weights.items():
        if not any(part in name for part in changed) or "attn1.to_out" in name:
            assert weight.data_ptr() in own, name


def test_weights_that_do_not_fit_are_named() -> None:
    unet = diffusers_unet()
    weights = unet.state_dict()

    def refusal(changed: dict[str, Tensor]) -> str:
        with pytest.raises(ValueError) as caught:
            LeanUNet.from_weights(unet.config, changed)
        return str(caught.value)

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert refusal({k: w for k, w in weights.items() if k != name}) == (
        f"the U-Net's weights lack {name}; expected those of the UNet2DConditionModel that its "
        "config.json describes"
    )
    assert refusal(weights | {"controlnet.weight": weights[name]}) == (
        "the U-Net's weights hold controlnet.weight, which its config.json does not describe; "
        "give the config.json that was saved with them"
    )
    assert refusal(weights | {"conv_in.bias": torch.zeros(31)}) == (
        "the U-Net's conv_in.bias have shape [31], but its config.json says [32]; give the "
        "config.json that was saved with them"
    )
    assert "and 202 more" in refusal({"conv_in.bias": weights["conv_in.bias"]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "UNet2D"}, "_class_name is 'UNet2D', not 'UNet2DConditionModel'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu', not 'silu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep', not None"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256, not None"),
        ({"a_new_setting": 3}, "a_new_setting = 3 is not known here"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
         "mid_block_type is 'UNetMidBlock2DSimpleCrossAttn'"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4},
         "down_block_types has AttnDownBlock2D, not DownBlock2D or CrossAttnDownBlock2D"),
        ({"block_out_channels": [320, 640]}, "down_block_types has 4 blocks for 2 of "
         "block_out_channels"),
        ({"transformer_layers_per_block": [[1, 2]] * 4},
         "transformer_layers_per_block is [[1, 2], [1, 2], [1, 2], [1, 2]], not a number or one a "
         "level"),
        ({"layers_per_block": [2, 2]}, "layers_per_block has 2 numbers for 4 levels"),
        ({"cross_attention_dim": [8, 8, 8, 16]},
         "cross_attention_dim differs between levels: [8, 8, 8, 16]"),
        ({"norm_num_groups": None}, "norm_num_groups is None: there is no group norm"),
        ({"attention_head_dim": 7}, "320 channels are not divisible by 7 heads"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_is_said(change: dict[str, Any], reason: str) -> None:
    assert why_not(SD1) is None
    assert why_not(SD1 | change) == reason
    with pytest.raises(ValueError, match="load it with diffusers' UNet2DConditionModel"):
        LeanUNet(SD1 | change)


def test_a_network_that_reads_no_text_is_not_this_one() -> None:
    plain = {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}
    assert why_not(SD1 | plain | {"mid_block_type": None}) == "no block reads the text"


def test_every_setting_of_diffusers_is_known() -> None:
    config = json.loads((BOX / "config.json").read_text())
    assert why_not(config) is None
    assert why_not(dict(diffusers_unet().config)) is None


def test_it_is_one_graph_and_can_be_exported() -> None:
    lean = lean_twin(diffusers_unet())
    noisy, tokens = inputs(lean, 2)
    given = noisy[:1], lean.times(torch.tensor([9.0])), lean.texts(tokens)
    want = lean(*given)
    with torch.inference_mode():
        compiled = torch.compile(lean, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*given), want)
    exported = torch.export.export(lean, given).module()
    assert relative(exported(*given), want) < 1e-6


def test_importing_it_imports_neither_diffusers_nor_transformers() -> None:
    names = "unet", "packing", "reuse", "merging"
    code = "".join(f"import latentdiff.lean.{name}\n" for name in names)
    code += "import sys\nprint(sorted({'diffusers', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
def test_on_a_gpu_it_waits_for_nothing_and_fits_in_a_graph() -> None:
    unet = diffusers_unet()
    weights = unet.state_dict()
    lean = LeanUNet.from_weights(unet.config, weights, "cuda", torch.float32)
    noisy, tokens = (x.cuda() for x in inputs(lean, 4))
    want = predict(lean_twin(unet), noisy[:2].cpu(), 9.0, tokens.cpu())
    with torch.inference_mode():
        time, text = lean.times(torch.tensor([9.0], device="cuda")), lean.texts(tokens)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their workspaces outside of the graph
            lean(noisy[:2], time, text)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_sync_debug_mode("error")
        try:
            lean(noisy[:2], time, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        static = torch.zeros_like(noisy[:2])
        with torch.cuda.graph(graph):
            got = lean(static, time, text)
        static.copy_(noisy[:2])
        graph.replay()
        assert relative(got.cpu(), want) < 2e-3  # TensorFloat-32 in convolutions
