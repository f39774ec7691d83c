"""Training runs: diffusion, autoencoder, contrastive text tower."""
