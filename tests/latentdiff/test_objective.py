"""Does a batch's loss put the parts of the objective together, and its config refuse nonsense?"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from latentdiff.buildschedule import build_schedule
from latentdiff.config import DiffusionRun, load
from latentdiff.loss import target
from latentdiff.randomness import normal
from latentdiff.training.denoising import batch_loss
from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.feed import clean_latents
from latentdiff.training.micro import Recipe, prepare
from latentdiff.training.noise import draw_noise, timestep_draws
from latentdiff.unet import as_network

SEED = 3


def make_run(objective: dict[str, Any], **changes: Any) -> DiffusionRun:
    return DiffusionRun.model_validate(
        {
            "kind": "diffusion",
            "out": "run",
            "seed": SEED,
            "data": {"shards": ["train-*.tar"], "size_px": 16},
            "unet": {
                "channels": [16, 16],
                "cross_attention": [],
                "layers_per_block": 1,
                "head_dim": 8,
                "norm_num_groups": 4,
            },
            "objective": objective,
            "samples": {"num_steps": 5, "guidance_scale": 1.0, "spacing": "karras"},
            "loop": {"num_steps": 1, "batch_size": 8},
            **changes,
        }
    )


# The loss of a batch


class Spy(nn.Module):
    """A network that keeps what it sees and says what it is told."""

    dtype = torch.float32

    def __init__(self, output: Tensor | None = None) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 3, 1)
        self.output = output

    def forward(self, noisy: Tensor, t: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.noisy, self.t = noisy, t
        return (torch.zeros_like(noisy) if self.output is None else self.output,)


def spied(config: DiffusionRun, output: Tensor | None = None) -> Any:
    return SimpleNamespace(
        unet=Spy(output),
        schedule=build_schedule(config.schedule),
        prediction=config.objective.prediction,
        text=None,
        autoencoder=SimpleNamespace(is_identity=True, latent_channels=3, downscale=1),
    )


def loss_of(
    model: Any, clean: Tensor, position: int, config: DiffusionRun, num_planned: int = 8
) -> Tensor:
    """The loss that samples at `position` and after it have as part of a step."""
    micro = prepare(batch_at(position, clean, num_planned), Recipe.of(model, config))
    assert torch.equal(clean_latents(model.autoencoder, micro), clean)

    def network(noisy: Tensor, t: Tensor, token_ids: None, cond: None) -> Tensor:
        return as_network(model.unet)(noisy, t, cond)

    return batch_loss(cast(Any, network), model, micro, config).share


def batch_at(position: int, clean: Tensor, num_planned: int) -> Batch:
    count = len(clean)
    places, sizes = np.arange(count), np.zeros((count, 2), np.int32)
    return Batch(
        step=0,
        num_planned=num_planned,
        positions=position + places,
        ids=places,
        valid=np.ones(count, dtype=bool),
        keys=("",) * count,
        captions=("",) * count,
        pixels=None,
        latents=clean[:, None],
        tokens=None,
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
    )


def clean_batch(count: int) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


OBJECTIVES = [
    ({"kind": "linear"}, "epsilon"),
    ({"kind": "scaled_linear", "zero_terminal_snr": True}, "v"),
    ({"kind": "cosine", "zero_terminal_snr": True}, "sample"),
    ({"kind": "flow"}, "flow"),
    ({"kind": "flow"}, "sample"),
    ({"kind": "edm"}, "edm"),
]


@pytest.mark.parametrize(("schedule", "prediction"), OBJECTIVES)
def test_a_network_that_says_the_target_has_no_loss(
    schedule: dict[str, Any], prediction: str
) -> None:
    """The input has the perturbed noise, the target the plain one; the offset is in both."""
    objective = {"prediction": prediction, "offset_noise": 0.2, "input_perturbation": 0.1}
    config = make_run(objective, schedule=schedule)
    clean, positions = clean_batch(8), range(16, 24)
    asked = spied(config)
    at_zero = loss_of(asked, clean, 16, config)

    t = asked.schedule.draw_timesteps(timestep_draws(positions, SEED, 8, False))
    assert asked.unet.t.tolist() == t.float().tolist()
    noise = draw_noise((3, 4, 4), positions, SEED, 0.2)
    extra = normal((3, 4, 4), SEED, positions, "input_perturbation")
    signal, spread = (part.float().view(-1, 1, 1, 1) for part in asked.schedule.mix(t))
    torch.testing.assert_close(asked.unet.noisy, signal * clean + spread * (noise + 0.1 * extra))

    expected = target(asked.schedule, clean, noise, t, prediction)
    assert at_zero.item() == pytest.approx(expected.square().mean().item(), rel=1e-5)
    assert loss_of(spied(config, expected), clean, 16, config).item() == 0


@pytest.mark.parametrize(
    ("weighting", "on_epsilon"),
    [
        ({"kind": "uniform"}, lambda snr: torch.ones_like(snr)),
        ({"kind": "min_snr", "gamma": 2.0}, lambda snr: snr.clamp(max=2.0) / snr),
        ({"kind": "soft_min_snr", "gamma": 3.0}, lambda snr: 3.0 / (3.0 + snr)),
        ({"kind": "p2", "gamma": 0.5, "k": 2.0}, lambda snr: (2.0 + snr) ** -0.5),
        ({"kind": "edm"}, lambda snr: 1 + 1 / snr),
    ],
)
def test_the_config_chooses_weighting_and_huber(weighting: dict[str, Any], on_epsilon: Any) -> None:
    config = make_run({"weighting": weighting, "loss": {"kind": "huber", "c": 0.3}})
    model, clean = spied(config), clean_batch(8)
    loss = loss_of(model, clean, 0, config)
    noise = draw_noise((3, 4, 4), range(8), SEED).double()
    huber = 0.6 * ((noise**2 + 0.09).sqrt() - 0.3)
    weight = on_epsilon(model.schedule.snr(model.unet.t.long()))
    assert loss.item() == pytest.approx((weight * huber.mean((1, 2, 3))).mean().item(), rel=1e-5)


def test_micro_batches_add_up_to_the_batch_with_everything_on() -> None:
    objective = {
        "prediction": "v",
        "weighting": {"kind": "min_snr"},
        "loss": {"kind": "huber"},
        "stratified_timesteps": True,
        "offset_noise": 0.1,
        "input_perturbation": 0.1,
        "learned_variance": True,
    }
    config = make_run(objective, schedule={"kind": "cosine", "num_timesteps": 100})
    clean = clean_batch(8)
    output = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = loss_of(spied(config, output), clean, 40, config)
    parts = [
        loss_of(spied(config, output[i : i + 4]), clean[i : i + 4], 40 + i, config) for i in (0, 4)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_the_hybrid_adds_the_bound_for_the_variance_alone() -> None:
    schedule = {"kind": "cosine", "num_timesteps": 100}
    simple = make_run({}, schedule=schedule)
    light, heavy = (
        make_run({"learned_variance": True, "vlb_weight": weight}, schedule=schedule)
        for weight in (0.001, 0.002)
    )
    clean = clean_batch(8)
    output = torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain = loss_of(spied(simple, output[:, :3]), clean, 0, simple)
    one = loss_of(spied(light, output), clean, 0, light)
    two = loss_of(spied(heavy, output), clean, 0, heavy)
    torch.testing.assert_close(two - one, one - plain, rtol=1e-3, atol=0)
    assert one > plain

    (of_plain,) = torch.autograd.grad(plain, output)
    (of_hybrid,) = torch.autograd.grad(one, output)
    assert torch.equal(of_hybrid[:, :3], of_plain[:, :3])
    assert (of_hybrid[:, 3:] != 0).all()


# Whole runs


@pytest.mark.parametrize(
    ("schedule", "objective"),
    [
        (
            {"kind": "cosine", "num_timesteps": 100},
            {"prediction": "epsilon", "learned_variance": True, "stratified_timesteps": True},
        ),
        ({"kind": "flow"}, {"prediction": "flow", "loss": {"kind": "huber"}}),
        ({"kind": "edm"}, {"prediction": "edm", "weighting": {"kind": "edm"}}),
        (
            {"kind": "scaled_linear", "zero_terminal_snr": True},
            {"prediction": "sample", "weighting": {"kind": "soft_min_snr"}, "offset_noise": 0.1},
        ),
    ],
    ids=["improved_ddpm", "flow", "edm", "zero_snr"],
)
def test_every_objective_trains(
    assets: Path, tmp_path: Path, schedule: dict[str, Any], objective: dict[str, Any]
) -> None:
    run = make_run(
        objective,
        out=str(tmp_path / "run"),
        schedule=schedule,
        data={"shards": [str(assets / "train-*.tar")], "size_px": 16},
        samples={"num_steps": 5, "guidance_scale": 1.0, "spacing": "karras"},
        optimizer={"lr": 5e-3, "warmup_steps": 5, "decay": "constant"},
        loop={
            "num_steps": 24,
            "batch_size": 16,
            "log_every": 1,
            "sample_every": 24,
            "checkpoint_every": 24,
        },
    )
    train_diffusion(run)
    assert load(tmp_path / "run" / "config.yaml") == run
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:3])


def test_a_model_without_variance_is_not_continued_with_it(
    tiny_run: DiffusionRun, tiny_model: Path, tmp_path: Path
) -> None:
    values = tiny_run.model_dump(exclude={"autoencoder", "text", "unet", "schedule", "samples"})
    objective = {"prediction": "v", "learned_variance": True}
    changes = {"out": str(tmp_path), "init_from": str(tiny_model), "objective": objective}
    with pytest.raises(
        ValueError,
        match=r"objective\.learned_variance is true, for which the U-Net needs 8 output channels; "
        r"\S+ has 4; set objective\.learned_variance=false",
    ):
        train_diffusion(DiffusionRun.model_validate(values | changes))


# The config


@pytest.mark.parametrize(
    ("objective", "schedule", "message"),
    [
        (
            {"learned_variance": True},
            {"kind": "flow"},
            "which schedule.kind flow does not have; choose a schedule of betas",
        ),
        (
            {"learned_variance": True, "prediction": "edm"},
            {"kind": "edm"},
            "which schedule.kind edm does not have",
        ),
        (
            {"prediction": "edm"},
            {"kind": "linear"},
            "objective.prediction edm has no name beside schedule.kind linear in diffusers' "
            "format; choose epsilon or v or sample, or another schedule.kind",
        ),
        (
            {"prediction": "v"},
            {"kind": "flow"},
            "objective.prediction v has no name beside schedule.kind flow .* choose flow or sample",
        ),
        (
            {"prediction": "epsilon"},
            {"kind": "linear", "zero_terminal_snr": True},
            "choose v or sample, or set schedule.zero_terminal_snr: false",
        ),
        (
            {"prediction": "epsilon"},
            {"kind": "betas", "betas": [0.1, 0.2, 0.3, 0.4, 1.0]},
            "objective.prediction epsilon says nothing of the clean sample",
        ),
        (
            {"vlb_weight": 0.01},
            {"kind": "linear"},
            "vlb_weight is 0.01 but learned_variance is false, .* set learned_variance: true",
        ),
        (
            {"min_snr_gamma": 5.0},
            {"kind": "linear"},
            r"replace min_snr_gamma: 5.0 by weighting: {kind: min_snr, gamma: 5.0}",
        ),
        (
            {"min_snr_gamma": None},
            {"kind": "linear"},
            r"replace min_snr_gamma: null by weighting: {kind: uniform}",
        ),
    ],
)
def test_nonsense_is_refused(
    objective: dict[str, Any], schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(objective, schedule=schedule)


def test_a_wrong_weighting_names_its_key(tmp_path: Path) -> None:
    for value, line in (
        ("{kind: min_snr, gama: 5}", "objective.weighting.gama: unknown key; did you mean"),
        ("{kind: minsnr}", "objective.weighting.kind: got 'minsnr'; expected one of 'uniform'"),
        ("{kind: p2, k: 0}", "objective.weighting.k: got 0; expected a value greater than 0"),
    ):
        with pytest.raises(ValueError, match=line):
            load("ddpm_emoji", [f"objective.weighting={value}"])
    run = load("ddpm_emoji", ["objective.weighting.kind=p2", "objective.loss.kind=huber"])
    assert isinstance(run, DiffusionRun)
    assert run.objective.weighting.model_dump() == {"kind": "p2", "gamma": 1.0, "k": 1.0}
    assert run.objective.loss.model_dump() == {"kind": "huber", "c": 0.1}
