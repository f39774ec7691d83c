"""How is a diffusion model trained? Data, loss, step, EMA, log, save: on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from torch import Tensor

from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun
from latentdiff.devices import choose_algorithms
from latentdiff.ema import Ema
from latentdiff.exitcodes import DIVERGED, PREEMPTED, SAVE_FAILED, RunEnded
from latentdiff.flops import device_peak_tflops
from latentdiff.parallel import World, gradient_norm, join, leave, mode_of, reducing, reshard
from latentdiff.randomness import seed_dropout
from latentdiff.training.checkpoint import Checkpoints
from latentdiff.training.commit import Keep
from latentdiff.training.denoising import batch_loss
from latentdiff.training.feed import Feed, check_same_data
from latentdiff.training.health import Diverged, Health
from latentdiff.training.latents import LatentCache
from latentdiff.training.ledgers import ledger_path, orphaned_ledgers, sum_accounts, write_ledger
from latentdiff.training.log import open_log
from latentdiff.training.looks import Looks, averaged
from latentdiff.training.meters import LossMeter, Pace, snapshot, update_ratio
from latentdiff.training.micro import Recipe
from latentdiff.training.optim import (
    build_optimizer,
    check_sharded,
    lr_at,
    optimizer_tensors,
    step_optimizer,
)
from latentdiff.training.plan import sample_flops
from latentdiff.training.positions import PositionLog
from latentdiff.training.preemption import Agreement, StopRequests
from latentdiff.training.restoring import after_restart, restore_loader
from latentdiff.training.trainee import check_words, export, new_trainee
from latentdiff.training.watchdog import LONG_S, Watchdog


def train_diffusion(config: DiffusionRun, resume: str = "auto") -> Path:
    """Run `config` to its end, with all the ranks that were launched.

    Args:
        config: the run.
        resume: `auto` (the run directory's newest valid checkpoint), `none`, or a checkpoint.

    Returns:
        The exported model's directory; the run directory for a model that diffusers' layout has no
        place for.

    Raises:
        ValueError: parts, data, checkpoint or launch that do not fit each other.
        RunEnded: it was preempted, it diverged, or its last checkpoint cannot be written: see
            `latentdiff.exitcodes`.
    """
    world = join(config.loop.device, config.parallel)
    exit_file = Path(config.out) / "exit.json"
    try:
        with (
            StopRequests(world.is_first) as requests,
            Watchdog(world, requests, config.parallel.timeout_s, exit_file) as watchdog,
        ):
            try:
                return _train(config, resume, world, requests, watchdog)
            except Diverged as error:
                raise RunEnded(DIVERGED, str(error)) from error
    finally:
        leave()


def _train(
    config: DiffusionRun, resume: str, world: World, requests: StopRequests, watchdog: Watchdog
) -> Path:
    out, loop = Path(config.out), config.loop
    choose_algorithms(loop.deterministic)
    if mode_of(config.parallel, world) == "fsdp":
        check_sharded(config.optimizer.kind)
    keep = Keep(loop.keep_checkpoints, loop.keep_every, loop.keep_best)
    checkpoints = Checkpoints(out / "checkpoints", world, keep, loop.async_save)
    resume = after_restart(resume)
    checkpoint = checkpoints.find(resume)
    if resume != "auto":
        checkpoints.set_aside(checkpoint)
    loader = Loader(
        config.data,
        config.seed,
        loop.batch_size,
        rank=world.rank,
        num_ranks=world.num_ranks,
        splits=loop.accumulation,
        with_images=not config.cache_latents,
        ledger_path=ledger_path(out, world),
        orphaned_ledgers=orphaned_ledgers(out, world),
    )
    check_same_data(loader, world)
    trainee = new_trainee(config, loader, world, anew=checkpoint is None)
    model, network, weights = trainee.model, trainee.network, trainee.weights
    optimizer = build_optimizer(weights, config.optimizer)
    ema = Ema(weights, config.ema)
    health = Health(config.health, trainee.home)
    meter = LossMeter(config.logging.timestep_bins, world.device)

    def groups() -> dict[str, Mapping[str, Tensor]]:
        return {
            "model": weights,
            "optimizer": optimizer_tensors(optimizer, weights),
            "ema": ema.tensors(),
            "health": health.tensors(),
        }

    step = 0
    if checkpoint is not None:
        step = checkpoint.step
        restore_loader(checkpoint, loader)
        check_words(checkpoint, trainee.words)
        for name, tensors in groups().items():
            checkpoint.restore(name, tensors)
        with suppress(ValueError):  # other bins than then: all that is lost is a mean in the log
            checkpoint.restore("meters", meter.tensors())
        reshard(network)
        checkpoint = None  # its open files would keep their disk space after they are removed
        if step > loop.num_steps:
            raise ValueError(
                f"the checkpoint is of step {step}, and loop.num_steps is {loop.num_steps}; raise "
                "that, resume an earlier checkpoint by its path, or give another `out`"
            )
    cache = None
    if config.cache_latents:
        cache = LatentCache.encode(model.autoencoder, loader, world.device)
    looks = Looks(config, trainee, world, watchdog)
    pace = Pace(world, step, *_flops(config, world))
    agreement = Agreement(world, requests)

    stopped, saved, logged, first = False, step, step, step
    with ExitStack() as stack:
        stack.callback(checkpoints.close)
        log = stack.enter_context(
            open_log(out, config, loop.num_steps, step, world, config.logging)
        )
        looks.tell(log)
        positions = None
        if loop.log_positions:
            positions = stack.enter_context(PositionLog(out, world, step))
        feed = stack.enter_context(Feed(loader, Recipe.of(model, config, cache), world.device))

        def save(is_last: bool, metric: float | None = None) -> None:
            watchdog.at("save", step, LONG_S)
            health.check(step)
            total = sum_accounts(feed.account, world, config.data.max_bad_rate)
            meter.fold(world)
            tensors = groups() | {"meters": meter.tensors()}
            state = {
                "loader": feed.state(step),
                "tokenizer": trainee.words,
                "skipped": health.scalars()["skipped"],
                "config": config.model_dump(mode="json"),
            }
            try:
                if world.is_first:
                    write_ledger(out, total, step)
                if positions is not None:
                    positions.merge()
                checkpoints.save(step, tensors, state, metric, is_last)
            except OSError as error:
                raise RunEnded(SAVE_FAILED, str(error)) from error

        while step < loop.num_steps and not stopped:
            watchdog.at("data", step + 1)
            with pace.waiting():
                micros = feed.next_step(_wants_to_stop(requests, world))
            if micros is None:
                stopped = True
                watchdog.at("save", step, LONG_S)
                break
            watchdog.at("step", step + 1, LONG_S if step == first else None)  # it may compile
            meter.begin_step()
            for i, micro in enumerate(micros):
                seed_dropout(config.seed, micro.positions[0])
                with reducing(network, is_last=i == len(micros) - 1):
                    loss = batch_loss(network, model, micro, config)
                    loss.share.backward()
                meter.add(loss.each, micro.numbers.t_fraction, micro.valid > 0)
            norm = gradient_norm(weights.values())
            skip = health.judge(norm)
            rate = lr_at(step, loop.num_steps, config.optimizer)
            is_logged = (step + 1) % loop.log_every == 0 or step + 1 == loop.num_steps
            before = snapshot(weights.values()) if is_logged else []
            step_optimizer(optimizer, weights.values(), norm, skip, rate, config.optimizer)
            step += 1
            ema.update(step, skip)
            if positions is not None:
                positions.add(micros)
            stopped = agreement.at_boundary()

            if is_logged:
                sum_accounts(feed.account, world, config.data.max_bad_rate)
                scalars = meter.read(world)
                scalars |= {"grad_norm": norm.item(), "lr": rate}
                scalars["update_ratio"] = update_ratio(before, weights.values(), world).item()
                del scalars["samples"]  # some may be from before a resume: no rate can come of them
                scalars |= health.scalars() | pace.read(step, (step - logged) * loop.batch_size)
                log.scalars(step, scalars)
                logged = step
            if is_logged or trainee.home.type == "cpu":
                health.check(step)
            metric = None
            is_last = step == loop.num_steps
            if looks.is_due(step) and (is_last or not stopped):  # who is to stop has little time
                with pace.paused(), averaged(ema, network):
                    metric = looks.look(step, log)
            if step % loop.checkpoint_every == 0 or is_last:
                with pace.paused():
                    save(is_last or stopped, metric)
                saved = step
        if stopped and (saved < step or not checkpoints.wait()):
            save(is_last=True)
    agreement.close()
    if stopped and step < loop.num_steps:
        raise RunEnded(
            PREEMPTED,
            f"stopped by a signal at step {step} of {loop.num_steps}, with its checkpoint; the "
            "same command goes on from there",
        )
    if model.diffusers_class is None:
        return out
    watchdog.at("export", step, LONG_S)
    with averaged(ema, network):
        return export(trainee, world)


def _flops(config: DiffusionRun, world: World) -> tuple[int | None, float | None]:
    """(FLOPs of training on a sample, a device's peak in TFLOP/s); None where MFU has no peak."""
    peak = config.logging.peak_tflops
    if peak is None:
        peak = device_peak_tflops(world.device, config.loop.precision)
    return (None, None) if peak is None else (sample_flops(config), peak)


def _wants_to_stop(requests: StopRequests, world: World) -> Callable[[], bool] | None:
    """Whether to stop waiting for data: a process alone may, several must agree at a boundary."""
    return None if world.num_ranks > 1 else lambda: requests.signal is not None
