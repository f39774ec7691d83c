"""A program for test_ranks.py: two real ranks judge faults, sum losses and weigh updates.

Usage: torchrun --nproc-per-node=2 ranks_driver.py MODE OUT. Each rank writes OUT/rank-<rank>.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.configtraining import HealthConfig, ParallelConfig
from latentdiff.parallel import World, gradient_norm, join, leave, local, wrap
from latentdiff.training.health import Diverged, Health
from latentdiff.training.meters import LossMeter, snapshot, update_ratio

FAULTS = {"nan": float("nan"), "inf": float("inf"), "spike": 100.0}
HEALTH = HealthConfig(spike_factor=10.0, spike_warmup=3, max_skips=3)


def new_network(parallel: ParallelConfig, world: World) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    return module, wrap(module, [module[0], module[2]], parallel, "fp32", world)


def fingerprint(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    tensors = [local(p.detach()) for p in module.parameters()]
    for state in optimizer.state.values():
        tensors += [local(value) for value in state.values()]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def train(
    parallel: ParallelConfig, world: World, num_steps: int, scale: dict[int, dict[int, float]]
) -> dict[str, Any]:
    """Steps whose loss is scaled on some ranks: step -> rank -> factor."""
    module, network = new_network(parallel, world)
    optimizer: Any = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    health = Health(HEALTH, world.device)
    verdicts: list[float] = []
    kept: list[bool] = []
    diverged: list[int] | None = None
    for step in range(1, num_steps + 1):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + world.rank))
        loss = network(x).square().mean() / world.num_ranks
        (loss * scale.get(step, {}).get(world.rank, 1.0)).backward()
        skip = health.judge(gradient_norm(module.parameters()))
        before = fingerprint(module, optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, skip
        optimizer.step()
        optimizer.zero_grad()
        verdicts.append(skip.item())
        kept.append(fingerprint(module, optimizer) == before)
        try:
            health.check(step)
        except Diverged as error:
            diverged = diverged or [error.step, error.in_a_row]
    state = {name: str(tensor.tolist()) for name, tensor in health.tensors().items()}
    return {"verdicts": verdicts, "kept": kept, "diverged": diverged, "state": state}


def measure(parallel: ParallelConfig, world: World) -> dict[str, Any]:
    """Losses of six samples and a known update, as any number of ranks sees them."""
    meter, losses = LossMeter(2, world.device), torch.arange(6.0)

    def add() -> None:
        part: Tensor = losses.chunk(world.num_ranks)[world.rank]
        meter.begin_step()
        meter.add(part, part / 6, part != 4)

    add()
    meter.fold(world)
    add()
    module, _ = new_network(parallel, world)
    before = snapshot(module.parameters())
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.mul_(1 + 0.01 * i)
    ratio = update_ratio(before, module.parameters(), world).item()
    return {"losses": meter.read(world), "ratio": ratio}


def main(mode: Any) -> dict[str, Any]:
    parallel = ParallelConfig(mode=mode, timeout_s=60)
    world = join("cpu", parallel)
    result: dict[str, Any] = {"rank": world.rank, "measured": measure(parallel, world)}
    for name, factor in FAULTS.items():
        for where in range(world.num_ranks):
            once = {5: {where: factor}}
            result[f"{name} on {where}"] = train(parallel, world, 7, once)
    # one rank after the other, to the limit: nothing is taken after it
    to_the_limit = {step: {step % 2: FAULTS["nan"]} for step in (4, 5, 6)}
    result["limit"] = train(parallel, world, 8, to_the_limit)
    leave()
    return result


if __name__ == "__main__":
    found = main(sys.argv[1])
    (Path(sys.argv[2]) / f"rank-{found['rank']}.json").write_text(json.dumps(found))
