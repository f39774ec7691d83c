"""What is the average of the weights? Exponential moving average in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average: `average <- d * average + (1 - d) * weights`.

    The decay warms up: d = min(decay, (1 + n) / (10 + n)) at update n, so that early averages
    forget the initial weights.

    Attributes:
        averages: parameter name -> float32 average.
        num_updates: n.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._parameters = dict(parameters)
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().float().clone() for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = list(self.averages.values())
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """The modules hold the averages inside the block, their own weights again after it."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    def load(self, averages: Mapping[str, Tensor], num_updates: int) -> None:
        """Take over saved averages.

        Raises:
            ValueError: they are not those of these parameters.
        """
        if wrong := sorted(self.averages.keys() ^ averages.keys()):
            raise ValueError(
                f"the saved averages do not fit: {len(wrong)} names differ, such as {wrong[0]}; "
                "resume with the config that they were saved with, or --resume none"
            )
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(averages[name])
        self.num_updates = num_updates

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
