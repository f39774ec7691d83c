"""A whole model in miniature, trained for a few steps on the real pairs of tests/assets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from latentdiff.config import AutoencoderRun, DiffusionRun
from latentdiff.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))  # for torchrun, in test modules too


def tiny_autoencoder_run(assets: Path, out: Path, **changes: object) -> AutoencoderRun:
    return AutoencoderRun.model_validate(
        {
            "kind": "autoencoder",
            "out": str(out),
            "data": {"shards": [str(assets / "train-*.tar")], "size_px": 32, "crop_px": 16},
            "autoencoder": {
                "kind": "kl",
                "latent_channels": 4,
                "block_out_channels": [8, 8, 8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "mid_block_attention": False,
            },
            "optimizer": {"lr": 2e-3, "warmup_steps": 1},
            "loop": {"num_steps": 4, "batch_size": 8, "log_every": 1, "sample_every": None},
            **changes,
        }
    )


def tiny_diffusion_run(
    assets: Path, out: Path, autoencoder: Path, **changes: object
) -> DiffusionRun:
    return DiffusionRun.model_validate(
        {
            "kind": "diffusion",
            "out": str(out),
            "data": {
                "shards": [str(assets / "train-*.tar")],
                "size_px": 32,
                "captions": {"languages": {"en": 0.5, "*": 0.5}},
            },
            "autoencoder": {"kind": "kl", "pretrained": str(autoencoder)},
            "text": {
                "kind": "small",
                "width": 16,
                "layers": 1,
                "heads": 2,
                "context_length": 16,
                "tokenizer": {"vocab_size": 600},
            },
            "unet": {
                "channels": [16, 16],
                "cross_attention": [False, True],
                "layers_per_block": 1,
                "head_dim": 8,
                "norm_num_groups": 4,
            },
            "objective": {"prediction": "v", "weighting": {"kind": "min_snr", "gamma": 5.0}},
            "optimizer": {"lr": 1e-3, "warmup_steps": 1},
            "samples": {
                "prompts": ["a red apple"],
                "num_steps": 2,
                "styles": ["fluent 3d", "fluent flat"],
            },
            "train_text": True,
            "cache_latents": True,
            "loop": {
                "num_steps": 4,
                "batch_size": 8,
                "log_every": 1,
                "sample_every": 4,
                "checkpoint_every": 2,
            },
            **changes,
        }
    )


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
