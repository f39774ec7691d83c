"""What is drawn when drawing is measured, and how do we draw it? A job, its result, our ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.attention import choose
from latentdiff.backends import Run
from latentdiff.lean.network import LeanNetwork, shared
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import read_config, read_weights
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.speed import Speed
from latentdiff.text import Conditioning

SUBJECTS = ("a red apple", "a cat", "a green tree", "a house", "the sun", "a blue car", "a fish")
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Job:
    """The same for all ways.

    Attributes:
        prompts: one a picture.
        start: standard normal [b, c, h, w], float32 on the CPU.
        steps: evaluations of the U-Net, each guided.
        guidance: scale.
    """

    prompts: Sequence[str]
    start: Tensor
    steps: int
    guidance: float

    @classmethod
    def of(cls, model: Path, batch: int, steps: int, guidance: float = 5.0) -> Job:
        """Pictures of the model's own size."""
        start = normal(Pipeline.load(model).latent_shape(), 0, range(batch), "start")
        prompts = [SUBJECTS[i % len(SUBJECTS)] for i in range(batch)]
        return cls(prompts, start, steps, guidance)


@dataclass(frozen=True)
class Drawn:
    """What came out, and when.

    Attributes:
        images: as PIL has them.
        latents: clean, [b, c, h, w].
        seconds: from prompts to images.
        steps_s: of these, until the latents were there; on a GPU until they were asked for.
    """

    images: Sequence[Image.Image]
    latents: Tensor
    seconds: float
    steps_s: float


Way = Callable[[Job], Drawn]
Change = Callable[["Ours"], None]


class Ours:
    """A way of drawing with this project.

    Args:
        model: directory.
        dtype: of the networks.
        device: where they run.
        speed: as `Pipeline.speed`.
        change: of the networks, before the first picture.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        speed: Speed | None = None,
        change: Change | None = None,
    ) -> None:
        self.model = Pipeline.load(model).to(device, dtype)
        self.model.speed = Speed(backend="torch") if speed is None else speed
        # as many evaluations as diffusers', all of them guided
        self.model.defaults = replace(self.model.defaults, guidance_interval=None)
        self.inference: Any = self.model.inference()
        if change is not None:
            change(self)
        self._watched = _Watched(self.inference.decoder)
        self.inference.decoder = self._watched

    def __call__(self, job: Job) -> Drawn:
        """Draw it."""
        downscale = self.model.shape.downscale
        began = time.perf_counter()
        images = self.model.generate(
            list(job.prompts),
            negative_prompt=NEGATIVE,
            latents=job.start,
            steps=job.steps,
            guidance_scale=job.guidance,
            height=job.start.shape[2] * downscale,
            width=job.start.shape[3] * downscale,
            batch_size=len(job.prompts),
        )
        seconds = time.perf_counter() - began
        assert self._watched.z is not None
        latents = self._watched.z.float().cpu()
        return Drawn(images, latents, seconds, self._watched.at - began)

    @property
    def runs_on(self) -> str:
        """What executes the U-Net of a default `Speed`, by name."""
        is_torch = isinstance(getattr(self.inference.network, "_run", None), LeanUNet)
        return "torch" if is_torch else "OpenVINO"


class _Watched:
    """A decoder that remembers what it was given, and when."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.z: Tensor | None = None
        self.at = 0.0

    def decode(self, z: Tensor) -> Tensor:
        self.z, self.at = z, time.perf_counter()
        return self._decoder.decode(z)


@dataclass
class Lever:
    """The lean U-Net with what is asked for, and nothing else: `Ours`' change.

    Attributes:
        cached: keys and values of the prompts once a picture, times once a timestep.
        paired: both halves of guidance share what comes before the text.
        attention: name of a kernel.
        around: what executes the U-Net, made of it; None: itself.
    """

    cached: bool = False
    paired: bool = False
    attention: str = "sdpa"
    around: Callable[[LeanUNet], Run] | None = None

    def __call__(self, ours: Ours) -> None:
        """Put it into the place of the network."""
        source, device, dtype = ours.model.source, ours.model.device, ours.model.dtype
        assert source is not None
        weights = read_weights(source / "unet", device)
        unet = LeanUNet.from_weights(read_config(source / "unet"), weights, device, dtype)
        layers = [layer for layer in unet.shape.layers if layer.transformer is not None]
        dims = list(dict.fromkeys(layer.channels_out // layer.num_heads for layer in layers))
        side = ours.model.shape.sample_size // 2 ** min(layer.level for layer in layers)
        unet.attend = choose(self.attention, device, dtype, dims, side**2).attend
        run = unet if self.around is None else self.around(unet)
        network = _Network(LeanNetwork(unet, run), run, self.cached, self.paired)
        ours.inference.network, ours.inference.prepare = network, network.prepare


@dataclass
class _Network:
    """`denoiser.Network` with or without what `LeanNetwork` saves."""

    lean: LeanNetwork
    run: Run
    cached: bool
    paired: bool

    def prepare(self, cond: Conditioning) -> Conditioning:
        return self.lean.prepare(cond) if self.cached else cond

    def __call__(self, noisy: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        unet, given = self.lean.unet, shared(noisy, cond) if self.paired else noisy
        if self.cached:
            return self.run(given, self.lean.time(t.item()), cond.tokens)
        time_bias = unet.times(torch.full((1,), t.item(), device=noisy.device))
        return self.run(given, time_bias, unet.texts(cond.tokens))


def described(speed: Mapping[str, Any]) -> str:
    """A Speed's options in words, as the command line names them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in speed.items())
