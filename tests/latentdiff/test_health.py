from __future__ import annotations

import math

import pytest
import torch

from latentdiff.configtraining import HealthConfig
from latentdiff.training.health import Diverged, Health

CPU = torch.device("cpu")
NAN, INF = math.nan, math.inf


def verdicts(health: Health, *norms: float) -> list[float]:
    return [health.judge(torch.tensor(norm)).item() for norm in norms]


def test_what_is_not_finite_is_skipped_from_the_first_step_on() -> None:
    health = Health(HealthConfig(), CPU)
    assert verdicts(health, NAN, 1.0, INF, 1.0, -INF, 2.0) == [1, 0, 1, 0, 1, 0]
    assert health.scalars() == {"skipped": 3.0}


def test_a_spike_is_told_by_the_mean_of_the_taken_steps() -> None:
    health = Health(HealthConfig(spike_factor=10, spike_warmup=4), CPU)
    assert verdicts(health, 1.0, 50.0, 1.0) == [0, 0, 0]  # not looked for yet
    assert verdicts(health, 1.0) == [0]
    mean = 50**0.25  # geometric
    assert verdicts(health, mean * 10.1, mean * 9.9) == [1, 0]


def test_skipped_norms_move_no_mean() -> None:
    seen, other = (Health(HealthConfig(spike_warmup=2, max_skips=50), CPU) for _ in range(2))
    verdicts(seen, 1.0, 2.0, 1e6, NAN, INF, 3.0)
    verdicts(other, 1.0, 2.0, 3.0)
    assert torch.equal(seen.tensors()["log_mean"], other.tensors()["log_mean"])
    assert seen.tensors()["log_mean"].exp().item() == pytest.approx(6 ** (1 / 3))


def test_the_mean_follows_a_drift_and_forgets() -> None:
    health = Health(HealthConfig(spike_factor=2, spike_warmup=1), CPU)
    norms = [1.005**i for i in range(2000)]  # 21,000-fold in all
    assert sum(verdicts(health, *norms)) == 0
    assert verdicts(health, norms[-1] * 3) == [1]


def test_no_gradient_is_no_fault_and_no_measure() -> None:
    health = Health(HealthConfig(spike_warmup=1), CPU)
    assert verdicts(health, 0.0, 0.0, 1.0, 0.0, 1.5) == [0] * 5
    assert health.tensors()["num_norms"].item() == 2


def test_spikes_can_be_let_through() -> None:
    health = Health(HealthConfig(spike_factor=None, spike_warmup=1), CPU)
    assert verdicts(health, 1.0, 1e30, NAN) == [0, 0, 1]


def test_after_the_limit_nothing_is_taken_any_more() -> None:
    health = Health(HealthConfig(max_skips=3), CPU)
    assert verdicts(health, 1.0, NAN, INF, 1.0, NAN, INF) == [0, 1, 1, 0, 1, 1]
    health.check(6)  # two in a row
    assert verdicts(health, NAN, 1.0, 1.0, 1.0) == [1] * 4
    with pytest.raises(Diverged) as caught:
        health.check(10)
    assert (caught.value.step, caught.value.in_a_row) == (10, 6)
    assert [norm for norm in caught.value.norms if math.isfinite(norm)] == [1.0, 1.0]
    assert str(caught.value) == (
        "step 10: no step was taken from step 5 on, for health.max_skips=3 in a row had gradients "
        "that were not finite; norms up to then: 1, nan, inf, 1, nan, inf, nan. The weights are "
        "those of step 4. Look for bad samples in the ledger; try a lower optimizer.lr, a longer "
        "optimizer.warmup_steps or loop.precision=fp32, and a higher health.spike_factor if the "
        "norms look sound; then go on from the last checkpoint"
    )


def test_the_error_tells_of_spikes_with_their_mean() -> None:
    health = Health(HealthConfig(max_skips=1, spike_warmup=2, spike_factor=4), CPU)
    verdicts(health, 2.0, 2.0, 9.0)
    with pytest.raises(Diverged, match=r"or a norm above 4 times the mean of 2; norms.* 2, 2, 9\."):
        health.check(3)


def test_the_state_carries_on_in_place() -> None:
    norms = [1.0, 1.2, NAN, 0.9, 30.0, 1.1, NAN, NAN, NAN, 1.0]
    config = HealthConfig(spike_warmup=2, max_skips=3)
    whole = Health(config, CPU)
    expected = verdicts(whole, *norms)
    assert expected == [0, 0, 1, 0, 1, 0, 1, 1, 1, 1]
    for cut in range(len(norms)):
        first, second = Health(config, CPU), Health(config, CPU)
        begun = verdicts(first, *norms[:cut])
        for name, tensor in second.tensors().items():
            tensor.copy_(first.tensors()[name])
        assert begun + verdicts(second, *norms[cut:]) == expected
        for name, tensor in second.tensors().items():
            assert torch.equal(tensor.nan_to_num(7), whole.tensors()[name].nan_to_num(7)), name


def test_it_never_waits_for_the_device() -> None:
    health = Health(HealthConfig(), torch.device("meta"))  # where reading a number is an error
    verdict = health.judge(torch.ones((), device="meta"))
    assert (verdict.shape, verdict.dtype) == ((), torch.float32)
    with pytest.raises(RuntimeError):
        health.check(1)


@pytest.mark.gpu
def test_it_never_waits_for_a_gpu() -> None:
    cuda = torch.device("cuda")
    health = Health(HealthConfig(spike_warmup=2), cuda)
    norms = torch.tensor([1.0, 1.0, NAN, 100.0, 2.0], device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    found = [health.judge(norm) for norm in norms.unbind()]
    torch.cuda.set_sync_debug_mode("default")
    assert [verdict.item() for verdict in found] == [0, 0, 1, 1, 0]
