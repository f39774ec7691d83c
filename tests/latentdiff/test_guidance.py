"""Does each guidance keep its law, in one batch, without a graph and without waiting for a GPU?"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import PREDICTIONS, Denoiser, NetworkDenoiser, from_clean, to_clean
from latentdiff.guidance import (
    ClassifierFree,
    ClassifierGuided,
    Conditional,
    Interval,
    Momentum,
    Pair,
    Projected,
    Rescale,
)
from latentdiff.samplers import euler
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import Conditioning
from latentdiff.thresholds import Dynamic, Static
from latentdiff.unet import as_network

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
SIGMA = torch.tensor(2.0, dtype=torch.float64)


class Model:
    """A denoiser that mixes x with each row's conditioning, and counts the rows it saw."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        assert x.shape == cond.shape
        self.rows.append(len(x))
        return 2 * torch.tanh(x / sigma + cond) / (1 + sigma)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting() -> tuple[Tensor, Tensor, Tensor, Pair]:
    """X [3, 2, 4, 4], the unconditional rows, the conditional rows, and both as a Pair."""
    x, uncond, cond = random(3, 3, 2, 4, 4)
    return x, uncond, cond, Pair(cond, torch.cat([uncond, cond]))


def std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)


# Classifier-free


def test_one_doubled_batch_equals_two_passes() -> None:
    x, uncond, cond, pair = setting()
    model = Model()
    guided = ClassifierFree(model, 3.5)(x, SIGMA, pair)
    assert model.rows == [6]
    plain, steered = model(x, SIGMA, uncond), model(x, SIGMA, cond)
    close(guided, plain + 3.5 * (steered - plain))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_one_doubled_batch_equals_two_passes_of_a_unet(prediction: str) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    unet.double()
    denoise = NetworkDenoiser(as_network(unet), NoiseSchedule.scaled_linear(), prediction)
    x, (uncond, cond) = SIGMA * random(3, 4, 8, 8), random(2, 3, 5, 12, seed=1)
    pair = Pair(Conditioning(cond), Conditioning(torch.cat([uncond, cond])))
    with torch.inference_mode():
        guided = ClassifierFree(denoise, 7.5)(x, SIGMA, pair)
        plain = denoise(x, SIGMA, Conditioning(uncond))
        steered = denoise(x, SIGMA, Conditioning(cond))
    close(guided, plain + 7.5 * (steered - plain))
    assert (steered - plain).abs().max() > 1e-3  # the text does matter


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional() -> None:
    x, uncond, cond, pair = setting()
    model = Model()
    close(ClassifierFree(model, 1.0)(x, SIGMA, pair), model(x, SIGMA, cond))
    close(ClassifierFree(model, 0.0)(x, SIGMA, pair), model(x, SIGMA, uncond))
    close(Conditional(model)(x, SIGMA, pair), model(x, SIGMA, cond))
    close(Projected(model, 1.0, eta=0.3, threshold=0.1)(x, SIGMA, pair), model(x, SIGMA, cond))


def test_guidance_is_affine_in_scale() -> None:
    x, _, _, pair = setting()
    two, four, seven = (ClassifierFree(Model(), s)(x, SIGMA, pair) for s in (2.0, 4.0, 7.0))
    close(seven, two + (7 - 2) / (4 - 2) * (four - two))


@pytest.mark.parametrize("kind", [ClassifierFree, Projected])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 100.0])
def test_no_difference_in_text_makes_no_difference_in_scale(kind: Any, scale: float) -> None:
    x, uncond, _, _ = setting()
    pair = Pair(uncond, torch.cat([uncond, uncond]))
    close(kind(Model(), scale)(x, SIGMA, pair), Model()(x, SIGMA, uncond))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_is_the_same_in_every_prediction(prediction: str) -> None:
    x, uncond, cond, pair = setting()
    plain, steered = (
        from_clean(Model()(x, SIGMA, c), x, SIGMA, prediction) for c in (uncond, cond)
    )
    mixed = to_clean(plain + 5 * (steered - plain), x, SIGMA, prediction)
    close(ClassifierFree(Model(), 5.0)(x, SIGMA, pair), mixed)


# In an interval


def test_no_unconditional_pass_outside_the_interval() -> None:
    x, _, _, pair = setting()
    model = Model()
    guided, plain = ClassifierFree(model, 5.0), Conditional(model)
    limited = Interval(guided, plain, low=0.5, high=4.0)
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    euler(partial(limited, cond=pair), x, sigmas)
    assert model.rows == [3, 6, 6, 6, 3, 3]  # low < sigma <= high
    for sigma in sigmas[:-1]:
        expected = (guided if 0.5 < sigma <= 4 else plain)(x, sigma, pair)
        assert torch.equal(limited(x, sigma, pair), expected)


def test_an_endless_interval_is_guidance() -> None:
    x, _, _, pair = setting()
    guided = ClassifierFree(Model(), 5.0)
    for sigma in torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64):
        limited = Interval(guided, Conditional(Model()), 0.0)(x, sigma, pair)
        assert torch.equal(limited, guided(x, sigma, pair))


# Rescale


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers_on_the_networks_output(prediction: str, phi: float) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    x, uncond, cond, pair = setting()

    def network(noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return torch.tanh(noisy + cond + t.view(-1, 1, 1, 1) / 1000)

    schedule = NoiseSchedule.scaled_linear()
    denoise = NetworkDenoiser(network, schedule, prediction)
    guided = Rescale(ClassifierFree(denoise, 7.5), phi, prediction)(x, SIGMA, pair)

    t = schedule.sigma_to_t(SIGMA.view(1)).float().expand(len(x))
    noisy = x / (1 + SIGMA.square()).sqrt()
    plain, steered = network(noisy, t, uncond), network(noisy, t, cond)
    theirs = rescale_noise_cfg(plain + 7.5 * (steered - plain), steered, guidance_rescale=phi)
    close(guided, to_clean(theirs, x, SIGMA, prediction))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_rescale_brings_guidance_to_the_conditional_spread(prediction: str) -> None:
    x, _, cond, pair = setting()
    space = (x, SIGMA, prediction)
    comparison = ClassifierFree(Model(), 5.0)
    wanted = std(from_clean(Model()(x, SIGMA, cond), *space))
    guided = from_clean(comparison(x, SIGMA, pair), *space)
    full = from_clean(Rescale(comparison, 1.0, prediction)(x, SIGMA, pair), *space)
    close(std(full), wanted)
    close(full, guided * wanted / std(guided))  # each sample by one number
    half = from_clean(Rescale(comparison, 0.5, prediction)(x, SIGMA, pair), *space)
    close(half, (full + guided) / 2)
    assert (std(guided) / wanted - 1).abs().max() > 0.1  # there was something to rescale


def test_rescale_knows_the_spread_of_edms_data() -> None:
    x, _, cond, pair = setting()
    space = (x, SIGMA, "edm", 0.5)
    output = Rescale(ClassifierFree(Model(), 5.0), 1.0, "edm", sigma_data=0.5)(x, SIGMA, pair)
    close(std(from_clean(output, *space)), std(from_clean(Model()(x, SIGMA, cond), *space)))


def test_rescale_is_neutral_at_phi_zero_and_at_scale_one() -> None:
    x, _, cond, pair = setting()
    guided = ClassifierFree(Model(), 5.0)
    close(Rescale(guided, 0.0, "v")(x, SIGMA, pair), guided(x, SIGMA, pair))
    plain = Rescale(ClassifierFree(Model(), 1.0), 0.7, "v")(x, SIGMA, pair)
    close(plain, Model()(x, SIGMA, cond))


def test_rescale_leaves_a_flat_prediction() -> None:
    x, _, _, pair = setting()

    def flat(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        return torch.full_like(x, 0.25)

    close(Rescale(ClassifierFree(flat, 5.0), 1.0)(x, SIGMA, pair), torch.full_like(x, 0.25))


# Projected


def test_projected_guidance_with_all_parts_is_classifier_free() -> None:
    x, _, _, pair = setting()
    expected = ClassifierFree(Model(), 6.0)(x, SIGMA, pair)
    close(Projected(Model(), 6.0, eta=1.0)(x, SIGMA, pair), expected)
    close(Projected(Model(), 6.0, eta=1.0, threshold=1e6)(x, SIGMA, pair), expected)
    close(Projected(Model(), 6.0, eta=1.0, momentum=Momentum(0.0))(x, SIGMA, pair), expected)


def test_perpendicular_guidance_adds_nothing_along_the_conditional_prediction() -> None:
    x, _, cond, pair = setting()
    steered = Model()(x, SIGMA, cond)
    update = Projected(Model(), 6.0, eta=0.0)(x, SIGMA, pair) - steered
    close((update * steered).sum((1, 2, 3)), torch.zeros(3, dtype=torch.float64))
    whole = ClassifierFree(Model(), 6.0)(x, SIGMA, pair) - steered
    assert (whole * steered).sum((1, 2, 3)).abs().min() > 0.1
    close((update * whole).sum((1, 2, 3)), update.square().sum((1, 2, 3)))  # a projection of it


def test_threshold_bounds_each_samples_update() -> None:
    x, uncond, cond, pair = setting()
    whole = (Model()(x, SIGMA, cond) - Model()(x, SIGMA, uncond)).flatten(1).norm(dim=1)
    threshold = whole.median().item()
    guided = Projected(Model(), 3.0, eta=1.0, threshold=threshold)(x, SIGMA, pair)
    update = (guided - Model()(x, SIGMA, cond)).flatten(1).norm(dim=1)
    close(update, 2 * whole.clamp(max=threshold))


@pytest.mark.parametrize("beta", [-0.5, 0.5])
@pytest.mark.parametrize(("threshold", "rescale"), [(None, 0.0), (2.5, 0.0), (2.5, 0.7)])
def test_projected_guidance_is_diffusers(
    beta: float, threshold: float | None, rescale: float
) -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    x, uncond, cond, pair = setting()
    projected = Projected(Model(), 6.0, eta=0.25, threshold=threshold, momentum=Momentum(beta))
    ours, buffer = Rescale(projected, rescale), MomentumBuffer(beta)
    for sigma in torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64):
        steered = Model()(x, sigma, cond)
        theirs = normalized_guidance(
            steered,
            Model()(x, sigma, uncond),
            guidance_scale=6.0 - 1,  # they add to the conditional prediction
            momentum_buffer=buffer,
            eta=0.25,
            norm_threshold=threshold or 0.0,  # which is none
            use_original_formulation=True,  # as the paper has it
        )
        close(ours(x, sigma, pair), rescale_noise_cfg(theirs, steered, rescale))


def test_momentum_belongs_to_one_drawing() -> None:
    x, _, _, pair = setting()
    momentum = Momentum(-0.5)
    guided = Projected(Model(), 6.0, momentum=momentum)
    first, second = guided(x, SIGMA, pair), guided(x, SIGMA, pair)
    assert not torch.allclose(first, second)
    close(Projected(Model(), 6.0, momentum=Momentum(-0.5))(x, SIGMA, pair), first)
    with pytest.raises(ValueError, match=r"shape \(3, 2, 4, 4\); got \(1, 2, 4, 4\); make a new"):
        guided(x[:1], SIGMA, Pair(pair.cond[:1], pair.both[:2]))


# All of them


def bright(x: Tensor, sigma: Tensor, cond: Pair) -> Tensor:
    """Log-probability of a bright picture, for tests of form alone."""
    return torch.nn.functional.logsigmoid(x.flatten(1).mean(1) / sigma)


def everything(denoise: Denoiser) -> dict[str, Denoiser]:
    free = ClassifierFree(denoise, 7.5)
    projected = Projected(denoise, 7.5, 0.0, 1.0, Momentum(-0.5))
    return {
        "free": free,
        "conditional": Conditional(denoise),
        "interval": Interval(free, Conditional(denoise), 0.1, 10.0),
        "projected": projected,
        **{f"rescale {p}": Rescale(free, 0.7, p) for p in PREDICTIONS},
        "classifier": ClassifierGuided(Conditional(denoise), bright, 2.0),
        "static": Static(free),
        "dynamic": Dynamic(free, 0.9),
        "all": Dynamic(
            ClassifierGuided(
                Interval(Rescale(projected, 0.7, "v"), Conditional(denoise), 0.1), bright, 2.0
            )
        ),
    }


@pytest.mark.parametrize("name", everything(Model()))
def test_nothing_waits_for_a_device(name: str) -> None:
    """A meta tensor holds no values: whoever asks for one raises."""
    x, _, _, pair = setting()
    guided = everything(Model())[name]
    for _ in range(2):  # the momentum's first and second update
        output = guided(x.to("meta"), SIGMA, Pair(*(c.to("meta") for c in pair)))
        assert (output.device.type, output.shape, output.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize("name", everything(Model()))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_is_left_and_float32_stays(name: str, mode: Callable[[], Any]) -> None:
    x, _, _, pair = setting()
    weight = torch.nn.Parameter(torch.ones(2, 4, 4))

    def denoise(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        return Model()(x * weight, sigma, cond)

    with mode():
        sigma = SIGMA.clone()  # an inference tensor under inference_mode, as x is
        output = everything(denoise)[name](x.float(), sigma, Pair(*(c.float() for c in pair)))
    assert not output.requires_grad and output.grad_fn is None
    assert output.dtype == torch.float32 and output.isfinite().all()
    expected = everything(Model())[name](x, SIGMA, pair)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


def test_order_of_wrapping_is_order_of_work() -> None:
    x, _, _, pair = setting()
    free = partial(ClassifierFree, scale=20.0)
    outer, inner = Static(free(Model()))(x, SIGMA, pair), free(Static(Model()))(x, SIGMA, pair)
    assert outer.abs().max() <= 1 < inner.abs().max()
    close(outer, free(Model())(x, SIGMA, pair).clamp(-1, 1))
    # Both kinds of guidance add to the clean sample, and each sees the same x.
    added = ClassifierGuided(free(Model()), bright, 3.0)(x, SIGMA, pair)
    push = ClassifierGuided(Model(), bright, 3.0)(x, SIGMA, pair.cond) - Model()(
        x, SIGMA, pair.cond
    )
    close(added, free(Model())(x, SIGMA, pair) + push)
    assert push.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda d: ClassifierFree(d, -1.0),
            r"scale must be at least 0 and finite; got -1\.0; 1 is",
        ),
        (lambda d: ClassifierFree(d, math.nan), "got nan"),
        (lambda d: Projected(d, math.inf), "scale must be at least 0 and finite; got inf"),
        (lambda d: Projected(d, 5.0, eta=1.5), r"eta must be in \[0, 1\]; got 1\.5; 0 drops"),
        (lambda d: Projected(d, 5.0, threshold=0.0), r"must be positive; got 0\.0; None sets no"),
        (lambda d: Momentum(1.0), r"beta must be in \(-1, 1\).*got 1\.0; Sadat et al. use -0\.5"),
        (
            lambda d: Rescale(ClassifierFree(d, 5.0), 1.2),
            r"phi must be in \[0, 1\]; got 1\.2; 0 is",
        ),
        (lambda d: Rescale(ClassifierFree(d, 5.0), 0.5, "x0"), "unknown prediction 'x0'; known: "),
        (
            lambda d: Rescale(cast(Any, Conditional(d)), 0.5),
            "two predictions; got Conditional; wrap",
        ),
        (lambda d: Interval(d, d, 2.0, 2.0), r"0 <= low < high; got low 2\.0 and high 2\.0, in"),
        (lambda d: Interval(d, d, -1.0), r"got low -1\.0 and high inf.* guide at every step"),
        (lambda d: Interval(d, d, math.nan), "got low nan"),
        (
            lambda d: ClassifierGuided(d, bright, -2.0),
            r"at least 0 and finite; got -2\.0; to steer",
        ),
    ],
)
def test_mistakes_are_named(make: Callable[[Denoiser], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Model())
