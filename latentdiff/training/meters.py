"""How does training go? Losses summed on the device, clocks on the host; read at logging points."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.parallel import World, local

_GIB = 1 << 30


class LossMeter:
    """Mean losses since the last logging point, over all ranks, and by parts of the schedule.

    Sums are kept on the device in float64 (float32 where a device lacks that), without atomics, so
    the same run gives the same bits. A rank adds to sums of its own; `fold` before a checkpoint
    turns them into the whole world's, the same on all ranks, so a run that goes on from it, on
    whatever number of ranks, logs what the uninterrupted one does.

    Args:
        num_bins: parts of the schedule with a loss of their own; 0 for none.
        device: where losses come from.
    """

    def __init__(self, num_bins: int, device: torch.device) -> None:
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._num_bins = num_bins
        # sum of losses, samples, samples with a non-finite loss, sum a bin, samples a bin
        self._own = torch.zeros(3 + 2 * num_bins, dtype=self._dtype, device=device)
        self._folded = torch.zeros_like(self._own)
        self._last = torch.zeros(2, dtype=self._dtype, device=device)  # of the last step alone
        self._edges = torch.arange(num_bins, device=device)

    def begin_step(self) -> None:
        """An optimiser step begins: what is added from here on is the last step's."""
        self._last.zero_()

    @torch.no_grad()
    def add(self, losses: Tensor, t_fraction: Tensor, valid: Tensor) -> None:
        """Add a micro-batch, without waiting for the device.

        Args:
            losses: of each sample [b]; non-finite ones are counted, and in no mean.
            t_fraction: where in the schedule, in [0, 1] [b].
            valid: bool [b]; others are padding or samples that could not be read.
        """
        losses = losses.detach().to(self._dtype)
        counted = valid & torch.isfinite(losses)
        values = torch.where(counted, losses, 0.0)
        broken = (valid & ~counted).sum()
        whole = torch.stack([values.sum(), counted.sum().to(self._dtype)])
        self._last += whole
        parts = [whole, broken.to(self._dtype).reshape(1)]
        if self._num_bins:
            place = (t_fraction * self._num_bins).long().clamp(0, self._num_bins - 1)
            # a sum over [b, bins]: index_add_ on CUDA would add in any order
            inside = (place[:, None] == self._edges) & counted[:, None]
            parts += [torch.where(inside, values[:, None], 0.0).sum(0), inside.sum(0)]
        self._own += torch.cat([part.to(self._dtype) for part in parts])

    def read(self, world: World) -> dict[str, float]:
        """Scalars since the last reading, the same on all ranks; then begin anew.

        One reduction over the ranks and one wait for the device; all ranks must call it.

        Returns:
            `loss` (mean over the window), `loss_last` (over its last step), `samples`,
            `loss_t/LOW-HIGH` for each bin that had samples, and `nonfinite_losses` if there were
            any. A mean over no samples is NaN.
        """
        size = len(self._own)
        total = world.sum(torch.cat([self._own, self._last]))
        window, last = (total[:size] + self._folded), total[size:]
        host: list[float] = torch.cat([window, last]).tolist()
        self._own.zero_()
        self._folded.zero_()

        loss_sum, num, num_broken = host[:3]
        last_sum, last_num = host[size:]
        scalars = {
            "loss": _mean(loss_sum, num),
            "loss_last": _mean(last_sum, last_num),
            "samples": num + num_broken,
        }
        if num_broken:
            scalars["nonfinite_losses"] = num_broken
        bins = self._num_bins
        for i in range(bins):
            if count := host[3 + bins + i]:
                scalars[f"loss_t/{i / bins:.4g}-{(i + 1) / bins:.4g}"] = host[3 + i] / count
        return scalars

    def fold(self, world: World) -> None:
        """Before every checkpoint, resumed or not: make the sums all ranks' own; all must call."""
        self._folded += world.sum(self._own)
        self._own.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The state after `fold`, the same on all ranks; loaded by writing into these tensors."""
        return {"sums": self._folded}


class Pace:
    """How fast does the loop go, and what does it wait for?

    The clock is the host's, read where the host has just waited for the device.

    Args:
        world: the ranks.
        first_step: optimiser steps done when the clock starts.
        flops_per_sample: of training, see `latentdiff.flops.training_flops`; None: no MFU.
        peak_tflops: dense peak of one device; None: no MFU.
        clock: seconds.
    """

    def __init__(
        self,
        world: World,
        first_step: int,
        flops_per_sample: int | None = None,
        peak_tflops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world, self._clock = world, clock
        self._flops, self._peak = flops_per_sample, peak_tflops
        self._step, self._start = first_step, clock()
        self._waited_s = self._paused_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the feed."""
        start = self._clock()
        yield
        self._waited_s += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: validation, pictures, evaluation, checkpoints."""
        self._finish_device()
        start = self._clock()
        yield
        self._finish_device()
        self._paused_s += self._clock() - start

    def read(self, step: int, num_samples: float) -> dict[str, float]:
        """Scalars since the last reading, the same on all ranks; then begin anew.

        Goes through the host; all ranks must call it.

        Args:
            step: optimiser steps done.
            num_samples: samples since then, over all ranks.

        Returns:
            `img_per_s` of all ranks; `step_s`, and `data_wait`, the share of the loop's time that
            the slowest rank waited for data (on a GPU less may be lost: the device works on while
            the host waits); `memory_gib`, the largest peak of a rank since it started; `mfu`, the
            share of the devices' peak that the model's own operations come to (PaLM, Chowdhery et
            al. 2022, appendix B).
        """
        now = self._clock()
        own = (now - self._start - self._paused_s, self._waited_s, peak_memory(self._world.device))
        seconds, waited, memory = (
            max(values) for values in zip(*self._world.gather(own), strict=True)
        )
        seconds, num_steps = max(seconds, 1e-9), max(step - self._step, 1)
        self._step, self._start = step, now
        self._waited_s = self._paused_s = 0.0

        rate = num_samples / seconds
        scalars = {
            "img_per_s": rate,
            "step_s": seconds / num_steps,
            "data_wait": min(waited / seconds, 1.0),
            "memory_gib": memory / _GIB,
        }
        if self._flops is not None and self._peak is not None:
            scalars["mfu"] = rate * self._flops / (self._peak * 1e12 * self._world.num_ranks)
        return scalars

    def _finish_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process ever had: on the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


@torch.no_grad()
def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """A copy of this rank's parts of the weights, for `update_ratio`.

    Taken after the backward pass it raises no peak: the activations, which are more, are gone.
    """
    return [local(parameter.detach()).clone() for parameter in parameters]


@torch.no_grad()
def update_ratio(before: list[Tensor], parameters: Iterable[nn.Parameter], world: World) -> Tensor:
    """How far a step moved the weights: `|after - before| / |before|`, 2-norms over all of them.

    Around 1e-3 is usual; 0 for a skipped step. All ranks must call it.

    Args:
        before: `snapshot` of the same parameters; used up.
        parameters: after the step; all of them sharded over the ranks, or none.
        world: the ranks, whose parts are summed (whole copies count alike above and below).

    Returns:
        0-dim float32 on the device, the same on all ranks.
    """
    after = [local(parameter.detach()) for parameter in parameters]
    size = torch.stack(torch._foreach_norm(before)).float().square().sum()
    torch._foreach_sub_(before, after)
    change = torch.stack(torch._foreach_norm(before)).float().square().sum()
    change, size = world.sum(torch.stack([change, size]).to(world.device)).unbind()
    return (change / size.clamp(min=1e-30)).sqrt()


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
