"""Does the host never wait for the GPU between logging points, and is a resume there bitwise?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import interrupt_in_the_fourth_step
from saved import everything
from tinyruns import tiny_diffusion_run

from latentdiff.config import DiffusionRun
from latentdiff.training import diffusion
from latentdiff.training.checkpoint import read_checkpoint
from latentdiff.training.diffusion import train_diffusion

pytestmark = pytest.mark.gpu


def gpu_run(assets: Path, out: Path, autoencoder: Path, **loop: Any) -> DiffusionRun:
    run = tiny_diffusion_run(assets, out, autoencoder, cache_latents=False)
    values = run.model_dump()
    values["loop"] |= {"device": "cuda", "sample_every": None, "deterministic": True} | loop
    return DiffusionRun.model_validate(values)


def test_the_host_waits_for_the_gpu_at_logging_points_alone(
    assets: Path, tmp_path: Path, tiny_autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu_run(
        assets, tmp_path / "run", tiny_autoencoder, num_steps=12, log_every=6, checkpoint_every=6
    )
    real_lr_at, real_gather = diffusion.lr_at, diffusion.sum_accounts
    watched: list[int] = []

    def watch(step: int, *rest: Any) -> float:
        if step % 6 == 2:  # the first steps may look for algorithms
            torch.cuda.set_sync_debug_mode("error")
        if step % 6 > 2:
            watched.append(step)
        return real_lr_at(step, *rest)

    def stop_watching(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return real_gather(*arguments)

    monkeypatch.setattr(diffusion, "lr_at", watch)
    monkeypatch.setattr(diffusion, "sum_accounts", stop_watching)
    try:
        train_diffusion(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [3, 4, 5, 9, 10, 11]


def test_a_deterministic_run_resumes_to_the_bit(
    assets: Path, tmp_path: Path, tiny_autoencoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gpu_run(assets, tmp_path / "whole", tiny_autoencoder)
    train_diffusion(whole)
    cut = gpu_run(assets, tmp_path / "cut", tiny_autoencoder)
    interrupt_in_the_fourth_step(cut, monkeypatch)
    train_diffusion(cut)
    found, expected = (
        everything(read_checkpoint(Path(run.out) / "checkpoints" / "step-4"))
        for run in (cut, whole)
    )
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
