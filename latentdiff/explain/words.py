"""What does the page say in words and numbers of a model? All computed from the objects."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from html import escape
from typing import Any

from latentdiff import __version__
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.explain import curves
from latentdiff.explain.experiments import PromptRow, algorithm_2_difference
from latentdiff.explain.lab import Lab, times
from latentdiff.explain.request import Plan, Subject
from latentdiff.explain.sheet import short
from latentdiff.pipeline import Pipeline
from latentdiff.schedule import NoiseSchedule

ALT: Mapping[str, str] = {  # what each figure shows, for those who cannot see it
    "cover": "A row of pictures, from noise at the left to a clean picture at the right",
    "autoencoder": "A picture, the channels of its latent in grey, the latent in colours, and the "
    "decoded picture, which is a little softer",
    "forward": "The picture with more and more noise, in pixels and in latents, until nothing but "
    "noise can be seen",
    "schedules": "Four panels of curves: how much is still picture, signal-to-noise ratio, sigma, "
    "and the factor of the picture against that of the noise, for each schedule",
    "guess": "Noisy pictures over the network's guesses of the clean picture, which blur as the "
    "noise grows, and its guesses of the noise, which become right",
    "reverse": "Moments of ancestral sampling: noisy, predicted clean picture, predicted noise",
    "ode": "Moments of deterministic sampling: noisy, predicted clean picture, predicted noise",
    "deterministic": "Deterministic samplers side by side, with more evaluations further down",
    "stochastic": "Stochastic samplers side by side, with more evaluations further down",
    "grids": "Dots on two axes, t and sigma: where each step grid asks the network",
    "text": "Rows of pictures from one noise: things, languages, styles",
    "guidance": "Rows of pictures, a starting noise each; the guidance scale grows to the right",
}
_THINGS = ("red apple", "banana", "penguin", "panda", "butterfly", "frog", "pizza", "rose")
_HEARTS = {  # "red heart" by its names in Unicode's CLDR
    "English": "red heart",
    "German": "rotes Herz",
    "Spanish": "corazón rojo",
    "French": "cœur rouge",
    "Italian": "cuore rosso",
    "Swedish": "rött hjärta",
    "Polish": "czerwone serce",
    "Russian": "алое сердце",
}
_COLOURS: Mapping[int, str] = {
    4: "the four channels pull towards red, green, blue and white; 0 in all of them is grey.",
    3: "the three channels are red, green and blue; 0 in all of them is grey.",
}
_COLOURS_OF_OTHERS = "the first channels are taken for red, green and blue; 0 is grey."


def facts(lab: Lab, subject: Subject) -> frozenset[str]:
    """What the page's <when> may ask about."""
    schedule = lab.schedule
    discrete = isinstance(schedule, NoiseSchedule)
    held = {
        "text": lab.pipeline.text is not None,
        "latent": not lab.in_pixels,
        "discrete": discrete,
        "literal": discrete and not schedule.ends_in_noise,
        "caption": bool(subject.caption),
        "styles": bool(lab.pipeline.defaults.styles),
    }
    return frozenset(name for name, holds in held.items() if holds)


def values(lab: Lab, subject: Subject, plan: Plan) -> dict[str, str]:
    """What stands for [[name]] on the page, but for what the experiments have measured."""
    pipeline, schedule = lab.pipeline, lab.schedule
    is_box = pipeline.source == PRETRAINED
    channels, height, width = lab.latent_shape
    first, last = times(schedule, 2).tolist()
    stable_diffusion = NoiseSchedule.scaled_linear()
    said = {
        "version": __version__,
        "model": "the model in the box" if is_box else _model_name(pipeline),
        "weights": pipeline.model_hash(),
        "prediction": pipeline.prediction,
        "unet_parameters": _millions(pipeline.unet),
        "vae_parameters": _millions(pipeline.autoencoder.model),
        "size_px": str(pipeline.default_size_px),
        "latent_size": f"{width} × {height} × {channels}",
        "schedule": schedule_name(lab),
        "num_timesteps": f"{lab.num_timesteps:,}",
        "first_t": f"{first:.3g}",
        "last_t": f"{last:.4g}",
        "picture_name": subject.name,
        "picture_words": _picture_words(subject, is_box),
        "picture_short": "the hamster" if subject.is_shipped else "the picture",
        "picture_licence": _PICTURE_LICENCE if subject.is_shipped else "",
        "caption": subject.caption,
        "prompt": lab.prompt,
        "seed": str(lab.seed),
        "sampler": pipeline.defaults.sampler,
        "spacing": pipeline.defaults.spacing,
        "steps": str(lab.default_steps),
        "scale": f"{lab.scale:g}",
        "colours": _COLOURS.get(channels, _COLOURS_OF_OTHERS),
        "leftover": f"{stable_diffusion.mix(times(stable_diffusion, 2))[0][-1].item():.1%}",
        "ddpm_steps": f"{plan.ddpm_steps:,}",
        "ddim_steps": str(plan.ddim_steps),
        "reference_evaluations": f"{plan.reference_evaluations:,}",
        "num_noises": str(plan.num_noises),
        "schedules_html": _schedules_table(lab),
        "commands_html": _commands(lab, plan, is_box),
    }
    if isinstance(schedule, NoiseSchedule) and not schedule.ends_in_noise:
        said["algorithm_difference"] = short(algorithm_2_difference(schedule, lab.seed))
    if pipeline.text is not None:
        said["text_parameters"] = _millions(pipeline.text.model)
        said["text_tokens"] = str(pipeline.text.context_length)
        said["languages"] = ", ".join(_HEARTS)
    return said


def prompt_rows(lab: Lab) -> list[PromptRow]:
    """The rows of the text figure: things, one thing in several languages, in several styles."""
    styles = lab.pipeline.defaults.styles
    thing, _, style = lab.prompt.rpartition(", ")
    has_style = bool(thing) and style in styles
    tail = f", {style}" if has_style else ""
    hearts = list(_HEARTS.values())
    rows = [
        PromptRow("things", [f"{thing}{tail}" for thing in _THINGS], _THINGS),
        PromptRow("one thing in\neight\nlanguages", [f"{heart}{tail}" for heart in hearts], hearts),
    ]
    if styles:
        shown = styles[: len(_THINGS)]
        bare = thing if has_style else lab.prompt
        rows.append(
            PromptRow("the prompt\nin other\nstyles", [f"{bare}, {s}" for s in shown], shown)
        )
    return rows


def schedule_name(lab: Lab) -> str:
    """The constructor's name and the number of timesteps, as far as there are such."""
    known = curves.all_schedules().items()
    names = [name for name, schedule in known if curves.is_same(schedule, lab.schedule)]
    name = names[0] if names else type(lab.schedule).__name__
    count = getattr(lab.schedule, "num_timesteps", None)
    return f"{name}, {count:,} timesteps" if count else name


_PICTURE_LICENCE = " The hamster is from Fluent Emoji, © Microsoft Corporation, MIT licence."


def _picture_words(subject: Subject, is_box: bool) -> str:
    if not subject.is_shipped:
        return "Your picture."
    unseen = ", which no part of the model in the box has seen in training" if is_box else ""
    return f"The hamster of Microsoft's Fluent Emoji{unseen}."


def _millions(network: Any) -> str:
    count = 0 if network is None else sum(p.numel() for p in network.parameters())
    return f"{count / 1e6:.1f}"


def _model_name(pipeline: Pipeline) -> str:
    return "unsaved model" if pipeline.source is None else pipeline.source.name


def _schedules_table(lab: Lab) -> str:
    """The facts of all schedules as an HTML table; the model's own in bold."""
    own = schedule_name(lab).partition(",")[0]
    heads = ("factor of the picture at the end", "largest σ", "more noise than picture after")
    lines = ["<th>schedule</th>" + "".join(f'<th class="num">{head}</th>' for head in heads)]
    table = f"<table><thead><tr>{lines[0]}</tr></thead>"
    for line in curves.schedule_facts():
        cells = (line.last_signal, line.sigma_max, f"{line.balance} of the time")
        numbers = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
        own_row = ' class="own"' if line.name == own else ""
        table += f"<tr{own_row}><td>{escape(line.name)}</td>{numbers}</tr>"
    return table + "</table>"


def _commands(lab: Lab, plan: Plan, is_box: bool) -> str:
    """Shell lines that draw single pictures of the page again."""
    start = ["latentdiff", "sample", "--seed", str(lab.seed)]
    if not is_box and lab.pipeline.source is not None:
        start += ["--model", str(lab.pipeline.source)]
    if lab.pipeline.text is not None:
        start += ["--prompt", lab.prompt]
    endings = {
        "the reverse process": ["--sampler", "ddpm", "--steps", str(plan.ddpm_steps)],
        "the same without fresh noise": ["--sampler", "ddim", "--steps", str(plan.ddim_steps)],
    }
    if lab.pipeline.text is not None:
        highest = f"{max(plan.guidance_scales):g}"
        endings["guidance, first row, last column"] = ["--guidance", highest]
    lines = [f"{shlex.join([*start, *end])}    # {what}" for what, end in endings.items()]
    return f'<pre class="shell">{escape(chr(10).join(lines))}</pre>'
