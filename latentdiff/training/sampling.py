"""What does the model draw while it learns? The run's prompts, drawn by all ranks together."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipelines.pixels import to_image
from latentdiff.config import DiffusionRun
from latentdiff.denoiser import time_of_each
from latentdiff.devices import autocast
from latentdiff.painter import Painter
from latentdiff.parallel import World
from latentdiff.pictures import grid
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.text import Conditioning
from latentdiff.training.together import collect, deal, in_evaluation_mode
from vae.autoencoder import Autoencoder

_CHUNK = 4  # pictures of a grid that are drawn at a time

Pixels = np.ndarray  # uint8 [h, w, 3]


def draw_grid(
    model: Pipeline, network: nn.Module, config: DiffusionRun, world: World
) -> Image.Image | None:
    """The run's prompts drawn with their own seed, by the weights as they are, as one picture.

    All ranks must call it. The picture is the same whatever their number.

    Args:
        model: frozen parts and forward process.
        network: a `Denoising`, as the ranks share it.
        config: of the run.
        world: the ranks.

    Returns:
        The grid on the first rank, None on the others.

    Warns:
        UserWarning: on the first rank, of pictures that are not finite; they stay grey.
    """
    samples = config.samples
    prompts = [p for p in samples.prompts for _ in range(samples.num_images)]
    drawn = draw_chunks(model, network, config, prompts, _CHUNK, world)
    own = {number: pictures for number, pictures in drawn if number is not None}
    pictures = [picture for chunk in collect(own, world) for picture in chunk]
    if not world.is_first:
        return None
    if missing := [i for i, picture in enumerate(pictures) if picture is None]:
        warnings.warn(
            f"{len(missing)} of {len(pictures)} sample pictures are not finite and stay grey, such "
            f"as number {missing[0]} ({prompts[missing[0]]!r}); lower samples.guidance_scale, or "
            "train in fp32",
            stacklevel=2,
        )
    height, width = (side * model.autoencoder.downscale for side in model.latent_shape()[1:])
    blank = Image.new("RGB", (width, height), "grey")
    return grid([blank if p is None else Image.fromarray(p) for p in pictures])


@torch.no_grad()  # not inference_mode, whose tensors training could not change in place later
def draw_chunks(
    model: Pipeline,
    network: nn.Module,
    config: DiffusionRun,
    prompts: Sequence[str],
    chunk_size: int,
    world: World,
    size_px: int | None = None,
) -> Generator[tuple[int | None, list[Pixels | None]]]:
    """Draw one picture a prompt, `chunk_size` at a time, as `config.samples` says.

    Picture i depends on (config.samples.seed, i). All ranks must go through it to its end.

    Args:
        model: frozen parts and forward process.
        network: a `Denoising`, as the ranks share it.
        config: of the run.
        prompts: one a picture.
        chunk_size: pictures at a time.
        world: the ranks.
        size_px: side of the pictures; default: the model's.

    Yields:
        This rank's chunks: their numbers, and their pictures, None for one that is not finite. A
        turn without a chunk has number None.
    """
    painter = painter_of(model, network, config)
    choices, seed = _choices(model, config), config.samples.seed
    shape = model.latent_shape(size_px, size_px)
    for number in deal(-(-len(prompts) // chunk_size), world):
        first = chunk_size * (number or 0)
        indices = range(first, min(first + chunk_size, len(prompts)))
        chunk = prompts[first : first + chunk_size]
        start = normal(shape, seed, indices, "start").to(world.device)
        with in_evaluation_mode(network), autocast(world.device, config.loop.precision):
            z = painter.draw(start, chunk, indices, choices, seed=seed)
        yield number, [] if number is None else _decode(model.autoencoder, z)


def painter_of(model: Pipeline, network: nn.Module, config: DiffusionRun) -> Painter:
    """What draws with a network that ranks share.

    A text tower that is trained may be sharded, and then works inside the network alone; there its
    token ids [b, n, 1] stand for the conditioning.
    """
    text = model.text
    if text is None or not config.train_text:

        def predict(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
            return network(noisy, time_of_each(t, noisy), None, cond)

        return replace(model.painter, network=predict)

    def predict_from_ids(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        return network(noisy, time_of_each(t, noisy), cond.tokens[..., 0], None)

    def encode(texts: Sequence[str]) -> Conditioning:
        return Conditioning(text.tokenize(texts)[..., None])

    return replace(model.painter, network=predict_from_ids, encode=encode)


def _choices(model: Pipeline, config: DiffusionRun) -> SamplingDefaults:
    """As the run's samples are drawn; a model that is trained further keeps its step grid."""
    samples = config.samples
    is_said = config.init_from is None or "spacing" in samples.model_fields_set
    return model.defaults.but(
        num_steps=samples.num_steps,
        guidance_scale=samples.guidance_scale,
        sampler=samples.sampler,
        spacing=samples.spacing if is_said else None,
    )


def _decode(autoencoder: Autoencoder, z: Tensor) -> list[Pixels | None]:
    """Latents [b, c, h, w] -> pictures; None for those that are not finite."""
    try:
        return [np.asarray(to_image(image)) for image in autoencoder.decode(z)]
    except FloatingPointError:
        if len(z) == 1:
            return [None]
        return [picture for row in z.split(1) for picture in _decode(autoencoder, row)]
