"""How is a model watched while it draws? The workbench of `latentdiff explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.explain.colours import pixel_colours
from latentdiff.grids import step_grid
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.samplers import EVALUATIONS, STOCHASTIC, Denoise, find_sampler
from latentdiff.schedule import NoiseSchedule, Schedule


@dataclass(frozen=True)
class Seen:
    """One evaluation of a denoiser: x = clean + sigma * noise in, the expected clean sample out."""

    x: Tensor
    sigma: Tensor
    clean: Tensor


@dataclass(frozen=True)
class Lab:
    """A model and what all experiments on it share.

    Attributes:
        pipeline: the model.
        prompt: what is drawn where the experiment is not about the prompt.
        seed: noise i is that of picture i of `Pipeline.generate` with this seed.
        tick: called after each evaluation of the network.
    """

    pipeline: Pipeline
    prompt: str
    seed: int
    tick: Callable[[], None] = lambda: None

    @property
    def schedule(self) -> Schedule:
        """The model's forward process."""
        return self.pipeline.schedule

    @property
    def in_pixels(self) -> bool:
        """Whether the model has no autoencoder: its latents are pictures."""
        return self.pipeline.autoencoder.is_identity

    @property
    def scale(self) -> float:
        """The model's own guidance scale."""
        return self.pipeline.defaults.guidance_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        side = self.pipeline.default_size_px // self.pipeline.autoencoder.downscale
        return self.pipeline.autoencoder.latent_channels, side, side

    def noise(self, index: int = 0, purpose: str = "start") -> Tensor:
        """Standard normal [1, c, h, w]."""
        return normal(self.latent_shape, self.seed, [index], purpose).to(self.pipeline.device)

    def encode(self, image: Tensor) -> Tensor:
        """A picture [3, h, w] -> the mean of its latent, [1, c, h, w]."""
        return self.pipeline.autoencoder.encode(image[None].to(self.pipeline.device)).float()

    def decode(self, z: Tensor) -> list[np.ndarray]:
        """Latents [b, c, h, w] -> pictures."""
        return [pixel_colours(image) for image in self.pipeline.autoencoder.decode(z.float())]

    def denoiser(self, prompts: Sequence[str], scale: float) -> Denoise:
        """The model as `denoise(x, sigma) -> clean`, guided towards a prompt for each row of x."""
        denoise = self.pipeline.denoiser(prompts, scale=scale)

        def counted(x: Tensor, sigma: Tensor) -> Tensor:
            clean = denoise(x, sigma)
            self.tick()
            return clean

        return counted

    def sample(
        self,
        sampler: str,
        steps: int,
        prompts: Sequence[str] | None = None,
        scale: float | None = None,
        noises: Sequence[int] = (0,),
    ) -> tuple[Tensor, list[Seen]]:
        """Draw one picture a noise as `Pipeline.generate` does.

        Args:
            sampler: name in SAMPLERS.
            steps: of the sampler.
            prompts: one a noise; default: the lab's.
            scale: of guidance; default: the model's.
            noises: indices of the starting noises.

        Returns:
            The latents, and every evaluation on the way.
        """
        prompts = [self.prompt] * len(noises) if prompts is None else prompts
        denoise = self.denoiser(prompts, self.scale if scale is None else scale)
        seen: list[Seen] = []

        def watched(x: Tensor, sigma: Tensor) -> Tensor:
            clean = denoise(x, sigma)
            seen.append(Seen(x, sigma, clean))
            return clean

        def fresh(x: Tensor, step: int) -> Tensor:
            return torch.cat([self.noise(i, f"step-{step}") for i in noises]).to(x)

        sigmas = step_grid(self.schedule, steps, self.pipeline.defaults.spacing)
        start = torch.cat([self.noise(i) for i in noises])
        x = start * self.schedule.start_scale(sigmas[0])
        given = fresh if sampler in STOCHASTIC else None
        return find_sampler(sampler)(watched, x, sigmas, given), seen

    def steps_for(self, sampler: str, evaluations: int) -> int:
        """As many steps as so many evaluations of the network allow: 1 to `most_steps`."""
        return max(1, min(evaluations // EVALUATIONS[sampler], self.most_steps))

    @property
    def default_steps(self) -> int:
        """The model's own number of steps."""
        return self.pipeline.defaults.num_steps

    @property
    def most_steps(self) -> int:
        """That the model's step grid has; `leading` lacks one."""
        return self.num_timesteps - (self.pipeline.defaults.spacing == "leading")

    @property
    def num_timesteps(self) -> int:
        """Of the forward process; 1000, as DDPM has, where it has no such number."""
        return getattr(self.schedule, "num_timesteps", 1000)


def times(schedule: Schedule, count: int) -> Tensor:
    """`count` times from the least noise to the most, evenly in t; integers where t is one."""
    ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
    first, last = schedule.sigma_to_t(ends).tolist()
    t = torch.linspace(first, last, count, dtype=torch.float64)
    return t.round().long() if isinstance(schedule, NoiseSchedule) else t
