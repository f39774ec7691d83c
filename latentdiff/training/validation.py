"""What is the loss on held-out pairs? The same number for the same weights, on any world size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from latentdiff.build import build_weighting
from latentdiff.config import DiffusionRun
from latentdiff.configtraining import ValidationConfig
from latentdiff.devices import autocast
from latentdiff.loss import Numbers, denoising_loss
from latentdiff.pairing import check_model, check_tokenizer
from latentdiff.parallel import World
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.training.heldout import HeldOut, open_held_out, read_held_out
from latentdiff.training.together import collect, deal, in_evaluation_mode

_SEED = 0  # of the noise, whatever the run's: runs of one data set are compared on the same noise
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Pairs:
    """A chunk of held-out pairs, on the host.

    Attributes:
        latents: float32 [b, c, h, w], the means of the posteriors.
        token_ids: [b, n]; None for a model without text.
    """

    latents: Tensor
    token_ids: Tensor | None


@dataclass(frozen=True)
class ValidationLoss:
    """Means over held-out pairs and their timesteps.

    Attributes:
        loss: as the run's objective penalises and weighs it, but for a learned variance's bound:
            what training brings down.
        plain: squared error of the network's own output, unweighted: it compares runs of one
            prediction whose weightings differ.
        by_timestep: `loss` by equal parts of the schedule, from the cleanest; NaN where no timestep
            fell.
        num_samples: pairs.
    """

    loss: float
    plain: float
    by_timestep: tuple[float, ...]
    num_samples: int

    @property
    def scalars(self) -> dict[str, float]:
        """For the log: `val_loss`, `val_loss_plain`, and `val_loss_t/LOW-HIGH` of each part."""
        found = {"val_loss": self.loss, "val_loss_plain": self.plain}
        count = len(self.by_timestep)
        digits = len(str(count - 1))
        for i, loss in enumerate(self.by_timestep):
            if not math.isnan(loss):
                found[f"val_loss_t/{i / count:.{digits}f}-{(i + 1) / count:.{digits}f}"] = loss
        return found


def read_validation(model: Pipeline, config: DiffusionRun, world: World) -> HeldOut[Pairs]:
    """Read and encode the held-out pairs of `config.validation`, for the life of the run.

    Each rank keeps its own share. All ranks must call it.

    Raises:
        ValueError: no validation in the config; data that change from draw to draw, that do not
            fit the model, or of which too much cannot be used.
    """
    settings = _settings(config)
    data = settings.data
    side, multiple = data.output_px, model.size_multiple_px
    if side % multiple:
        raise ValueError(
            f"validation.data.size_px must be a multiple of {multiple} for this model; got {side}"
        )

    @torch.no_grad()
    def encode(batch: Batch) -> Pairs:
        if batch.latents is not None:
            latents = batch.latents[:, 0].float()  # the mean, or the one sample that is stored
        else:
            latents = model.autoencoder.moments(batch.images.to(world.device))[0].float().cpu()
        token_ids = batch.tokens
        if model.text is None:
            token_ids = None
        elif token_ids is None:
            token_ids = model.text.tokenize(batch.captions)
        return Pairs(latents, token_ids)

    loader = open_held_out(data, "validation.data")
    if loader.latents is not None:
        check_model(loader.latents, model.autoencoder)
        if model.text is not None and loader.latents.tokenizer_hash is not None:
            check_tokenizer(loader.latents, model.text)
    return read_held_out(loader, settings.num_samples, settings.batch_size, encode, world)


@torch.no_grad()  # not inference_mode, whose tensors training could not change in place later
def validation_loss(
    model: Pipeline,
    network: nn.Module,
    held: HeldOut[Pairs],
    config: DiffusionRun,
    world: World,
) -> ValidationLoss:
    """The loss on held-out pairs with the weights as they are; all ranks must call it.

    Each pair meets `num_timesteps` timesteps, one in each of as many equal parts of their training
    distribution, and standard-normal noise of its own. Both depend on the sample's number alone.
    Captions are never dropped, dropout is off. The micro-batches are the same whatever the number
    of ranks, and the losses are summed exactly, so that the number has the same bits where the
    kernels are the same.

    Args:
        model: frozen parts and forward process.
        network: a `Denoising`, as the ranks share it.
        held: what `read_validation` has read.
        config: of the run.
        world: the ranks.
    """
    settings, bins = _settings(config), config.logging.timestep_bins
    own: dict[int, Tensor] = {}
    with in_evaluation_mode(network):
        for number in deal(held.num_chunks, world):
            if number is None:
                any_pairs = _blank(model, config)
                _chunk_losses(model, network, any_pairs, 0, settings.num_timesteps, config, world)
                continue
            first, pairs = number * held.chunk_size, held.chunks[number]
            found = _chunk_losses(
                model, network, pairs, first, settings.num_timesteps, config, world
            )
            own[number] = found[:, :, held.places(number)]
    losses, plain, fractions = torch.cat(collect(own, world), dim=2).flatten(1).tolist()
    parts: list[list[float]] = [[] for _ in range(bins)]
    for loss, fraction in zip(losses, fractions, strict=True):
        if bins:
            parts[min(int(fraction * bins), bins - 1)].append(loss)
    return ValidationLoss(
        loss=_mean(losses),
        plain=_mean(plain),
        by_timestep=tuple(map(_mean, parts)),
        num_samples=len(held.numbers),
    )


def validation_timesteps(numbers: range, k: int, num_timesteps: int) -> Tensor:
    """Numbers in [0, 1) that `Schedule.draw_timesteps` turns into timesteps, float64 [b].

    The k-th of a sample lies in the k-th of `num_timesteps` equal parts; where in it moves on by
    the golden ratio from sample to sample, which fills the part evenly for any number of them
    (Kronecker's sequence).
    """
    places = torch.tensor([((n + 0.5) * _GOLDEN) % 1 for n in numbers], dtype=torch.float64)
    return (k + places) / num_timesteps


def _chunk_losses(
    model: Pipeline,
    network: nn.Module,
    pairs: Pairs,
    first: int,
    num_timesteps: int,
    config: DiffusionRun,
    world: World,
) -> Tensor:
    """(weighted loss, plain loss, place in the schedule) of a chunk: float64 [3, k, b], host."""
    objective, schedule, device = config.objective, model.schedule, world.device
    weighting = build_weighting(objective.weighting, schedule.sigma_data)
    huber_c = objective.loss.c if objective.loss.kind == "huber" else None
    clean = pairs.latents.to(device)
    ids = None if pairs.token_ids is None else pairs.token_ids.to(device)
    samples = range(first, first + len(clean))
    found: list[Tensor] = []
    with autocast(device, config.loop.precision):
        cond = None
        if model.text is not None and not config.train_text and ids is not None:
            cond = model.text.encode_ids(ids)
        for k in range(num_timesteps):
            # t stays on the CPU beside the float64 schedule, which not every device could hold
            t = schedule.draw_timesteps(validation_timesteps(samples, k, num_timesteps))
            numbers = Numbers.at(schedule, t, model.prediction, weighting)
            on_device = Numbers(*numbers.table.to(device))
            noise = normal(clean.shape[1:], _SEED, samples, f"validation_noise-{k}").to(device)
            output = network(on_device.add_noise(clean, noise), on_device.t, ids, cond)
            predicted = output[:, : clean.shape[1]]  # a learned variance has as many again
            expected = on_device.target(clean, noise)
            loss = denoising_loss(predicted, expected, on_device.weight, huber_c)
            plain = denoising_loss(predicted, expected)
            found.append(torch.stack([loss, plain, on_device.t_fraction]))
    return torch.stack(found, dim=1).double().cpu()


def _blank(model: Pipeline, config: DiffusionRun) -> Pairs:
    """A chunk of nothing."""
    settings = _settings(config)
    side, count = settings.data.output_px, settings.batch_size
    ids = None if model.text is None else model.text.tokenize([""] * count)
    return Pairs(torch.zeros(count, *model.latent_shape(side, side)), ids)


def _mean(values: list[float]) -> float:
    """The mean of an exact sum, so that no order matters; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def _settings(config: DiffusionRun) -> ValidationConfig:
    if config.validation is None:
        raise ValueError("the run has no held-out data; give validation.data")
    return config.validation
