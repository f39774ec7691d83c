"""How many bits per dimension does a model of pixels need for pictures that it has not seen?

    python benchmarks/likelihood.py --config ddpm_emoji --model runs/ddpm_emoji/model \
        --shards "data/emoji/val-*.tar"

The variational bound of DDPM (eq. 5) over all timesteps, term by term, with both of the paper's
fixed variances, or the learned one where the model has it; pictures are chosen by the config's
`data.where` and cut as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun, load
from latentdiff.likelihood import BitsPerDim, bits_per_dim
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.schedule import NoiseSchedule
from latentdiff.unet import as_network


def pictures(config: DiffusionRun, shards: str, count: int) -> Tensor:
    """The first pictures of a split, [n, 3, h, w]."""
    data = config.data.model_copy(update={"shards": (shards,), "flip": False})
    loader = Loader(data, config.seed, 1)
    return torch.stack([loader.image(i) for i in range(min(count, len(loader)))])


def fresh_noise(clean: Tensor, t: int) -> Tensor:
    """Standard normal, a function of the timestep alone."""
    return normal(clean.shape[1:], 0, range(len(clean)), f"bound-{t}")


def measure(model: Pipeline, clean: Tensor, variance: str) -> BitsPerDim:
    """The bound of each picture."""
    assert isinstance(model.schedule, NoiseSchedule)
    network: Callable[..., Any] = as_network(model.unet.eval())
    return bits_per_dim(
        partial(network, cond=None),
        model.schedule,
        model.prediction,
        clean,
        fresh_noise,
        variance=variance,
        clamp=1.0,
    )


def main() -> None:
    """Prints one line for each variance."""
    parser = argparse.ArgumentParser(description="Bits per dimension of unseen pictures.")
    parser.add_argument("--config", default="ddpm_emoji")
    parser.add_argument("--model", default="runs/ddpm_emoji/model")
    parser.add_argument("--shards", default="data/emoji/val-*.tar")
    parser.add_argument("--pictures", type=int, default=16)
    options = parser.parse_args()
    config = load(options.config)
    assert isinstance(config, DiffusionRun)
    model = Pipeline.load(options.model)
    clean = pictures(config, options.shards, options.pictures)
    for variance in ("learned",) if model.learns_variance else ("small", "large"):
        bits = measure(model, clean, "small" if variance == "learned" else variance)
        spread = bits.total.std().item() / len(clean) ** 0.5
        print(
            f"{variance}: {bits.total.mean():.3f} +- {spread:.3f} bits per dimension "
            f"({len(clean)} pictures): decoder {bits.terms[:, 0].mean():.3f}, "
            f"chain {bits.terms[:, 1:].sum(1).mean():.3f}, prior {bits.prior.mean():.2g}",
            flush=True,
        )


if __name__ == "__main__":
    main()
