"""How is a diffusion model trained? Data, loss, step, EMA, log, save (DDPM, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.loader import Batch, Loader
from latentdiff.config import DiffusionRun
from latentdiff.devices import autocast, resolve_device
from latentdiff.ema import Ema
from latentdiff.loss import (
    denoising_loss,
    drop_captions,
    min_snr_weight,
    target,
    uniform_timesteps,
)
from latentdiff.pictures import grid
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal, uniform
from latentdiff.training.captions import vocabulary_captions
from latentdiff.training.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from latentdiff.training.latents import LatentCache, encode_batch
from latentdiff.training.log import RunLog
from latentdiff.training.optim import (
    load_optimizer_tensors,
    lr_at,
    make_adamw,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)
from latentdiff.unet import as_network


def train_diffusion(config: DiffusionRun, resume: str = "auto") -> Path:
    """Run `config` to its end.

    Args:
        config: the run.
        resume: `auto` (the run directory's newest valid checkpoint), `none`, or a checkpoint.

    Returns:
        The exported model's directory; the run directory for a model that diffusers' layout has no
        place for.
    """
    torch.manual_seed(config.seed)
    device, out, loop = resolve_device(config.loop.device), Path(config.out), config.loop
    micro = loop.batch_size // loop.accumulation
    loader = Loader(config.data, config.seed, micro, with_images=not config.cache_latents)
    captions = vocabulary_captions(loader.index, config.data.captions, config.seed)
    model = Pipeline.new(config, captions).to(device)
    if not loop.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    trained = _prepare(model, config)
    optimizer = make_adamw(trained, config.optimizer)
    weights = named_trainable(trained)
    ema = Ema(weights, config.ema.decay)

    step = 0
    if (checkpoint := find_checkpoint(out / "checkpoints", resume)) is not None:
        step = checkpoint.step
        _check_data(checkpoint, loader)
        checkpoint.restore("model", weights)
        load_optimizer_tensors(optimizer, weights, checkpoint.group("optimizer"))
        ema.load(checkpoint.group("ema"), checkpoint.state["ema_updates"])
    loader.cursor = step * loop.batch_size
    cache = LatentCache.encode(model.autoencoder, loader, device) if config.cache_latents else None

    batches = iter(loader)
    with RunLog(out, config, loop.num_steps, step) as log:
        while step < loop.num_steps:
            total = torch.zeros((), device=device)
            for _ in range(loop.accumulation):
                batch = next(batches)
                clean = (
                    cache.draw(batch, config.seed).to(device)
                    if cache is not None
                    else encode_batch(model.autoencoder, batch, config.seed, device)
                )
                loss = batch_loss(model, clean, batch, config)
                (loss / loop.accumulation).backward()
                total += loss.detach() / loop.accumulation
            rate = lr_at(step, loop.num_steps, config.optimizer)
            norm = step_optimizer(optimizer, weights.values(), rate, config.optimizer)
            ema.update()
            step += 1
            last = step == loop.num_steps
            if step % loop.log_every == 0 or last:
                scalars = {"loss": total.item(), "grad_norm": norm.item(), "lr": rate}
                log.scalars(step, scalars, loop.batch_size)
            if loop.sample_every and (step % loop.sample_every == 0 or last):
                with ema.applied():
                    log.picture(step, "samples", sample_grid(model, config))
            if step % loop.checkpoint_every == 0 or last:
                groups: dict[str, Mapping[str, Tensor]] = {
                    "model": weights,
                    "optimizer": optimizer_tensors(optimizer, weights),
                    "ema": ema.averages,
                }
                state = {"ema_updates": ema.num_updates, "fingerprint": loader.index.fingerprint}
                save_checkpoint(out / "checkpoints", step, groups, state, loop.keep_checkpoints)

    if model.text is None or model.autoencoder.is_identity:
        return out
    target_dir = Path(config.export or out / "model")
    with ema.applied():
        model.save(target_dir, torch.float16 if config.export_dtype == "fp16" else torch.float32)
    return target_dir


def batch_loss(model: Pipeline, clean: Tensor, batch: Batch, config: DiffusionRun) -> Tensor:
    """The denoising loss of one micro-batch (DDPM, algorithm 1, lines 2 to 5).

    Timesteps, noise and caption drops depend on (seed, position) alone.
    """
    positions = range(batch.position, batch.position + len(clean))
    draws = uniform(config.seed, positions, "timestep")
    # t stays on the CPU beside the float64 schedule, which not every device could hold
    t = uniform_timesteps(torch.from_numpy(draws), model.schedule.num_timesteps)
    noise = normal(clean.shape[1:], config.seed, positions, "noise").to(clean.device)
    noisy = model.schedule.add_noise(clean, noise, t)
    objective = config.objective
    weight = None
    if objective.min_snr_gamma is not None:
        weight = min_snr_weight(model.schedule.snr(t), objective.min_snr_gamma, model.prediction)
    with autocast(clean.device, config.loop.precision):
        cond = None
        if model.text is not None:
            dropped = torch.from_numpy(uniform(config.seed, positions, "caption_drop"))
            captions = drop_captions(list(batch.captions), dropped, objective.caption_dropout)
            cond = model.text.encode(captions)
        output = as_network(model.unet)(noisy, t.to(clean.device), cond)
    expected = target(model.schedule, clean, noise, t, model.prediction)
    return denoising_loss(output, expected, weight)


def sample_grid(model: Pipeline, config: DiffusionRun) -> Any:
    """The run's prompts drawn with its own seed, as one picture."""
    networks = [model.unet] + ([model.text] if model.text is not None else [])
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    images = model.generate(
        list(config.samples.prompts),
        seed=config.samples.seed,
        steps=config.samples.num_steps,
        guidance_scale=config.samples.guidance_scale,
        batch_size=16,
    )
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    return grid(images)


def _prepare(model: Pipeline, config: DiffusionRun) -> dict[str, nn.Module]:
    """Freeze what is not trained; returns what is, by name."""
    model.autoencoder.eval().requires_grad_(False)
    trained: dict[str, nn.Module] = {"unet": model.unet.train()}
    if model.text is not None:
        if config.train_text:
            trained["text"] = model.text.train()
        else:
            model.text.eval().requires_grad_(False)
    return trained


def _check_data(checkpoint: Checkpoint, loader: Loader) -> None:
    saved, here = checkpoint.state.get("fingerprint"), loader.index.fingerprint
    if saved != here:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} was trained on other data (fingerprint "
            f"{str(saved)[:12]}, here {here[:12]}); give it the same data.shards and data.where, "
            "another `out`, or --resume none"
        )
