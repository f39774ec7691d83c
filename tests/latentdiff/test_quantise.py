"""Are 8-bit weights small, near enough, and refused where they cannot be?"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import read_config, read_weights
from latentdiff.offload import Stage
from latentdiff.quantise import quantise

ROWS, TOKENS, WIDTH, SIDE = 2, 32, 256, 16  # of the model in the box


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="the optional extra 8bit is not installed")


def unet_in_the_box(dtype: torch.dtype = torch.float32) -> LeanUNet:
    source = PRETRAINED / "unet"
    return LeanUNet.from_weights(read_config(source), read_weights(source), dtype=dtype)


@torch.inference_mode()
def evaluated(unet: LeanUNet) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS // 2, 4, SIDE, SIDE, generator=generator)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    return unet(x, unet.times(torch.tensor([500.0])), unet.texts(hidden)).float()


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.012), ("fp8", 0.05)])
def test_an_evaluation_stays_near(kind: str, most: float) -> None:
    needs_torchao()
    unet = unet_in_the_box()
    exact = evaluated(unet)
    quantise(unet, kind)
    error = ((evaluated(unet) - exact).norm() / exact.norm()).item()
    assert 0 < error < most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_saved_are_those_of_the_linear_layers(dtype: torch.dtype) -> None:
    needs_torchao()
    unet = unet_in_the_box(dtype)
    inner = [
        module
        for part in (unet.down, unet.middle, unet.up)
        for module in part.modules()
        if isinstance(module, nn.Linear)
    ]
    numbers = sum(module.weight.numel() for module in inner)
    rows = sum(module.out_features for module in inner)
    before = sum(p.numel() for p in unet.parameters()) * dtype.itemsize
    found = quantise(unet, "int8")
    assert (found.num_layers, found.bytes_before) == (len(inner), before)
    saved = found.bytes_before - found.bytes_after
    scales = rows * (4 + 1)  # a scale in float32 and a zero point
    assert saved == numbers * (dtype.itemsize - 1) - scales


def test_what_is_computed_once_stays_exact() -> None:
    needs_torchao()
    unet = unet_in_the_box()
    hidden, t = torch.randn(1, TOKENS, WIDTH), torch.tensor([3.0])
    text, time = unet.texts(hidden), unet.times(t)
    quantise(unet, "int8")
    assert torch.equal(unet.texts(hidden), text)
    assert torch.equal(unet.times(t), time)


def test_quantised_layers_can_be_traced() -> None:
    needs_torchao()
    unet = unet_in_the_box()
    quantise(unet, "int8")
    inner = [m for m in unet.middle.modules() if isinstance(m, nn.Linear)]
    layer = nn.Sequential(inner[0], nn.GELU())
    x = torch.randn(1, 4, inner[0].in_features)
    expected = layer(x)
    traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), expected)


def test_quantised_weights_come_to_the_device_and_go() -> None:
    needs_torchao()
    unet = unet_in_the_box()
    found = quantise(unet, "fp8")
    expected = evaluated(unet)
    stage = Stage(unet, "meta")
    assert stage.num_bytes == pytest.approx(found.bytes_after, rel=0.03)  # and gaps between them
    with stage:
        assert {p.device.type for p in unet.parameters()} == {"meta"}
    assert torch.equal(evaluated(unet), expected)


def test_unknown_kinds() -> None:
    with pytest.raises(ValueError, match=r"unknown quantisation 'int4';.* known: int8, fp8"):
        quantise(nn.Linear(2, 2), "int4")


def test_nothing_to_quantise() -> None:
    with pytest.raises(ValueError, match=r"Conv2d has no linear layer .* leave --quantise out"):
        quantise(nn.Conv2d(2, 2, 1), "int8")


def test_quantised_twice() -> None:
    needs_torchao()
    unet = unet_in_the_box()
    quantise(unet, "int8")
    with pytest.raises(ValueError, match="expected a U-Net with attention that is not quantised"):
        quantise(unet, "fp8")


def test_torchao_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"need torchao .* run pip install 'latentdiff\[8bit\]'"):
        quantise(nn.Sequential(nn.Linear(2, 2)), "int8")


class OnApples(nn.Linear):
    """A layer that says it is where no test machine has one."""

    def parameters(self, recurse: bool = True) -> Any:
        yield SimpleNamespace(device=torch.device("mps"))


def test_a_device_without_such_numbers() -> None:
    with pytest.raises(ValueError, match=r"Apple's GPUs have no 8-bit .* use int8"):
        quantise(OnApples(2, 2), "fp8")
