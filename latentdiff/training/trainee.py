"""What is trained in a run: which parts, frozen or not, and shared among the ranks how?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun, SmallTextConfig
from latentdiff.files import staged
from latentdiff.pairing import check_model, check_tokenizer, tokenizer_hash
from latentdiff.parallel import World, is_sharded, whole, wrap
from latentdiff.pipeline import Pipeline
from latentdiff.text import save_tokenizer, train_tokenizer
from latentdiff.training.captions import vocabulary_captions
from latentdiff.training.checkpoint import Checkpoint
from latentdiff.training.denoising import Denoising, blocks_of

VOCABULARY = "tokenizer"  # where a run directory has the one that the run learned
EXPORT_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Trainee:
    """A model in training.

    Attributes:
        model: its parts; those that are not trained are frozen.
        network: what is called for the forward pass: a `Denoising`, shared among the ranks.
        weights: name -> parameter, of all that is trained.
        config: the run's, with the vocabulary's place in it.
    """

    model: Pipeline
    network: nn.Module
    weights: dict[str, nn.Parameter]
    config: DiffusionRun

    @property
    def words(self) -> str | None:
        """Hash of the vocabulary; None for a model without text."""
        return None if self.model.text is None else tokenizer_hash(self.model.text)

    @property
    def home(self) -> torch.device:
        """Where the weights are: the device, or the host if they are offloaded."""
        return next(iter(self.weights.values())).device


def new_trainee(config: DiffusionRun, loader: Loader, world: World, *, anew: bool) -> Trainee:
    """Build a run's model on this rank's device and share it among the ranks.

    Args:
        config: the run.
        loader: for a vocabulary that is learned from its captions.
        world: the ranks.
        anew: learn the vocabulary even if the run directory holds one.

    Raises:
        ValueError: parts that do not fit each other, the data or the export.
    """
    config = _learn_vocabulary(config, loader, world, anew)
    model = first_model(config).to(world.device)
    _check(model, loader, config)
    model.autoencoder.eval().requires_grad_(False)
    model.unet.train()
    if model.text is not None:
        model.text.train(config.train_text).requires_grad_(config.train_text)
    if not config.loop.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    text = model.text if config.train_text else None
    network = Denoising(model.unet, text, config.loop.channels_last)
    blocks = blocks_of(model.unet, text)
    if config.parallel.activation_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if text is not None:
            text.model.gradient_checkpointing_enable()
    if config.parallel.compile:
        for block in blocks:
            block.compile()
    precision, deterministic = config.loop.precision, config.loop.deterministic
    shared = wrap(network, blocks, config.parallel, precision, world, deterministic)
    weights = {name: w for name, w in network.named_parameters() if w.requires_grad}
    return Trainee(model, shared, weights, config)


def first_model(config: DiffusionRun) -> Pipeline:
    """A run's model on the host before its first step: the same on all ranks and at the export.

    Args:
        config: the run, with the vocabulary's place in it.
    """
    torch.manual_seed(config.seed)
    return Pipeline.new(config)


@torch.no_grad()
def fill(model: Pipeline, config: DiffusionRun, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Give a run's `first_model` what was trained; what was not stays as it is.

    Args:
        model: on the host.
        config: the run.
        weights: (name, whole tensor) of all that is trained, named as `Trainee.weights` names it;
            one at a time is in memory, if they come so.

    Raises:
        ValueError: they are another model's.
    """
    text = model.text if config.train_text else None
    left = dict(Denoising(model.unet, text, channels_last=False).named_parameters())
    for name, weight in weights:
        if name not in left or left[name].shape != weight.shape:
            found = tuple(left[name].shape) if name in left else "none"
            raise ValueError(
                f"the weights are not those of the config's model: {name} is "
                f"{tuple(weight.shape)}, expected {found}; use the version of latentdiff, the "
                "pretrained parts and the vocabulary that they were trained with"
            )
        left.pop(name).copy_(weight)
    if left:
        raise ValueError(
            f"the weights are not all of the config's model: {len(left)} are missing, such as "
            f"{next(iter(left))}; use the version of latentdiff that they were trained with"
        )


def check_words(checkpoint: Checkpoint, words: str | None) -> None:
    """Refuse a checkpoint whose weights stand for other token ids."""
    if checkpoint.state.get("tokenizer", words) != words:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} cannot go on here: the vocabulary was "
            "learned again and is another one; set text.pretrained to a directory with the run's "
            "tokenizer, or install the version of tokenizers that the run began with"
        )


def export(trainee: Trainee, world: World) -> Path:
    """Save the model as its weights are now, whole, in diffusers' layout; all ranks must call it.

    Returns:
        The model's directory.
    """
    config, model = trainee.config, trainee.model
    target = Path(config.export or Path(config.out) / "model")
    if any(is_sharded(weight) for weight in trainee.weights.values()):
        model = _put_together(trainee, world)
    if world.is_first:
        model.save(target, EXPORT_DTYPES[config.export_dtype])
    world.barrier()
    return target


def _put_together(trainee: Trainee, world: World) -> Pipeline:
    """The model with whole weights on the first rank's host."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trainee.weights.items():
        full = whole(weight.detach())
        if world.is_first:
            tensors[name] = full.cpu()
    if not world.is_first:
        return trainee.model
    model = first_model(trainee.config)
    fill(model, trainee.config, tensors.items())
    return model


def learns_vocabulary(config: DiffusionRun) -> bool:
    """Whether a run makes its vocabulary itself, from its captions."""
    text = config.text
    return (
        config.init_from is None
        and isinstance(text, SmallTextConfig)
        and text.pretrained is None
        and text.tokenizer.pretrained is None
    )


def with_vocabulary(config: DiffusionRun, place: Path) -> DiffusionRun:
    """A run that learned its vocabulary, as one that is given it."""
    text = config.text
    assert isinstance(text, SmallTextConfig)
    tokenizer = text.tokenizer.model_copy(update={"pretrained": str(place)})
    return config.model_copy(update={"text": text.model_copy(update={"tokenizer": tokenizer})})


def _learn_vocabulary(
    config: DiffusionRun, loader: Loader, world: World, anew: bool
) -> DiffusionRun:
    """The run with a vocabulary: learned by the first rank, once, and kept in the run directory."""
    text = config.text
    if not learns_vocabulary(config):
        return config
    assert isinstance(text, SmallTextConfig)
    place = Path(config.out) / VOCABULARY
    if world.is_first and (anew or not place.is_dir()):
        words = train_tokenizer(
            vocabulary_captions(loader), text.tokenizer.vocab_size, text.context_length
        )
        with staged(place) as partial:
            save_tokenizer(words, partial)
    world.barrier()
    return with_vocabulary(config, place)


def _check(model: Pipeline, loader: Loader, config: DiffusionRun) -> None:
    """Refuse at the start what would fail at a later step, or at the export."""
    learned = config.objective.learned_variance
    channels, found = model.autoencoder.latent_channels, model.unet.config.out_channels
    wanted = 2 * channels if learned else channels
    if found != wanted:
        raise ValueError(
            f"objective.learned_variance is {str(learned).lower()}, for which the U-Net needs "
            f"{wanted} output channels; {config.init_from or 'it'} has {found}; set "
            f"objective.learned_variance={str(not learned).lower()}"
        )
    if config.export is not None and model.diffusers_class is None:
        raise ValueError(
            f"export is {config.export}, but diffusers' layouts hold a text tower with an "
            "autoencoder (Stable Diffusion) or neither (DDPM), not one of the two; set export: null"
        )
    if loader.latents is None:
        return
    check_model(loader.latents, model.autoencoder)
    if model.text is not None and loader.latents.tokenizer_hash is not None:
        check_tokenizer(loader.latents, model.text)
