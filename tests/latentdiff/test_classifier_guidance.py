"""Is a denoiser guided by a classifier the posterior's? Everything is Gaussian: it is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser
from latentdiff.guidance import ClassifierFree, ClassifierGuided, Pair
from latentdiff.samplers import euler

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
SIGMA = torch.tensor(2.0, dtype=torch.float64)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(mean: float, spread: float) -> Denoiser:
    """E[clean | x] of clean ~ N(mean, spread^2)."""

    def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return (spread**2 * x + sigma**2 * mean) / (spread**2 + sigma**2)

    return denoise


MEAN, SPREAD = 0.5, 1.5  # of clean
Y, ERROR = 2.0, 0.8  # y = clean + ERROR * noise was observed
POSTERIOR_SPREAD = (SPREAD**-2 + ERROR**-2) ** -0.5
POSTERIOR_MEAN = POSTERIOR_SPREAD**2 * (MEAN / SPREAD**2 + Y / ERROR**2)


def likelihood(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
    """Log p(y | x) + c: clean | x is N(denoised, SPREAD^2 sigma^2 / (SPREAD^2 + sigma^2))."""
    denoised = gaussian(MEAN, SPREAD)(x, sigma, cond)
    variance = ERROR**2 + SPREAD**2 * sigma**2 / (SPREAD**2 + sigma**2)
    return (-((Y - denoised) ** 2) / (2 * variance)).sum(1)


def test_classifier_guidance_at_scale_one_is_the_posterior() -> None:
    x = 3 * random(50, 2)
    for sigma in torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64):
        guided = ClassifierGuided(gaussian(MEAN, SPREAD), likelihood)(x, sigma, None)
        posterior = gaussian(POSTERIOR_MEAN, POSTERIOR_SPREAD)(x, sigma, None)
        close(guided, posterior)

        def of_clean(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            return (-((Y - x) ** 2) / (2 * ERROR**2)).sum(1)

        wrong = ClassifierGuided(gaussian(MEAN, SPREAD), of_clean)(x, sigma, None)
        assert (wrong - posterior).abs().max() > 1e-3  # a classifier of clean samples will not do


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_classifier_guided_sampling_ends_at_the_posterior(mode: Callable[[], Any]) -> None:
    guided = ClassifierGuided(gaussian(MEAN, SPREAD), likelihood)
    with mode():  # what a caller makes there, too: x and the grid
        quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        x = 1000 * torch.special.ndtri(quantiles).view(-1, 1)
        sigmas = torch.cat([torch.logspace(3, -3, 1000, dtype=torch.float64), torch.zeros(1)])
        clean = euler(partial(guided, cond=None), x, sigmas.double())
        assert clean.grad_fn is None and not clean.requires_grad
        assert clean.mean().item() == pytest.approx(POSTERIOR_MEAN, abs=0.01)
        assert clean.std().item() == pytest.approx(POSTERIOR_SPREAD, rel=0.01)


def test_classifier_guidance_is_classifier_free_guidance_of_exact_models() -> None:
    """Two classes N(-1, 1), N(1, 1): cond - uncond = sigma^2 grad log p(label | x)."""

    def log_prob(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return torch.nn.functional.logsigmoid(2 * x / (1 + sigma**2)).sum(1)

    def either(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        """The class of each row's label, or both alike where it is 0."""
        right = torch.where(cond == 0, torch.sigmoid(2 * x / (1 + sigma**2)), (cond + 1) / 2)
        return (x + sigma**2 * (2 * right - 1)) / (1 + sigma**2)

    x, none, one = 3 * random(40, 1), torch.zeros(40, 1), torch.ones(40, 1)
    for scale in (0.0, 1.0, 4.0):
        free = ClassifierFree(either, scale)(x, SIGMA, Pair(one, torch.cat([none, one])))
        close(ClassifierGuided(either, log_prob, scale)(x, SIGMA, none), free)


def test_a_classifiers_parameters_are_left_alone() -> None:
    classifier, network = torch.nn.Linear(6, 1).double(), torch.nn.Linear(6, 6).double()

    def log_prob(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return torch.nn.functional.logsigmoid(classifier(x / (1 + sigma))).squeeze(1)

    def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        return network(x)

    x = random(4, 6)
    with torch.no_grad():
        guided = ClassifierGuided(denoise, log_prob)(x, SIGMA, None)
    assert not guided.requires_grad
    ClassifierGuided(denoise, log_prob)(x, SIGMA, None).sum().backward()  # denoise's own graph
    assert network.weight.grad is not None and classifier.weight.grad is None
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("log_prob", "message"),
    [
        (lambda x, s, c: x.mean(), r"one number a sample, shape \(4,\); got \(\); sum over"),
        (lambda x, s, c: x, r"shape \(4,\); got \(4, 6\)"),
        (lambda x, s, c: x.detach().sum(1), "must depend on x differentiably; got a constant"),
        (lambda x, s, c: torch.ones(4, requires_grad=True), "must depend on x differentiably"),
        (lambda x, s, c: (x * c).sum(1), "made under torch.inference_mode.* clone it inside"),
    ],
)
def test_a_wrong_classifier_is_named(log_prob: Any, message: str) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        ClassifierGuided(gaussian(MEAN, SPREAD), log_prob)(random(4, 6), SIGMA, random(4, 6))


def test_other_errors_of_a_classifier_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        ClassifierGuided(gaussian(MEAN, SPREAD), lambda x, s, c: x + random(5))(
            random(4, 6), SIGMA, random(4, 6)
        )
