"""Does guidance move from the unconditional towards the conditional prediction, in one batch?"""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.guidance import ClassifierFree


class Model:
    """A denoiser that mixes x with each row's conditioning, and counts its calls."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(len(x))
        assert len(x) == len(cond)
        return torch.tanh(x + cond) / (1 + sigma)


def setting() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, uncond, text = torch.randn(
        3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return x, torch.tensor(2.0), uncond, text


def test_one_doubled_batch_equals_two_passes() -> None:
    x, sigma, uncond, text = setting()
    model = Model()
    guided = ClassifierFree(model, 3.5)(x, sigma, torch.cat([uncond, text]))
    assert model.batches == [8]
    plain, steered = model(x, sigma, uncond), model(x, sigma, text)
    torch.testing.assert_close(guided, plain + 3.5 * (steered - plain))


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional() -> None:
    x, sigma, uncond, text = setting()
    model, both = Model(), torch.cat([uncond, text])
    torch.testing.assert_close(ClassifierFree(model, 1.0)(x, sigma, both), model(x, sigma, text))
    torch.testing.assert_close(ClassifierFree(model, 0.0)(x, sigma, both), model(x, sigma, uncond))


def test_no_difference_in_text_makes_no_difference_in_scale() -> None:
    x, sigma, uncond, _ = setting()
    model, both = Model(), torch.cat([uncond, uncond])
    expected = model(x, sigma, uncond)
    for scale in (0.0, 1.0, 7.5, 100.0):
        torch.testing.assert_close(ClassifierFree(model, scale)(x, sigma, both), expected)
