"""What is shown of a model? The experiments of `latentdiff explain`, as sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentdiff.explain.colours import LATENT_LIMIT, latent_colours, pixel_colours
from latentdiff.explain.lab import Lab, times
from latentdiff.explain.sheet import Row, Sheet, short, time_label
from latentdiff.randomness import normal
from latentdiff.reconstruction import peak_signal_to_noise
from latentdiff.samplers import SAMPLERS, STOCHASTIC, find_sampler
from latentdiff.schedule import NoiseSchedule


@dataclass(frozen=True)
class PromptRow:
    """Prompts to be drawn side by side, and what stands below each."""

    title: str
    prompts: Sequence[str]
    labels: Sequence[str]


def autoencoder_sheet(lab: Lab, image: Tensor) -> Sheet:
    """A picture [3, h, w], its latent channel by channel, in colours, and decoded again."""
    z = lab.encode(image)
    decoded = lab.pipeline.autoencoder.decode(z).float().clamp(-1, 1)
    psnr_db = peak_signal_to_noise(decoded.cpu(), image[None]).item()
    channels, height, width = lab.latent_shape
    shown = min(channels, 4)
    greys = [pixel_colours((c / LATENT_LIMIT).expand(3, -1, -1)) for c in z[0, :shown]]
    heads = ["picture", *(f"channel {i + 1}" for i in range(shown)), "as colours", "decoded"]
    sizes = [f"{image.shape[-1]} × {image.shape[-2]} × 3", *[f"{width} × {height}"] * shown]
    sizes += [f"{width} × {height} × {channels}", f"PSNR {psnr_db:.1f} dB"]
    images = [pixel_colours(image), *greys, latent_colours(z[0]), *lab.decode(z)]
    return Sheet(
        [f"{head}\n{size}" for head, size in zip(heads, sizes, strict=True)],
        [Row("", images)],
        {
            "psnr_db": f"{psnr_db:.1f}",
            "numbers_in_picture": f"{image.numel():,}",
            "numbers_in_latent": f"{z.numel():,}",
            "compression": f"{image.numel() / z.numel():.0f}",
            "latent_std": f"{z.std().item():.2f}",
        },
    )


def forward_sheet(lab: Lab, image: Tensor, num_columns: int) -> Sheet:
    """The forward process of a picture [3, h, w], in pixels and in latents, with one noise each."""
    schedule, t = lab.schedule, times(lab.schedule, num_columns)
    signal, spread = schedule.mix(t)
    heads = []
    for i, time in enumerate(t.tolist()):
        snr = schedule.snr(t[i : i + 1]).item()
        part = (
            rf"$\bar\alpha_t$ = {short(signal[i].item() ** 2)}"
            if isinstance(schedule, NoiseSchedule)
            else f"signal {short(signal[i].item())}"
        )
        heads.append(f"{time_label(time)}\n{part}\nSNR {short(snr)}")
    pixel_noise = normal(tuple(image.shape), lab.seed, [0], "pixels")
    noisy = schedule.add_noise(image.expand(len(t), -1, -1, -1), pixel_noise, t)
    rows = [Row("picture,\nnoise added\nto pixels", [pixel_colours(part) for part in noisy])]
    last = noisy[-1]
    if not lab.in_pixels:
        z = lab.encode(image).expand(len(t), -1, -1, -1)
        noisy_z = schedule.add_noise(z, lab.noise(purpose="forward"), t)
        rows += [
            Row("latent,\nnoise added,\nas colours", [latent_colours(part) for part in noisy_z]),
            Row("the same\nlatents,\ndecoded", lab.decode(noisy_z)),
        ]
        last = noisy_z[-1]
    return Sheet(
        heads,
        rows,
        {
            "last_t": f"{t[-1].item():g}",
            "last_mean": f"{last.mean().item():.2f}".replace("-", "−"),
            "last_std": f"{last.std().item():.2f}",
            "last_signal": f"{signal[-1].item():.3f}",
            "last_spread": f"{spread[-1].item():.3f}",
        },
    )


def guess_sheet(lab: Lab, image: Tensor, caption: str, num_columns: int) -> Sheet:
    """What the network, asked once, makes of a noised picture [3, h, w], without guidance."""
    t = times(lab.schedule, num_columns)
    clean, noise = lab.encode(image), lab.noise(purpose="forward")
    denoise = lab.denoiser([caption], 1)
    noisy, guesses, noises, heads = [], [], [], []
    for time in t:
        sigma = lab.schedule.t_to_sigma(time.view(1))[0]
        x = clean + sigma.to(clean) * noise
        guess = denoise(x, sigma)
        noisy.append(x * lab.schedule.signal_at(sigma))
        guesses.append(guess)
        noises.append((x - guess) / sigma)
        heads.append(f"{time_label(time.item())}\n$\\sigma_t$ = {short(sigma.item())}")
    title = "what the\nnetwork sees" + ("" if lab.in_pixels else "\n(decoded)")
    rows = [
        Row(title, lab.decode(torch.cat(noisy))),
        Row(
            "its guess of\nthe clean\npicture",
            lab.decode(torch.cat(guesses)),
            [_error_label(guess, clean) for guess in guesses],
        ),
        Row(
            "its guess of\nthe noise",
            [latent_colours(guess[0]) for guess in noises],
            [_error_label(guess, noise) for guess in noises],
        ),
        Row("the noise\nthat was\nadded", [latent_colours(noise[0])] * len(t)),
    ]
    return Sheet(heads, rows)


def _error_label(guess: Tensor, truth: Tensor) -> str:
    return f"error {short((guess - truth).square().mean().item())}"


def reverse_sheet(lab: Lab, sampler: str, steps: int, num_columns: int) -> Sheet:
    """Moments of a sampling: what the network sees, its guesses of the clean picture and noise."""
    _, seen = lab.sample(sampler, steps)
    places = np.linspace(0, len(seen) - 1, min(num_columns, len(seen))).round().astype(int)
    shown = [seen[i] for i in places]
    signals = [lab.schedule.signal_at(moment.sigma) for moment in shown]
    noisy = torch.cat([m.x * s for m, s in zip(shown, signals, strict=True)])
    clean = torch.cat([moment.clean for moment in shown])
    noises = [(moment.x - moment.clean) / moment.sigma for moment in shown]
    heads = []
    for moment in shown:
        t = lab.schedule.sigma_to_t(moment.sigma.view(1)).item()
        heads.append(f"{time_label(t)}\n$\\sigma_t$ = {short(moment.sigma.item())}")
    rows = [
        Row("noisy" if lab.in_pixels else "noisy latent,\ndecoded", lab.decode(noisy)),
        Row("predicted\nclean picture", lab.decode(clean)),
        Row(
            "predicted\nnoise" if lab.in_pixels else "predicted\nnoise,\nas colours",
            [latent_colours(noise[0]) for noise in noises],
        ),
    ]
    return Sheet(heads, rows, {"columns": str(len(heads))})


def samplers_sheet(
    lab: Lab, names: Sequence[str], evaluations: Sequence[int], reference: Tensor | None
) -> Sheet:
    """Samplers side by side from one noise: a column each, a row for each number of evaluations.

    Without guidance, so that the solver alone makes the difference.

    Args:
        lab: the model.
        names: in SAMPLERS.
        evaluations: of the network at most, a row each.
        reference: latents that all of them would end in with enough steps, if there are such.
    """
    rows = []
    for count in evaluations:
        images, labels = [], []
        for name in names:
            z, _ = lab.sample(name, lab.steps_for(name, count), scale=1)
            images += lab.decode(z)
            if reference is not None:
                labels.append(f"{(z - reference).square().mean().sqrt().item():.2f}")
        rows.append(Row(f"{count}\nevaluations", images, labels))
    return Sheet(
        ["_\n".join(name.rsplit("_", 1)) if len(name) > 11 else name for name in names], rows
    )


def reference_solution(lab: Lab, evaluations: int) -> Tensor:
    """Latents: the unguided probability-flow ODE from the lab's noise, by Heun's method."""
    return lab.sample("heun", lab.steps_for("heun", evaluations), scale=1)[0]


def families() -> tuple[list[str], list[str]]:
    """The samplers' names: deterministic, stochastic."""
    return [n for n in SAMPLERS if n not in STOCHASTIC], [n for n in SAMPLERS if n in STOCHASTIC]


def guidance_sheet(lab: Lab, scales: Sequence[float], num_noises: int) -> Sheet:
    """A column each guidance scale, a row each starting noise."""
    noises = range(num_noises)
    columns = [
        lab.decode(
            lab.sample(lab.pipeline.defaults.sampler, lab.default_steps, None, scale, noises)[0]
        )
        for scale in scales
    ]
    rows = [Row(f"noise {i + 1}", [column[i] for column in columns]) for i in noises]
    return Sheet([f"$s$ = {scale:g}" for scale in scales], rows)


def text_sheet(lab: Lab, rows: Sequence[PromptRow]) -> Sheet:
    """Rows of prompts, all from the same starting noise."""
    drawn = []
    for row in rows:
        noises = [0] * len(row.prompts)
        z, _ = lab.sample(
            lab.pipeline.defaults.sampler, lab.default_steps, row.prompts, None, noises
        )
        drawn.append(Row(row.title, lab.decode(z), row.labels))
    return Sheet([], drawn)


def algorithm_2_difference(schedule: NoiseSchedule, seed: int) -> float:
    """DDPM's Algorithm 2 word for word against `samplers.ddpm`, over all timesteps, in float64.

    The network is made up: it takes the data for standard normal, E[clean | x] = x / (1 + sigma^2).

    Returns:
        The largest difference of the two results on 64 numbers of one starting noise.
    """

    def fresh(step: int) -> Tensor:
        return normal((64,), seed, [0], f"algorithm-2-{step}")[0].double()

    def guess(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.square())

    bars, count = schedule.alphas_cumprod, schedule.num_timesteps
    alphas = bars / torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    x_t = start = fresh(-1)  # line 1
    for t in reversed(range(count)):  # line 2; the paper's t is this one plus 1
        z = fresh(count - 1 - t) if t > 0 else torch.zeros(64, dtype=torch.float64)  # line 3
        clean = guess(x_t / bars[t].sqrt(), schedule.sigmas[t])
        eps = (x_t - bars[t].sqrt() * clean) / (1 - bars[t]).sqrt()
        before = bars[t - 1] if t > 0 else torch.ones((), dtype=torch.float64)
        variance = (1 - before) / (1 - bars[t]) * (1 - alphas[t])  # beta tilde, section 3.2
        mean = (x_t - (1 - alphas[t]) / (1 - bars[t]).sqrt() * eps) / alphas[t].sqrt()
        x_t = mean + variance.sqrt() * z  # line 4
    sigmas = torch.cat([schedule.sigmas.flip(0), torch.zeros(1, dtype=torch.float64)])
    ours = find_sampler("ddpm")(guess, start / bars[-1].sqrt(), sigmas, lambda _, step: fresh(step))
    return (ours - x_t).abs().max().item()
