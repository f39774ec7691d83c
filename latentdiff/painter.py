"""How does noise become clean latents? Prompts, guidance and a sampler around any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from latentdiff.denoiser import Denoiser, Network, NetworkDenoiser
from latentdiff.grids import step_grid
from latentdiff.guidance import ClassifierFree, Pair
from latentdiff.randomness import normal
from latentdiff.samplers import STOCHASTIC, Denoise, ddpm, find_sampler
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.schedule import Schedule
from latentdiff.text import Conditioning
from latentdiff.thresholds import Static


@dataclass(frozen=True)
class Painter:
    """What it takes to draw; training puts networks in here that ranks share.

    Attributes:
        network: (noisy, t, cond) -> prediction.
        encode: prompts -> what the network takes as `cond`; None for an unconditional model.
        schedule: the forward process that the network was trained on.
        prediction: what the network predicts, one of `denoiser.PREDICTIONS`.
        learns_variance: the network says the reverse process's variance too; unguided ddpm takes
            it.
        is_in_pixels: clean samples are pictures, clipped to [-1, 1], as DDPM's code does.
    """

    network: Network
    encode: Callable[[Sequence[str]], Conditioning] | None
    schedule: Schedule
    prediction: str
    learns_variance: bool
    is_in_pixels: bool

    def draw(
        self,
        start: Tensor,
        prompts: Sequence[str],
        indices: Sequence[int],
        choices: SamplingDefaults,
        *,
        seed: int = 0,
        negative_prompt: str = "",
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Clean latents from noise, like `start`.

        Args:
            start: standard normal [b, c, h, w], on the device where the network runs.
            prompts: [b]; an unconditional network takes none of them.
            indices: [b], the pictures' numbers: with `seed` they decide a sampler's fresh noise.
            choices: sampler, steps and guidance.
            seed: of the call.
            negative_prompt: what guidance steers away from.
            progress: called with b after each step.

        Raises:
            ValueError: an unknown sampler or spacing, or a bad number.
        """
        sampler, scale = choices.sampler, choices.guidance_scale
        draw = find_sampler(sampler)
        is_unguided = self.encode is None or scale == 1
        if learned := sampler == "ddpm" and self.learns_variance and is_unguided:
            draw = partial(ddpm, variance="learned")
        sigmas = step_grid(self.schedule, choices.num_steps, choices.spacing)
        # the clean part of x = clean + sigma * noise is unknown, and beside such noise small
        x = start * self.schedule.start_scale(sigmas[0])
        denoise = self.denoiser(prompts, negative_prompt, scale, with_variance=learned)

        def noise(x: Tensor, step: int) -> Tensor:
            return normal(x.shape[1:], seed, indices, f"step-{step}").to(x)

        def tick(step: int, x: Tensor, denoised: Tensor) -> None:
            if progress is not None:
                progress(len(x))

        return draw(denoise, x, sigmas, noise if sampler in STOCHASTIC else None, tick)

    def denoiser(
        self,
        prompts: Sequence[str],
        negative_prompt: str = "",
        scale: float = 1.0,
        with_variance: bool = False,
    ) -> Denoise:
        """The model as `denoise(x, sigma) -> clean` for rows of x that belong to these prompts.

        Guidance doubles the batch inside.

        Args:
            prompts: one for each row; an unconditional network takes none of them.
            negative_prompt: what guidance steers away from.
            scale: of classifier-free guidance; 1 is off.
            with_variance: clean and the learned variance's fraction, for samplers.ddpm; unguided.
        """
        plain = NetworkDenoiser(self.network, self.schedule, self.prediction)
        guided: Denoiser = plain
        cond: Conditioning | Pair | None = None
        if self.encode is not None and scale == 1:
            cond = self.encode(list(prompts))
        elif self.encode is not None:
            both = self.encode([negative_prompt, *prompts])
            uncond = Conditioning(both.tokens[:1]).repeat(len(prompts))
            text = Conditioning(both.tokens[1:])
            cond = Pair(text, Conditioning.cat([uncond, text]))
            guided = ClassifierFree(plain, scale)
        if with_variance:
            guided = plain.with_variance
        return partial(Static(guided) if self.is_in_pixels else guided, cond=cond)
