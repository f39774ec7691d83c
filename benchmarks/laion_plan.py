"""What does a LAION-scale run take, from URLs to a model: machines, hours, bytes, money?

    python benchmarks/laion_plan.py                  the plan as text
    python benchmarks/laion_plan.py --out docs       ... between the markers of docs/laion_scale.md
    python benchmarks/laion_plan.py --urls 2e9 --gpus 256 --gpu-hour 3.5

Every figure comes from FIGURES in laion_arithmetic.py, from the shipped configs or from what
`latentdiff train --dry-run` works out; the plan is arithmetic on them. Prices and shares are
assumptions and options.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from laion_arithmetic import (
    FIGURES,
    HOUR_S,
    PEAK_TFLOPS,
    Stage,
    Wanted,
    count_text,
    encoder_flops,
    latent_bytes,
    make_plans,
    stages,
    train_speed,
    training_line,
)

from latentdiff.training.dryrun import way_name
from latentdiff.training.plan import Plan

PLAN, MEMORY = ("laion_scale.md", "laion_plan.py"), ("training.md", "memory")  # page, its marker


def plan_text(wanted: Wanted, plans: Mapping[str, Plan]) -> str:
    """The tables."""
    found = stages(wanted, plans)
    return "\n".join(
        [*_figures(), "", *_assumed(wanted), "", *_stage_table(wanted, found), "",
         *_needs(wanted, plans), "", *_config_table(wanted, plans), "", *_losses(wanted, plans)]
    )  # fmt: skip


def _figures() -> Iterator[str]:
    yield "| what | figure | source |"
    yield "| --- | ---: | --- |"
    for figure in FIGURES.values():
        yield f"| {figure.unit} | {figure.value:,g} | {figure.source} |"


def _assumed(wanted: Wanted) -> Iterator[str]:
    yield (
        f"Assumed, and options of the command: {count_text(wanted.urls)} URLs, of which "
        f"{wanted.fetched:.0%} still answer; selection and de-duplication keep "
        f"{wanted.kept:.0%} of the pictures; "
        f"{wanted.machines} machines of {wanted.cores} cores, {wanted.gpus} {wanted.gpu}; "
        f"${wanted.gpu_hour:g} a GPU-hour, ${wanted.machine_hour:g} a machine-hour, "
        f"${wanted.tb_month:g} a TB and month of storage."
    )


def _stage_table(wanted: Wanted, found: Sequence[Stage]) -> Iterator[str]:
    yield "| stage | by | amount | clock | GPU-hours | machine-hours | stored | cost |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    cost = [s.gpu_hours * wanted.gpu_hour + s.machine_hours * wanted.machine_hour for s in found]
    for stage, dollars in zip(found, cost, strict=True):
        yield (
            f"| {stage.name} | `{stage.command}` | {stage.amount} | {_clock(stage.hours)} | "
            f"{stage.gpu_hours:,.0f} | {stage.machine_hours:,.0f} | {_stored(stage.stored_tb)} | "
            f"${dollars:,.0f} |"
        )
    stored = sum(stage.stored_tb for stage in found)
    hours = sum(stage.hours for stage in found)
    yield (
        f"| together | | | {_clock(hours)} | {sum(s.gpu_hours for s in found):,.0f} | "
        f"{sum(s.machine_hours for s in found):,.0f} | {_stored(stored)} | ${sum(cost):,.0f} |"
    )
    yield ""
    yield f"Storage, as long as all of it is kept: ${stored * wanted.tb_month:,.0f} a month."


def _needs(wanted: Wanted, plans: Mapping[str, Plan]) -> Iterator[str]:
    """What must not be slower than the GPUs."""
    value = {name: figure.value for name, figure in FIGURES.items()}
    peak = PEAK_TFLOPS[wanted.gpu] * 1e12
    yield "| what must keep up | needed | cores |"
    yield "| --- | ---: | ---: |"
    for size in (256, 512):
        rate = value["encode_share"] * peak / encoder_flops(size)
        yield (
            f"| decoding for one {wanted.gpu} that encodes {size} px | {rate:,.0f} pictures/s | "
            f"{rate / value['decode']:.1f} |"
        )
    for name in ("sd15_256", "sd15_512"):
        plan = plans[name]
        speed, _ = train_speed(plans, name, wanted.gpu)
        size = plan.config.data.output_px
        share = speed / value["loader"] * latent_bytes(size) / latent_bytes(256)
        yield (
            f"| reading latents for 8 {wanted.gpu} that train at {size} px | {8 * speed:,.0f} "
            f"samples/s, {8 * speed * latent_bytes(size) / 1e6:,.0f} MB/s | {8 * share:.2f} |"
        )


def _config_table(wanted: Wanted, plans: Mapping[str, Plan]) -> Iterator[str]:
    yield (
        f"| config | samples | img/s of one {wanted.gpu} | GPU-hours | clock on {wanted.gpus} | "
        "memory of a rank |"
    )
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for name, plan in plans.items():
        speed, _ = train_speed(plans, name, wanted.gpu)
        hours = plan.num_samples / speed / HOUR_S
        yield (
            f"| {name} | {count_text(plan.num_samples)} | {speed:.1f} | {hours:,.0f} | "
            f"{_clock(hours / wanted.gpus)} | {plan.memory.total / 1e9:.0f} GB, {plan.way.mode}, "
            f"{plan.micro_batch} at a time |"
        )


def _losses(wanted: Wanted, plans: Mapping[str, Plan]) -> Iterator[str]:
    """What a kill costs, what ranks tell each other, why text is stored as ids."""
    minutes = []
    for name in ("sd15_256", "sd15_512"):
        loop, (speed, _) = plans[name].config.loop, train_speed(plans, name, wanted.gpu)
        seconds = loop.checkpoint_every * loop.batch_size / (speed * wanted.gpus)
        minutes.append(f"{seconds / 60:.0f} min at {plans[name].config.data.output_px} px")
    plan = plans["sd15_256"]
    text = next(part.forward_flops for part in plan.parts if part.name == "text")
    embedding = 2 * 77 * 768
    yield (
        f"A kill loses at most {loop.checkpoint_every:,} steps: {' and '.join(minutes)}. With ddp "
        f"a rank sums {4 * plan.trained / 1e9:.1f} GB of gradients with the others in every step. "
        f"Stored text embeddings (77 x 768, float16) would be {embedding / 1e3:.0f} kB a sample, "
        f"{embedding / (2 * 4 * 32 * 32 * 2):.0f} times the moments of a 256 px latent; the text "
        f"tower, which ids need, is {text / plan.sample_flops:.1%} of a step at 256 px."
    )


def memory_text(plans: Mapping[str, Plan]) -> str:
    """What a rank of SD 1.x needs, by the way that ranks share the work."""
    small, large = plans["sd15_256"], plans["sd15_512"]
    batch = small.micro_batch
    lines = [
        f"| a rank, SD 1.x | 256 px, {batch} at a time | most in 24 GB | 512 px, {batch} at a time "
        "| most in 24 GB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for one, other in zip(small.ways, large.ways, strict=True):
        cells = []
        for way in (one, other):
            most = way.largest(24e9)
            cells += [f"{way.memory(batch).total / 1e9:.1f} GB", f"{most:,}" if most else "none"]
        lines.append(f"| {way_name(one)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _clock(hours: float) -> str:
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h"


def _stored(terabytes: float) -> str:
    return f"{terabytes:,.1f} TB" if terabytes >= 1 else f"{1e3 * terabytes:,.0f} GB"


def write_between(page: Path, marker: str, text: str) -> None:
    """Put `text` between the markers of a page; the rest of it stays.

    Raises:
        ValueError: the page has no markers.
    """
    begin, end = f"<!-- begin: {marker} -->", f"<!-- end: {marker} -->"
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{page} has no line {begin!r} followed by {end!r}; add them")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="The arithmetic of a LAION-scale run.")
    parser.add_argument("--out", type=Path, help=f"folder of {PLAN[0]} and {MEMORY[0]}")
    for field in fields(Wanted):
        kind, default = type(field.default), field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default)
    values = vars(parser.parse_args())
    out = values.pop("out")
    wanted = Wanted(**values)
    plans = make_plans(wanted.gpus)
    text, memory = plan_text(wanted, plans), memory_text(plans)
    if out is not None:
        for (page, marker), tables in ((PLAN, text), (MEMORY, memory)):
            write_between(out / page, marker, tables)
    print(text, memory, sep="\n\n", end="\n\n")
    for name in plans:
        print(f"{name}: {training_line(plans, name, wanted.gpu)}")


if __name__ == "__main__":
    main()
