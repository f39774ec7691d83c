"""What will a run need: memory on each rank, work a step, room on disk? Nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import DiffusionRun
from latentdiff.devices import autocast
from latentdiff.flops import forward_flops, training_flops
from latentdiff.parallel import World, mode_of
from latentdiff.text import Conditioning, TextEncoder
from latentdiff.training.denoising import blocks_of
from latentdiff.training.memory import (
    Alive,
    Line,
    Mode,
    RankMemory,
    alive_during,
    held_memory,
    norms_in_float32,
    num_bytes,
    with_activations,
)
from latentdiff.training.optim import check_sharded, lr_at
from latentdiff.training.shapes import Shapes, shapes_of, without_weights
from latentdiff.unet import as_network

_CPU = torch.device("cpu")
# What else is worth a look: mode, ranks that share a copy, optimiser, activation checkpointing.
_WAYS: tuple[tuple[Mode, int, str, bool], ...] = (
    ("none", 1, "adamw", False),
    ("none", 1, "adamw", True),
    ("none", 1, "adamw8bit", True),
    ("ddp", 1, "adamw", False),
    ("ddp", 1, "adamw", True),
    ("fsdp", 2, "adamw", False),
    ("fsdp", 2, "adamw", True),
    ("fsdp", 8, "adamw", False),
    ("fsdp", 8, "adamw", True),
)


@dataclass(frozen=True)
class Part:
    """One network of the model.

    Attributes:
        name: unet, text or autoencoder.
        parameters: how many numbers.
        is_trained: whether they move.
        forward_flops: of one sample; of the autoencoder those of its encoder.
    """

    name: str
    parameters: int
    is_trained: bool
    forward_flops: int


@dataclass(frozen=True)
class Way:
    """A way to share the run, and what it takes.

    Attributes:
        mode: none, ddp or fsdp.
        shard_ranks: ranks that share a copy of the weights; 1 but for fsdp.
        optimizer: its kind.
        recomputes: activation checkpointing.
        held: memory of a rank but for activations.
        lines: what comes alive by the samples at a time; of several the largest counts.
        accumulation: micro-batches a step.
    """

    mode: Mode
    shard_ranks: int
    optimizer: str
    recomputes: bool
    held: RankMemory
    lines: tuple[Line, ...]
    accumulation: int

    def memory(self, micro_batch: int) -> RankMemory:
        """Of a rank that takes so many samples at a time."""
        alive = zip(*(astuple(line.at(micro_batch)) for line in self.lines), strict=True)
        return with_activations(self.held, Alive(*map(max, alive)), self.mode, self.accumulation)

    def largest(self, num_bytes: float) -> int:
        """The most samples at a time that fit into so much memory; 0 if not even one does."""
        fits = 0
        for step in (1 << power for power in range(16, -1, -1)):
            if self.memory(fits + step).total <= num_bytes:
                fits += step
        return fits


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        config: the run.
        num_ranks: processes.
        micro_batch: samples at a time on a rank.
        latent: (c, h, w) of a sample.
        parts: networks.
        trained: how many numbers are trained.
        way: the run's own.
        ways: the others worth a look.
        checkpoint_bytes: of weights, optimiser and averages on disk.
        export_bytes: of the final model.
        notes: where shapes come from that are not here.
    """

    config: DiffusionRun
    num_ranks: int
    micro_batch: int
    latent: tuple[int, int, int]
    parts: tuple[Part, ...]
    trained: int
    way: Way
    ways: tuple[Way, ...]
    checkpoint_bytes: int
    export_bytes: int
    notes: tuple[str, ...]

    @property
    def memory(self) -> RankMemory:
        """Of a rank of the run."""
        return self.way.memory(self.micro_batch)

    @property
    def sample_flops(self) -> int:
        """Of one sample's training step: see the function of this name."""
        return _training_flops(self.parts)

    @property
    def step_flops(self) -> int:
        """Of an optimiser step, on all ranks."""
        return self.config.loop.batch_size * self.sample_flops

    @property
    def num_samples(self) -> int:
        """That the run trains on, repeats included."""
        return self.config.loop.num_steps * self.config.loop.batch_size


def sample_flops(config: DiffusionRun) -> int:
    """Operations of one sample's training step, the denominator of MFU.

    Three forward passes of what is trained, one of the rest; what activation checkpointing does
    again does not count.

    Raises:
        ValueError: the shape of a part cannot be known.
    """
    with without_weights():
        shapes = shapes_of(config)
        return _training_flops(_parts(config, shapes, _latent(config, shapes)))


def make_plan(config: DiffusionRun, num_ranks: int = 1) -> Plan:
    """Work out what a run needs on so many ranks; only a config and shapes are looked at.

    Raises:
        ValueError: it could not run so.
    """
    world = World(_CPU, 0, num_ranks)
    mode = _check(config, world)
    loop = config.loop
    micro_batch = loop.batch_size // (num_ranks * loop.accumulation)
    with without_weights():
        shapes = shapes_of(config)
        latent = _latent(config, shapes)
        parts = _parts(config, shapes, latent)
        lines = _lines(config, shapes, latent, micro_batch)
        trained, blocks = _trained(config, shapes)
        frozen = [shapes.autoencoder, None if config.train_text else shapes.text]
        frozen_bytes = sum(map(num_bytes, frozen))

    def way(mode: Mode, shard_ranks: int, optimizer: str, recomputes: bool) -> Way:
        held = held_memory(
            trained,
            blocks,
            frozen_bytes,
            mode=mode,
            shard_ranks=shard_ranks,
            parallel=config.parallel,
            optimizer=optimizer,
            num_averages=len(config.ema.sigma_rel) if config.ema.kind == "power" else 1,
            precision=loop.precision,
            accumulation=loop.accumulation,
        )
        found = lines[recomputes]
        return Way(mode, shard_ranks, optimizer, recomputes, held, found, loop.accumulation)

    shard_ranks = (config.parallel.shard_ranks or num_ranks) if mode == "fsdp" else 1
    kind, recomputes = config.optimizer.kind, config.parallel.activation_checkpointing
    numbers = sum(p.numel() for p in trained)
    whole = way("none", 1, kind, recomputes).held
    num_bytes_exported = 2 if config.export_dtype == "fp16" else 4
    return Plan(
        config=config,
        num_ranks=num_ranks,
        micro_batch=micro_batch,
        latent=latent,
        parts=parts,
        trained=numbers,
        way=way(mode, shard_ranks, kind, recomputes),
        ways=tuple(way(*found) for found in _WAYS),
        checkpoint_bytes=whole.weights + whole.optimizer + whole.ema,
        export_bytes=num_bytes_exported * sum(part.parameters for part in parts),
        notes=shapes.notes,
    )


def _check(config: DiffusionRun, world: World) -> Mode:
    """How the ranks share the weights; refuses what the run itself would refuse."""
    loop, ranks, share = config.loop, world.num_ranks, config.parallel.shard_ranks
    if ranks < 1:
        raise ValueError(f"a run has at least one rank; got {ranks}")
    if loop.batch_size % (ranks * loop.accumulation):
        raise ValueError(
            f"{ranks} rank(s) with {loop.accumulation} micro-batch(es) a step must share "
            f"loop.batch_size evenly; got {loop.batch_size}; take a multiple of "
            f"{ranks * loop.accumulation}"
        )
    if config.parallel.mode == "none" and ranks > 1:
        raise ValueError(
            f"parallel.mode is none, but there would be {ranks} ranks; set parallel.mode=ddp or "
            "fsdp, or take one"
        )
    if share is not None and ranks % share:
        raise ValueError(
            f"parallel.shard_ranks must divide the number of ranks; got {share} for {ranks}; "
            "choose a divisor, or null for all of them"
        )
    lr_at(0, loop.num_steps, config.optimizer)
    mode = mode_of(config.parallel, world)
    if mode == "fsdp":
        check_sharded(config.optimizer.kind)
    return mode


def _trained(config: DiffusionRun, shapes: Shapes) -> tuple[list[nn.Parameter], list[int]]:
    """The parameters that are trained, and the numbers in each block of them."""
    text = shapes.text if config.train_text else None
    trained = [*shapes.unet.parameters(), *([] if text is None else text.parameters())]
    blocks = blocks_of(shapes.unet, text)
    return trained, [sum(p.numel() for p in block.parameters()) for block in blocks]


def _parts(config: DiffusionRun, shapes: Shapes, latent: tuple[int, int, int]) -> tuple[Part, ...]:
    """The networks and their work on one sample in a training step."""
    noisy, t, cond = _inputs(shapes, latent, 1)
    tokens = None if cond is None else cond.tokens
    flops = forward_flops(shapes.unet, noisy, t, tokens, call=_call_unet)
    parts = [Part("unet", _count(shapes.unet), True, flops)]
    if shapes.text is not None:
        flops = forward_flops(shapes.text, _ids(shapes.text, 1), call=lambda x, ids: x(ids).tokens)
        parts.append(Part("text", _count(shapes.text), config.train_text, flops))
    if not shapes.autoencoder.is_identity:
        flops = 0
        if _encodes(config, shapes):
            image = torch.zeros(1, 3, config.data.output_px, config.data.output_px)
            flops = forward_flops(shapes.autoencoder, image, call=lambda a, x: a.moments(x))
        parts.append(Part("autoencoder", _count(shapes.autoencoder), False, flops))
    return tuple(parts)


def _training_flops(parts: Iterable[Part]) -> int:
    trained, frozen = 0, 0
    for part in parts:
        if part.is_trained:
            trained += part.forward_flops
        else:
            frozen += part.forward_flops
    return training_flops(trained, frozen)


def _latent(config: DiffusionRun, shapes: Shapes) -> tuple[int, int, int]:
    side = config.data.output_px // shapes.autoencoder.downscale
    return shapes.autoencoder.latent_channels, side, side


def _lines(
    config: DiffusionRun, shapes: Shapes, latent: tuple[int, int, int], micro_batch: int
) -> dict[bool, tuple[Line, ...]]:
    """What is alive in a step, without and with activation checkpointing."""
    shapes.unet.train()
    shapes.autoencoder.requires_grad_(False)
    if shapes.text is not None:
        shapes.text.train(config.train_text).requires_grad_(config.train_text)
    if config.loop.precision == "bf16" and config.loop.device != "cpu":
        norms_in_float32(shapes.unet)
    numbers = sum(p.numel() for p in _trained(config, shapes)[0])
    copies = 2 * numbers if config.loop.precision == "bf16" else 0
    empty = Alive(4 * numbers + copies, copies, 0)
    encoding: tuple[Line, ...] = ()
    if _encodes(config, shapes):
        encoding = (Line(micro_batch, _encoding(config, shapes, micro_batch), Alive(0, 0, 0)),)
    lines = {}
    for recomputes in (False, True):
        if recomputes:
            shapes.unet.enable_gradient_checkpointing()
            if shapes.text is not None and config.train_text:
                shapes.text.model.gradient_checkpointing_enable()
        alive = _step(config, shapes, latent, micro_batch)
        lines[recomputes] = (Line(micro_batch, alive, empty), *encoding)
    return lines


def _step(config: DiffusionRun, shapes: Shapes, latent: tuple[int, int, int], batch: int) -> Alive:
    """Forward and backward pass of a micro-batch."""
    unet, text = shapes.unet, shapes.text
    noisy, t, cond = _inputs(shapes, latent, batch)
    ids = None if text is None else _ids(text, batch)
    held = [*unet.parameters(), noisy, t, *([] if cond is None else [cond.tokens])]
    if text is not None:
        held += [*text.parameters(), *text.buffers()]

    def work() -> None:
        with autocast(_CPU, config.loop.precision):
            given = cond
            if text is not None and ids is not None:
                with torch.set_grad_enabled(config.train_text):
                    given = text.encode_ids(ids)
            output = as_network(unet, False)(noisy, t, given)
        error = output[:, : noisy.shape[1]].float() - noisy
        torch.autograd.backward(error.square().mean())

    alive = alive_during(work, held)
    for parameter in unet.parameters():
        parameter.grad = None
    for parameter in text.parameters() if text is not None else ():
        parameter.grad = None
    return alive


def _encoding(config: DiffusionRun, shapes: Shapes, batch: int) -> Alive:
    """A micro-batch of pictures through the autoencoder, before the step."""
    images = torch.zeros(batch, 3, config.data.output_px, config.data.output_px)
    held = [*shapes.autoencoder.parameters(), *shapes.autoencoder.buffers(), images]
    with torch.no_grad():
        return alive_during(lambda: shapes.autoencoder.moments(images), held)


def _inputs(
    shapes: Shapes, latent: tuple[int, int, int], batch: int
) -> tuple[Tensor, Tensor, Conditioning | None]:
    text = shapes.text
    cond = None
    if text is not None:
        cond = Conditioning(torch.zeros(batch, text.context_length, text.width))
    return torch.zeros(batch, *latent), torch.ones(batch), cond


def _call_unet(unet: Any, noisy: Tensor, t: Tensor, tokens: Tensor | None) -> Tensor:
    cond = None if tokens is None else Conditioning(tokens)
    return as_network(unet, False)(noisy, t, cond)


def _ids(text: TextEncoder, batch: int) -> Tensor:
    return torch.zeros(batch, text.context_length, dtype=torch.int64)


def _encodes(config: DiffusionRun, shapes: Shapes) -> bool:
    """Whether pictures go through an autoencoder in every step."""
    latents = config.cache_latents or config.data.payload == "latents"
    return not latents and not shapes.autoencoder.is_identity


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
