"""What is the average of the weights? Exponential moving averages in float32, of any length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.configtraining import EmaConfig
from latentdiff.parallel import local


def power_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function average of a length (EDM2, Karras et al. 2024, algorithm 2).

    The weights of time tau have the share ~ tau^gamma in the average at t, whose standard deviation
    is sigma_rel * t = (gamma + 1)^(1/2) (gamma + 2)^-1 (gamma + 3)^(-1/2) * t (equation 126).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def decay_at(step: int, config: EmaConfig, gamma: float | None = None) -> float:
    """What the update after optimiser step `step` (from 1) keeps of the average.

    It is the product of the decays of the `config.every` steps since the update before, so that
    weights that rest between updates have the same average on any stride.

    - constant: min(decay, (1 + n) / (10 + n)) for the n-th step after `start_step`;
    - power: (1 - 1 / t)^(gamma + 1) for step t of the run (EDM2, section 3.1, equation 4).

    Args:
        step: with an update: a multiple of `every` after `start_step`.
        config: kind, decay, start and stride.
        gamma: exponent of kind power.
    """
    if gamma is not None:
        return (1 - config.every / step) ** (gamma + 1)  # the product, in closed form
    last = step - config.start_step
    steps = range(last - config.every + 1, last + 1)
    return math.prod(min(config.decay, (1 + n) / (10 + n)) for n in steps)


class Ema:
    """Averages of a run's weights: `average <- d * average + (1 - d) * weights`.

    d depends on the step and the config alone: an average goes on from its tensors and the step.

    Args:
        parameters: name -> parameter, sharded or not; in any precision.
        config: kind, lengths, start and stride.

    Attributes:
        names: of the averages: "constant", or the lengths `sigma_rel` ("0.1"); the first one is for
            pictures, validation and export.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> None:
        self._config = config
        self._parameters = dict(parameters)
        self._gammas: dict[str, float | None] = {"constant": None}
        if config.kind == "power":
            self._gammas = {str(length): power_gamma(length) for length in config.sigma_rel}
        self.names = tuple(self._gammas)
        self._averages = {
            length: {
                name: parameter.detach().to(torch.float32, copy=True)
                for name, parameter in parameters.items()
            }
            for length in self.names
        }
        self._is_behind = False  # before start_step the weights are copied only when looked at

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Length -> parameter name -> float32 average, sharded as the parameter is."""
        if self._is_behind:
            self._catch_up()
        return self._averages

    def tensors(self) -> dict[str, Tensor]:
        """`length/parameter` -> average: the averages themselves, to save or to load in place."""
        return {
            f"{length}/{name}": average
            for length, averages in self.averages.items()
            for name, average in averages.items()
        }

    @torch.no_grad()
    def update(self, step: int, skip: Tensor | None = None) -> None:
        """Take in the weights after an optimiser step.

        Args:
            step: optimiser steps done, this one and skipped ones included.
            skip: [] float32 on the weights' device: 1 if the step was skipped, which leaves the
                averages as they are, bit for bit; 0 if not. The device is not waited for.
        """
        since_start = step - self._config.start_step
        if since_start <= 0:
            self._is_behind = True
            if since_start == 0:
                self._catch_up()
            return
        if since_start % self._config.every:
            return
        weights = [local(p.detach()).float() for p in self._parameters.values()]
        skip = None if skip is None else skip.to(weights[0].device)
        for length, gamma in self._gammas.items():
            kept = decay_at(step, self._config, gamma)
            _mix([local(a) for a in self._averages[length].values()], weights, 1 - kept, skip)

    @contextmanager
    @torch.no_grad()
    def applied(self, name: str | None = None) -> Iterator[None]:
        """The parameters hold an average inside the block, their own values again after it.

        Values change in place. Where FSDP has gathered weights, it must gather them anew, both
        inside the block and after it: `parallel.reshard`.

        Args:
            name: one of `names`; None for the first.
        """
        own = {name: local(p).clone() for name, p in self._parameters.items()}
        self._set(self.averages[self.names[0] if name is None else name])
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            local(parameter).copy_(local(values[name]))

    @torch.no_grad()
    def _catch_up(self) -> None:
        for averages in self._averages.values():
            for name, average in averages.items():
                local(average).copy_(local(self._parameters[name]))
        self._is_behind = False


def _mix(averages: list[Tensor], weights: list[Tensor], share: float, skip: Tensor | None) -> None:
    """`average += share * (weight - average)`, in one pass over memory, unless `skip` is 1.

    This is a step of gradient descent from the average, of rate `share`, whose gradient is its
    distance from the weight: - weight (`maximize`) + 1 * average (`weight_decay`). The fused kernel
    of SGD looks on the device itself whether to do nothing; lerp with a share of 0 would wait for
    nobody either, but turn -0.0 into 0.0.
    """
    torch._fused_sgd_(
        averages,
        weights,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=share,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip,
    )
