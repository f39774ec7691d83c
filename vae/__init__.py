"""Autoencoders: image <-> latent. Knows nothing of text, data or diffusion."""
