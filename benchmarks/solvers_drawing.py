"""How are all prompts drawn by any sampler, as `Pipeline.generate` does, and each run once?"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import latentdiff
from data_pipelines.pixels import to_image
from latentdiff.grids import step_grid
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.samplers import EVALUATIONS, SAMPLERS, STOCHASTIC
from latentdiff.solver import Callback, Denoise, Noise, Sampler, steps, toward

SEED = 0


class Run(NamedTuple):
    """One drawing of all prompts."""

    sampler: str
    spacing: str
    evaluations: int
    guidance: float

    @property
    def per_step(self) -> int:
        """Evaluations a step."""
        return EVALUATIONS.get(self.sampler, 1)

    @property
    def num_steps(self) -> int:
        """The most steps that the evaluations allow; the one to sigma = 0 takes one alone."""
        return (self.evaluations - 1) // self.per_step + 1

    @property
    def used(self) -> int:
        """Evaluations that those steps take."""
        return (self.num_steps - 1) * self.per_step + 1

    def __str__(self) -> str:
        """Also the name of its file."""
        return f"{self.sampler}-{self.spacing}-{self.evaluations}-guidance-{self.guidance:g}"


# The solvers: ours, and two more to compare with


def dpmpp_3m_published(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M) as its authors' code and diffusers (`solver_order=3`) have it.

    Apart from the weight of D2, half of what integrating the polynomial gives, it is `dpmpp_3m`.
    """
    history: list[tuple[Tensor, Tensor]] = []
    for step, sigma, following in steps(sigmas):
        history = [(sigma, denoise(x, sigma)), *history][:3]
        order = min(len(history), len(sigmas) - 1 - step)
        m0 = history[0][1]
        if order == 1:
            x = toward(m0, x, sigma, following)
            continue
        h = (sigma / following).log()
        phi_1 = torch.expm1(-h)
        r0 = (history[1][0] / sigma).log() / h
        d1_0 = (m0 - history[1][1]) / r0
        x = following / sigma * x - phi_1 * m0
        if order == 2:
            x = x - 0.5 * phi_1 * d1_0
            continue
        r1 = (history[2][0] / history[1][0]).log() / h
        d1_1 = (history[1][1] - history[2][1]) / r1
        d1 = d1_0 + r0 / (r0 + r1) * (d1_0 - d1_1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
        x = x + (phi_1 / h + 1) * d1 - ((phi_1 + h) / h**2 - 0.5) * d2
    return x


MORE: Mapping[str, Sampler] = {
    "dpmpp_3m_published": dpmpp_3m_published,
    "unipc_3": partial(SAMPLERS["unipc"], order=3),  # pyright: ignore[reportCallIssue]
}


# Drawing


@dataclass
class BrownianPath:
    """One Brownian motion M in tau = 1 / sigma^2 for all step grids.

    For a constant clean sample the reverse SDE's exact step with r = (next / sigma)^2 is
        x_next = clean + r (x - clean) + next * sqrt(1 - r) * n,
        n = (M(tau_next) - M(tau)) / sqrt(tau_next - tau)
    so runs that take n from one path solve the same equation with the same noise.

    Attributes:
        shape: of a picture's latents.
        indices: of the pictures.
        sigmas: every noise level at which the path will be asked.
    """

    shape: Sequence[int]
    indices: Sequence[int]
    sigmas: Iterable[float]

    @cached_property
    def values(self) -> dict[float, Tensor]:
        """Sigma -> M(1 / sigma^2), 0 at the first."""
        levels = sorted(set(self.sigmas), reverse=True)
        value = torch.zeros(len(self.indices), *self.shape, dtype=torch.float64)
        path = {levels[0]: value}
        for i in range(1, len(levels)):
            spread = (levels[i] ** -2 - levels[i - 1] ** -2) ** 0.5
            value = value + spread * normal(self.shape, SEED, self.indices, f"brownian-{i}")
            path[levels[i]] = value
        return path

    def noise(self, sigmas: Tensor) -> Noise:
        """The standard-normal noise of the steps of a grid."""
        levels = sigmas.tolist()

        def step_noise(x: Tensor, step: int) -> Tensor:
            here, following = levels[step], levels[step + 1]
            moved = self.values[following] - self.values[here]
            return (moved[: len(x)] / (following**-2 - here**-2) ** 0.5).to(x)

        return step_noise


@dataclass
class Studio:
    """Draws runs, each once.

    Attributes:
        pipeline: the model.
        prompts: one picture each.
        cache: folder of what was drawn.
        sde_runs: all that will share the Brownian path.
    """

    pipeline: Pipeline
    prompts: list[str]
    cache: Path
    sde_runs: list[Run]

    def __post_init__(self) -> None:
        self.shape = self.pipeline.latent_shape()
        self.indices = range(len(self.prompts))
        grids = [self.grid(run).tolist() for run in self.sde_runs]
        self.path = BrownianPath(self.shape, self.indices, [s for g in grids for s in g if s > 0])
        self.seconds: dict[Run, float] = {}

    def grid(self, run: Run) -> Tensor:
        """Sigmas of a run."""
        return step_grid(self.pipeline.schedule, run.num_steps, run.spacing)

    @torch.inference_mode()
    def latents(self, run: Run, count: int | None = None) -> Tensor:
        """The drawn latents of the first `count` prompts (default: all), float32."""
        count = len(self.prompts) if count is None else count
        file = self.cache / f"{run}-of-{count}.safetensors"
        if not file.is_file():
            began = time.process_time()
            z = self._draw(run, count).contiguous()
            temporary = file.with_suffix(".tmp")
            spent = time.process_time() - began
            save_file({"z": z}, temporary, {"seconds": f"{spent:.3f}"})
            temporary.replace(file)
            print(f"{run}: {spent:.1f} s", flush=True)
        with safe_open(file, "pt") as stored:
            self.seconds[run] = float(stored.metadata()["seconds"])
            return stored.get_tensor("z")

    def _draw(self, run: Run, count: int) -> Tensor:
        """As `Pipeline.generate` does."""
        sigmas = self.grid(run)
        start = normal(self.shape, SEED, self.indices[:count], "start")
        x = start * self.pipeline.schedule.start_scale(sigmas[0]).float()
        denoise = self.pipeline.denoiser(self.prompts[:count], scale=run.guidance)
        draw = {**SAMPLERS, **MORE}[run.sampler]
        return draw(denoise, x, sigmas, self._noise(run, sigmas, count))

    def _noise(self, run: Run, sigmas: Tensor, count: int) -> Noise | None:
        """The path's for those that solve the SDE, `Pipeline.generate`'s for lcm."""
        if run.sampler not in STOCHASTIC:
            return None
        if run.sampler != "lcm":
            return self.path.noise(sigmas)
        indices = self.indices[:count]
        return lambda x, step: normal(self.shape, SEED, indices, f"step-{step}").to(x)

    @torch.inference_mode()
    def pictures(self, z: Tensor) -> list[Image.Image]:
        """Latents -> pictures."""
        return [to_image(image) for image in self.pipeline.autoencoder.decode(z)]


def fingerprint(pipeline: Pipeline, *settings: object) -> str:
    """Of all that decides what is drawn: weights, settings, and the code of drawing."""
    digest = hashlib.sha256(repr((pipeline.model_hash(), torch.__version__, settings)).encode())
    core = Path(latentdiff.__file__).parent
    names = ("solver", "samplers", "multistep", "grids", "schedule", "denoiser", "guidance")
    for file in (Path(__file__), *(core / f"{name}.py" for name in names)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
