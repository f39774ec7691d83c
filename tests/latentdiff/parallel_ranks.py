"""What the ranks of test_parallel.py run: each mode on the same network, results as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.configtraining import ParallelConfig
from latentdiff.parallel import (
    gradient_norm,
    is_sharded,
    join,
    leave,
    load_shards,
    local,
    mode_of,
    reducing,
    reshard,
    save_shards,
    whole,
    wrap,
)

BATCH, NUM_MICRO = 24, 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # widths that no number of ranks divides, and a kernel in channels-last
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 7, 3, padding=1), nn.Flatten()
    ).to(memory_format=torch.channels_last)


def batch() -> Tensor:
    return torch.randn(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def train(mode: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Two steps of SGD with accumulation; what the ranks agree on."""
    parallel = ParallelConfig.model_validate(mode)
    module = network()
    net = wrap(module, [module[0], module[2]], parallel, "fp32", WORLD)
    weights = dict(module.named_parameters())
    optimizer = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9)
    own = batch().chunk(WORLD.num_ranks)[WORLD.rank].chunk(NUM_MICRO)
    norms = []
    for _ in range(2):
        for i, micro in enumerate(own):
            with reducing(net, i == NUM_MICRO - 1):
                (net(micro).square().sum() / BATCH).backward()
        norms.append(gradient_norm(weights.values()).item())
        optimizer.step()
        optimizer.zero_grad()
    # weights changed in place behind fsdp's back, between two passes without gradients
    with torch.no_grad():
        before = WORLD.sum(net(own[0]).double().sum())
        for weight in weights.values():
            local(weight).mul_(0.5)
        reshard(net)
        after = WORLD.sum(net(own[0]).double().sum())
    save_shards(folder, {f"model/{n}": w.detach() for n, w in weights.items()}, WORLD)
    empty = {f"model/{n}": torch.zeros_like(w.detach()) for n, w in weights.items()}
    load_shards(folder, empty, WORLD)
    return {
        "mode": mode_of(parallel, WORLD),
        "norms": norms,
        "sharded": any(is_sharded(w) for w in weights.values()),
        "local": sum(local(w).numel() for w in weights.values()),
        "weights": {n: whole(w.detach()).flatten().tolist() for n, w in weights.items()},
        "loaded": all(
            torch.equal(whole(empty[f"model/{n}"]), whole(w)) for n, w in weights.items()
        ),
        "passes": [before.item(), after.item()],
    }


def talk() -> dict[str, Any]:
    """What World offers besides."""
    words = torch.tensor([WORLD.rank, -WORLD.rank])
    if (handle := WORLD.post(words)) is not None:
        handle.wait()
    return {
        "sum": WORLD.sum(torch.tensor([1.0, WORLD.rank])).tolist(),
        "gather": WORLD.gather({"rank": WORLD.rank}),
        "broadcast": WORLD.broadcast(f"from {WORLD.rank}"),
        "side": WORLD.side_group().gather(WORLD.rank),
        "post": words.tolist(),
        "has_store": WORLD.store is not None,
    }


if __name__ == "__main__":
    modes, root = json.loads(sys.argv[1]), Path(sys.argv[2])
    WORLD = join("cpu", ParallelConfig.model_validate(modes[0]))
    results = {"talk": talk(), "trained": [train(m, root / str(i)) for i, m in enumerate(modes)]}
    (root / f"rank-{WORLD.rank}.json").write_text(json.dumps(results))
    leave()
