"""What the ranks of test_checkpoint_ranks.py run: one act on a sharded model, results as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.configtraining import ParallelConfig
from latentdiff.parallel import World, is_sharded, join, leave, whole, wrap
from latentdiff.training import checkpoint as module
from latentdiff.training import shared
from latentdiff.training.checkpoint import Checkpoints, group_hash
from latentdiff.training.commit import Keep
from latentdiff.training.shards import tensors_hash


def network(seed: int) -> nn.Sequential:
    """Sides that no number of ranks divides, and fewer rows than ranks."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Conv2d(2, 3, 3))


def groups(net: nn.Module, world: World) -> dict[str, dict[str, Tensor]]:
    weights = {name: weight.detach() for name, weight in net.named_parameters()}
    return {
        "model": weights,
        "ema": {name: weight.float() * 0.5 for name, weight in weights.items()},
        "health": {"mean": torch.tensor(1.25), "counts": torch.arange(7)},  # not sharded
    }


def sharded(seed: int, mode: dict[str, Any], world: World) -> nn.Module:
    net = network(seed)
    wrap(net, [net[0]], ParallelConfig.model_validate(mode), "fp32", world)
    return net


def hashes(held: dict[str, dict[str, Tensor]]) -> dict[str, str]:
    return {
        group: tensors_hash({name: whole(tensor) for name, tensor in tensors.items()})
        for group, tensors in held.items()
    }


def save(root: Path, mode: dict[str, Any], world: World) -> dict[str, Any]:
    """Save in the background; the weights change as soon as the call is back."""
    net = sharded(1, mode, world)
    checkpoints = Checkpoints(root, world, Keep(3), background=True)
    expected = {}
    for step in (1, 2):
        held = groups(net, world)
        expected = hashes(held)
        checkpoints.save(step, held, {"cursor": 10 * step})
        for tensors in held.values():
            for tensor in tensors.values():
                tensor.add_(1)
    checkpoints.close()
    return {"hashes": expected, "sharded": sum(is_sharded(w) for w in net.parameters())}


def load(root: Path, mode: dict[str, Any], world: World) -> dict[str, Any]:
    """Restore into a model of other weights, sharded as this number of ranks does it."""
    found = Checkpoints(root, world, Keep(3)).find("auto")
    assert found is not None
    net = sharded(2, mode, world)
    held = groups(net, world)
    for group, tensors in held.items():
        found.restore(group, tensors)
    wrong = {**held["model"], "0.weight": torch.zeros(5, 4)}
    return {
        "step": found.step,
        "state": dict(found.state),
        "hashes": hashes(held),
        "files": {group: group_hash(found, group) for group in held},
        "refused": told(lambda: found.restore("model", wrong)),
    }


def fail(root: Path, mode: dict[str, Any], world: World) -> dict[str, Any]:
    """The last rank has no space: nobody's checkpoint is made, all know why."""
    checkpoints = Checkpoints(root, world, Keep(1), background=True)
    held = groups(sharded(1, mode, world), world)
    whole_write = module._write_parts

    def no_space(*arguments: Any) -> bool:
        done = whole_write(*arguments)
        if world.rank == world.num_ranks - 1:
            raise OSError(28, "No space left on device")
        return done

    module._write_parts = no_space
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints.save(7, held, {})
        checkpoints.wait()
    texts = [str(w.message) for w in caught if "step-7" in str(w.message)]
    raised = told(lambda: checkpoints.save(8, held, {}, is_last=True))
    module._write_parts = whole_write
    return {"warned": texts, "raised": raised, "left": left(root, world)}


def blind(root: Path, mode: dict[str, Any], world: World) -> dict[str, Any]:
    """Each rank has a directory of its own."""
    shared._TO_BE_SEEN_S = 0.2
    own = root / f"node-{world.rank}"
    return {"raised": told(lambda: Checkpoints(own, world, Keep(1)).save(1, {}, {}))}


def find(root: Path, mode: dict[str, Any], world: World) -> dict[str, Any]:
    """What is found, and what is said of what is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Checkpoints(root, world, Keep(3)).find("auto")
    texts = [str(w.message) for w in caught if "instead" in str(w.message)]
    named = told(lambda: Checkpoints(root, world, Keep(3)).find(str(root / "step-2")))
    return {"step": None if found is None else found.step, "warned": texts, "named": named}


def told(act: Any) -> str:
    try:
        act()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def left(root: Path, world: World) -> list[str]:
    world.barrier()
    return sorted(path.name for path in root.iterdir())


if __name__ == "__main__":
    acts, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    WORLD = join("cpu", ParallelConfig.model_validate(acts[0][2]))
    results = [globals()[act](Path(root), mode, WORLD) for act, root, mode in acts]
    (out / f"rank-{WORLD.rank}.json").write_text(json.dumps(results))
    leave()
