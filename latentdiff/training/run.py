"""Which trainer does a config ask for?"""

from __future__ import annotations

from pathlib import Path

from latentdiff.config import AutoencoderRun, ContrastiveRun, DiffusionRun


def train(config: DiffusionRun | AutoencoderRun | ContrastiveRun, resume: str = "auto") -> Path:
    """Run any kind of training to its end; returns where its model is."""
    match config:
        case DiffusionRun():
            from latentdiff.training.diffusion import train_diffusion

            return train_diffusion(config, resume)
        case AutoencoderRun():
            from latentdiff.training.autoencoder import train_autoencoder

            return train_autoencoder(config, resume)
        case ContrastiveRun():
            from latentdiff.training.contrastive import train_contrastive

            return train_contrastive(config, resume)
