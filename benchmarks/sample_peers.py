"""How does diffusers draw the same? StableDiffusionPipeline as it comes, and faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sample_ways import NEGATIVE, Drawn, Job
from torch import Tensor

Change = Callable[[Any], None]  # of a diffusers pipeline, in place


class Theirs:
    """A way of drawing with diffusers.

    Args:
        model: directory.
        dtype: of the networks.
        device: where they run; None: the change sees to that.
        change: of the pipeline, before the first picture.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype = torch.float32,
        device: str | None = "cpu",
        change: Change | None = None,
    ) -> None:
        from diffusers import StableDiffusionPipeline

        pipe: Any = StableDiffusionPipeline.from_pretrained(
            str(model), torch_dtype=dtype, safety_checker=None
        )
        pipe.set_progress_bar_config(disable=True)
        if device is not None:
            pipe.to(device)
        if change is not None:
            change(pipe)
        self._pipe, self._dtype = pipe, dtype

    def __call__(self, job: Job) -> Drawn:
        """Draw it."""
        pipe, last = self._pipe, [job.start]
        at = [0.0]

        def after(_: Any, step: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            last[0], at[0] = values["latents"], time.perf_counter()
            return values

        began = time.perf_counter()
        images = pipe(
            list(job.prompts),
            negative_prompt=[NEGATIVE] * len(job.prompts),
            latents=job.start.to(self._dtype),  # it does not convert them itself
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            height=job.start.shape[2] * pipe.vae_scale_factor,
            width=job.start.shape[3] * pipe.vae_scale_factor,
            callback_on_step_end=after,
        ).images
        seconds = time.perf_counter() - began
        return Drawn(images, last[0].float().cpu(), seconds, at[0] - began)


def channels_last(pipe: Any) -> None:
    """U-Net and autoencoder with channels innermost."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


def compiled(mode: str) -> Change:
    """Channels-last, and the U-Net compiled as diffusers' documentation says.

    Args:
        mode: of torch.compile.
    """

    def change(pipe: Any) -> None:
        channels_last(pipe)
        pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)

    return change


def xformers(pipe: Any) -> None:
    """Channels-last, and xformers' attention."""
    channels_last(pipe)
    pipe.enable_xformers_memory_efficient_attention()


def offloaded(pipe: Any) -> None:
    """What diffusers offers for little memory: one network on the GPU, decoding in tiles."""
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
