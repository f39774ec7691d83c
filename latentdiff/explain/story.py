"""How does the page come about? Experiments, figures, numbers, then the template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from latentdiff import __version__
from latentdiff.explain import curves, experiments, words
from latentdiff.explain.figures import draw_sheet
from latentdiff.explain.lab import Lab
from latentdiff.explain.page import TEMPLATE, Figure, render
from latentdiff.explain.request import DEFAULT_PROMPT, Plan, Subject, read_subject
from latentdiff.explain.sheet import Row, Sheet
from latentdiff.files import staged
from latentdiff.pictures import save_png
from latentdiff.pipeline import Pipeline
from latentdiff.samplers import EVALUATIONS, SAMPLERS

Progress = Callable[[int, int], None]  # (evaluations of the network done, of how many)


def explain(
    out: Path,
    pipeline: Pipeline,
    *,
    prompt: str | None = None,
    picture: Path | None = None,
    caption: str | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `out/index.html` and its figures: what the model does, step by step.

    Args:
        out: directory; files of other names in it stay. After an error nothing in it has changed.
        pipeline: the model.
        prompt: what it draws; default: DEFAULT_PROMPT.
        picture: JPEG, PNG, WebP, GIF or BMP to take apart; default: the one in the package.
        caption: what that picture shows; default: unknown, but for the shipped one.
        seed: of all noise.
        plan: how much; default: all of it.
        progress: called after each evaluation of the network.

    Returns:
        The page.

    Raises:
        ValueError: the picture cannot be read, `out` is a file, or an unconditional model got text.
        OSError: `picture` is not there, or `out` cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a directory, which may be new")
    if pipeline.text is None and not (prompt is None and caption is None):
        raise ValueError(
            "this model is unconditional: it knows no text; leave out --prompt and --caption"
        )
    subject = read_subject(pipeline, picture, caption)
    text = "" if pipeline.text is None else DEFAULT_PROMPT if prompt is None else prompt
    lab = Lab(pipeline, text, seed)
    plan = (Plan() if plan is None else plan).within(lab.most_steps)
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a wrong --out costs nothing
    with staged(out) as folder, torch.inference_mode():
        _write(folder, replace(lab, tick=_counter(progress, lab, plan)), subject, plan)
    return out / "index.html"


def _write(folder: Path, lab: Lab, subject: Subject, plan: Plan) -> None:
    """Draw everything into `folder`, then the page."""
    figures: dict[str, Figure] = {}
    said = words.values(lab, subject, plan)
    story = {"prompt": lab.prompt, "seed": lab.seed, "model": said["weights"]}

    def keep(name: str, drawn: Sheet | Image.Image) -> None:
        image = draw_sheet(drawn) if isinstance(drawn, Sheet) else drawn
        save_png(image, folder / f"{name}.png", {**story, "latentdiff": __version__})
        figures[name] = Figure(f"{name}.png", *image.size, words.ALT[name])
        if isinstance(drawn, Sheet):
            said.update(drawn.numbers)

    image, columns = subject.image, plan.num_columns
    if not lab.in_pixels:
        keep("autoencoder", experiments.autoencoder_sheet(lab, image))
    keep("forward", experiments.forward_sheet(lab, image, columns))
    keep("schedules", curves.draw_schedules(lab.schedule))
    keep("guess", experiments.guess_sheet(lab, image, subject.caption, columns))

    keep("reverse", experiments.reverse_sheet(lab, "ddpm", plan.ddpm_steps, columns))
    ode = experiments.reverse_sheet(lab, "ddim", plan.ddim_steps, columns)
    keep("ode", ode)
    keep("cover", Sheet([], [Row("", ode.rows[0].images)]))

    solution = experiments.reference_solution(lab, plan.reference_evaluations)
    deterministic, stochastic = experiments.families()
    compared = plan.evaluations
    keep("deterministic", experiments.samplers_sheet(lab, deterministic, compared, solution))
    keep("stochastic", experiments.samplers_sheet(lab, stochastic, compared, None))
    keep("grids", curves.draw_grids(lab.schedule, min(10, lab.num_timesteps - 1)))
    if lab.pipeline.text is not None:
        keep("text", experiments.text_sheet(lab, words.prompt_rows(lab)))
        scales = plan.guidance_scales
        keep("guidance", experiments.guidance_sheet(lab, scales, plan.num_noises))

    template = TEMPLATE.read_text(encoding="utf-8")
    page = render(template, said, figures, words.facts(lab, subject))
    (folder / "index.html").write_text(page, encoding="utf-8")


def _counter(progress: Progress | None, lab: Lab, plan: Plan) -> Callable[[], None]:
    """What is called after each evaluation, and tells `progress` how far the page is."""
    total = plan.num_columns + plan.ddpm_steps + plan.ddim_steps + plan.reference_evaluations
    total += sum(
        lab.steps_for(name, most) * EVALUATIONS[name]
        for name in SAMPLERS
        for most in plan.evaluations
    )
    if lab.pipeline.text is not None:
        each = lab.default_steps * EVALUATIONS[lab.pipeline.defaults.sampler]
        total += each * (len(plan.guidance_scales) + len(words.prompt_rows(lab)))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(min(done, total), total)

    return tick
