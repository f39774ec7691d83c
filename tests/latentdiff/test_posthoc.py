"""Is the average of another length that snapshots give the one that the run would have kept?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentdiff.configtraining import EmaConfig
from latentdiff.ema import Ema, power_gamma
from latentdiff.posthoc import combine, posthoc_shares

LENGTHS, NUM_STEPS, EVERY = (0.1, 0.05), 2000, 100


def exact(history: np.ndarray, step: int, sigma_rel: float) -> np.ndarray:
    """The power-function average at `step` of weights [steps, n] after steps 1, 2, ...; float64."""
    shares = np.diff((np.arange(step + 1) / step) ** (power_gamma(sigma_rel) + 1))
    return shares @ history[:step]


@pytest.fixture(scope="module")
def walked() -> tuple[np.ndarray, list[tuple[int, float]], list[dict[str, Tensor]]]:
    """A random walk [steps, n] far from zero, and the snapshots that its run kept."""
    weight = nn.Parameter(torch.full((64,), 10.0))
    ema = Ema({"w": weight}, EmaConfig(kind="power", sigma_rel=LENGTHS))
    generator = torch.Generator().manual_seed(0)
    history, kept, averages = [], [], []
    for step in range(1, NUM_STEPS + 1):
        with torch.no_grad():
            weight += 0.1 * torch.randn(64, generator=generator)
        ema.update(step)
        history.append(weight.detach().double().numpy().copy())
        if step % EVERY == 0:
            for length in LENGTHS:
                kept.append((step, length))
                averages.append({"w": ema.averages[str(length)]["w"].clone()})
    return np.stack(history), kept, averages


@pytest.mark.parametrize(
    ("step", "sigma_rel"),
    [(2000, 0.07), (2000, 0.15), (2000, 0.2), (2000, 0.03), (1200, 0.06), (1950, 0.12)],
)
def test_another_length_is_found(walked, step: int, sigma_rel: float) -> None:
    history, kept, averages = walked
    shares, error = posthoc_shares(kept, step, sigma_rel)
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    ((name, found),) = combine(averages, shares)
    assert name == "w" and found.dtype == torch.float32
    expected = exact(history, step, sigma_rel)
    miss = np.abs(found.double().numpy() - expected).mean()
    nearest = min(np.abs(a["w"].double().numpy() - expected).mean() for a in averages)
    assert miss < 0.25 * nearest  # of the kept ones
    assert error < (0.02 if step == 2000 and sigma_rel > 0.05 else 0.25)
    if error < 0.02:
        assert miss < 0.02 * np.abs(history[step - 1] - expected).mean()


def test_a_kept_average_is_itself(walked) -> None:
    _, kept, averages = walked
    for index in (0, 13, 38, 39):
        shares, error = posthoc_shares(kept, *kept[index])
        assert shares == pytest.approx(np.eye(len(kept))[index], abs=1e-6)
        assert error < 1e-6
        ((_, found),) = combine(averages, shares)
        torch.testing.assert_close(found, averages[index]["w"])


def test_the_error_is_the_distance_of_the_profiles() -> None:
    kept, step, sigma_rel = [(400, 0.1), (700, 0.1), (1000, 0.05), (1000, 0.1)], 1000, 0.07
    shares, error = posthoc_shares(kept, step, sigma_rel)
    times = (np.arange(200_000) + 0.5) / 200_000 * 1000

    def profile(t: int, length: float) -> np.ndarray:
        gamma = power_gamma(length)
        return np.where(times < t, (gamma + 1) / t * (times / t) ** gamma, 0.0)

    wanted = profile(step, sigma_rel)
    fitted = shares @ np.stack([profile(*one) for one in kept])
    distance = np.linalg.norm(fitted - wanted)
    assert error == pytest.approx(distance / np.linalg.norm(wanted), rel=1e-3)
    shifted = (np.array([1, -1, 1, -1]) * 1e-2 + shares) @ np.stack([profile(*s) for s in kept])
    assert np.linalg.norm(shifted - wanted) > distance


def test_tensors_are_read_one_name_at_a_time() -> None:
    class Reading(Mapping[str, Tensor]):
        def __init__(self, value: float) -> None:
            self.value, self.read = value, []

        def __getitem__(self, name: str) -> Tensor:
            self.read.append(name)
            return torch.full((2,), self.value, dtype=torch.bfloat16)

        def __iter__(self) -> Iterator[str]:
            return iter(("a", "b"))

        def __len__(self) -> int:
            return 2

    files = [Reading(1.0), Reading(3.0)]
    combined = combine(files, [-0.5, 1.5])
    name, tensor = next(combined)
    assert (name, tensor.tolist()) == ("a", [4.0, 4.0])
    assert [file.read for file in files] == [["a"], ["a"]]
    assert dict(combined)["b"].tolist() == [4.0, 4.0]


# Errors


@pytest.mark.parametrize(
    ("kept", "step", "sigma_rel", "message"),
    [
        ([], 10, 0.1, "there are no snapshots to combine; keep averages of kind power"),
        ([(10, 0.1), (10, 0.1)], 10, 0.1, r"must differ in step or length; got \[\(10, 0.1\), "),
        ([(10, 0.1)], 10, 0.3, r"sigma_rel must be in \(0, 0.25\); got 0.3"),
        ([(10, 0.0)], 10, 0.1, r"sigma_rel must be in \(0, 0.25\); got 0.0"),
        ([(10, 0.1)], 11, 0.1, "step must be in 1 to 10, which is the last snapshot's; got 11"),
        ([(10, 0.1)], 0, 0.1, "step must be in 1 to 10, which is the last snapshot's; got 0"),
    ],
)
def test_what_cannot_be_solved(kept, step: int, sigma_rel: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posthoc_shares(kept, step, sigma_rel)


def test_snapshots_of_different_models() -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match="0 and 1 are of different models: 1 names differ, such a"):
        dict(combine([one, {"a": torch.zeros(2)}], [0.5, 0.5]))
    with pytest.raises(ValueError, match=r"a is \(2,\) in snapshot 0, but \(3,\) in snapshot 1"):
        dict(combine([one, {**one, "a": torch.zeros(3)}], [0.5, 0.5]))
