"""What does a micro-batch teach? The denoising loss (DDPM, algorithm 1, lines 2 to 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.config import DiffusionRun
from latentdiff.devices import autocast
from latentdiff.likelihood import PIXEL_BINS, vlb_loss
from latentdiff.loss import denoising_loss
from latentdiff.pipeline import Pipeline
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import Conditioning, TextEncoder
from latentdiff.training.feed import clean_latents
from latentdiff.training.micro import MicroBatch
from latentdiff.unet import as_network


class Denoising(nn.Module):
    """What is trained, as the one module that ranks share.

    Args:
        unet: of diffusers.
        text: the text tower, where it is trained too.
        channels_last: memory format of what the U-Net works on.
    """

    def __init__(self, unet: Any, text: TextEncoder | None, channels_last: bool) -> None:
        super().__init__()
        self.unet = unet
        self.text = text
        self._channels_last = channels_last

    def forward(
        self, noisy: Tensor, t: Tensor, token_ids: Tensor | None, cond: Conditioning | None
    ) -> Tensor:
        """What the network says of noisy [b, c, h, w] at t [b].

        Args:
            noisy: [b, c, h, w].
            t: [b] timesteps.
            token_ids: [b, n] for a tower that is trained here.
            cond: from a frozen tower; None for that, and for a model without text.
        """
        if self.text is not None and token_ids is not None:
            cond = self.text.encode_ids(token_ids)
        return as_network(self.unet, self._channels_last)(noisy, t, cond)


def blocks_of(unet: Any, text: TextEncoder | None) -> list[nn.Module]:
    """What is gathered, compiled and computed again as one.

    Args:
        unet: of diffusers.
        text: the text tower, where it is trained too.
    """
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    if text is not None:
        tower = getattr(text.model, "text_model", text.model)
        blocks += tower.encoder.layers
    return blocks


class BatchLoss(NamedTuple):
    """What a micro-batch comes to.

    Attributes:
        share: its share of the step's loss, 0-dim: shares add up over micro-batches and ranks.
        each: [b], of every sample, without gradient.
    """

    share: Tensor
    each: Tensor


def batch_loss(
    network: nn.Module, model: Pipeline, micro: MicroBatch, config: DiffusionRun
) -> BatchLoss:
    """The denoising loss of one micro-batch.

    Timesteps, noise and caption drops depend on (seed, position) alone; `feed.prepare` drew them.

    Args:
        network: a `Denoising`, as the ranks share it.
        model: its frozen parts, and the forward process.
        micro: the micro-batch, on the device.
        config: the run.
    """
    objective, numbers, noise = config.objective, micro.numbers, micro.noise
    with autocast(micro.noise.device, config.loop.precision):
        clean = clean_latents(model.autoencoder, micro)
    noisy = numbers.add_noise(clean, micro.perturbed_noise)

    with autocast(clean.device, config.loop.precision):
        cond = None
        if model.text is not None and not config.train_text and micro.token_ids is not None:
            with torch.no_grad():
                cond = model.text.encode_ids(micro.token_ids)
        output = network(noisy, numbers.t, micro.token_ids, cond)

    predicted = output[:, : clean.shape[1]]  # a learned variance has as many channels again
    expected = numbers.target(clean, noise)
    huber_c = objective.loss.c if objective.loss.kind == "huber" else None
    losses = denoising_loss(predicted, expected, numbers.weight, huber_c)
    if objective.learned_variance:
        assert isinstance(model.schedule, NoiseSchedule)  # the config has seen to it
        bins = PIXEL_BINS if model.autoencoder.is_identity else None
        bound = vlb_loss(model.schedule, output, clean, noisy, micro.t, model.prediction, bins)
        losses = losses + objective.vlb_weight * bound
    return BatchLoss((losses * micro.valid).sum() / micro.num_planned, losses.detach())
