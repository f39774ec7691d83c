"""How close are drawn pictures to held-out ones, and to their captions? FID, KID, CLIP score."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from latentdiff.config import DiffusionRun
from latentdiff.configtraining import EvaluationConfig
from latentdiff.features import FeatureNetwork, load_clip, load_features
from latentdiff.parallel import World
from latentdiff.pipeline import Pipeline
from latentdiff.training.heldout import HeldOut, open_held_out, read_held_out
from latentdiff.training.sampling import draw_chunks
from latentdiff.training.together import collect

_FEW_FOR_FID = 2048  # pictures; below it the estimate's bias is larger than most improvements
_SUBSET = 1000  # pictures of a subset of KID; 100 subsets, as its authors have them
_SUBSETS = 100
_SEED = 0  # of KID's subsets


@dataclass(frozen=True)
class Evaluation:
    """What does not change between evaluations.

    Attributes:
        told: how many held-out pairs there are, and which cannot be used.
        captions: of the pictures that are drawn, one each.
        real: features of the held-out pictures [n, d], on the first rank; None elsewhere, and
            where neither FID nor KID is asked for.
        features: the network that they are of.
        clip: torchmetrics' CLIPScore.
    """

    told: str
    captions: tuple[str, ...]
    real: Tensor | None
    features: FeatureNetwork | None
    clip: Any


@dataclass(frozen=True)
class _Seen:
    """A chunk of held-out pairs.

    Attributes:
        captions: one a place.
        features: float32 [b, d], of the places that are valid, and zero elsewhere; None where no
            metric asks for them.
    """

    captions: tuple[str, ...]
    features: Tensor | None


@dataclass(frozen=True)
class _Drawn:
    """A chunk of drawn pictures.

    Attributes:
        features: float32 [b, d] of those that are finite; None where no metric asks for them.
        clip_sum: of their CLIP scores.
        num: of those that are finite.
        num_broken: of the others.
    """

    features: Tensor | None
    clip_sum: float
    num: int
    num_broken: int


def prepare_evaluation(model: Pipeline, config: DiffusionRun, world: World) -> Evaluation:
    """Open the metrics' networks and look at the held-out pairs, for the life of the run.

    All ranks must call it.

    Raises:
        ValueError: no evaluation in the config, a network that is not there, or data that do not
            fit.

    Warns:
        UserWarning: on the first rank, where there are too few pictures for a FID.
    """
    settings = _settings(config)
    if settings.data.payload != "images":
        raise ValueError(
            f"drawn pictures are compared with pictures; got evaluation.data.payload "
            f"{settings.data.payload}; give shards of images"
        )
    model.latent_shape(settings.data.output_px, settings.data.output_px)  # or it says what is wrong
    if "clip_score" in settings.metrics and model.text is None:
        raise ValueError(
            "evaluation.metrics has clip_score, but the model draws without text; leave it out"
        )
    has_features = bool({"fid", "kid"} & {*settings.metrics})
    features = load_features(settings.features, world.device) if has_features else None
    clip = None
    if "clip_score" in settings.metrics:
        assert settings.clip is not None  # the config has seen to it
        clip = load_clip(settings.clip, world.device)

    def look(batch: Batch) -> _Seen:
        assert batch.pixels is not None
        if features is None:
            return _Seen(batch.captions, None)
        good = torch.from_numpy(batch.valid)
        found = torch.zeros(len(batch), features.width)
        if good.any():
            found[good] = features(batch.pixels[good].permute(0, 3, 1, 2))
        return _Seen(batch.captions, found)

    loader = open_held_out(settings.data, "evaluation.data")
    held = read_held_out(loader, settings.num_images, settings.batch_size, look, world)
    captions, real = _merged(held, world)
    if "fid" in settings.metrics and world.is_first:
        _warn_of_few(len(held.numbers), settings.num_images)
    drawn = tuple(captions[i % len(captions)] for i in range(settings.num_images))
    return Evaluation(str(held), drawn, real if world.is_first else None, features, clip)


def evaluate(
    model: Pipeline, network: nn.Module, evaluation: Evaluation, config: DiffusionRun, world: World
) -> dict[str, float]:
    """Draw pictures of the held-out captions with the weights as they are, and judge them.

    All ranks must call it, and all get the same numbers, whatever their number. Pictures that are
    not finite are left out of the metrics and counted.

    Args:
        model: frozen parts and forward process.
        network: a `Denoising`, as the ranks share it.
        evaluation: what `prepare_evaluation` has prepared.
        config: of the run.
        world: the ranks.

    Returns:
        Those that are asked for of `fid`, `kid`, `kid_std` and `clip_score`; and `eval_broken`,
        pictures that are not finite, if there are any. NaN where fewer than 2 are left.
    """
    settings = _settings(config)
    own: dict[int, _Drawn] = {}
    for number, pictures in draw_chunks(
        model,
        network,
        config,
        evaluation.captions,
        settings.batch_size,
        world,
        settings.data.output_px,
    ):
        if number is not None:
            own[number] = _judge(evaluation, number * settings.batch_size, pictures)
    chunks = collect(own, world)
    scores = _scores(evaluation, settings, chunks, world) if world.is_first else None
    return world.broadcast(scores)


def frechet_distance(real: Tensor, drawn: Tensor) -> float:
    """FID of features [n, d] and [m, d], in float64 (Heusel et al. 2017), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]), sync_on_compute=False)
    metric.to(real.device)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return metric.compute().item()


def kernel_distance(real: Tensor, drawn: Tensor) -> tuple[float, float]:
    """KID of features [n, d] and [m, d], in float64 (Binkowski et al. 2018), by torchmetrics.

    Returns:
        Mean and standard deviation over subsets, which are always the same ones; there is one where
        it holds all pictures.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(_SUBSET, len(real), len(drawn))
    subsets = 1 if size == len(real) == len(drawn) else _SUBSETS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features")
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets, size, sync_on_compute=False
        )
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


class _Given(nn.Module):
    """Stands where a metric has its feature network: features are found before, by all ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def _merged(held: HeldOut[_Seen], world: World) -> tuple[list[str], Tensor | None]:
    """Captions, and features [n, d], of all pairs that count."""
    captions: list[str] = []
    features: list[Tensor] = []
    for number, seen in enumerate(collect(held.chunks, world)[: held.num_chunks]):
        places = held.places(number)
        captions += [seen.captions[i] for i in places]
        if seen.features is not None:
            features.append(seen.features[places])
    return captions, torch.cat(features) if features else None


def _judge(evaluation: Evaluation, first: int, pictures: list[np.ndarray | None]) -> _Drawn:
    """What the metrics' networks say of a chunk of pictures, the first of which has a number."""
    finite = [i for i, picture in enumerate(pictures) if picture is not None]
    num_broken = len(pictures) - len(finite)
    if not finite:
        return _Drawn(None, 0.0, 0, num_broken)
    pixels = torch.from_numpy(np.stack([p for p in pictures if p is not None]))
    images = pixels.permute(0, 3, 1, 2)  # [b, 3, h, w]
    features = None if evaluation.features is None else evaluation.features(images)
    clip_sum = 0.0
    if evaluation.clip is not None:
        evaluation.clip.reset()
        with torch.no_grad():
            evaluation.clip.update(
                list(images.to(evaluation.clip.device)),
                [evaluation.captions[first + i] for i in finite],
            )
        clip_sum = evaluation.clip.score.item()
    return _Drawn(features, clip_sum, len(finite), num_broken)


def _scores(
    evaluation: Evaluation, settings: EvaluationConfig, chunks: list[_Drawn], world: World
) -> dict[str, float]:
    num = sum(chunk.num for chunk in chunks)
    num_broken = sum(chunk.num_broken for chunk in chunks)
    scores: dict[str, float] = {}
    parts = [chunk.features for chunk in chunks if chunk.features is not None]
    if evaluation.real is not None:
        is_enough = min(num, len(evaluation.real)) >= 2
        # eigenvalues in float64, which takes minutes on few CPU cores and works on CUDA alone
        device = world.device if world.device.type == "cuda" else torch.device("cpu")
        real = evaluation.real.to(device)
        drawn = torch.cat(parts).to(device) if parts else real[:0]
        if "fid" in settings.metrics:
            scores["fid"] = frechet_distance(real, drawn) if is_enough else math.nan
        if "kid" in settings.metrics:
            mean, deviation = kernel_distance(real, drawn) if is_enough else (math.nan, math.nan)
            scores |= {"kid": mean, "kid_std": deviation}
    if "clip_score" in settings.metrics:
        total = math.fsum(chunk.clip_sum for chunk in chunks)
        scores["clip_score"] = max(total / num, 0.0) if num else math.nan
    if num_broken:
        scores["eval_broken"] = num_broken
    return scores


def _warn_of_few(num_real: int, num_drawn: int) -> None:
    if min(num_real, num_drawn) < _FEW_FOR_FID:
        warnings.warn(
            f"FID of {num_drawn} drawn and {num_real} held-out pictures is biased upwards, and is "
            f"to be compared with none of other numbers; take {_FEW_FOR_FID} or more "
            "(evaluation.num_images), or kid, which has no bias",
            stacklevel=3,
        )


def _settings(config: DiffusionRun) -> EvaluationConfig:
    if config.evaluation is None:
        raise ValueError("the run has no evaluation; give evaluation.data")
    return config.evaluation
