"""How close does each sampler come, with few evaluations, to the exact solution of its equation?

    python benchmarks/solvers.py --out docs

Draws with the model in the box, as `Pipeline.generate` does, and measures the distance to a
solution of 1,000 evaluations. Writes solvers.md, solvers.json (every picture's numbers) and
solvers.png. What was drawn is kept in `--cache`, so that a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from solvers_drawing import MORE, SEED, Run, Studio, fingerprint
from solvers_report import write_report
from torch import Tensor

import latentdiff
from latentdiff.pipeline import Pipeline
from latentdiff.samplers import SAMPLERS, STOCHASTIC

ROOT = Path(__file__).parent.parent
DEFAULT = "trailing"
FEW = (5, 10, 20)  # evaluations
MANY = 50  # with the default spacing alone
CLOSER = ("dpmpp_2m", "lms", "unipc")  # those among which a default is chosen:
BETWEEN = (8, 12, 15, 30)  # evaluations
SPACINGS = (DEFAULT, "leading", "linspace", "karras", "log_snr", "ays_sd15")
OTHER_SPACINGS = (DEFAULT, "karras", "log_snr")  # where the question is another
EQUAL = {"ddim": "euler", "euler_ancestral": "ddpm"}  # in exact arithmetic: measured once
ODE = [n for n in (*SAMPLERS, *MORE) if n not in STOCHASTIC and n not in EQUAL]
SDE = [n for n in SAMPLERS if n in STOCHASTIC and n not in EQUAL and n != "lcm"]


def references(evaluations: int, scale: float) -> dict[str, tuple[Run, Run]]:
    """Equation -> its reference, and another solver's solution that proves it."""
    return {
        "ODE": (
            Run("dpmpp_3m", "log_snr", evaluations, scale),
            Run("heun", "karras", evaluations, scale),
        ),
        "SDE": (
            Run("dpmpp_2m_sde", "log_snr", evaluations, scale),
            Run("ddpm", "log_snr", evaluations, scale),
        ),
    }


def plan(scale: float) -> list[Run]:
    """Everything that is measured, the most telling first."""
    runs = [Run(name, DEFAULT, n, scale) for n in (*FEW, MANY) for name in (*ODE, *SDE)]
    runs += [Run("lcm", DEFAULT, n, scale) for n in FEW]
    runs += [Run(name, DEFAULT, 10, scale) for name in EQUAL]
    places = [(name, place) for name in CLOSER for place in (DEFAULT, "karras")]
    runs += [Run(name, place, n, scale) for name, place in places for n in BETWEEN]
    runs += [Run(name, "karras", MANY, scale) for name in CLOSER]
    runs += [Run(name, space, n, scale) for space in SPACINGS[1:] for n in FEW for name in ODE]
    runs += [
        Run(name, space, n, scale) for space in OTHER_SPACINGS[1:] for n in FEW for name in SDE
    ]
    runs += [Run(name, space, n, 1.0) for space in OTHER_SPACINGS for n in FEW for name in ODE]
    return runs


def latent_distances(z: Tensor, reference: Tensor) -> list[float]:
    """||z - reference|| / ||reference|| of each picture."""
    gap = (z - reference).double().flatten(1).norm(dim=1)
    return (gap / reference.double().flatten(1).norm(dim=1)).tolist()


def pixel_distances(some: list[Image.Image], others: list[Image.Image]) -> list[float]:
    """Mean absolute difference of 0..255 values of each picture."""
    pairs = zip(some, others, strict=True)
    return [float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()) for a, b in pairs]


def measure(studio: Studio, scale: float, evaluations: int) -> dict:
    """Draw everything; the numbers of solvers.json."""
    solutions: dict[tuple[str, float], tuple[Tensor, list[Image.Image]]] = {}
    proofs = []
    for guidance in (scale, 1.0):
        for equation, (run, check) in references(evaluations, guidance).items():
            if (equation, guidance) == ("SDE", 1.0):
                continue
            z = studio.latents(run)
            shown = studio.pictures(z)
            solutions[equation, guidance] = z, shown
            few = max(2, len(z) // 4)
            again = studio.latents(check, few)
            proofs.append(
                {
                    "equation": equation,
                    "guidance": guidance,
                    "reference": _described(run),
                    "check": _described(check),
                    **_distances(studio, again, z[:few], shown[:few]),
                }
            )
    rows, equal = [], []
    for run in plan(scale):
        z = studio.latents(run)
        if run.sampler in EQUAL:
            other = studio.latents(run._replace(sampler=EQUAL[run.sampler]))
            gaps = _rounded(latent_distances(z, other))
            equal.append({"sampler": run.sampler, "same_as": EQUAL[run.sampler], "latents": gaps})
            continue
        equation = "SDE" if run.sampler in SDE else "ODE"
        described = {**_described(run), "guidance": run.guidance, "equation": equation}
        rows.append(described | _distances(studio, z, *solutions[equation, run.guidance]))
    z = solutions["ODE", scale][0]
    apart = fmean(latent_distances(z, z.roll(1, 0)))
    return {"references": proofs, "between_prompts": apart, "equal": equal, "runs": rows}


def _described(run: Run) -> dict:
    return {
        "sampler": run.sampler,
        "spacing": run.spacing,
        "evaluations": run.evaluations,
        "used": run.used,
    }


def _distances(studio: Studio, z: Tensor, reference: Tensor, shown: list[Image.Image]) -> dict:
    return {
        "latents": _rounded(latent_distances(z, reference)),
        "pixels": _rounded(pixel_distances(studio.pictures(z), shown)),
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.3g}") for value in values]


def sheet_rows(studio: Studio, scale: float, evaluations: int) -> dict:
    """Label -> evaluations -> pictures of the first prompts, for solvers.png."""
    rows = [(name, DEFAULT) for name in ("euler", "heun", "dpmpp_2m", "unipc", "dpmpp_2m_sde")]
    rows.insert(3, ("dpmpp_2m", "karras"))
    shown = {}
    for name, place in rows:
        equation = "SDE" if name in SDE else "ODE"
        runs = {str(n): Run(name, place, n, scale) for n in FEW}
        runs[f"{evaluations:,} (reference)"] = references(evaluations, scale)[equation][0]
        shown[name if place == DEFAULT else f"{name}, {place}"] = {
            label: studio.pictures(studio.latents(run)[:4]) for label, run in runs.items()
        }
    return shown


def main() -> None:
    """Draw, measure, write."""
    parser = argparse.ArgumentParser(description="Measure the samplers on the model in the box.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the three files")
    parser.add_argument("--prompts", type=int, default=8, help="of docs/prompts/emoji_64.txt")
    parser.add_argument("--reference", type=int, default=1000, help="evaluations")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "outputs" / "solvers", help="of what was drawn"
    )
    arguments = parser.parse_args()
    pipeline = Pipeline.load().to("cpu")
    prompts = (ROOT / "docs/prompts/emoji_64.txt").read_text(encoding="utf-8").splitlines()
    prompts = prompts[: arguments.prompts]
    scale = pipeline.defaults.guidance_scale
    solutions = references(arguments.reference, scale)["SDE"]
    sde_runs = [*solutions, *(run for run in plan(scale) if run.sampler in {*SDE, *EQUAL})]
    cache = arguments.cache / fingerprint(pipeline, prompts, sde_runs)
    cache.mkdir(parents=True, exist_ok=True)
    studio = Studio(pipeline, prompts, cache, sde_runs)
    numbers = measure(studio, scale, arguments.reference)
    about = {
        "model": pipeline.model_hash(),
        "defaults": {
            "sampler": pipeline.defaults.sampler,
            "spacing": pipeline.defaults.spacing,
            "num_steps": pipeline.defaults.num_steps,
            "guidance": scale,
        },
        "seed": SEED,
        "prompts": prompts,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "versions": {"latentdiff": latentdiff.__version__, "torch": torch.__version__},
        "evaluations": sum(run.used for run in studio.seconds),
        "processor_minutes": round(sum(studio.seconds.values()) / 60, 1),
    }
    sheet = sheet_rows(studio, scale, arguments.reference)
    write_report(arguments.out, about | numbers, sheet)


def _processor() -> str:
    """Its name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
