"""What does diffusion look like? A real model, taken apart on a page that a student can read."""

from latentdiff.explain.request import DEFAULT_PROMPT, Plan
from latentdiff.explain.story import explain

__all__ = ["DEFAULT_PROMPT", "Plan", "explain"]
