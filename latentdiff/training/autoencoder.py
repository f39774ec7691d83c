"""How is an autoencoder trained? Data, loss, step, EMA, log, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.loader import Loader
from latentdiff.config import AutoencoderRun
from latentdiff.devices import autocast, resolve_device
from latentdiff.ema import Ema
from latentdiff.parallel import World, check_alone, gradient_norm
from latentdiff.randomness import normal
from latentdiff.reconstruction import score_reconstructions
from latentdiff.training.checkpoint import Checkpoint, Checkpoints
from latentdiff.training.commit import Keep
from latentdiff.training.log import RunLog
from latentdiff.training.optim import (
    build_optimizer,
    lr_at,
    materialize,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)
from latentdiff.training.restoring import restore_loader
from vae.autoencoder import Autoencoder
from vae.discriminator import discriminator_loss
from vae.latent_norm import LatentNorm
from vae.objective import Objective, reconstruct

_NORM_IMAGES = 2048  # pictures that the latent norm is measured on


def train_autoencoder(config: AutoencoderRun, resume: str = "auto") -> Path:
    """Run `config` to its end and export the autoencoder; returns its directory.

    Raises:
        ValueError: no KL autoencoder, a picture size that it does not divide, or a checkpoint that
            does not fit.
    """
    check_alone("an autoencoder")
    torch.manual_seed(config.seed)
    device, out = resolve_device(config.loop.device), Path(config.out)
    autoencoder = Autoencoder.build(config.autoencoder)
    _check(autoencoder, config)
    format_ = torch.channels_last if config.loop.channels_last else torch.contiguous_format
    model = autoencoder.model.to(device, memory_format=format_).train()
    objective = Objective(config.objective).to(device)
    weights = named_trainable({"autoencoder": model})
    optimizer = build_optimizer(weights, config.optimizer)
    ema = Ema(weights, config.ema) if config.ema is not None else None
    critic = _Critic(objective, config)

    step = 0
    keep = Keep(config.loop.keep_checkpoints)
    checkpoints = Checkpoints(out / "checkpoints", World(device), keep)
    if (checkpoint := checkpoints.find(resume)) is not None:
        step = checkpoint.step
        checkpoint.restore("model", weights)
        checkpoint.restore("optimizer", optimizer_tensors(optimizer, weights))
        critic.load(checkpoint)
        if ema is not None:
            checkpoint.restore("ema", ema.tensors())

    loop = config.loop
    loader = Loader(
        config.data,
        config.seed,
        loop.batch_size,
        splits=loop.accumulation,
        ledger_path=out / "ledger.jsonl",
    )
    if checkpoint is not None:
        restore_loader(checkpoint, loader)
    batches = iter(loader)
    channels, downscale = autoencoder.latent_channels, autoencoder.downscale

    with RunLog(out, config, loop.num_steps, step) as log:
        while step < loop.num_steps:
            totals: dict[str, Tensor] = {}
            pairs: list[tuple[Tensor, Tensor]] = []  # real, reconstructed
            for _ in range(loop.accumulation):
                batch = next(batches).good()
                if not len(batch):
                    continue
                image = batch.images.to(device, memory_format=format_)
                positions = batch.positions.tolist()
                shape = (channels, image.shape[2] // downscale, image.shape[3] // downscale)
                noise = normal(shape, config.seed, positions, "posterior")
                with autocast(device, loop.precision):
                    passed = reconstruct(model, image, noise.to(device))
                    terms = objective(passed, step)
                share = len(batch) / batch.num_planned
                (terms["loss"] * share).backward()
                pairs.append((image, passed.output.detach()))
                for name, value in terms.items():
                    totals[name] = totals.get(name, 0) + value.detach() * share
            rate = lr_at(step, loop.num_steps, config.optimizer)
            norm = totals["grad_norm"] = gradient_norm(weights.values())
            step_optimizer(optimizer, weights.values(), norm, None, rate, config.optimizer)
            if pairs and objective.adversarial_at(step) is not None:
                totals["critic_loss"] = critic.step(pairs)
            step += 1
            if ema is not None:
                ema.update(step)
            if step % loop.log_every == 0 or step == loop.num_steps:
                log.scalars(
                    step, {k: v.item() for k, v in totals.items()} | {"lr": rate}, loop.batch_size
                )
            if config.val is not None and loop.sample_every and step % loop.sample_every == 0:
                _validate(autoencoder, ema, config, device, log, step)
            if step % loop.checkpoint_every == 0 or step == loop.num_steps:
                groups = {
                    "model": weights,
                    "optimizer": optimizer_tensors(optimizer, weights),
                    "ema": ema.tensors() if ema is not None else {},
                    **critic.groups(),
                }
                state = {"loader": loader.state(), "config": config.model_dump(mode="json")}
                checkpoints.save(step, groups, state, is_last=step == loop.num_steps)
    checkpoints.close()

    with ema.applied() if ema is not None else nullcontext():
        return _export(autoencoder.eval(), config, device)


class _Critic:
    """The discriminator's own optimiser; does nothing where the term is switched off."""

    def __init__(self, objective: Objective, config: AutoencoderRun) -> None:
        term = config.objective.adversarial
        self.module = objective.discriminator
        self.weights = named_trainable({"critic": self.module} if self.module is not None else {})
        self.optimizer = None
        if term is not None:
            self.optimizer = torch.optim.AdamW(self.weights.values(), term.lr, (0.5, 0.9))
            materialize(self.optimizer)

    def step(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One step on all micro-batches (real, fake); returns the mean loss."""
        assert self.module is not None and self.optimizer is not None
        self.optimizer.zero_grad(set_to_none=True)  # the generator's pass left gradients here
        losses: list[Tensor] = []
        for real, fake in pairs:
            loss = discriminator_loss(self.module(real), self.module(fake)) / len(pairs)
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def groups(self) -> dict[str, dict[str, Tensor]]:
        if self.optimizer is None:
            return {}
        return {
            "critic": dict(self.weights),
            "critic_optimizer": optimizer_tensors(self.optimizer, self.weights),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore it; a critic that the checkpoint does not have yet starts fresh."""
        if self.optimizer is None or not checkpoint.group("critic"):
            return
        checkpoint.restore("critic", self.weights)
        checkpoint.restore("critic_optimizer", optimizer_tensors(self.optimizer, self.weights))


def _check(autoencoder: Autoencoder, config: AutoencoderRun) -> None:
    """Refuse at the start what would fail at a later step, or at the export."""
    from diffusers import AutoencoderKL

    if not isinstance(autoencoder.model, AutoencoderKL):
        raise ValueError(
            f"autoencoder.pretrained {config.autoencoder.pretrained} is an "
            f"{type(autoencoder.model).__name__}; only an AutoencoderKL can be trained"
        )
    sizes = {"data.size_px": config.data.size_px, "data.crop_px": config.data.output_px}
    if config.data.buckets is not None:
        sizes = {"data.buckets.step_px": config.data.buckets.step_px}
    if config.data.payload != "images":
        raise ValueError(
            f"an autoencoder is trained on pictures; got data.payload {config.data.payload}; give "
            "shards of images"
        )
    if config.val is not None:
        sizes["val.size_px"] = config.val.side_step_px
    for name, px in sizes.items():
        if px % autoencoder.downscale:
            raise ValueError(
                f"{name} must be a multiple of the autoencoder's {autoencoder.downscale}; got {px}"
            )


def _validate(
    autoencoder: Autoencoder,
    ema: Ema | None,
    config: AutoencoderRun,
    device: torch.device,
    log: RunLog,
    step: int,
) -> None:
    assert config.val is not None
    autoencoder.eval()
    with ema.applied() if ema is not None else nullcontext():
        score, sheet = score_reconstructions(autoencoder, config.val, device, max_images=256)
    autoencoder.train()
    path = log.picture(step, "reconstructions", sheet)
    log.line(f"step {step}  val PSNR {score.psnr_db:.2f} dB  SSIM {score.ssim:.4f}  {path}", True)


@torch.no_grad()
def _export(autoencoder: Autoencoder, config: AutoencoderRun, device: torch.device) -> Path:
    """Measure the latent norm on whole training pictures from all shards, fold it in, save."""
    whole = config.data.model_copy(update={"crop_px": None})
    loader = Loader(whole, config.seed, batch_size=1)
    count = min(_NORM_IMAGES, len(loader))
    indices = [i * len(loader) // count for i in range(count)]
    batches = (
        torch.stack([loader.image(i) for i in indices[start : start + 64]]).to(device)
        for start in range(0, count, 64)
    )
    autoencoder.norm = LatentNorm.from_scalars()
    norm = LatentNorm.measure(autoencoder.encode(images) for images in batches)
    autoencoder.norm = norm if autoencoder.folds_norm else norm.pooled()
    target = Path(config.export or Path(config.out) / "autoencoder")
    autoencoder.save(target)
    return target
