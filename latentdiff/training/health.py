"""Is a step fit to be taken? The verdict on its gradients' norm, made on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentdiff.configtraining import HealthConfig

_WINDOW = 100  # taken steps over which the mean forgets
_NUM_RECENT = 8  # norms that an error can show


class Diverged(RuntimeError):
    """Too many steps in a row were skipped; the weights are those of the last good step.

    Attributes:
        step: optimiser steps done.
        in_a_row: skipped steps at the end of them.
        norms: gradient norms of the last steps up to the limit, oldest first.
    """

    def __init__(self, message: str, step: int, in_a_row: int, norms: list[float]) -> None:
        super().__init__(message)
        self.step, self.in_a_row, self.norms = step, in_a_row, norms


class Health:
    """Which steps are skipped, and when are they too many?

    A step is skipped if the norm of its gradients is not finite, or is a spike: above
    `spike_factor` times the running mean of the norms of taken steps. After `max_skips` in a row
    all later ones are skipped too: the host may look only at the next logging point, and finds the
    weights of the last good step there.

    The mean is geometric, exp of the mean logarithm: gradient norms spread over orders of
    magnitude, and one taken norm just below the limit of 20 times moves it by 3 %, but an
    arithmetic one over the same 100 steps by 20 %. Its first 100 norms weigh alike; then it forgets
    exponentially.

    The norm that comes in is the whole gradient's, already reduced over the ranks: all of them hold
    the same bits (a NaN or Inf of one rank is in the sum of all), start from the same state and
    apply the same operations, so they come to the same verdict with no word between them.

    Args:
        config: limits.
        device: where the verdict is made and the state lives.
    """

    def __init__(self, config: HealthConfig, device: torch.device) -> None:
        self._config = config
        count = {"dtype": torch.int64, "device": device}
        self._in_a_row = torch.zeros((), **count)
        self._skipped = torch.zeros((), **count)
        self._limit_reached = torch.zeros((), **count)  # 1 for good
        self._num_norms = torch.zeros((), **count)
        self._log_mean = torch.zeros((), device=device)
        self._recent = torch.full((_NUM_RECENT,), -1.0, device=device)  # -1: none yet

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """Whether to skip the step, without waiting for the device.

        Args:
            norm: 2-norm of all gradients before clipping, 0-dim, the same on all ranks.

        Returns:
            1.0 to skip, 0.0 to step; 0-dim float32, what a fused optimiser takes as `found_inf`.
        """
        norm = norm.detach().to(self._log_mean)
        stopped = self._limit_reached > 0
        is_finite = torch.isfinite(norm)
        has_log = is_finite & (norm > 0)  # no gradient at all is no reason to skip
        log_norm = torch.where(has_log, norm, 1.0).log()
        skip = stopped | ~is_finite
        if (factor := self._config.spike_factor) is not None:
            knows = self._num_norms >= self._config.spike_warmup
            skip = skip | (knows & has_log & (log_norm > self._log_mean + math.log(factor)))

        counted = has_log & ~skip
        rate = (1.0 / (self._num_norms + 1)).clamp(min=1 / _WINDOW)
        self._log_mean += torch.where(counted, (log_norm - self._log_mean) * rate, 0.0)
        self._num_norms += counted
        self._skipped += skip
        self._in_a_row.add_(1).mul_(skip)
        self._limit_reached |= (self._in_a_row >= self._config.max_skips).long()
        pushed = torch.cat([self._recent[1:], norm.reshape(1)])
        self._recent.copy_(torch.where(stopped, self._recent, pushed))
        return skip.float()

    def check(self, step: int) -> None:
        """Wait for the verdicts so far; for logging points and before checkpoints.

        Args:
            step: optimiser steps done, skipped ones among them.

        Raises:
            Diverged: max_skips steps in a row were skipped at some time.
        """
        if not self._limit_reached.item():
            return
        in_a_row, mean = int(self._in_a_row.item()), math.exp(self._log_mean.item())
        norms = [norm for norm in self._recent.tolist() if norm != -1]
        factor, spike = self._config.spike_factor, ""
        if factor is not None and self._num_norms.item() >= self._config.spike_warmup:
            spike = f" or a norm above {factor:g} times the mean of {mean:.4g}"
        shown = ", ".join(f"{norm:.4g}" for norm in norms)
        raise Diverged(
            f"step {step}: no step was taken from step {step - in_a_row + 1} on, for "
            f"health.max_skips={self._config.max_skips} in a row had gradients that were not "
            f"finite{spike}; norms up to then: {shown}. The weights are those of step "
            f"{step - in_a_row}. Look for bad samples in the ledger; try a lower optimizer.lr, a "
            "longer optimizer.warmup_steps or loop.precision=fp32, and a higher "
            "health.spike_factor if the norms look sound; then go on from the last checkpoint",
            step,
            in_a_row,
            norms,
        )

    def scalars(self) -> dict[str, float]:
        """Steps skipped so far, for the log; waits for the device."""
        return {"skipped": float(self._skipped.item())}

    def tensors(self) -> dict[str, Tensor]:
        """The state, the same on all ranks; loaded by writing into these tensors."""
        return {
            "in_a_row": self._in_a_row,
            "limit_reached": self._limit_reached,
            "log_mean": self._log_mean,
            "num_norms": self._num_norms,
            "recent": self._recent,
            "skipped": self._skipped,
        }
