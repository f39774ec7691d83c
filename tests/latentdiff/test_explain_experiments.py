"""Do the experiments that `explain` draws show what the processes and samplers really do?"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentdiff.explain import Plan, colours
from latentdiff.explain import experiments as shown
from latentdiff.explain.lab import Lab, times
from latentdiff.explain.request import Subject, read_subject
from latentdiff.explain.sheet import short
from latentdiff.pipeline import Pipeline
from latentdiff.samplers import SAMPLERS, STOCHASTIC
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule


@pytest.fixture
def lab(tiny_pipeline: Pipeline) -> Lab:
    return Lab(tiny_pipeline, "a red apple", seed=3)


@pytest.fixture
def subject(tiny_pipeline: Pipeline) -> Subject:
    return read_subject(tiny_pipeline, None, None)


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """But for the rounding that another batch size brings."""
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_forward_process_goes_from_the_picture_to_standard_normal(
    lab: Lab, subject: Subject
) -> None:
    sheet = shown.forward_sheet(lab, subject.image, 6)
    pixels = np.stack(list(sheet.rows[0].images)).astype(float)
    picture = colours.pixel_colours(subject.image).astype(float)
    errors = np.abs(pixels - picture).mean((1, 2, 3))
    spread = lab.schedule.mix(times(lab.schedule, 6))[1][0].item()
    assert errors[0] < 127.5 * spread  # E|noise| = 0.8, less where white is clipped
    assert (np.diff(errors) > 0).all()
    numbers = torch.Size(lab.latent_shape).numel()
    assert (
        abs(float(sheet.numbers["last_mean"].replace("−", "-"))) < 4 / numbers**0.5 + 0.1
    )  # some picture is left
    assert abs(float(sheet.numbers["last_std"]) - 1) < 4 / (2 * numbers) ** 0.5
    assert sheet.columns[0].startswith("$t$ = 0\n") and sheet.columns[-1].startswith("$t$ = 999\n")


def test_times_span_every_schedule() -> None:
    for schedule in (NoiseSchedule.cosine(50), FlowSchedule(), EDMSchedule()):
        t = times(schedule, 5)
        ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
        torch.testing.assert_close(schedule.t_to_sigma(t[[0, -1]]), ends)
        assert bool((t.diff() > 0).all())


def test_guesses_are_the_networks_and_their_errors_are_told(lab: Lab, subject: Subject) -> None:
    sheet = shown.guess_sheet(lab, subject.image, "hamster", 3)
    clean, noise = lab.encode(subject.image), lab.noise(purpose="forward")
    sigma = torch.tensor(lab.schedule.sigma_max, dtype=torch.float64)
    guess = lab.denoiser(["hamster"], 1)(clean + sigma * noise, sigma)
    _, guesses, noises, true = sheet.rows
    assert_same(guesses.images[-1], lab.decode(guess)[0])
    assert guesses.labels[-1] == f"error {short((guess - clean).square().mean().item())}"
    assert (true.images[0] == true.images[-1]).all()
    assert (noises.images[0] != noises.images[-1]).any()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_what_is_watched_is_what_generate_draws(lab: Lab, sampler: str) -> None:
    prompts = ["a red apple", "a cat", "a dog"]
    with torch.inference_mode():
        z, seen = lab.sample(sampler, 3, prompts, scale=2.5, noises=range(3))
        pictures = lab.decode(z)
    drawn = lab.pipeline.generate(
        prompts, steps=3, sampler=sampler, guidance_scale=2.5, seed=lab.seed
    )
    assert len(seen) == 3
    for ours, theirs in zip(pictures, drawn, strict=True):
        assert_same(ours, np.asarray(theirs))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_no_sampler_asks_more_often_than_its_row_says(lab: Lab, sampler: str) -> None:
    for most in (1, 2, 5, 10):
        asked: list[None] = []
        counting = replace(lab, tick=lambda asked=asked: asked.append(None))
        counting.sample(sampler, lab.steps_for(sampler, most))
        assert most / 2 <= len(asked) <= most


def test_steps_fit_the_models_own_grid(tiny_pipeline: Pipeline) -> None:
    leading = copy(tiny_pipeline)
    leading.defaults = replace(tiny_pipeline.defaults, spacing="leading")
    lab = Lab(leading, "", 0)
    assert (lab.most_steps, lab.num_timesteps) == (999, 1000)
    assert Plan().within(lab.most_steps).ddpm_steps == 999
    assert lab.steps_for("ddim", 5000) == 999
    with pytest.raises(ValueError, match=r"num_steps must be in 1\.\.999"):  # which is why
        lab.sample("ddim", 1000)


def test_every_sampler_is_in_one_family() -> None:
    deterministic, stochastic = shown.families()
    assert sorted(deterministic + stochastic) == sorted(SAMPLERS)
    assert set(stochastic) == STOCHASTIC


def test_solvers_are_measured_against_the_solution(lab: Lab) -> None:
    solution = shown.reference_solution(lab, 5)
    sheet = shown.samplers_sheet(lab, ["heun"], (5,), solution)
    assert sheet.rows[0].labels == ["0.00"]
    moved = shown.samplers_sheet(lab, ["heun"], (5,), solution + 0.5)
    assert moved.rows[0].labels == ["0.50"]


def test_reverse_process_ends_in_the_last_guess(lab: Lab) -> None:
    sheet = shown.reverse_sheet(lab, "ddpm", 5, 3)
    assert [len(row.images) for row in sheet.rows] == [3, 3, 3]
    drawn, seen = lab.sample("ddpm", 5)
    assert_same(sheet.rows[1].images[-1], lab.decode(drawn)[0])
    assert_same(sheet.rows[1].images[0], lab.decode(seen[0].clean)[0])


def test_guidance_starts_every_scale_from_the_same_noises(lab: Lab) -> None:
    sheet = shown.guidance_sheet(lab, (0, 1, 4), 2)
    unconditional = lab.sample(lab.pipeline.defaults.sampler, 2, ["", ""], 1, range(2))[0]
    for row, picture in zip(sheet.rows, lab.decode(unconditional), strict=True):
        assert_same(row.images[0], picture)  # scale 0 ignores the text
        assert (row.images[1] != row.images[2]).any()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_our_ddpm_is_algorithm_2(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = getattr(NoiseSchedule, kind)(40)
    assert shown.algorithm_2_difference(schedule, seed=0) < 1e-9
    monkeypatch.setattr(shown, "find_sampler", lambda _: SAMPLERS["lcm"])
    assert shown.algorithm_2_difference(schedule, seed=0) > 0.1
