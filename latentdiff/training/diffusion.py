"""How is a diffusion model trained? Data, loss, step, EMA, log, save (DDPM, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.loader import Loader
from latentdiff.build import build_weighting
from latentdiff.config import DiffusionRun
from latentdiff.devices import autocast, resolve_device
from latentdiff.ema import Ema
from latentdiff.likelihood import PIXEL_BINS, vlb_loss
from latentdiff.loss import denoising_loss, drop_captions, drop_ids, loss_weight, target
from latentdiff.pairing import check_model, check_tokenizer, tokenizer_hash
from latentdiff.pictures import grid
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import seed_dropout, uniform
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import Conditioning, TextEncoder
from latentdiff.training.captions import vocabulary_captions
from latentdiff.training.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from latentdiff.training.latents import LatentCache, draw_stored, encode_batch
from latentdiff.training.log import RunLog
from latentdiff.training.noise import draw_noise, perturb, timestep_draws
from latentdiff.training.optim import (
    load_optimizer_tensors,
    lr_at,
    make_adamw,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)
from latentdiff.training.restoring import restore_loader
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
    loader = Loader(
        config.data,
        config.seed,
        loop.batch_size,
        splits=loop.accumulation,
        with_images=not config.cache_latents,
        ledger_path=out / "ledger.jsonl",
    )
    captions = vocabulary_captions(loader)
    model = Pipeline.new(config, captions).to(device)
    if not loop.channels_last:
        model.unet.to(memory_format=torch.contiguous_format)
    _check_latents(loader, model)
    trained = _prepare(model, config)
    optimizer = make_adamw(trained, config.optimizer)
    weights = named_trainable(trained)
    ema = Ema(weights, config.ema.decay)

    words = None if model.text is None else tokenizer_hash(model.text)
    step = 0
    if (checkpoint := find_checkpoint(out / "checkpoints", resume)) is not None:
        step = checkpoint.step
        restore_loader(checkpoint, loader)
        _check_words(checkpoint, words)
        checkpoint.restore("model", weights)
        load_optimizer_tensors(optimizer, weights, checkpoint.group("optimizer"))
        ema.load(checkpoint.group("ema"), checkpoint.state["ema_updates"])
    cache = LatentCache.encode(model.autoencoder, loader, device) if config.cache_latents else None

    batches = iter(loader)
    with RunLog(out, config, loop.num_steps, step) as log:
        while step < loop.num_steps:
            total = torch.zeros((), device=device)
            for _ in range(loop.accumulation):
                batch = next(batches).good()
                if not len(batch):
                    continue
                clean = clean_latents(model, cache, batch, config.seed, device)
                seed_dropout(config.seed, int(batch.positions[0]))
                share = len(batch) / batch.num_planned
                loss = batch_loss(model, clean, batch, config) * share
                loss.backward()
                total += loss.detach()
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
                state = {
                    "ema_updates": ema.num_updates,
                    "loader": loader.state(),
                    "tokenizer": words,
                }
                save_checkpoint(out / "checkpoints", step, groups, state, loop.keep_checkpoints)

    if model.diffusers_class is None:
        return out
    target_dir = Path(config.export or out / "model")
    with ema.applied():
        model.save(target_dir, torch.float16 if config.export_dtype == "fp16" else torch.float32)
    return target_dir


def batch_loss(model: Pipeline, clean: Tensor, batch: Batch, config: DiffusionRun) -> Tensor:
    """The denoising loss of one micro-batch (DDPM, algorithm 1, lines 2 to 5).

    Timesteps, noise and caption drops depend on (seed, position) alone.
    """
    objective, schedule, seed = config.objective, model.schedule, config.seed
    positions = batch.positions.tolist()

    draws = timestep_draws(positions, seed, config.loop.batch_size, objective.stratified_timesteps)
    # t stays on the CPU beside the float64 schedule, which not every device could hold
    t = schedule.draw_timesteps(draws)
    noise = draw_noise(clean, positions, seed, objective.offset_noise)
    perturbed = perturb(noise, positions, seed, objective.input_perturbation)
    noisy = schedule.add_noise(clean, perturbed, t)

    with autocast(clean.device, config.loop.precision):
        cond = None
        if model.text is not None:
            dropped = torch.from_numpy(uniform(seed, positions, "caption_drop"))
            cond = _condition(model.text, batch, dropped, objective.caption_dropout)
        output = as_network(model.unet)(noisy, t.float().to(clean.device), cond)

    predicted = output[:, : clean.shape[1]]  # a learned variance has as many channels again
    expected = target(schedule, clean, noise, t, model.prediction)
    weighting = build_weighting(objective.weighting, schedule.sigma_data)
    weight = loss_weight(weighting, schedule.snr(t), model.prediction, schedule.sigma_data)
    huber_c = objective.loss.c if objective.loss.kind == "huber" else None
    loss = denoising_loss(predicted, expected, weight, huber_c)
    if objective.learned_variance:
        assert isinstance(schedule, NoiseSchedule)  # the config has seen to it
        bins = PIXEL_BINS if model.autoencoder.is_identity else None
        bound = vlb_loss(schedule, output, clean, noisy, t, model.prediction, bins)
        loss = loss + objective.vlb_weight * bound
    return loss


def clean_latents(
    model: Pipeline, cache: LatentCache | None, batch: Batch, seed: int, device: torch.device
) -> Tensor:
    """What the batch's pictures are to the U-Net: held, stored, or encoded now."""
    if cache is not None:
        return cache.draw(batch, seed).to(device)
    if batch.latents is not None:
        return draw_stored(batch, seed, device)
    return encode_batch(model.autoencoder, batch, seed, device)


def _condition(text: TextEncoder, batch: Batch, dropped: Tensor, rate: float) -> Conditioning:
    """Captions or their stored ids, some of them replaced by the empty one, through the tower."""
    if batch.tokens is None:
        return text.encode(drop_captions(list(batch.captions), dropped, rate))
    empty = text.tokenize([""])[0]
    return text.encode_ids(drop_ids(batch.tokens, empty, dropped, rate))


def sample_grid(model: Pipeline, config: DiffusionRun) -> Any:
    """The run's prompts drawn with its own seed, as one picture."""
    networks = [model.unet] + ([model.text] if model.text is not None else [])
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    images = model.generate(
        list(config.samples.prompts),
        num_images=config.samples.num_images,
        seed=config.samples.seed,
        sampler=config.samples.sampler,
        steps=config.samples.num_steps,
        guidance_scale=config.samples.guidance_scale,
        batch_size=16,
    )
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    return grid(images)


def _check_latents(loader: Loader, model: Pipeline) -> None:
    """Refuse stored latents or token ids that another model made."""
    if loader.latents is None:
        return
    check_model(loader.latents, model.autoencoder)
    if model.text is not None and loader.latents.tokenizer_hash is not None:
        check_tokenizer(loader.latents, model.text)


def _prepare(model: Pipeline, config: DiffusionRun) -> dict[str, nn.Module]:
    """Freeze what is not trained; returns what is, by name."""
    _check_variance(model, config)
    if config.export is not None and model.diffusers_class is None:
        raise ValueError(
            f"export is {config.export}, but diffusers' layouts hold a text tower with an "
            "autoencoder (Stable Diffusion) or neither (DDPM), not one of the two; set export: null"
        )
    model.autoencoder.eval().requires_grad_(False)
    trained: dict[str, nn.Module] = {"unet": model.unet.train()}
    if model.text is not None:
        if config.train_text:
            trained["text"] = model.text.train()
        else:
            model.text.eval().requires_grad_(False)
    return trained


def _check_variance(model: Pipeline, config: DiffusionRun) -> None:
    learned = config.objective.learned_variance
    channels, found = model.autoencoder.latent_channels, model.unet.config.out_channels
    wanted = 2 * channels if learned else channels
    if found != wanted:
        raise ValueError(
            f"objective.learned_variance is {str(learned).lower()}, for which the U-Net needs "
            f"{wanted} output channels; {config.init_from or 'it'} has {found}; set "
            f"objective.learned_variance={str(not learned).lower()}"
        )


def _check_words(checkpoint: Checkpoint, words: str | None) -> None:
    if checkpoint.state.get("tokenizer", words) != words:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} cannot go on here: the vocabulary was "
            "learned again and is another one; set text.pretrained to a directory with the run's "
            "tokenizer, or install the version of tokenizers that the run began with"
        )
