"""A whole model in miniature, trained for a few steps on the real pairs of tests/assets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentdiff.config import DiffusionRun
from latentdiff.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))  # for tinyruns, in test modules too

from tinyruns import tiny_autoencoder_run, tiny_diffusion_run


@pytest.fixture(scope="session")
def tiny_autoencoder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from latentdiff.training.autoencoder import train_autoencoder

    return train_autoencoder(tiny_autoencoder_run(assets, tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="session")
def tiny_run(
    assets: Path, tiny_autoencoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> DiffusionRun:
    """The config of a finished run; its directory is `out`, its model `out/model`."""
    from latentdiff.training.diffusion import train_diffusion

    run = tiny_diffusion_run(assets, tmp_path_factory.mktemp("ldm") / "run", tiny_autoencoder)
    train_diffusion(run)
    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_run: DiffusionRun) -> Path:
    return Path(tiny_run.out) / "model"


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_model: Path) -> Pipeline:
    return Pipeline.load(tiny_model)
