"""How does noise become clean latents? Prompts, guidance and a sampler around any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser, Network, NetworkDenoiser
from latentdiff.grids import step_grid
from latentdiff.guidance import ClassifierFree, Conditional, Interval, Pair, Rescale
from latentdiff.randomness import normal
from latentdiff.samplers import STOCHASTIC, Callback, Denoise, ddpm, find_sampler
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.schedule import Schedule
from latentdiff.text import Conditioning
from latentdiff.thresholds import Static

Wrap = Callable[[Denoiser], Denoiser]


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
        negative_prompt: str | Sequence[str] = "",
        begin: Tensor | None = None,
        strength: float = 1.0,
        wrap: Wrap | None = None,
        purpose: str = "step",
        callback: Callback | None = None,
    ) -> Tensor:
        """Clean latents from noise, like `start`.

        Args:
            start: standard normal [b, c, h, w], on the device where the network runs.
            prompts: [b]; an unconditional network takes none of them.
            indices: [b], the pictures' numbers: with `seed` they decide a sampler's fresh noise.
            choices: sampler, steps and guidance.
            seed: of the call.
            negative_prompt: what guidance steers away from; one for all, or [b].
            begin: clean latents like `start`, which the steps begin from: SDEdit (Meng et al.
                2022), image-to-image.
            strength: in [0, 1], the last part of the steps that is taken from `begin`.
            wrap: what the guided denoiser is wrapped in, such as `editing.Known`.
            purpose: names the fresh noise: two passes of one picture need two names.
            callback: sees (step, x, denoised) after each step.

        Raises:
            ValueError: an unknown sampler or spacing, or a bad number.
        """
        sampler, scale = choices.sampler, choices.guidance_scale
        draw = find_sampler(sampler)
        is_unguided = self.encode is None or scale == 1
        if learned := sampler == "ddpm" and self.learns_variance and is_unguided:
            draw = partial(ddpm, variance="learned")
        sigmas = step_grid(self.schedule, choices.num_steps, choices.spacing)
        if begin is None:
            # the clean part of x = clean + sigma * noise is unknown, and beside such noise small
            x = start * self.schedule.start_scale(sigmas[0])
        else:
            sigmas = last_part(sigmas, strength)
            x = begin + sigmas[0] * start
        if len(sigmas) < 2:  # strength 0
            return x
        denoise = self._denoise(prompts, negative_prompt, choices, learned, wrap)

        def noise(x: Tensor, step: int) -> Tensor:
            fresh = normal(x.shape[1:], seed, indices, f"{purpose}-{step}")
            if x.device.type == "cuda":  # from page-locked memory it is copied without a wait
                fresh = fresh.pin_memory()
            return fresh.to(x.device, x.dtype, non_blocking=True)

        return draw(denoise, x, sigmas, noise if sampler in STOCHASTIC else None, callback)

    def denoiser(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        scale: float = 1.0,
        with_variance: bool = False,
    ) -> Denoise:
        """The model as `denoise(x, sigma) -> clean` for rows of x that belong to these prompts.

        Guidance doubles the batch inside.

        Args:
            prompts: one for each row; an unconditional network takes none of them.
            negative_prompt: what guidance steers away from; one for all, or one for each row.
            scale: of classifier-free guidance; 1 is off.
            with_variance: clean and the learned variance's fraction, for samplers.ddpm; unguided.
        """
        choices = SamplingDefaults(guidance_scale=scale)
        return self._denoise(prompts, negative_prompt, choices, with_variance, None)

    def _denoise(
        self,
        prompts: Sequence[str],
        negative_prompt: str | Sequence[str],
        choices: SamplingDefaults,
        with_variance: bool,
        wrap: Wrap | None,
    ) -> Denoise:
        plain = NetworkDenoiser(self.network, self.schedule, self.prediction)
        guided: Denoiser = plain
        cond: Conditioning | Pair | None = None
        if self.encode is not None and choices.guidance_scale == 1:
            cond = self.encode(list(prompts))
        elif self.encode is not None:
            cond = _pair(self.encode, prompts, negative_prompt)
            guided = self._guided(plain, choices)
        if with_variance:
            guided = plain.with_variance
        if self.is_in_pixels:
            guided = Static(guided)
        return partial(guided if wrap is None else wrap(guided), cond=cond)

    def _guided(self, plain: Denoiser, choices: SamplingDefaults) -> Denoiser:
        guided: Denoiser = ClassifierFree(plain, choices.guidance_scale)
        if choices.guidance_rescale:
            data = self.schedule.sigma_data
            guided = Rescale(guided, choices.guidance_rescale, self.prediction, data)
        if choices.guidance_interval is not None:
            guided = Interval(guided, Conditional(plain), *choices.guidance_interval)
        return guided


def last_part(sigmas: Tensor, strength: float) -> Tensor:
    """The last `strength` of a grid's steps, at least one where strength is above 0.

    Args:
        sigmas: [n + 1], decreasing.
        strength: in [0, 1].

    Raises:
        ValueError: strength is out of range.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength must be in [0, 1]; got {strength}; 0 keeps the picture, 1 draws it anew"
        )
    count = len(sigmas) - 1
    kept = int(strength * count + 1e-9)  # so that 0.29 of 100 steps are 29
    if strength > 0:
        kept = max(kept, 1)
    return sigmas[count - kept :]


def _pair(
    encode: Callable[[Sequence[str]], Conditioning],
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
) -> Pair:
    """What guidance compares; texts that occur several times are encoded once."""
    negatives = (
        [negative_prompt] * len(prompts)
        if isinstance(negative_prompt, str)
        else list(negative_prompt)
    )
    wanted = [*negatives, *prompts]
    texts = list(dict.fromkeys(wanted))
    place = torch.tensor([texts.index(text) for text in wanted])
    tokens = encode(texts).tokens
    both = tokens[place.to(tokens.device)]
    return Pair(Conditioning(both[len(prompts) :]), Conditioning(both, is_pair=True))
