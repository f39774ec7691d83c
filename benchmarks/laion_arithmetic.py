"""What follows for a LAION-scale run from figures that are measured, cited or assumed?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from latentdiff.config import DiffusionRun, load
from latentdiff.flops import forward_flops
from latentdiff.training.plan import Plan, make_plan
from vae.autoencoder import Autoencoder
from vae.config import KLConfig

PEAK_TFLOPS = {"A100": 312.0, "H100": 989.4}  # dense bf16, the vendor's data sheets
CONFIGS = ("sd15_256", "sd15_512", "sd2_v_768")
_TAR_BLOCK, _NPY_HEADER = 512, 128
HOUR_S = 3_600


@dataclass(frozen=True)
class Figure:
    """A number that the plan starts from.

    Attributes:
        value: the number.
        unit: of it.
        source: measured, cited or assumed, and where.
    """

    value: float
    unit: str
    source: str


_DATA = "measured, docs/data.md"
FIGURES = {
    "download": Figure(1_300, "pictures/s a machine", "cited: img2dataset"),
    "picture_bytes": Figure(82e3, "bytes a picture, shorter side 512 px", _DATA),
    "index": Figure(6_260, "samples/s a core", _DATA),
    "decode": Figure(653, "pictures/s a core, shorter side 512 px", _DATA),
    "loader": Figure(43_700, "latents/s a core", _DATA),
    "encode_share": Figure(
        0.4, "of the GPU's peak, encoding pictures", "assumed; not measured yet"
    ),
    "draw_share": Figure(0.25, "of the GPU's peak, drawing pictures", "assumed; not measured yet"),
    "train_256": Figure(137.5, "img/s an A100, 256 px", "cited: mosaicml/diffusion"),
    "train_512": Figure(36.3, "img/s an A100, 512 px", "cited: mosaicml/diffusion"),
    "train_512_h100": Figure(137.0, "img/s an H100, 512 px", "cited: MLPerf Training 4.1, SD2"),
}


@dataclass(frozen=True)
class Wanted:
    """What is asked for; shares and prices are assumptions.

    Attributes:
        urls: pairs of URL and caption.
        fetched: share of them that still yields a picture.
        kept: share of the pictures that selection and de-duplication leave.
        machines: that download.
        cores: of one of them.
        gpus: that encode and train.
        gpu: A100 or H100.
        gpu_hour: dollars.
        machine_hour: dollars, of a machine without a GPU.
        tb_month: dollars, of 10^12 bytes in an object store.
    """

    urls: float = 1e9
    fetched: float = 0.7
    kept: float = 0.25
    machines: int = 20
    cores: int = 16
    gpus: int = 64
    gpu: str = "A100"
    gpu_hour: float = 2.0
    machine_hour: float = 0.8
    tb_month: float = 20.0


@dataclass(frozen=True)
class Stage:
    """One stage of the plan.

    Attributes:
        name: what is done.
        command: that does it.
        amount: how much of what.
        hours: of the clock.
        gpu_hours: of all GPUs together.
        machine_hours: of all machines without one.
        stored_tb: what it leaves in the store.
    """

    name: str
    command: str
    amount: str
    hours: float
    gpu_hours: float = 0.0
    machine_hours: float = 0.0
    stored_tb: float = 0.0


def latent_bytes(size_px: int, caption_bytes: int = 60, num_ids: int | None = 77) -> int:
    """A sample of a tar of latents: header and padded content of each member."""
    side = size_px // 8
    members = [_NPY_HEADER + 2 * 2 * 4 * side * side, caption_bytes, 400]  # float16; .txt; .json
    if num_ids is not None:
        members.append(_NPY_HEADER + 4 * num_ids)
    return sum(_TAR_BLOCK + _TAR_BLOCK * math.ceil(size / _TAR_BLOCK) for size in members)


def train_speed(plans: Mapping[str, Plan], name: str, gpu: str) -> tuple[float, str]:
    """(img/s of one GPU, where that comes from) for a run from stored latents.

    The cited speed of its resolution and GPU; what is not cited is scaled from what is: another
    resolution or network by operations a sample, another GPU by its peak.
    """
    is_small = plans[name].config.data.output_px <= 256
    model = "sd15_256" if is_small else "sd15_512"  # whose work the cited speed is of
    figure, of_gpu = FIGURES["train_256" if is_small else "train_512"], "A100"
    if gpu == "H100" and not is_small:
        figure, of_gpu = FIGURES["train_512_h100"], "H100"
    speed, how = figure.value, figure.source
    if name != model:
        speed *= plans[model].sample_flops / plans[name].sample_flops
        how += ", by operations a sample"
    if of_gpu != gpu:
        speed *= PEAK_TFLOPS[gpu] / PEAK_TFLOPS[of_gpu]
        how += ", by the GPU's peak"
    return speed, how


def training_line(plans: Mapping[str, Plan], name: str, gpu: str = "A100") -> str:
    """What a config's header says of its time."""
    speed, how = train_speed(plans, name, gpu)
    hours = plans[name].num_samples / (plans[name].num_ranks * speed) / HOUR_S
    return (
        f"{hours:.0f} h on {plans[name].num_ranks} {gpu} at {speed:.1f} img/s each ({how}): "
        f"{hours * plans[name].num_ranks:,.0f} GPU-hours"
    )


def stages(wanted: Wanted, plans: Mapping[str, Plan]) -> list[Stage]:
    """The plan, in order."""
    value = {name: figure.value for name, figure in FIGURES.items()}
    peak = PEAK_TFLOPS[wanted.gpu] * 1e12
    pictures = wanted.urls * wanted.fetched
    chosen = pictures * wanted.kept
    cores = wanted.machines * wanted.cores

    download = wanted.urls / (value["download"] * wanted.machines) / HOUR_S
    index = pictures / (value["index"] * cores) / HOUR_S
    found = [
        Stage(
            "download", "img2dataset", f"{count_text(wanted.urls)} URLs", download,
            machine_hours=download * wanted.machines,
            stored_tb=pictures * value["picture_bytes"] / 1e12,
        ),
        Stage(
            "index", "latentdiff data index", f"{count_text(pictures)} pictures", index,
            machine_hours=index * wanted.machines,
        ),
    ]  # fmt: skip
    for name in ("sd15_256", "sd15_512"):
        plan, size = plans[name], plans[name].config.data.output_px
        flops = encoder_flops(size)
        hours = chosen * flops / (value["encode_share"] * peak * wanted.gpus) / HOUR_S
        found.append(
            Stage(
                f"precompute, {size} px", "latentdiff data precompute",
                f"{count_text(chosen)} pictures", hours, gpu_hours=hours * wanted.gpus,
                stored_tb=chosen * latent_bytes(size) / 1e12,
            )
        )  # fmt: skip
    for name in ("sd15_256", "sd15_512"):
        plan = plans[name]
        speed, _ = train_speed(plans, name, wanted.gpu)
        hours = plan.num_samples / (speed * wanted.gpus) / HOUR_S
        found.append(
            Stage(
                f"train, {plan.config.data.output_px} px",
                f"latentdiff train --config {name}",
                f"{count_text(plan.num_samples)} samples = {plan.num_samples / chosen:.1f} epochs",
                hours, gpu_hours=hours * wanted.gpus, stored_tb=_kept_tb(plan),
            )
        )  # fmt: skip
    plan = plans["sd15_512"]
    images, steps = 10_000, plan.config.samples.num_steps
    forward = next(part.forward_flops for part in plan.parts if part.name == "unet")
    hours = images * steps * 2 * forward / (value["draw_share"] * peak * wanted.gpus) / HOUR_S
    times = sum(
        plans[n].config.loop.num_steps // e.every
        for n in ("sd15_256", "sd15_512")
        if (e := plans[n].config.evaluation) is not None
    )
    found.append(
        Stage(
            "evaluate", "in the run", f"{times} x {count_text(images)} pictures of {steps} steps",
            times * hours, gpu_hours=times * hours * wanted.gpus,
        )
    )  # fmt: skip
    found.append(Stage("export", "in the run", "1 model", 0.0, stored_tb=plan.export_bytes / 1e12))
    return found


@cache
def encoder_flops(size_px: int) -> int:
    """KL-f8's encoder on one picture."""
    with torch.device("meta"):
        autoencoder = Autoencoder.build(KLConfig())
        image = torch.empty(1, 3, size_px, size_px)
    return forward_flops(autoencoder, image, call=lambda encoder, x: encoder.moments(x))


def _kept_tb(plan: Plan) -> float:
    loop = plan.config.loop
    kept = loop.keep_checkpoints + 1 + (loop.num_steps // loop.keep_every if loop.keep_every else 0)
    return kept * plan.checkpoint_bytes / 1e12


def count_text(number: float) -> str:
    """1,000,000 as 1 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def make_plans(gpus: int) -> dict[str, Plan]:
    """The shipped configs' own needs."""
    plans = {}
    for name in CONFIGS:
        config = load(name)
        assert isinstance(config, DiffusionRun)
        plans[name] = make_plan(config, gpus)
    return plans
