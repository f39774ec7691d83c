"""What is a model as one thing? Load, save and generate, in diffusers' directory layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from PIL import Image

from latentdiff.buildschedule import build_schedule
from latentdiff.call import Call, Options, plan
from latentdiff.devices import DTYPES, resolve_device
from latentdiff.diffusers_format import (
    PRETRAINED,
    check_model_directory,
    is_unconditional,
    pipeline_class,
    weights_hash,
)
from latentdiff.generate import stream
from latentdiff.inference import Inference
from latentdiff.lean.weights import read_config, read_weights
from latentdiff.modelshape import ModelShape
from latentdiff.painter import Painter
from latentdiff.samplers import Denoise
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.scheduler_format import read_schedule
from latentdiff.speed import Speed

if TYPE_CHECKING:
    from latentdiff.config import DiffusionRun
    from latentdiff.configschedule import ScheduleConfig
    from latentdiff.modules import Modules
    from latentdiff.schedule import Schedule
    from latentdiff.text import TextEncoder
    from vae.autoencoder import Autoencoder


class Pipeline:
    """An autoencoder, a text tower, a U-Net and the forward process it was trained on.

    `unet`, `autoencoder` and `text` are diffusers' and transformers' modules. They are loaded when
    they are first asked for: `generate` draws with lean networks of the same weights, and follows
    what is done to the modules.

    Attributes:
        schedule: the forward process.
        schedule_config: what it was built from.
        prediction: what the U-Net predicts, one of `denoiser.PREDICTIONS`.
        shape: sizes of its latents and pictures.
        defaults: what `generate` does where it is not told.
        source: the directory that the weights are in; None for a new model.
        loras: files that were merged into the weights, with their weights.
        speed: how it draws fast, or in little memory.
    """

    def __init__(
        self,
        *,
        schedule: Schedule,
        schedule_config: ScheduleConfig,
        prediction: str,
        shape: ModelShape,
        defaults: SamplingDefaults,
        source: Path | None = None,
        modules: Modules | None = None,
    ) -> None:
        self.schedule = schedule
        self.schedule_config: ScheduleConfig = schedule_config
        self.prediction = prediction
        self.shape = shape
        self.defaults = defaults
        self.source = source
        self.loras: list[tuple[Path, float]] = []
        self.speed = Speed()
        self._modules = modules
        self._place = (torch.device("cpu"), torch.float32)
        self._inference: Inference | None = None
        self._made_of: object = None  # what the inference was made of

    @classmethod
    def new(cls, config: DiffusionRun, captions: Iterable[str] = ()) -> Pipeline:
        """The model of a run with fresh (or, where the config says so, pretrained) weights.

        Args:
            config: the run.
            captions: what a new vocabulary is learned from.

        Raises:
            ValueError: the pictures' size does not fit the autoencoder or the U-Net, or
                `init_from` names a model of another prediction.
        """
        if config.init_from is not None:
            return cls._continued(config.init_from, config)
        from latentdiff.modules import Modules

        modules = Modules.new(config, captions)
        grid = config.samples
        return cls(
            schedule=build_schedule(config.schedule),
            schedule_config=config.schedule,
            prediction=config.objective.prediction,
            shape=modules.shape,
            defaults=SamplingDefaults(
                num_steps=grid.num_steps,
                guidance_scale=grid.guidance_scale,
                sampler=grid.sampler,
                spacing=grid.spacing,
                styles=grid.styles,
            ),
            modules=modules,
        )

    @classmethod
    def _continued(cls, init_from: str, config: DiffusionRun) -> Pipeline:
        """A saved model, to be trained further."""
        model = cls.load(None if init_from == "box" else init_from)
        if model.prediction != config.objective.prediction:
            raise ValueError(
                f"objective.prediction is {config.objective.prediction}, but {init_from} predicts "
                f"{model.prediction}; set objective.prediction={model.prediction}"
            )
        from latentdiff.modules import check_sides

        check_sides(config.data, model.size_multiple_px, init_from)
        styles = config.samples.styles or model.defaults.styles
        model.defaults = replace(model.defaults, styles=styles)
        return model

    @classmethod
    def load(
        cls, model: str | Path | None = None, loras: Iterable[tuple[str | Path, float]] = ()
    ) -> Pipeline:
        """Open the model in the box (None), a directory in diffusers' layout, or a hub id.

        Args:
            model: which.
            loras: LoRA files with their weights, to be merged.

        Raises:
            ValueError: there is no such directory, it holds no such model, or a LoRA is of another
                architecture.
        """
        source = check_model_directory(PRETRAINED if model is None else model)
        with_text = not is_unconditional(source)
        schedule_config, prediction = read_schedule(source)
        vae = read_config(source / "vae") if with_text else None
        shape = ModelShape.read(read_config(source / "unet"), vae)
        shape.check_channels(str(source / "unet"))
        found = cls(
            schedule=build_schedule(schedule_config),
            schedule_config=schedule_config,
            prediction=prediction,
            shape=shape,
            defaults=SamplingDefaults.read(source),
            source=source,
        )
        for path, weight in loras:
            found.add_lora(path, weight)
        return found

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write diffusers' layout with safetensors of `dtype`; `source` points there afterwards.

        A latent model with text becomes a StableDiffusionPipeline, an unconditional model of pixels
        a DDPMPipeline. LoRA files that were added are part of the weights from then on.

        Raises:
            ValueError: the model is of neither sort.
            OSError: it cannot be written.
        """
        from latentdiff.saving import save

        save(self, Path(directory), dtype)
        self.source, self.loras = Path(directory), []

    @property
    def modules(self) -> Modules:
        """The libraries' modules, loaded at the first call."""
        if self._modules is None:
            from latentdiff.modules import Modules

            assert self.source is not None  # only `load` leaves them out
            with torch.inference_mode(False):  # or nobody could train them
                self._modules = Modules.load(self.source)
                self._modules.to(*self._place)
                for path, weight in self.loras:
                    self._modules.merge(path, weight)
        return self._modules

    @property
    def unet(self) -> Any:
        """Diffusers' UNet2DConditionModel, or UNet2DModel without text."""
        return self.modules.unet

    @property
    def autoencoder(self) -> Autoencoder:
        """Image <-> latent."""
        return self.modules.autoencoder

    @property
    def text(self) -> TextEncoder | None:
        """The text tower; None for an unconditional model."""
        return self.modules.text

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Move all networks; returns self.

        Raises:
            ValueError: no such device here, or a dtype that is none of float32, bfloat16, float16.
        """
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype {dtype} is not for networks; use float32, bfloat16 or float16; for weights "
                "of 8 bits set speed = Speed(quantise='int8')"
            )
        self._place = (resolve_device(str(device)), dtype)
        if self._modules is not None:
            self._modules.to(device, dtype)
        return self

    def add_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Merge a LoRA file into the weights: weight * (alpha / rank) * up @ down is added.

        Raises:
            ValueError: it is no LoRA file, or one of another architecture.
        """
        from latentdiff.lora import find_targets, read_lora

        if self._modules is not None:
            with torch.inference_mode(False):
                self._modules.merge(Path(path), weight)
        elif self.source is not None:
            parts = [self.source / name for name in ("unet", "text_encoder")]
            find_targets(read_lora(path), *(read_weights(p) if p.is_dir() else {} for p in parts))
        self.loras = [*self.loras, (Path(path), weight)]

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self._place[0] if self._modules is None else self._modules.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the U-Net's weights."""
        return self._place[1] if self._modules is None else self._modules.unet.dtype

    @property
    def has_modules(self) -> bool:
        """Whether the libraries' modules are loaded, whose weights may be another's to change."""
        return self._modules is not None

    @property
    def has_text(self) -> bool:
        """Whether it draws from prompts."""
        if self._modules is not None:
            return self._modules.text is not None
        return self.source is not None and not is_unconditional(self.source)

    @property
    def learns_variance(self) -> bool:
        """Whether the U-Net says the reverse process's variance too; unguided ddpm takes it."""
        return self.shape.learns_variance

    @property
    def diffusers_class(self) -> str | None:
        """The pipeline of diffusers that opens the saved model; None where there is none."""
        return pipeline_class(self.has_text, self.shape.downscale > 1)

    @property
    def default_size_px(self) -> int:
        """Side of the pictures the model was trained on."""
        return self.shape.default_size_px

    @property
    def size_multiple_px(self) -> int:
        """Height and width must be multiples of this."""
        return self.shape.size_multiple_px

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(c, h, w) of a picture's latent; `ModelShape.latent`."""
        return self.shape.latent(height, width)

    def model_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the weights on disk; "unsaved" without them."""
        return "unsaved" if self.source is None else weights_hash(self.source)

    def inference(self) -> Inference:
        """The networks as `generate` uses them; made anew when weights or wishes have changed."""
        if self._inference is None or self._made_of != self._what_counts():
            self._inference = None  # its memory first
            self._inference = Inference.of(self, self._modules, self.dtype)
            self._made_of = self._what_counts()  # now, for modules may have been loaded
        return self._inference

    def _what_counts(self) -> object:
        weights = None if self._modules is None else self._modules.fingerprint()
        return self._place, self.speed, self.source, self.loras, weights

    def inference_in_float32(self) -> Inference:
        """The same where half precision overflows: made anew, and not kept."""
        return Inference.of(self, self._modules, torch.float32)

    def generate(
        self, prompt: str | Sequence[str] = "", **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Draw `num_images` pictures of each prompt, prompt by prompt.

        Picture i of the call depends on (seed, i) alone, whatever the batch size.

        Args:
            prompt: one or several; ignored by an unconditional model. "(word:1.3)" weighs a word,
                long prompts are taken in chunks (`latentdiff.prompts`).
            **options: by name:

                num_images: pictures of each prompt; default: 1.
                negative_prompt: what guidance steers away from; one, or one a prompt.
                steps: of the sampler; default: the model's own, as for the next five.
                guidance_scale: 1 switches guidance off.
                guidance_interval: (low, high) in units of sigma: guided there alone, at half the
                    cost elsewhere.
                guidance_rescale: in [0, 1], against over-exposure (Lin et al. 2023).
                sampler: name in `latentdiff.samplers.SAMPLERS`.
                spacing: of the steps, in `latentdiff.grids.SPACINGS`.
                seed: of the call; default: 0.
                height: in pixels; default: the training size, or the image's.
                width: likewise.
                batch_size: pictures drawn at a time; default: 8.
                latents: standard-normal start [pictures, c, h, w] instead of the seed's.
                clip_skip: last layers of the text tower that are left out; default: 0.
                image: picture to begin from, one or one a prompt; resized to height and width.
                strength: in [0, 1], how far from it; default: 0.8, with a mask 1.
                mask: of the image's size; what is white is drawn anew, the rest stays.
                variation_seed: another seed, towards which the start is turned.
                variation_strength: in [0, 1], how far.
                upscale: factor of a second pass on enlarged latents (high-resolution fix).
                upscale_strength: in [0, 1], of the second pass; default: 0.4.
                progress: called with the number of pictures after each step of a batch.
                preview: called with (step, clean latents [b, c, h, w], pictures' numbers) then.

        Raises:
            ValueError: an unknown name, a size that is not a multiple, a bad number, a prompt
                whose brackets do not match, pictures that do not fit.
        """
        return [image for _, image in self.stream(prompt, **options)]

    def stream(
        self,
        prompt: str | Sequence[str] = "",
        indices: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[tuple[int, Image.Image]]:
        """As `generate`, but one by one as they are done, each with its number.

        Args:
            prompt: as for `generate`.
            indices: numbers of the pictures that are wanted; default: all.
            **options: as for `generate`.
        """
        progress, preview = options.get("progress"), options.get("preview")
        return stream(self, self.plan(prompt, **options), indices, progress, preview)

    def plan(self, prompt: str | Sequence[str] = "", **options: Unpack[Options]) -> Call:
        """What `generate` would do, checked; nothing is loaded or drawn."""
        return plan(self, prompt, options)

    @property
    def painter(self) -> Painter:
        """What draws with the libraries' modules, which may be trained meanwhile."""
        from latentdiff.unet import as_network

        return Painter(
            network=as_network(self.unet),
            encode=None if self.text is None else self.text.encode,
            schedule=self.schedule,
            prediction=self.prediction,
            learns_variance=self.learns_variance,
            is_in_pixels=self.autoencoder.is_identity,
        )

    def denoiser(
        self,
        prompts: Sequence[str],
        negative_prompt: str = "",
        scale: float = 1.0,
        with_variance: bool = False,
    ) -> Denoise:
        """The modules as `denoise(x, sigma) -> clean`; see `Painter.denoiser`."""
        return self.painter.denoiser(prompts, negative_prompt, scale, with_variance)
