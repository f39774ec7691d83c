"""A text-to-image model's networks for inference alone: diffusers' weights, the same numbers."""
