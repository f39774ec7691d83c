"""Does a packed network compute what it did before?"""

from __future__ import annotations

import pytest
import torch
from leanrig import SHAPES, diffusers_unet, inputs, lean_twin, predict, relative
from torch import nn

from latentdiff.lean import packing
from latentdiff.lean.blocks import Enlarge
from latentdiff.lean.packing import pack


@pytest.fixture(autouse=True)
def onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_unet_predicts_the_same(name: str, size: tuple[int, int]) -> None:
    lean, packed = (lean_twin(diffusers_unet(name)) for _ in range(2))
    assert pack(packed)
    noisy, tokens = inputs(lean, 2, size)
    want = predict(lean, noisy[:1], 9.0, tokens)
    assert relative(predict(packed, noisy[:1], 9.0, tokens), want) < 5e-6


def test_in_bfloat16_too() -> None:
    unet = diffusers_unet()
    packed = lean_twin(unet, torch.bfloat16)
    if not pack(packed):
        pytest.skip("this processor's oneDNN has no bfloat16")
    noisy, tokens = inputs(packed, 2)
    assert relative(predict(packed, noisy, 9.0, tokens), unet(noisy, 9.0, tokens).sample) < 2e-2


def test_enlarging_by_a_transposed_convolution_is_exact_at_the_border() -> None:
    torch.manual_seed(0)
    plain = Enlarge(5, 7, 3, padding=1).requires_grad_(False)
    for weight in plain.parameters():
        weight.normal_()
    holder = nn.Sequential(plain)
    assert pack(holder)
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    for size in (6, 8), (5, 8), (6, 7):
        torch.testing.assert_close(holder[0](x, size), plain(x, size), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_packed_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    assert not pack(grouped)
    assert isinstance(grouped[0], nn.Conv2d)
    double = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64))
    assert not pack(double)
    assert isinstance(double[0], nn.Linear)

    def missing(layer: object) -> nn.Module:
        raise AttributeError("no operator of that name")

    monkeypatch.setattr(packing, "_packed", missing)
    single = nn.Sequential(nn.Linear(4, 4))
    assert not pack(single)
    assert isinstance(single[0], nn.Linear)


def test_operators_that_compute_something_else_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "_packed", lambda layer: lambda x, *_: layer(x, *_) + 1)
    single = nn.Sequential(nn.Linear(4, 4))
    assert not pack(single)
    assert isinstance(single[0], nn.Linear)
