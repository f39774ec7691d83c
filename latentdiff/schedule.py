"""How does noise take over? Forward processes and t <-> sigma, all in float64.

Every forward process here mixes clean data and standard-normal noise in one shot,
    noisy = signal(t) * clean + spread(t) * noise,
and is the same process seen through another scale:
    x = noisy / signal = clean + sigma * noise,   sigma = spread / signal,   SNR = 1 / sigma^2
Networks see (noisy, t); samplers see (x, sigma).

| process             | signal                         | spread          | t                     |
|---------------------|--------------------------------|-----------------|-----------------------|
| variance preserving | sqrt(alpha_bar)                | sqrt(1 - a_bar) | 0 ... T - 1           |
| flow matching       | 1 - t / T                      | t / T           | (0, T]                |
| EDM                 | c_in = 1/sqrt(sigma^2 + s_d^2) | c_in * sigma    | c_noise = ln(sigma)/4 |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA_CAP = 4096.0  # samplers' infinity: alpha_bar = 2^-24 to them, as in diffusers


class Schedule(ABC):
    """A forward process: signal and spread at every time t."""

    sigma_data: float = 1.0  # standard deviation of clean data; only EDM's depends on it

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """Sigma at the first time."""

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """Sigma at the last time, made finite where nothing is left of the data."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the data at the last time."""
        return False

    @abstractmethod
    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, spread) at t [b], float64 [b]."""

    @abstractmethod
    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at t [n], float64 [n]; finite also where nothing is left of the data."""

    @abstractmethod
    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Inverse of `t_to_sigma`, float64 [n]; where there is a last time, nothing is beyond."""

    @abstractmethod
    def signal_at(self, sigma: Tensor) -> Tensor:
        """The signal at sigma: x * signal is what the network sees. float64, like sigma."""

    @abstractmethod
    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """Training timesteps from numbers in [0, 1) [b], by the inverse of their distribution."""

    def start_scale(self, sigma: Tensor) -> Tensor:
        """What makes noise a sampler's start at sigma: the network sees it at unit variance."""
        return 1 / self.signal_at(sigma)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The forward process in one shot (DDPM, eq. 4): signal * clean + spread * noise.

        Args:
            clean: [b, ...].
            noise: standard normal, like clean.
            t: [b] times, integer or in between.
        """
        signal, spread = (per_sample(part, clean) for part in self.mix(t))
        return signal * clean + spread * noise

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio signal^2 / spread^2, float64 [b]."""
        signal, spread = self.mix(t)
        return (signal / spread).square()

    def log_snr(self, t: Tensor) -> Tensor:
        """Natural logarithm of the SNR, float64 [b]; -inf where no signal is left."""
        signal, spread = self.mix(t)
        return 2 * (signal.log() - spread.log())


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """The discrete variance-preserving process of T timesteps (DDPM).

    Attributes:
        alphas_cumprod: [T] float64, alpha_bar[t]; decreasing in (0, 1), the last may be 0.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        bars = self.alphas_cumprod
        if bars.ndim != 1 or len(bars) < 2 or bars.dtype != torch.float64:
            raise ValueError(
                "alphas_cumprod must be a float64 vector of at least 2 entries; "
                f"got {bars.dtype} of shape {tuple(bars.shape)}"
            )
        good = (bars.diff(prepend=bars.new_ones(1)) < 0) & (bars >= 0)
        if not bool(good.all()):
            wrong = int(good.int().argmin())
            raise ValueError(
                "alphas_cumprod must decrease from below 1 to no less than 0; got "
                f"{bars[wrong].item():g} at index {wrong}; give betas in (0, 1), the last may be 1"
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
    def beta_sigmoid(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> NoiseSchedule:
        """Betas along a sigmoid from -6 to 6 (GeoDiff, Xu et al. 2022; diffusers' "sigmoid")."""
        ramp = torch.sigmoid(_linspace(-6, 6, num_timesteps))
        return cls.from_betas(beta_start + ramp * (beta_end - beta_start))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, offset: float = 0.008) -> NoiseSchedule:
        """f(t) = cos^2((t / T + s) / (1 + s) * pi / 2), beta <= 0.999 (Nichol & Dhariwal 17)."""
        t = _linspace(0, 1, num_timesteps + 1)
        return cls._from_curve(torch.cos((t + offset) / (1 + offset) * math.pi / 2).square())

    @classmethod
    def sigmoid(
        cls, num_timesteps: int = 1000, start: float = -3, end: float = 3, temperature: float = 1
    ) -> NoiseSchedule:
        """A sigmoid that falls from 1 to 0, beta <= 0.999 (Jabri et al. 2023; Chen 2023).

        f(t) = 1 - sigmoid((start + (end - start) t / T) / temperature), shifted and scaled.
        """
        curve = torch.sigmoid(-_linspace(start, end, num_timesteps + 1) / temperature)
        return cls._from_curve((curve - curve[-1]) / (curve[0] - curve[-1]))

    @classmethod
    def _from_curve(cls, f: Tensor) -> NoiseSchedule:
        return cls.from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alpha_bar) to end in exactly 0 (Lin et al. 2024, algorithm 1)."""
        root = self.alphas_cumprod.sqrt()
        return NoiseSchedule(((root - root[-1]) * root[0] / (root[0] - root[-1])).square())

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """[T] float64, 1 - alpha_bar[t] / alpha_bar[t - 1]."""
        before = torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])
        return 1 - self.alphas_cumprod / before

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep is noise alone."""
        return self.alphas_cumprod[-1].item() == 0

    @property
    def sigmas(self) -> Tensor:
        """[T] float64 noise-to-signal ratio, increasing in t; infinite at a zero-SNR end."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @property
    def sigma_min(self) -> float:
        """Sigma at t = 0."""
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        """Sigma at t = T - 1; of a zero-SNR schedule the stand-in for infinity."""
        return self._finite_sigmas[-1].item()

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(sqrt(alpha_bar), sqrt(1 - alpha_bar)); log sigma is interpolated between integers."""
        _check_times(t, self.num_timesteps - 1)
        low = t.long()
        at_t = self.alphas_cumprod.to(t.device)[low]
        if t.is_floating_point():
            at_t = torch.where(t == low, at_t, 1 / (1 + self.t_to_sigma(t).square()))
        return at_t.sqrt(), (1 - at_t).sqrt()

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma at timesteps [n], also between the integers (log sigma is interpolated)."""
        log_sigmas = self._finite_sigmas.log().to(t.device)
        t = t.double().clamp(0, self.num_timesteps - 1)
        low = t.long()
        high = (low + 1).clamp(max=self.num_timesteps - 1)
        return torch.lerp(log_sigmas[low], log_sigmas[high], t - low).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """Inverse of `t_to_sigma`, float64 [n] in [0, T - 1]."""
        log_sigmas = self._finite_sigmas.log().to(sigma.device)
        log_sigma = sigma.double().log()
        high = torch.searchsorted(log_sigmas, log_sigma).clamp(1, self.num_timesteps - 1)
        low = high - 1
        part = (log_sigma - log_sigmas[low]) / (log_sigmas[high] - log_sigmas[low])
        return low + part.clamp(0, 1)

    def signal_at(self, sigma: Tensor) -> Tensor:
        """sqrt(alpha_bar) = 1 / sqrt(1 + sigma^2)."""
        return (1 + sigma.double().square()).rsqrt()

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """Integers in [0, T), each equally likely (DDPM, algorithm 1, line 3)."""
        return (uniform.double() * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    @property
    def _finite_sigmas(self) -> Tensor:
        sigmas = self.sigmas
        if self.ends_in_noise:
            sigmas[-1] = max(SIGMA_CAP, 1.5 * sigmas[-2].item())
        return sigmas


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Straight lines from data to noise (Lipman et al. 2023; rectified flow, Liu et al. 2023).

    Attributes:
        num_timesteps: T, the network's unit of time.
        shift: multiplies every sigma, as pictures of more pixels need more noise (Esser et al.
            2024, eq. 23: the square root of the ratio of pixel counts); t -> s t / (1 + (s - 1) t).
        logit_mean: of the logit-normal training distribution of t / T (Esser et al. 2024, eq. 19).
        logit_std: of the same; None trains on uniform t.
    """

    num_timesteps: int = 1000
    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float | None = 1.0

    def __post_init__(self) -> None:
        std = 1.0 if self.logit_std is None else self.logit_std
        if self.num_timesteps < 2 or not (0 < self.shift < math.inf and 0 < std < math.inf):
            raise ValueError(
                "num_timesteps must be at least 2, shift and logit_std positive; "
                f"got {self.num_timesteps}, {self.shift} and {self.logit_std}"
            )

    def shifted(self, part: Tensor) -> Tensor:
        """Times t / T in (0, 1] before the shift -> after it; 1 stays exactly 1."""
        return self.shift * part / (1 - part + self.shift * part)

    @property
    def sigma_min(self) -> float:
        """Sigma at t = 1, shifted."""
        return self.shift / (self.num_timesteps - 1)

    @property
    def sigma_max(self) -> float:
        """SIGMA_CAP, or more where the shift takes t = T - 1 near it: t = T has no finite sigma."""
        return max(SIGMA_CAP, 2 * self.shift * self.num_timesteps)

    @property
    def ends_in_noise(self) -> bool:
        """True: at t = T there is noise alone."""
        return True

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t / T, t / T)."""
        _check_times(t, self.num_timesteps)
        part = t.double() / self.num_timesteps
        return 1 - part, part

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Sigma = t / (T - t), at most `sigma_max`."""
        t = t.double().clamp(0, self.num_timesteps)
        return (t / (self.num_timesteps - t)).clamp(max=self.sigma_max)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """T sigma / (1 + sigma); exactly T from `sigma_max` on."""
        sigma = sigma.double()
        part = torch.where(sigma >= self.sigma_max, 1.0, sigma / (1 + sigma))
        return part * self.num_timesteps

    def signal_at(self, sigma: Tensor) -> Tensor:
        """1 - t / T = 1 / (1 + sigma)."""
        return 1 / (1 + sigma.double())

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """Logit-normal or uniform times in (0, T), then shifted."""
        part = uniform.double()
        if self.logit_std is not None:
            part = torch.sigmoid(self.logit_mean + self.logit_std * _normal_quantile(part))
        # t = T and t = 0 are left out: v and flow are defined there, but epsilon and SNR are not
        return self.num_timesteps * self.shifted(part.clamp(1e-6, 1 - 1e-6))


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """Sigma itself is the time; c_in keeps the input at unit size (Karras et al. 2022).

    Attributes:
        sigma_data: standard deviation of the data.
        smallest: where sampling ends before 0.
        largest: where sampling begins.
        log_mean: P_mean of ln(sigma) in training.
        log_std: P_std of the same.
    """

    sigma_data: float = 0.5
    smallest: float = 0.002
    largest: float = 80.0
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self) -> None:
        scales = (self.smallest, self.largest, self.sigma_data, self.log_std)
        if not (all(0 < s < math.inf for s in scales) and self.smallest < self.largest):
            raise ValueError(
                "smallest, largest, sigma_data and log_std must be positive, and smallest below "
                f"largest; got {', '.join(map(str, scales))}"
            )

    @property
    def sigma_min(self) -> float:
        """Where sampling ends before 0."""
        return self.smallest

    @property
    def sigma_max(self) -> float:
        """Where sampling begins."""
        return self.largest

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in, c_in * sigma)."""
        sigma = self.t_to_sigma(t)
        signal = self.signal_at(sigma)
        return signal, signal * sigma

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """exp(4 t), the inverse of c_noise."""
        return (4 * t.double()).exp()

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 (table 1)."""
        return sigma.double().log() / 4

    def signal_at(self, sigma: Tensor) -> Tensor:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2) (table 1)."""
        return (sigma.double().square() + self.sigma_data**2).rsqrt()

    def draw_timesteps(self, uniform: Tensor) -> Tensor:
        """ln(sigma) ~ N(P_mean, P_std^2) (table 1)."""
        return (self.log_mean + self.log_std * _normal_quantile(uniform.double())) / 4


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


def _check_times(t: Tensor, last: int) -> None:
    """Refuse times outside 0..last; on a GPU nothing is looked at, which would wait for it."""
    if t.device.type == "cpu" and t.numel() and not 0 <= t.min() <= t.max() <= last:
        raise ValueError(
            f"timesteps must lie in 0..{last}; got {t.min().item():g} to {t.max().item():g}"
        )


def _normal_quantile(uniform: Tensor) -> Tensor:
    """The inverse of the normal distribution function, finite at 0 and 1."""
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[b] as [b, 1, ...] in the precision and on the device of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1)).to(like)
