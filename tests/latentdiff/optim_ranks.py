"""What the ranks of test_optim.py run: sharded weights step and are averaged; results as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.configtraining import EmaConfig, OptimizerConfig, ParallelConfig
from latentdiff.ema import Ema
from latentdiff.parallel import (
    gradient_norm,
    is_sharded,
    join,
    leave,
    load_shards,
    local,
    save_shards,
    whole,
    wrap,
)
from latentdiff.training.optim import build_optimizer, optimizer_tensors, step_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # a kernel, matrices and vectors, some in fewer rows than there are ranks
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(80, 7),
        nn.SiLU(), nn.Linear(7, 1),
    )  # fmt: skip


class Run:
    """A network, its optimiser and its averages; all ranks', or of one process."""

    def __init__(self, kind: str, mode: str) -> None:
        settings = {"kind": kind, "weight_decay": 0.1, "max_grad_norm": 0.5}
        self.config = OptimizerConfig.model_validate(settings)
        module = network()
        self.rank, self.num_ranks = (WORLD.rank, WORLD.num_ranks) if mode == "fsdp" else (0, 1)
        self.network: nn.Module = module
        if mode == "fsdp":
            parallel = ParallelConfig.model_validate({"mode": mode})
            self.network = wrap(module, [module[0]], parallel, "fp32", WORLD)
        self.weights = dict(module.named_parameters())
        self.optimizer = build_optimizer(self.weights, self.config)
        self.ema = Ema(self.weights, EmaConfig(kind="power", sigma_rel=(0.2, 0.1)))

    def step(self, step: int, skipped: bool = False) -> None:
        batch = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        own = batch.chunk(self.num_ranks)[self.rank]
        (self.network(own).square().sum() / 8).backward()
        norm = gradient_norm(self.weights.values())
        skip = torch.tensor(float(skipped))
        weights = self.weights.values()
        step_optimizer(self.optimizer, weights, norm, skip, 0.01, self.config)
        self.ema.update(step, skip)

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model/{name}": p.detach() for name, p in self.weights.items()},
            **{f"opt/{n}": t for n, t in optimizer_tensors(self.optimizer, self.weights).items()},
            **{f"ema/{name}": average for name, average in self.ema.tensors().items()},
        }


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(tensor).detach().clone() for name, tensor in tensors.items()}


def num_different(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> int:
    """Tensors of which this rank's bits differ."""
    assert ours.keys() == theirs.keys()
    pairs = [(local(ours[name]), local(theirs[name])) for name in ours]
    return sum(not torch.equal(a, b) or not torch.equal(a.signbit(), b.signbit()) for a, b in pairs)


def farthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest difference of a sharded tensor from the one of one process, relative to it."""
    pairs = [(whole(ours[name]), theirs[name]) for name in ours]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def main(root: Path) -> dict[str, Any]:
    sharded, alone = Run("adamw", "fsdp"), Run("adamw", "none")
    for step in range(1, 6):
        sharded.step(step)
        alone.step(step)
    result: dict[str, Any] = {
        "sharded": any(is_sharded(p) for p in sharded.weights.values()),
        "weights": farthest(sharded.weights, alone.weights),
        "averages": farthest(sharded.ema.tensors(), alone.ema.tensors()),
    }
    before = copies(sharded.tensors())
    sharded.step(6, skipped=True)
    result["skipped"] = num_different(sharded.tensors(), before)

    with sharded.ema.applied("0.1"):
        assert num_different(sharded.weights, sharded.ema.averages["0.1"]) == 0
    result["given_back"] = num_different(sharded.tensors(), before)

    save_shards(root / "saved", sharded.tensors(), WORLD)
    again = Run("adamw", "fsdp")
    load_shards(root / "saved", again.tensors(), WORLD)
    for run in (sharded, again):
        run.step(7)
    result["saved"] = num_different(sharded.tensors(), again.tensors())

    result["refused"] = []  # what check_sharded says is still so
    for kind in ("adafactor", "muon"):
        try:
            Run(kind, "fsdp").step(1)
        except RuntimeError:
            result["refused"].append(kind)
    return result


if __name__ == "__main__":
    WORLD = join("cpu", ParallelConfig(mode="fsdp"))
    found = main(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank-{WORLD.rank}.json").write_text(json.dumps(found))
    leave()
