"""What would another EMA length have given? Post-hoc averages from snapshots (EDM2, section 3.2).

Power-function averages of two lengths, kept now and then during a run, span averages of almost any
length at any step: a least-squares fit of their profiles over time gives the shares (Karras et al.
2024, algorithm 3). Other than there the shares add up to 1 exactly: EDM2's weights are normalised
afterwards, but of other networks a sum of 0.97 would shrink all weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from latentdiff.ema import power_gamma

_RCOND = 1e-13  # directions that float64 cannot tell from zero are left out of the fit


def posthoc_shares(
    snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Shares of snapshots whose sum is nearest to the average of another length.

    Args:
        snapshots: (step, sigma_rel) of each; a run's averages of kind power from `start_step` 0.
        step: that the average belongs to; at most the last snapshot's.
        sigma_rel: its length.

    Returns:
        Shares [n], float64, some of them negative, and the fit's error: the L2 distance of the two
        profiles over time, relative to the wanted one's norm. Above some 0.1 it is another average.

    Raises:
        ValueError: no snapshots, two alike, a length outside (0, 0.25), or a step that they do not
            reach.
    """
    _check(snapshots, step, sigma_rel)
    steps = np.array([at for at, _ in snapshots], float)
    gammas = np.array([power_gamma(length) for _, length in snapshots])
    gamma = power_gamma(sigma_rel)
    gram = _product(steps[:, None], gammas[:, None], steps, gammas)
    wanted = _product(steps, gammas, float(step), gamma)
    # In profiles of norm 1, so that early snapshots count as much as late ones.
    norm, wanted_norm = np.sqrt(gram.diagonal()), np.sqrt(_product(step, gamma, step, gamma))
    gram, wanted = gram / norm[:, None] / norm, wanted / norm / wanted_norm
    to_share = wanted_norm / norm
    # Nearest among those with sum 1 (Lagrange): [gram c; c^T 0] [fit; multiplier] = [wanted; 1]
    system = np.block([[gram, to_share[:, None]], [to_share[None], np.zeros((1, 1))]])
    fit = np.linalg.lstsq(system, np.append(wanted, 1.0), rcond=_RCOND)[0][:-1]
    error = np.sqrt(max(0.0, 1 - 2 * fit @ wanted + fit @ gram @ fit))
    return fit * to_share, float(error)


@torch.no_grad()
def combine(
    averages: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | np.ndarray
) -> Iterator[tuple[str, Tensor]]:
    """The sum of shares of averages, tensor by tensor: only one name's are in memory at a time.

    Args:
        averages: of each snapshot: parameter name -> tensor. A mapping that reads a tensor from its
            file when it is asked for it will do.
        shares: of `posthoc_shares`.

    Yields:
        (name, float32 tensor), summed in float64.

    Raises:
        ValueError: the snapshots' names or shapes differ.
    """
    assert len(averages) == len(shares) > 0
    first = averages[0]
    for index, other in enumerate(averages):
        if wrong := sorted({*first} ^ {*other}):  # not .keys(), whose ^ may read the tensors
            raise ValueError(
                f"snapshots 0 and {index} are of different models: {len(wrong)} names differ, such "
                f"as {wrong[0]}; give snapshots of one run"
            )
    for name in first:
        total = torch.zeros(())
        for index, (average, share) in enumerate(zip(averages, shares, strict=True)):
            tensor = average[name].double()
            if index and tensor.shape != total.shape:
                raise ValueError(
                    f"{name} is {tuple(total.shape)} in snapshot 0, but {tuple(tensor.shape)} in "
                    f"snapshot {index}; give snapshots of one run"
                )
            total = total + float(share) * tensor
        yield name, total.float()


def _product(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Inner products of profiles p_i(tau) = (gamma_i + 1) tau^gamma_i / t_i^(gamma_i + 1).

    EDM2, algorithm 3, PDOTP; arguments are numbers or arrays that broadcast.
    """
    ratio = t_a / t_b
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    numerator = (gamma_a + 1) * (gamma_b + 1) * ratio**exponent
    return numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def _check(snapshots: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> None:
    if not snapshots:
        raise ValueError("there are no snapshots to combine; keep averages of kind power")
    if len({*snapshots}) < len(snapshots):
        raise ValueError(f"snapshots must differ in step or length; got {sorted(snapshots)}")
    for length in (sigma_rel, *(length for _, length in snapshots)):
        if not 0 < length < 0.25:
            raise ValueError(f"sigma_rel must be in (0, 0.25); got {length}")
    last = max(at for at, _ in snapshots)
    if not 0 < step <= last:
        raise ValueError(
            f"step must be in 1 to {last}, which is the last snapshot's; got {step}; choose one"
        )
