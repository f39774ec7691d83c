"""Configs of a whole model in miniature, for the real pairs of tests/assets."""

from __future__ import annotations

from pathlib import Path

from latentdiff.config import AutoencoderRun, DiffusionRun


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
