"""How do the tests of exports make quick runs, and compare weights?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.config import DiffusionRun
from latentdiff.pipeline import Pipeline
from latentdiff.training.checkpoint import Checkpoint, read_checkpoint


def loop(num_steps: int, **changes: Any) -> dict[str, Any]:
    quick = {"num_steps": num_steps, "batch_size": 4, "log_every": num_steps, "sample_every": None}
    return {**quick, "checkpoint_every": num_steps, "async_save": False, **changes}


def pixel_run(assets: Path, out: Path, num_steps: int, **changes: Any) -> DiffusionRun:
    """A run without text or autoencoder, of few small tensors."""
    unet = {"channels": [8], "cross_attention": [False], "layers_per_block": 1, "head_dim": 8}
    values = {
        "out": str(out),
        "data": {"shards": [str(assets / "train-*.tar")], "size_px": 16},
        "unet": {**unet, "norm_num_groups": 4},
        "samples": {"num_steps": 2},
        "logging": {"to": []},
        "loop": loop(num_steps),
    }
    return DiffusionRun.model_validate({**values, **changes})


def weights(model: Path) -> dict[str, Tensor]:
    """What is trained in a model's directory, by the names in a checkpoint."""
    found = Pipeline.load(model)
    modules = {"unet": found.unet} | ({} if found.text is None else {"text": found.text})
    return {f"{m}.{n}": p.detach() for m in modules for n, p in modules[m].named_parameters()}


def average(saved: Checkpoint, length: float) -> dict[str, Tensor]:
    start = f"{length}/"
    tensors = saved.group("ema").items()
    return {n.removeprefix(start): t for n, t in tensors if n.startswith(start)}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return sum((one[n] - other[n]).square().sum().item() for n in one) ** 0.5


def step_of(run: DiffusionRun, step: int) -> Checkpoint:
    return read_checkpoint(Path(run.out) / "checkpoints" / f"step-{step}")
