"""Which ways of training are compared? This project's step, a plain loop, diffusers' script.

Each is a `step()` over the same batches with the same weights: it trains on the next batch, which
is on the device already, and returns its loss there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from train_made import Made, micro_batches

from data_pipelines.loader import Loader
from latentdiff.devices import autocast
from latentdiff.ema import Ema
from latentdiff.parallel import World, gradient_norm
from latentdiff.training.denoising import batch_loss
from latentdiff.training.feed import clean_latents
from latentdiff.training.health import Health
from latentdiff.training.micro import MicroBatch
from latentdiff.training.optim import build_optimizer, step_optimizer
from latentdiff.training.trainee import new_trainee


class Step(Protocol):
    """A way of training."""

    def step(self) -> Tensor:
        """Train on the next batch; returns its loss, 0-dim on the device."""
        ...


@dataclass(frozen=True)
class Options:
    """How this project's step runs.

    Attributes:
        changes: of the run's config, `section.name` -> value.
        fused: AdamW as one kernel, as the trainer has it; otherwise PyTorch's default.
        stored: latents come from shards; otherwise pictures are encoded in the step.
        bare: forward, loss, backward, AdamW, and nothing else.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = True
    stored: bool = True
    bare: bool = False


class OurStep:
    """The trainer's step: loss, backward, norm, verdict, clipped AdamW unless skipped, EMA."""

    def __init__(self, made: Made, options: Options) -> None:
        self._config = config = made.config(options.changes)
        loader = Loader(config.data, config.seed, config.loop.batch_size)
        self.trainee = new_trainee(config, loader, World(made.device), anew=False)
        self._weights = self.trainee.weights
        self._optimizer = build_optimizer(self._weights, config.optimizer)
        if not options.fused:
            self._optimizer = _default_adamw([*self._weights.values()], config.optimizer.lr)
        self._ema = None if options.bare else Ema(self._weights, config.ema)
        self._health = Health(config.health, made.device)
        self._options, self._num_steps = options, 0
        self.micros = micro_batches(made, self.trainee.model, config)
        if not options.stored:
            self.micros = [_with_pixels(micro, made) for micro in self.micros]
        self._batches = itertools.cycle(self.micros)

    def step(self) -> Tensor:
        """Train on the next batch."""
        trainee, config = self.trainee, self._config
        share = batch_loss(trainee.network, trainee.model, next(self._batches), config).share
        share.backward()
        self._num_steps += 1
        if self._ema is None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            return share.detach()
        norm = gradient_norm(self._weights.values())
        skip = self._health.judge(norm)
        rate = config.optimizer.lr
        if self._options.fused:
            step_optimizer(
                self._optimizer, self._weights.values(), norm, skip, rate, config.optimizer
            )
        else:
            torch.nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._ema.update(self._num_steps, skip)
        return share.detach()


class PlainStep:
    """A plain loop over diffusers' U-Net: latents and text embeddings lie ready; no EMA.

    Args:
        made: model and data.
        ours: whose batches it takes, and whose text tower has made its embeddings.
        compiled: the whole U-Net by torch.compile.
    """

    def __init__(self, made: Made, ours: OurStep, compiled: bool) -> None:
        from diffusers import DDPMScheduler

        self._precision = ours.trainee.config.loop.precision
        self._device = made.device
        self._unet = _unet(made).to(memory_format=torch.channels_last).train()
        self._parameters = [*self._unet.parameters()]
        self._call = torch.compile(self._unet) if compiled else self._unet
        self._scheduler: Any = DDPMScheduler.from_pretrained(made.model / "scheduler")
        rate = ours.trainee.config.optimizer.lr
        self._optimizer = _default_adamw(self._parameters, rate)
        self._batches = itertools.cycle(_inputs(ours, micro) for micro in ours.micros)

    def step(self) -> Tensor:
        """Train on the next batch."""
        clean, noise, t, tokens = next(self._batches)
        noisy = self._scheduler.add_noise(clean, noise, t)
        with autocast(self._device, self._precision):
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            output = self._call(noisy, t, encoder_hidden_states=tokens, return_dict=False)[0]
        loss = functional.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class ScriptStep:
    """The step of diffusers' examples/text_to_image/train_text_to_image.py, without accelerate.

    As its README's command runs it, with --use_ema and --mixed_precision: pictures and captions'
    ids are encoded in every step, the U-Net is neither compiled nor channels-last, and the loss is
    read from the device in every step, for the progress bar.

    Args:
        made: model and data.
        ours: whose batches it takes; their pictures are noise.
    """

    def __init__(self, made: Made, ours: OurStep) -> None:
        from diffusers import AutoencoderKL, DDPMScheduler
        from diffusers.training_utils import EMAModel
        from transformers import CLIPTextModel

        self._precision = ours.trainee.config.loop.precision
        self._device = device = made.device
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
        self._dtype = dtype
        self._vae: Any = AutoencoderKL.from_pretrained(made.model / "vae").requires_grad_(False)
        self._vae.to(device, dtype)
        tower: Any = CLIPTextModel.from_pretrained(made.model / "text_encoder")
        self._text = tower.requires_grad_(False).to(device, dtype)
        self._unet = _unet(made).train()
        self._scheduler: Any = DDPMScheduler.from_pretrained(made.model / "scheduler")
        self._optimizer = _default_adamw([*self._unet.parameters()], 1e-4)
        self._ema = EMAModel(self._unet.parameters())
        self._batches = itertools.cycle(
            (_pixels(micro, made), micro.token_ids) for micro in ours.micros
        )

    def step(self) -> Tensor:
        """Train on the next batch."""
        pixels, ids = next(self._batches)
        latents = self._vae.encode(pixels.to(self._dtype)).latent_dist.sample()
        latents = latents * self._vae.config.scaling_factor
        noise = torch.randn_like(latents)
        count = self._scheduler.config.num_train_timesteps
        t = torch.randint(0, count, (len(latents),), device=self._device)
        noisy = self._scheduler.add_noise(latents, noise, t)
        tokens = self._text(ids, return_dict=False)[0]
        with autocast(self._device, self._precision):
            output = self._unet(noisy, t, tokens, return_dict=False)[0]
        loss = functional.mse_loss(output.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._unet.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._ema.step(self._unet.parameters())
        loss.item()
        return loss.detach()


def _unet(made: Made) -> Any:
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(made.model / "unet")
    return unet.to(made.device)


def _default_adamw(parameters: list[Any], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)


@torch.no_grad()
def _inputs(ours: OurStep, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(clean latents, noise, timesteps, text embeddings), as our step makes them of a batch."""
    model = ours.trainee.model
    assert model.text is not None and micro.token_ids is not None
    clean = clean_latents(model.autoencoder, micro)
    with autocast(clean.device, ours.trainee.config.loop.precision):
        tokens = model.text.encode_ids(micro.token_ids).tokens
    return clean, micro.noise, micro.t.long().to(clean.device), tokens.clone()


def _pixels(micro: MicroBatch, made: Made) -> Tensor:
    """Pictures of noise, float32 [b, 3, h, w] in [-1, 1]."""
    side = made.size.size_px
    return torch.rand(len(micro), 3, side, side, device=made.device) * 2 - 1


def _with_pixels(micro: MicroBatch, made: Made) -> MicroBatch:
    side = made.size.size_px
    pixels = torch.randint(0, 256, (len(micro), side, side, 3), dtype=torch.uint8)
    return replace(micro, latents=None, pixels=pixels.to(made.device))
