"""What is a micro-batch, and how does a batch of the loader become one?

Everything of a place depends on (seed, position) alone: whichever rank has it, in whichever
micro-batch, with whatever beside it, its numbers are the same to the bit.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipelines.batch import Batch
from latentdiff.build import build_weighting
from latentdiff.config import DiffusionRun
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.loss import Numbers
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal, uniform
from latentdiff.schedule import Schedule
from latentdiff.text import TextEncoder
from latentdiff.training.captions import Tokenize, caption_ids
from latentdiff.training.latents import LatentCache
from latentdiff.training.noise import draw_extra_noise, draw_noise, timestep_draws
from latentdiff.training.reading import sample_crc

_LANES = 64  # a multiple of what any CPU computes at once


@dataclass(frozen=True)
class Proof:
    """What the log of positions says of every place.

    Attributes:
        valid: [b], False where the place is empty.
        dropped: [b], whether the caption was replaced by the empty one.
        noise: [b], CRC-32 of all noise: of the data, of the input, of the posterior.
        data: [b], CRC-32 of pixels or stored latents, and of the caption or its stored ids.
    """

    valid: list[bool]
    dropped: list[bool]
    noise: list[int]
    data: list[int]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank trains on at a time; one entry a place.

    Empty places are there too, as zeros with `valid` 0: shapes never vary with the data, and no
    rank leaves out an operation that others wait for.

    Attributes:
        step: optimiser steps before this one.
        positions: [b], places since the start of the run.
        ids: [b], numbers of the samples; -1 where the plan left the place open.
        num_planned: samples of the whole step, over all ranks and micro-batches.
        valid: float32 [b], 1, or 0 where the place is empty: its loss counts for nothing.
        pixels: uint8 [b, h, w, 3], to be encoded; or...
        latents: float16 [b, 2 | 1, c, h, w], moments of the posterior, or a sample of it.
        posterior: float32 [b, c, h, w], standard normal, makes a sample of moments; None where
            there are none, or their standard deviation is zero.
        noise: float32 [b, c, h, w], of the target.
        extra_noise: float32 [b, c, h, w], that the input has beside it; None for none.
        t: [b] on the CPU, as the schedule gave it.
        numbers: of t.
        token_ids: int64 [b, n], of the captions, some dropped; None for a model without text.
        proof: for the log of positions; None where none is kept.
    """

    step: int
    positions: list[int]
    ids: list[int]
    num_planned: int
    valid: Tensor
    pixels: Tensor | None
    latents: Tensor | None
    posterior: Tensor | None
    noise: Tensor
    extra_noise: Tensor | None
    t: Tensor
    numbers: Numbers
    token_ids: Tensor | None
    proof: Proof | None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def perturbed_noise(self) -> Tensor:
        """The noise of the network's input, like `noise`."""
        return self.noise if self.extra_noise is None else self.noise + self.extra_noise

    def to(self, move: Callable[[Tensor], Tensor]) -> MicroBatch:
        """All that the device needs, moved; t stays where it is."""
        moved = {name: move(value) for name, value in self._tensors()}
        return replace(self, numbers=Numbers(*move(self.numbers.table).unbind()), **moved)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep its memory, allocated on another stream, until this one is done with it."""
        for _, value in self._tensors():
            value.record_stream(stream)
        for field in fields(Numbers):
            getattr(self.numbers, field.name).record_stream(stream)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in _ON_DEVICE:
            if (value := getattr(self, name)) is not None:
                yield name, value


_ON_DEVICE = ("valid", "pixels", "latents", "posterior", "noise", "extra_noise", "token_ids")


@dataclass(frozen=True)
class Recipe:
    """What `prepare` goes by, besides the batch.

    Attributes:
        seed: of the run.
        batch_size: places of an optimiser step, over all ranks and micro-batches.
        schedule: the forward process.
        prediction: what the network predicts.
        objective: weighting, noise and caption dropout.
        latent_channels: c of what the U-Net sees.
        downscale: pixels per latent cell along one side.
        has_posterior: whether encoding leaves something to chance; it does not in pixel space.
        tokenize: captions -> ids; None for a model without text.
        cache: latents held in memory, instead of the batch's pictures.
        with_proof: whether positions are logged.
    """

    seed: int
    batch_size: int
    schedule: Schedule
    prediction: str
    objective: DiffusionObjectiveConfig
    latent_channels: int
    downscale: int
    has_posterior: bool
    tokenize: Tokenize | None = None
    cache: LatentCache | None = None
    with_proof: bool = False

    @classmethod
    def of(cls, model: Pipeline, config: DiffusionRun, cache: LatentCache | None = None) -> Recipe:
        """That of a run."""
        autoencoder = model.autoencoder
        return cls(
            config.seed,
            config.loop.batch_size,
            model.schedule,
            model.prediction,
            config.objective,
            autoencoder.latent_channels,
            autoencoder.downscale,
            not autoencoder.is_identity,
            None if model.text is None else own_tokenizer(model.text),
            cache,
            config.loop.log_positions,
        )


def own_tokenizer(text: TextEncoder) -> Tokenize:
    """`text.tokenize` for another thread: a fast tokenizer must not be used in two at a time."""
    return TextEncoder(copy.deepcopy(text.tokenizer), text.model).tokenize


def prepare(batch: Batch, recipe: Recipe) -> MicroBatch:
    """The micro-batch of a batch, on the CPU: a pure function of both."""
    positions, seed, objective = batch.positions.tolist(), recipe.seed, recipe.objective
    latents = batch.latents if recipe.cache is None else recipe.cache.take(batch.ids)
    if latents is not None:
        shape, has_posterior = tuple(latents.shape[2:]), latents.shape[1] == 2
    else:
        assert batch.pixels is not None, "the loader was asked for no pictures"
        height, width = (side // recipe.downscale for side in batch.pixels.shape[1:3])
        shape, has_posterior = (recipe.latent_channels, height, width), True
    posterior = None
    if has_posterior and recipe.has_posterior:
        posterior = normal(shape, seed, positions, "posterior")
    t, numbers = _timesteps(positions, recipe)
    token_ids, draws = None, torch.from_numpy(uniform(seed, positions, "caption_drop"))
    if recipe.tokenize is not None:
        token_ids = caption_ids(batch, recipe.tokenize, draws, objective.caption_dropout)
    noise = draw_noise(shape, positions, seed, objective.offset_noise)
    micro = MicroBatch(
        step=batch.step,
        positions=positions,
        ids=batch.ids.tolist(),
        num_planned=batch.num_planned,
        valid=torch.from_numpy(batch.valid.astype(np.float32)),
        pixels=batch.pixels if latents is None else None,
        latents=latents,
        posterior=posterior,
        noise=noise,
        extra_noise=draw_extra_noise(shape, positions, seed, objective.input_perturbation),
        t=t,
        numbers=numbers,
        token_ids=token_ids,
        proof=None,
    )
    if not recipe.with_proof:
        return micro
    dropped = draws < (objective.caption_dropout if token_ids is not None else 0)
    return replace(micro, proof=_proof(batch, micro, dropped))


def _timesteps(positions: list[int], recipe: Recipe) -> tuple[Tensor, Numbers]:
    """(t [b], its numbers).

    Vectorised exp, sigmoid and the like may differ in the last bit from what computes the end of a
    vector, so that a number would hang on its place in the batch: all get whole vectors.
    """
    objective, schedule = recipe.objective, recipe.schedule
    draws = timestep_draws(
        positions, recipe.seed, recipe.batch_size, objective.stratified_timesteps
    )
    count = len(draws)
    t = schedule.draw_timesteps(functional.pad(draws, (0, -count % _LANES), value=0.5))
    weighting = build_weighting(objective.weighting, schedule.sigma_data)
    numbers = Numbers.at(schedule, t, recipe.prediction, weighting)
    return t[:count], Numbers(*numbers.table[:, :count].unbind())


def _proof(batch: Batch, micro: MicroBatch, dropped: Tensor) -> Proof:
    payloads = batch.pixels if batch.pixels is not None else batch.latents
    noises = [n for n in (micro.noise, micro.extra_noise, micro.posterior) if n is not None]
    noise, data = [], []
    for i in range(len(batch)):
        crc = sample_crc(payloads, batch.captions[i], i)
        data.append(crc if batch.tokens is None else zlib.crc32(batch.tokens[i].numpy().data, crc))
        crc = 0
        for tensor in noises:
            crc = zlib.crc32(tensor[i].numpy().data, crc)
        noise.append(crc)
    return Proof(batch.valid.tolist(), dropped.tolist(), noise, data)
