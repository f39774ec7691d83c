"""How is a small text tower trained against images? CLIP's objective (Radford et al. 2021)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.loader import Loader
from latentdiff.build import build_text
from latentdiff.config import ContrastiveRun, ImageTowerConfig
from latentdiff.devices import autocast, resolve_device
from latentdiff.parallel import World, check_alone, gradient_norm
from latentdiff.text import TextEncoder
from latentdiff.training.captions import vocabulary_captions
from latentdiff.training.checkpoint import Checkpoints
from latentdiff.training.commit import Keep
from latentdiff.training.log import RunLog
from latentdiff.training.optim import (
    build_optimizer,
    lr_at,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)
from latentdiff.training.restoring import restore_loader

_MAX_LOGIT_SCALE = 100.0  # CLIP, section 2.5


class ImageTower(nn.Module):
    """A small residual convolutional network to one embedding a picture."""

    def __init__(self, config: ImageTowerConfig, width: int) -> None:
        super().__init__()
        first, *_ = config.channels
        self.stem = nn.Conv2d(3, first, 3, padding=1)
        pairs = zip(config.channels, [*config.channels[1:], config.channels[-1]], strict=True)
        self.blocks = nn.ModuleList(_Downsample(a, b) for a, b in pairs)
        self.head = nn.Linear(config.channels[-1], width)

    def forward(self, image: Tensor) -> Tensor:
        """Image [b, 3, h, w] in [-1, 1] -> [b, width]."""
        h = self.stem(F.avg_pool2d(image, 2))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((2, 3)))


class _Downsample(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, 2, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.conv1(F.silu(self.norm(x)))))
        return h + self.skip(F.avg_pool2d(x, 2))


class ContrastivePair(nn.Module):
    """The two towers' projections and the temperature."""

    def __init__(self, text: TextEncoder, config: ImageTowerConfig) -> None:
        super().__init__()
        self.text = text
        self.image = ImageTower(config, text.width)
        self.project = nn.Linear(text.width, text.width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, token_ids: Tensor) -> Tensor:
        """Logits [b, b]: scaled cosine of every picture (rows) with every caption (columns)."""
        pictures = F.normalize(self.image(images), dim=-1)
        words = F.normalize(self.project(self.text.pooled(token_ids)), dim=-1)
        return self.log_scale.exp().clamp(max=_MAX_LOGIT_SCALE) * pictures @ words.T


def contrastive_loss(logits: Tensor) -> Tensor:
    """Symmetric cross-entropy with the diagonal as the truth (CLIP, figure 3)."""
    truth = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def train_contrastive(config: ContrastiveRun, resume: str = "auto") -> Path:
    """Run `config` to its end; returns the directory with `text_encoder/` and `tokenizer/`."""
    check_alone("a text tower")
    torch.manual_seed(config.seed)
    device, out = resolve_device(config.loop.device), Path(config.out)
    loop = config.loop
    if loop.accumulation != 1:
        raise ValueError(
            f"a contrastive batch cannot be split; got loop.accumulation {loop.accumulation}; use 1"
        )
    if config.data.payload != "images" or config.data.buckets is not None:
        raise ValueError(
            f"the image tower takes square pictures; got data.payload {config.data.payload} and "
            f"buckets {config.data.buckets}; give shards of images and buckets: null"
        )
    loader = Loader(config.data, config.seed, loop.batch_size, ledger_path=out / "ledger.jsonl")
    captions = vocabulary_captions(loader)
    text = build_text(config.text, captions)
    assert text is not None
    pair = ContrastivePair(text, config.image).to(device)
    weights = named_trainable({"pair": pair})
    optimizer = build_optimizer(weights, config.optimizer)

    step = 0
    checkpoints = Checkpoints(out / "checkpoints", World(device), Keep(loop.keep_checkpoints))
    if (checkpoint := checkpoints.find(resume)) is not None:
        step = checkpoint.step
        checkpoint.restore("model", weights)
        checkpoint.restore("optimizer", optimizer_tensors(optimizer, weights))
        restore_loader(checkpoint, loader)

    batches = iter(loader)
    with RunLog(out, config, loop.num_steps, step) as log:
        while step < loop.num_steps:
            batch = next(batches).good()
            rate, logits, loss = lr_at(step, loop.num_steps, config.optimizer), None, None
            if len(batch):
                with autocast(device, loop.precision):
                    ids = text.tokenize(batch.captions).to(device)
                    logits = pair(batch.images.to(device), ids)
                    loss = contrastive_loss(logits.float())
                loss.backward()
            norm = gradient_norm(weights.values())
            step_optimizer(optimizer, weights.values(), norm, None, rate, config.optimizer)
            step += 1
            is_logged = step % loop.log_every == 0 or step == loop.num_steps
            if is_logged and logits is not None and loss is not None:
                truth = torch.arange(len(logits), device=device)
                accuracy = (logits.argmax(1) == truth).float().mean()
                scalars = {
                    "loss": loss.item(),
                    "accuracy": accuracy.item(),
                    "grad_norm": norm.item(),
                    "lr": rate,
                }
                log.scalars(step, scalars, loop.batch_size)
            if step % loop.checkpoint_every == 0 or step == loop.num_steps:
                groups = {"model": weights, "optimizer": optimizer_tensors(optimizer, weights)}
                state = {"loader": loader.state(), "config": config.model_dump(mode="json")}
                checkpoints.save(step, groups, state, is_last=step == loop.num_steps)
    checkpoints.close()

    target = Path(config.export or out / "text")
    text.save(target)
    return target
