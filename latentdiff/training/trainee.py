"""What is trained in a run: which parts, frozen or not, and shared among the ranks how?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from latentdiff.training.denoising import Denoising


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
    config = _with_vocabulary(config, loader, world, anew)
    torch.manual_seed(config.seed)  # the same first weights on all ranks
    model = Pipeline.new(config).to(world.device)
    _check(model, loader, config)
    model.autoencoder.eval().requires_grad_(False)
    model.unet.train()
    if model.text is not None:
        model.text.train(config.train_text).requires_grad_(config.train_text)
    if not config.loop.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    text = model.text if config.train_text else None
    network = Denoising(model.unet, text, config.loop.channels_last)
    blocks = _blocks(model, config.train_text)
    if config.parallel.activation_checkpointing:
        model.unet.enable_gradient_checkpointing()
        if text is not None:
            text.model.gradient_checkpointing_enable()
    if config.parallel.compile:
        for block in blocks:
            block.compile()
    shared = wrap(network, blocks, config.parallel, config.loop.precision, world)
    weights = {name: w for name, w in network.named_parameters() if w.requires_grad}
    return Trainee(model, shared, weights, config)


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
        model.save(target, torch.float16 if config.export_dtype == "fp16" else torch.float32)
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
    model = Pipeline.new(trainee.config)
    parts = Denoising(model.unet, model.text, channels_last=False)
    with torch.no_grad():
        for name, weight in parts.named_parameters():
            if name in tensors:
                weight.copy_(tensors[name])
    return model


def _with_vocabulary(
    config: DiffusionRun, loader: Loader, world: World, anew: bool
) -> DiffusionRun:
    """The run with a vocabulary: learned by the first rank, once, and kept in the run directory."""
    text = config.text
    if (
        config.init_from is not None
        or not isinstance(text, SmallTextConfig)
        or text.pretrained is not None
        or text.tokenizer.pretrained is not None
    ):
        return config
    place = Path(config.out) / "tokenizer"
    if world.is_first and (anew or not place.is_dir()):
        words = train_tokenizer(
            vocabulary_captions(loader), text.tokenizer.vocab_size, text.context_length
        )
        with staged(place) as partial:
            save_tokenizer(words, partial)
    world.barrier()
    tokenizer = text.tokenizer.model_copy(update={"pretrained": str(place)})
    return config.model_copy(update={"text": text.model_copy(update={"tokenizer": tokenizer})})


def _blocks(model: Pipeline, with_text: bool) -> list[nn.Module]:
    """What is gathered, compiled and computed again as one."""
    unet: Any = model.unet
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    if with_text and model.text is not None:
        tower = getattr(model.text.model, "text_model", model.text.model)
        blocks += tower.encoder.layers
    return blocks


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
