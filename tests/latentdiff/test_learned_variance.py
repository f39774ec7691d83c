"""Is a network's learned variance read beside its clean sample, and is its absence told?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import PREDICTIONS, NetworkDenoiser
from latentdiff.schedule import EDMSchedule, NoiseSchedule

STABLE = NoiseSchedule.scaled_linear()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_learned_variance_is_a_fraction_beside_the_clean_sample(prediction: str) -> None:
    """Output -1 is beta tilde, 1 is beta (Nichol & Dhariwal 2021, eq. 15)."""
    x, output = random(2, 2, 3, 4)
    rest = torch.tensor([-1.0, 1.0, 0.5]).view(1, 3, 1).expand(2, 3, 4).double()
    sigma = scalar(2.0)
    wide = NetworkDenoiser(
        lambda noisy, t, cond: torch.cat([output, rest], 1), EDMSchedule(), prediction
    )
    narrow = NetworkDenoiser(lambda noisy, t, cond: output, EDMSchedule(), prediction)
    both = wide.with_variance(x, sigma, None)
    clean, fraction = both.chunk(2, 1)
    torch.testing.assert_close(clean, narrow(x, sigma, None))
    torch.testing.assert_close(wide(x, sigma, None), clean)
    assert fraction[0, :, 0].tolist() == [0, 1, 0.75]


@pytest.mark.parametrize("channels", [1, 4, 7])
def test_a_network_of_another_number_of_channels_is_refused(channels: int) -> None:
    denoise = NetworkDenoiser(lambda noisy, t, cond: torch.ones(2, channels, 4), STABLE, "v")
    message = (
        "the network must give as many channels as x has, 3, or with learned variance 6; "
        f"got {channels}"
    )
    with pytest.raises(ValueError, match=message):
        denoise(torch.ones(2, 3, 4), scalar(1.0), None)


def test_a_network_without_learned_variance_is_refused() -> None:
    denoise = NetworkDenoiser(lambda noisy, t, cond: torch.ones(2, 3, 4), STABLE, "v")
    message = (
        "needs a network of 6 output channels for 3 of x; got 3; train with "
        "objective.learned_variance, or sample with variance small"
    )
    with pytest.raises(ValueError, match=message):
        denoise.with_variance(torch.ones(2, 3, 4), scalar(1.0), None)
