"""Are timesteps and noise pure functions of (seed, position), distributed as they should be?"""

from __future__ import annotations

import math

import pytest
import torch

from latentdiff.randomness import normal
from latentdiff.training.noise import draw_extra_noise, draw_noise, timestep_draws

SEED = 3


@pytest.mark.parametrize("stratified", [False, True])
def test_timesteps_are_the_same_in_micro_batches(stratified: bool) -> None:
    whole = timestep_draws(range(24, 36), SEED, 12, stratified)
    parts = [timestep_draws(range(p, p + 4), SEED, 12, stratified) for p in (24, 28, 32)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.float64


def test_a_step_of_stratified_timesteps_covers_all_strata() -> None:
    for step in range(20):
        draws = timestep_draws(range(step * 12, step * 12 + 12), SEED, 12, stratified=True)
        assert (draws * 12).long().sort().values.tolist() == list(range(12))
    independent = timestep_draws(range(12), SEED, 12, stratified=False)
    assert len((independent * 12).long().unique()) < 12


def test_stratified_timesteps_are_uniform_at_every_place_and_differ_by_step() -> None:
    for place in (0, 5):
        draws = torch.cat([timestep_draws(range(p, p + 1), SEED, 8, True)
                           for p in range(place, 8 * 2000, 8)])  # fmt: skip
        counts = torch.bincount((draws * 20).long(), minlength=20).double()
        assert ((counts - 100).square() / 100).sum() < 43.8  # 99.9 % of chi-squared, 19 d.o.f.


def test_offset_noise_shifts_whole_channels() -> None:
    plain = draw_noise((3, 4, 4), range(2000), SEED)
    assert torch.equal(plain, normal((3, 4, 4), SEED, range(2000), "noise"))
    shifted = draw_noise((3, 4, 4), range(2000), SEED, offset_strength=0.5)
    offset = shifted - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6, rtol=0)
    channels = offset[:, :, 0, 0]
    assert abs(channels.std().item() - 0.5) < 4 * 0.5 / math.sqrt(2 * 6000)
    assert channels.T.corrcoef().fill_diagonal_(0).abs().max() < 4 / math.sqrt(2000)
    means = plain.mean((2, 3))
    assert torch.stack([means.flatten(), channels.flatten()]).corrcoef()[0, 1].abs() < 0.06
    some = draw_noise((3, 4, 4), range(70, 75), SEED, offset_strength=0.5)
    assert torch.equal(some, shifted[70:75])


def test_input_perturbation_is_noise_of_its_own() -> None:
    noise = draw_noise((3,), range(2000), SEED)
    assert draw_extra_noise((3,), range(2000), SEED, 0.0) is None
    extra = draw_extra_noise((3,), range(2000), SEED, 0.1)
    assert extra is not None and abs(extra.std().item() - 0.1) < 0.005
    assert torch.stack([noise.flatten(), extra.flatten()]).corrcoef()[0, 1].abs() < 0.06
    some = draw_extra_noise((3,), range(70, 75), SEED, 0.1)
    assert some is not None and torch.equal(some, extra[70:75])
