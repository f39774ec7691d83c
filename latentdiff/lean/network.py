"""How does a sampler call the lean U-Net? As any network, with text and times prepared once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.backends import Run
from latentdiff.denoiser import Network
from latentdiff.lean.reuse import Reuse
from latentdiff.lean.unet import LeanUNet
from latentdiff.text import Conditioning


class LeanNetwork:
    """(noisy, t, cond) -> prediction, as `denoiser.Network` has it.

    Args:
        unet: whose times and texts are prepared.
        run: what is called in each step: the U-Net itself, or what executes it.
    """

    def __init__(self, unet: LeanUNet, run: Run) -> None:
        self.unet = unet
        self._run = run
        self._times: dict[float, Tensor] = {}

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Hidden states -> keys and values of every cross-attention, once for all steps."""
        return Conditioning(self.unet.texts(cond.tokens), cond.is_pair)

    def __call__(self, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The prediction for noisy [b, c, h, w] at one time, a scalar on the CPU."""
        return self._run(shared(noisy, cond), self.time(t.item()), cond.tokens)

    def time(self, t: float) -> Tensor:
        """The time biases [1, m], computed once a timestep, whatever the batch."""
        if t not in self._times:
            device = self.unet.time_conv.device
            # not torch.tensor(t, device=...), which would wait for a GPU
            self._times[t] = self.unet.times(torch.full((1,), t, device=device))
        return self._times[t]

    def with_reuse(self, reuse: Reuse) -> Network:
        """A network for one drawing, which takes deep features of earlier steps."""
        return _Reusing(self, reuse)


@dataclass
class _Reusing:
    """The evaluations of one drawing."""

    lean: LeanNetwork
    reuse: Reuse
    step: int = 0
    deep: Tensor | None = None

    def __call__(self, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        output, self.deep = self.reuse.predict(
            self.lean.unet,
            shared(noisy, cond),
            self.lean.time(t.item()),
            cond.tokens,
            self.step,
            self.deep,
        )
        self.step += 1
        return output


def shared(noisy: Tensor, cond: Conditioning) -> Tensor:
    """What both halves of guidance look at [b, ...], once; without halves, all of it."""
    return noisy[: len(noisy) // 2] if cond.is_pair else noisy
