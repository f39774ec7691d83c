"""How fast does noise take over? Noise schedules, t <-> sigma, and step grids, all in float64.

The forward process (Ho et al. 2020, eq. 4) mixes clean data and noise in one shot:
    noisy = sqrt(alpha_bar[t]) * clean + sqrt(1 - alpha_bar[t]) * noise
Samplers work on the rescaled x = noisy / sqrt(alpha_bar[t]) = clean + sigma * noise, with
    sigma[t] = sqrt((1 - alpha_bar[t]) / alpha_bar[t])                    # Song et al. 2021
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SPACINGS = ("trailing", "leading", "linspace", "karras")


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete forward process of T timesteps.

    Attributes:
        alphas_cumprod: [T] float64, alpha_bar[t]; decreasing in (0, 1).
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        bars = self.alphas_cumprod
        if bars.ndim != 1 or len(bars) < 2 or not bool((bars.diff() < 0).all()):
            raise ValueError("alphas_cumprod must be a decreasing vector of at least 2 entries")
        if not 0 < bars[-1].item() <= bars[0].item() < 1:
            raise ValueError(
                "alphas_cumprod must lie in (0, 1); "
                f"got {bars[0].item():.3g} ... {bars[-1].item():.3g}"
            )

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """alpha_bar[t] = prod over s <= t of (1 - beta[s])."""
        return cls(torch.cumprod(1 - betas.double(), 0))

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas evenly spaced (DDPM, section 4)."""
        return cls.from_betas(_linspace(beta_start, beta_end, num_timesteps))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of the betas evenly spaced (Stable Diffusion)."""
        roots = _linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps)
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, offset: float = 0.008) -> NoiseSchedule:
        """f(t) = cos^2((t / T + s) / (1 + s) * pi / 2), beta <= 0.999 (Nichol & Dhariwal 17)."""
        t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        f = torch.cos((t + offset) / (1 + offset) * math.pi / 2).square()
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """[T] float64 noise-to-signal ratio, increasing in t."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process in one shot (DDPM, eq. 4).

        Args:
            clean: [b, ...].
            noise: standard normal, like clean.
            t: [b] integer timesteps in [0, T).
        """
        signal, scale = self._mix(clean, t)
        return signal * clean + scale * noise

    def velocity(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """V = sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * clean (Salimans & Ho 2022)."""
        signal, scale = self._mix(clean, t)
        return signal * noise - scale * clean

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha_bar / (1 - alpha_bar), float64 [b]."""
        bars = self.alphas_cumprod.to(t.device)[t]
        return bars / (1 - bars)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at timesteps [n], also between the integers (log-sigma is interpolated)."""
        log_sigmas = self.sigmas.log().to(t.device)
        low = t.double().floor().clamp(0, self.num_timesteps - 1)
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        part = (t.double() - low).clamp(0, 1)
        return torch.lerp(log_sigmas[low.long()], log_sigmas[high.long()], part).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Inverse of `t_to_sigma`, float64 [n]; clamped to [0, T - 1]."""
        log_sigmas = self.sigmas.log().to(sigma.device)
        log_sigma = sigma.double().log()
        high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, self.num_timesteps - 1)
        low = high - 1
        part = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        return low + part.clamp(0, 1)

    def _mix(self, like: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        bars = self.alphas_cumprod.to(t.device)[t].view(-1, *[1] * (like.ndim - 1))
        return bars.sqrt().to(like), (1 - bars).sqrt().to(like)


def step_grid(schedule: NoiseSchedule, num_steps: int, spacing: str = "trailing") -> Tensor:
    """Decreasing sigmas [num_steps + 1], float64, ending in 0.

    Args:
        schedule: the model's forward process.
        num_steps: steps of the sampler.
        spacing: where the timesteps lie. `trailing` starts at T - 1 (Lin et al. 2023, table 2);
            `leading` is DDIM's and Stable Diffusion's, offset by one, for less than T steps;
            `linspace` spans [0, T - 1];
            `karras` is even in sigma^(1/7) (Karras et al. 2022, eq. 5).

    Raises:
        ValueError: unknown spacing, or more steps than timesteps.
    """
    count = schedule.num_timesteps
    most = count - 1 if spacing == "leading" else count
    if not 1 <= num_steps <= most:
        raise ValueError(f"num_steps must be in 1..{most}; got {num_steps}")
    match spacing:
        case "trailing":
            t = (
                torch.round(
                    count - torch.arange(num_steps, dtype=torch.float64) * count / num_steps
                )
                - 1
            )
        case "leading":
            t = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * (count // num_steps) + 1
        case "linspace":
            t = _linspace(count - 1, 0, num_steps)
        case "karras":
            low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
            sigmas = _linspace(high ** (1 / 7), low ** (1 / 7), num_steps) ** 7
            return torch.cat([sigmas, sigmas.new_zeros(1)])
        case _:
            raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    sigmas = schedule.t_to_sigma(t)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)
