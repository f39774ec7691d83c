"""What does `latentdiff train --dry-run` say: what would the run need, and what would it read?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from data_pipelines.config import DataConfig
from data_pipelines.expand import expand_shards
from data_pipelines.loader import Loader
from data_pipelines.storage import Storage
from latentdiff.config import DiffusionRun
from latentdiff.devices import resolve_device
from latentdiff.flops import device_peak_tflops, peak_tflops
from latentdiff.training.plan import Plan, Way, make_plan

_GB = 1e9
_CARDS_GB = (24, 80)
_RANKS_SHOWN = 8
_SAMPLES_SHOWN = 4
_SHARDS_SHOWN = 3
_ASSUMED_GPUS = ("A100", "H100")  # where none is here and the config names no peak


def report(
    config: DiffusionRun, num_ranks: int = 1, *, mfu: float = 0.25, img_per_s: float | None = None
) -> str:
    """A run's plan as text; nothing is trained, no weights are made, no picture is decoded.

    Args:
        config: the run.
        num_ranks: processes that it would have.
        mfu: share of the peak that is assumed where the speed is not known.
        img_per_s: samples a second, over all ranks, if measured.

    Raises:
        ValueError: the run could not start so.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is a share of the peak, above 0 and at most 1; got {mfu:g}")
    if img_per_s is not None and img_per_s <= 0:
        raise ValueError(f"img-per-s must be positive; got {img_per_s:g}")
    plan = make_plan(config, num_ranks)
    num_read, reads = _reads(config, num_ranks)
    lines = [
        *_model(plan),
        *_memory(plan),
        *_ways(plan),
        *_work(plan, num_read),
        *_time(plan, mfu, img_per_s),
        *_disk(plan),
        *reads,
    ]
    return "\n".join(lines)


def way_name(way: Way) -> str:
    """What a way is called in tables."""
    mode = way.mode if way.mode != "fsdp" else f"fsdp, {way.shard_ranks} ranks a copy"
    again = ", checkpointed" if way.recomputes else ""
    return f"{mode}, {way.optimizer}{again}"


def _model(plan: Plan) -> Iterator[str]:
    frozen = sum(part.parameters for part in plan.parts) - plan.trained
    yield f"dry run of {plan.config.out} on {plan.num_ranks} rank(s): nothing is trained"
    yield from (f"  {note}" for note in plan.notes)
    yield ""
    yield f"parameters: {plan.trained:,} trained, {frozen:,} frozen"
    for part in plan.parts:
        state = "trained" if part.is_trained else "frozen"
        yield f"  {part.name:<12} {part.parameters:>15,}  {state}"


def _memory(plan: Plan) -> Iterator[str]:
    memory, config = plan.memory, plan.config
    c, h, w = plan.latent
    yield ""
    yield (
        f"memory of a rank: {way_name(plan.way)}, {plan.micro_batch} latent(s) of {c} x {h} x {w} "
        f"at a time, {config.loop.precision}"
    )
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        f"optimiser ({plan.way.optimizer})": memory.optimizer,
        "averages (EMA)": memory.ema,
        "frozen networks": memory.frozen,
        "gathered blocks": memory.gathered,
        "activations": memory.activations,
    }
    for name, size in rows.items():
        if size:
            yield f"  {name:<24} {_bytes(size):>10}"
    yield f"  {'together':<24} {_bytes(memory.total):>10}"
    yield (
        "  Activations are measured on tensors without memory; copies of weights in bfloat16 are "
        "among them."
    )
    if config.loop.device != "cpu":
        yield "  The device's own use (context, workspaces, gaps), 1 to 2 GB as a rule, is on top."
    if config.parallel.cpu_offload and plan.way.mode == "fsdp":
        yield "  Weights, gradients, optimiser and averages lie in the host's memory (cpu_offload)."


def _ways(plan: Plan) -> Iterator[str]:
    if plan.config.loop.device == "cpu":
        return
    yield ""
    yield (
        f"other ways: a rank's memory at {plan.micro_batch} sample(s) at a time, and the most "
        "samples at a time that a GPU has room for:"
    )
    head = "".join(f"{f'{card} GB':>9}" for card in _CARDS_GB)
    yield f"  {'':<52}{'':>10}{head}"
    for way in (plan.way, *plan.ways):
        most = "".join(f"{_most(way, card):>9}" for card in _CARDS_GB)
        mark = ", this run" if way is plan.way else ""
        total = _bytes(way.memory(plan.micro_batch).total)
        yield f"  {way_name(way) + mark:<52}{total:>10}{most}"


def _work(plan: Plan, num_read: int | None) -> Iterator[str]:
    loop = plan.config.loop
    forward = sum(part.forward_flops for part in plan.parts if part.is_trained)
    yield ""
    yield (
        f"work: {_flops(plan.step_flops)} a step ({_flops(plan.sample_flops)} a sample: forward "
        f"{_flops(forward)}, three times, and the frozen networks once)"
    )
    epochs = "" if not num_read else f" = {plan.num_samples / num_read:.2f} epochs of {num_read:,}"
    yield (
        f"  {loop.num_steps:,} steps of {loop.batch_size:,} = {plan.num_samples:,} samples"
        f"{epochs}: {_flops(plan.num_samples * plan.sample_flops)}"
    )
    validation = plan.config.validation
    if validation is not None and (times := loop.num_steps // validation.every):
        passes = times * validation.num_samples * validation.num_timesteps
        share = passes * forward / (plan.num_samples * plan.sample_flops)
        yield f"  validation, {times:,} times, adds {share:.1%} to that"


def _time(plan: Plan, mfu: float, img_per_s: float | None) -> Iterator[str]:
    config = plan.config
    yield ""
    if img_per_s is not None:
        seconds = plan.num_samples / img_per_s
        yield f"time: {_duration(seconds)} at {img_per_s:,.1f} samples/s, which you say"
        return
    for name, peak in _peaks(config):
        rate = plan.num_ranks * peak * 1e12 * mfu / plan.sample_flops
        yield (
            f"time: {_duration(plan.num_samples / rate)} on {plan.num_ranks} x {name} ({peak:g} "
            f"TFLOP/s) at {mfu:.0%} of it, which is assumed: {rate:,.0f} samples/s"
        )
        hours = plan.num_samples / rate / 3600 * plan.num_ranks
        yield f"  {hours:,.0f} GPU-hours; validation, pictures and checkpoints come on top"
    if config.loop.device == "cpu" and config.logging.peak_tflops is None:
        yield "time: unknown on a CPU; measure samples/s in a short run and give --img-per-s"


def _disk(plan: Plan) -> Iterator[str]:
    loop = plan.config.loop
    kept = min(loop.keep_checkpoints, -(-loop.num_steps // loop.checkpoint_every))
    named = [f"the latest {kept}"]
    if loop.keep_best and plan.config.validation is not None:
        kept, named = kept + 1, [*named, "the best"]
    if loop.keep_every is not None:
        more = loop.num_steps // loop.keep_every
        kept, named = kept + more, [*named, f"{more} for good"]
    yield ""
    yield (
        f"disk: {_bytes(plan.checkpoint_bytes)} a checkpoint; {', '.join(named)}: "
        f"{_bytes(kept * plan.checkpoint_bytes)}; the model that is exported: "
        f"{_bytes(plan.export_bytes)}"
    )


def _reads(config: DiffusionRun, num_ranks: int) -> tuple[int | None, list[str]]:
    """(samples of the data, what each rank reads in its first step); None where there are none."""
    try:
        loader = Loader(
            config.data, config.seed, config.loop.batch_size, num_ranks=num_ranks, with_images=False
        )
        lines = [_first(loader, rank, num_ranks) for rank in range(min(num_ranks, _RANKS_SHOWN))]
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and _is_here(config.data):
            raise
        return None, ["", f"data: not to be read here: {error}"]
    if num_ranks > _RANKS_SHOWN:
        lines.append(f"  and so on, to rank {num_ranks - 1}")
    head = f"data: {len(loader):,} samples; the first step, by rank (numbers and keys of samples):"
    return len(loader), ["", head, *lines]


def _first(loader: Loader, rank: int, num_ranks: int) -> str:
    draws = loader.plan.rank(0, rank, num_ranks)
    places = [i for i in range(len(draws)) if draws.ids[i] >= 0]
    keys, urls = [], {}
    for i in places:
        rows = loader.datasets[draws.sources[i]].rows(int(draws.shards[i]))
        urls[rows.url.rpartition("/")[2]] = None
        if len(keys) < _SAMPLES_SHOWN:
            keys.append(f"{draws.ids[i]} {rows.key(int(draws.rows[i]))}")
    shape = "" if draws.shape is None else f", {draws.shape[1]}x{draws.shape[0]} px"
    shards = list(urls)
    more = f" and {len(shards) - _SHARDS_SHOWN} more" if len(shards) > _SHARDS_SHOWN else ""
    return (
        f"  rank {rank}: {', '.join(keys)}{', ...' * (len(places) > len(keys))} "
        f"({len(places)} samples{shape}) from {', '.join(shards[:_SHARDS_SHOWN])}{more}"
    )


def _is_here(config: DataConfig) -> bool:
    """Whether the shards, or the selection that names them, are there at all."""
    for source in config.sources:
        if source.select is not None:
            if not Path(source.select).is_file():
                return False
            continue
        try:
            expand_shards(source.shards, Storage(config.storage))
        except (OSError, ValueError):
            return False
    return True


def _peaks(config: DiffusionRun) -> Iterator[tuple[str, float]]:
    """(name, TFLOP/s) of the device: as the config says, as it is known, or of some usual ones."""
    precision = config.loop.precision
    if config.logging.peak_tflops is not None:
        yield "the config's device", config.logging.peak_tflops
        return
    if config.loop.device == "cpu":
        return
    if torch.cuda.is_available():
        device = resolve_device(config.loop.device)
        if (peak := device_peak_tflops(device, precision)) is not None:
            yield torch.cuda.get_device_name(device), peak
            return
    for name in _ASSUMED_GPUS:
        if (peak := peak_tflops(name, precision)) is not None:
            yield name, peak


def _most(way: Way, card_gb: int) -> str:
    most = way.largest(card_gb * _GB)
    return f"{most:,}" if most else "no"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _flops(count: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count / 1e6:.3g} MFLOP"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
