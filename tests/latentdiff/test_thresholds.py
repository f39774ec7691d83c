"""Do the thresholds keep a sample in [-1, 1], each in its own way?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff.thresholds import Dynamic, Static

SIGMA = torch.tensor(1.0, dtype=torch.float64)


def itself(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    return x


def samples(scale: float = 3.0) -> Tensor:
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return noise * torch.tensor([0.2, 1.0, scale, 10.0]).view(-1, 1, 1, 1)


def test_static_is_clipping() -> None:
    x = samples()
    torch.testing.assert_close(Static(itself)(x, SIGMA, None), x.clip(-1, 1))


@pytest.mark.parametrize("percentile", [0.3, 0.9, 0.995, 1.0])
def test_dynamic_is_imagens_formula_a_sample_at_a_time(percentile: float) -> None:
    x = samples()
    output = Dynamic(itself, percentile)(x, SIGMA, None)
    for sample, result in zip(x.numpy(), output.numpy(), strict=True):
        s = max(1.0, np.percentile(np.abs(sample), 100 * percentile))
        np.testing.assert_allclose(result, np.clip(sample, -s, s) / s, rtol=1e-12)
    assert output.abs().max() <= 1


def test_dynamic_leaves_what_is_in_range() -> None:
    x = samples().clamp(-1, 1)
    for percentile in (0.01, 0.995, 1.0):
        assert torch.equal(Dynamic(itself, percentile)(x, SIGMA, None), x)


def test_the_largest_value_keeps_all_proportions() -> None:
    x = samples()
    output = Dynamic(itself, 1.0)(x, SIGMA, None)
    shrunk = x.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
    torch.testing.assert_close(output * shrunk, x)


def test_dynamic_is_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs: Any = DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=100.0
    )
    x = samples().float()
    torch.testing.assert_close(Dynamic(itself, 0.95)(x, SIGMA, None), theirs._threshold_sample(x))


def test_half_precision_and_one_value_a_sample() -> None:
    half = Dynamic(itself)(samples().bfloat16(), SIGMA, None)
    assert half.dtype == torch.bfloat16 and half.abs().max() <= 1
    x = torch.tensor([0.5, -4.0])
    torch.testing.assert_close(Dynamic(itself)(x, SIGMA, None), torch.tensor([0.5, -1.0]))


@pytest.mark.parametrize("percentile", [0.0, -0.5, 99.5, float("nan")])
def test_percentile_out_of_range(percentile: float) -> None:
    with pytest.raises(ValueError, match=rf"must be in \(0, 1\]; got {percentile}; Imagen's 99.5"):
        Dynamic(itself, percentile)
