"""How strongly is the drawing steered? Guidance wraps a denoiser and is one.

So wrappers compose:

    Interval(Rescale(ClassifierFree(denoise, 7.5), 0.7), Conditional(denoise), 0.3, 5.0)
    thresholds.Dynamic(ClassifierGuided(denoise, log_prob, 2.0))

Everywhere x = clean + sigma * noise, sigma is a scalar on the CPU, and scale 1 is the plain
conditional model: Ho & Salimans' w is scale - 1. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser, check_prediction, from_clean, to_clean


class Pair(NamedTuple):
    """Conditioning for guidance that compares two predictions; of what kind, the network knows.

    Attributes:
        cond: b rows: what is wanted.
        both: 2 b rows: what is compared with (nothing, or what is not wanted), then `cond`'s.
    """

    cond: Any
    both: Any


@dataclass(frozen=True)
class Conditional:
    """The conditional half alone: guidance switched off, at half the cost.

    Attributes:
        denoise: takes the b rows of `Pair.cond`.
    """

    denoise: Denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Pair) -> Tensor:
        """The expected clean sample [b, ...]."""
        return self.denoise(x, sigma, cond.cond)


# Guidance that compares the conditional prediction with an unconditional one


@runtime_checkable
class Comparison(Protocol):
    """Guidance made of two predictions: what `Rescale` can look inside of."""

    @property
    def denoise(self) -> Denoiser:
        """Takes the 2 b rows of `Pair.both`."""
        ...

    def combine(self, uncond: Tensor, conditional: Tensor) -> Tensor:
        """Both clean predictions [b, ...] -> the guided one."""
        ...


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6), both halves in one batch.

    guided = uncond + scale * (conditional - uncond)

    The same formula holds for noise, v and clean predictions: at a given x and sigma each is
    a * x + b * clean with one a and b for both halves, and the halves' weights, 1 - scale and
    scale, add up to 1.

    Attributes:
        denoise: takes the doubled batch.
        scale: 1 gives the plain conditional model, 0 the unconditional one.

    Raises:
        ValueError: scale is negative or not finite.
    """

    denoise: Denoiser
    scale: float

    def __post_init__(self) -> None:
        _check_scale(self.scale)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Pair) -> Tensor:
        """The guided clean sample [b, ...]."""
        return self.combine(*_both_halves(self.denoise, x, sigma, cond))

    def combine(self, uncond: Tensor, conditional: Tensor) -> Tensor:
        """Both clean predictions [b, ...] -> the guided one."""
        return uncond + self.scale * (conditional - uncond)


class Momentum:
    """The running sum of guidance's updates in one drawing: sum = update + beta * sum before.

    This is state: make a new one for each drawing (each batch of one call of a sampler). Every
    evaluation of the network counts, so a second-order sampler feeds it twice a step.

    Attributes:
        beta: in (-1, 1); negative, as in the paper, pushes away from where earlier updates went.
        total: the sum so far; None before the first update.

    Raises:
        ValueError: beta is out of range.
    """

    def __init__(self, beta: float) -> None:
        if not -1 < beta < 1:
            raise ValueError(
                f"momentum's beta must be in (-1, 1), else the sum of updates has no bound; got "
                f"{beta}; Sadat et al. use -0.5"
            )
        self.beta = beta
        self.total: Tensor | None = None

    def add(self, update: Tensor) -> Tensor:
        """The sum with `update` [b, ...] in it.

        Raises:
            ValueError: it belongs to a drawing of another shape.
        """
        if self.total is not None:
            if self.total.shape != update.shape:
                raise ValueError(
                    f"momentum holds updates of shape {tuple(self.total.shape)}; got "
                    f"{tuple(update.shape)}; make a new Momentum for each drawing"
                )
            update = update + self.beta * self.total
        self.total = update
        return update


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance (Sadat, Hilliges & Weber 2024): less saturation at high scales.

    update = conditional - uncond                                     # or momentum's sum of them
    update = update * min(1, threshold / |update|)
    parallel = <update, conditional> / <conditional, conditional> * conditional
    guided = conditional + (scale - 1) * (update - parallel + eta * parallel)

    Norm and products are taken over all values of a sample. With eta 1, no threshold and no
    momentum this is `ClassifierFree`.

    Attributes:
        denoise: takes the doubled batch.
        scale: 1 gives the plain conditional model.
        eta: in [0, 1], what is kept of the part parallel to the conditional prediction, which
            saturates; 0 is perpendicular guidance.
        threshold: largest norm of the update; it grows with the square root of the number of
            values (Sadat et al. use 2.5 to 15 on latents); None sets none.
        momentum: a new one for each drawing; None is without.

    Raises:
        ValueError: scale is negative, eta not in [0, 1], or threshold not positive.
    """

    denoise: Denoiser
    scale: float
    eta: float = 0.0
    threshold: float | None = None
    momentum: Momentum | None = None

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta must be in [0, 1]; got {self.eta}; 0 drops the parallel part of the update, "
                "1 keeps it"
            )
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(
                f"threshold must be positive; got {self.threshold}; None sets no threshold"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Pair) -> Tensor:
        """The guided clean sample [b, ...]."""
        return self.combine(*_both_halves(self.denoise, x, sigma, cond))

    def combine(self, uncond: Tensor, conditional: Tensor) -> Tensor:
        """Both clean predictions [b, ...] -> the guided one; feeds the momentum."""
        update = conditional - uncond
        if self.momentum is not None:
            update = self.momentum.add(update)
        update = _rows(update)  # [b, n]
        if self.threshold is not None:
            update = update * (self.threshold / update.norm(dim=1, keepdim=True)).clamp(max=1)
        direction = torch.nn.functional.normalize(_rows(conditional), dim=1)
        parallel = (update * direction).sum(1, keepdim=True) * direction
        kept = update - parallel + self.eta * parallel
        return conditional + (self.scale - 1) * kept.view_as(conditional)


@dataclass(frozen=True)
class Rescale:
    """Guidance whose output varies as much as the conditional one's (Lin et al. 2023, sec. 3.4).

    rescaled = guided * std(conditional) / std(guided)                # eq. 15, a sample at a time
    output = phi * rescaled + (1 - phi) * guided                      # eq. 16

    Unlike classifier-free guidance this depends on what is rescaled. Lin et al., and diffusers'
    `guidance_rescale`, take the network's own output: name its prediction for theirs. The clean
    sample itself is the default, where no noise is in the measure.

    Attributes:
        guided: ClassifierFree or Projected.
        phi: in [0, 1]; 0 leaves `guided` as it is. Lin et al. use 0.7.
        prediction: what is rescaled: epsilon | v | sample | flow | edm.
        sigma_data: of the data, for edm.

    Raises:
        ValueError: phi out of range, an unknown prediction, or `guided` is no comparison.
    """

    guided: Comparison
    phi: float
    prediction: str = "sample"
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.phi <= 1:
            raise ValueError(
                f"phi must be in [0, 1]; got {self.phi}; 0 is no rescaling, Lin et al. use 0.7"
            )
        check_prediction(self.prediction)
        if not isinstance(self.guided, Comparison):
            raise ValueError(
                f"Rescale compares two predictions; got {type(self.guided).__name__}; wrap "
                "ClassifierFree or Projected in it, and other guidance around it"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Pair) -> Tensor:
        """The guided clean sample [b, ...]."""
        uncond, conditional = _both_halves(self.guided.denoise, x, sigma, cond)
        space = (x, sigma, self.prediction, self.sigma_data)
        wanted = from_clean(conditional, *space)
        guided = from_clean(self.guided.combine(uncond, conditional), *space)
        spread = _rows(guided).std(1)
        # What does not vary at all stays as it is: there is nothing to bring to scale.
        ratio = torch.where(spread > 0, _rows(wanted).std(1) / spread, 1.0)
        rescaled = guided * ratio.view(-1, *(1,) * (x.ndim - 1))
        return to_clean(self.phi * rescaled + (1 - self.phi) * guided, *space)


# Guidance in a part of the noise levels


@dataclass(frozen=True)
class Interval:
    """One denoiser for low < sigma <= high and another elsewhere (Kynkäänniemi et al. 2024).

    With `outside=Conditional(denoise)` the unconditional half is never computed there.

    Attributes:
        inside: guided.
        outside: what remains.
        low: in units of sigma; 0 guides down to the end.
        high: in units of sigma; infinity guides from the start.

    Raises:
        ValueError: low is negative or not below high.
    """

    inside: Denoiser
    outside: Denoiser
    low: float
    high: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"a guidance interval needs 0 <= low < high; got low {self.low} and high "
                f"{self.high}, in units of sigma; 0 and infinity guide at every step"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample [b, ...]."""
        chosen = self.inside if self.low < sigma <= self.high else self.outside
        return chosen(x, sigma, cond)


# Guidance by a classifier

LogProb = Callable[[Tensor, Tensor, Any], Tensor]  # (x [b, ...], sigma, cond) -> [b]


@dataclass(frozen=True)
class ClassifierGuided:
    """Classifier guidance (Dhariwal & Nichol 2021, algorithm 2), in sigma units.

    guided = clean + scale * sigma^2 * grad_x log p(y | x)

    Their eps - sqrt(1 - alpha_bar) grad log p(y | x_t), with x_t = sqrt(alpha_bar) x. By Tweedie,
    E[clean | x] = x + sigma^2 grad log p(x); with Bayes' log p(x | y) = log p(x) + log p(y | x) + c
    scale 1 is exactly E[clean | x, y], if p(y | x) is a classifier of noisy samples. One that was
    trained on clean pictures alone is not.

    Works under torch.no_grad and torch.inference_mode too. The gradient is a constant: what is
    left on the result is `denoise`'s graph, if it has one, and no parameter's `.grad` is touched.

    Attributes:
        denoise: any denoiser; already guided or not.
        log_prob: (x [b, ...], sigma, cond) -> log p(y | x) [b], differentiable in x, each row by
            itself; x = clean + sigma * noise, and cond is what `denoise` gets.
        scale: 0 is no guidance; above 1 sharpens p(y | x).

    Raises:
        ValueError: scale is negative or not finite; when called, log_prob is not of shape [b], does
            not depend on x, or uses tensors that were made under torch.inference_mode.
    """

    denoise: Denoiser
    log_prob: LogProb
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(
                f"classifier guidance's scale must be at least 0 and finite; got {self.scale}; to "
                "steer away from a label, give the log-probability of its absence"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The guided clean sample [b, ...]."""
        clean = self.denoise(x, sigma, cond)
        return clean + self.scale * sigma.square() * self._gradient(x, sigma, cond)

    def _gradient(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """grad_x log p(y | x) [b, ...]."""
        # Under inference_mode, enable_grad alone records nothing, and tensors made there cannot
        # enter a graph; clones made outside of it can.
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            try:
                log_prob = self.log_prob(x, sigma.clone(), cond)
            except RuntimeError as error:
                if "Inference tensors cannot be saved for backward" not in str(error):
                    raise
                raise ValueError(
                    "log_prob uses a tensor that was made under torch.inference_mode, through "
                    "which no gradient flows; make it outside, or clone it inside log_prob"
                ) from error
            if log_prob.shape != (len(x),):
                raise ValueError(
                    f"log_prob must give one number a sample, shape ({len(x)},); got "
                    f"{tuple(log_prob.shape)}; sum over everything but the first dimension"
                )
            gradient = None
            if log_prob.requires_grad:
                (gradient,) = torch.autograd.grad(log_prob.sum(), x, allow_unused=True)
            if gradient is None:
                raise ValueError(
                    "log_prob must depend on x differentiably; got a constant; remove detach, "
                    "no_grad and argmax between x and the log-probability"
                )
            return gradient


def _both_halves(denoise: Denoiser, x: Tensor, sigma: Tensor, cond: Pair) -> tuple[Tensor, Tensor]:
    """(unconditional, conditional) clean predictions of x [b, ...], in one batch of 2 b rows."""
    uncond, conditional = denoise(torch.cat([x, x]), sigma, cond.both).chunk(2)
    return uncond, conditional


def _check_scale(scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ValueError(
            f"guidance scale must be at least 0 and finite; got {scale}; 1 is the plain "
            "conditional model; to steer away from a text, give it as the negative prompt"
        )


def _rows(x: Tensor) -> Tensor:
    """[b, ...] -> [b, n]."""
    return x.reshape(len(x), -1)
