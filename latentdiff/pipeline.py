"""What is a model as one thing? Load, save and generate, in diffusers' directory layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.transforms import to_image
from latentdiff.build import build_schedule, build_text
from latentdiff.config import DiffusionRun
from latentdiff.configschedule import ScheduleConfig
from latentdiff.devices import cast
from latentdiff.diffusers_format import (
    check_model_directory,
    is_unconditional,
    pipeline_class,
    weights_hash,
    write_model_index,
)
from latentdiff.files import staged
from latentdiff.painter import Painter
from latentdiff.randomness import normal
from latentdiff.samplers import Denoise, find_sampler
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.schedule import Schedule
from latentdiff.scheduler_format import read_schedule, saved_scheduler
from latentdiff.text import TextEncoder
from latentdiff.unet import as_network, new_unet
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig

PRETRAINED = Path(__file__).parent / "pretrained"  # the model in the box
_DEFAULT_BATCH = 8  # pictures at a time


@dataclass
class Pipeline:
    """An autoencoder, a text tower, a U-Net and the forward process it was trained on."""

    unet: Any
    autoencoder: Autoencoder
    text: TextEncoder | None
    schedule: Schedule
    schedule_config: ScheduleConfig
    prediction: str
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    source: Path | None = None

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
        autoencoder = Autoencoder.build(config.autoencoder)
        size_px, downscale = config.data.output_px, autoencoder.downscale
        _check_sides(config.data, downscale, "the autoencoder")
        text = build_text(config.text, captions)
        channels = autoencoder.latent_channels
        unet = new_unet(
            config.unet,
            channels,
            size_px // downscale,
            None if text is None else text.width,
            2 * channels if config.objective.learned_variance else channels,
        )
        grid = config.samples
        return cls(
            unet=unet,
            autoencoder=autoencoder,
            text=text,
            schedule=build_schedule(config.schedule),
            schedule_config=config.schedule,
            prediction=config.objective.prediction,
            defaults=SamplingDefaults(
                num_steps=grid.num_steps,
                guidance_scale=grid.guidance_scale,
                sampler=grid.sampler,
                spacing=grid.spacing,
                styles=grid.styles,
            ),
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
        _check_sides(config.data, model.size_multiple_px, init_from)
        styles = config.samples.styles or model.defaults.styles
        model.defaults = replace(model.defaults, styles=styles)
        return model

    @classmethod
    def load(cls, model: str | Path | None = None) -> Pipeline:
        """Open the model in the box (None), a directory in diffusers' layout, or a hub id.

        Raises:
            ValueError: there is no such directory, or it holds no such model.
        """
        from diffusers import UNet2DConditionModel, UNet2DModel

        source = check_model_directory(PRETRAINED if model is None else model)
        with_text = not is_unconditional(source)
        schedule_config, prediction = read_schedule(source)
        unet_class = UNet2DConditionModel if with_text else UNet2DModel
        unet: Any = unet_class.from_pretrained(str(source / "unet"))
        autoencoder = (
            Autoencoder.load(source / "vae") if with_text else Autoencoder.build(IdentityConfig())
        )
        if not with_text and unet.config.in_channels != autoencoder.latent_channels:
            raise ValueError(
                f"{source / 'unet'} works on {unet.config.in_channels} channels; expected RGB "
                "pictures (3) of an unconditional model"
            )
        return cls(
            unet=unet.float().eval(),
            autoencoder=autoencoder.float().eval(),
            text=TextEncoder.load(source).float().eval() if with_text else None,
            schedule=build_schedule(schedule_config),
            schedule_config=schedule_config,
            prediction=prediction,
            defaults=SamplingDefaults.read(source),
            source=source,
        )

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write diffusers' layout with safetensors of `dtype`; `source` points there afterwards.

        A latent model with text becomes a StableDiffusionPipeline, an unconditional model of pixels
        a DDPMPipeline.

        Raises:
            ValueError: the model is of neither sort.
        """
        layout = self.diffusers_class
        if layout is None:
            raise ValueError(
                "diffusers' layouts hold a text tower with an autoencoder (Stable Diffusion) or "
                "neither (DDPM); this model has one of the two; keep its training checkpoint "
                "instead"
            )
        target = Path(directory)
        modules: dict[str, Any] = {"unet": self.unet}
        if self.text is not None:
            modules |= {"vae": self.autoencoder.model, "text_encoder": self.text.model}
        kept = {name: module.dtype for name, module in modules.items()}
        try:
            for module in modules.values():
                cast(module, module.device, dtype)
            with staged(target) as partial:
                self.unet.save_pretrained(partial / "unet", safe_serialization=True)
                if self.text is not None:
                    self.autoencoder.save(partial / "vae")
                    self.text.save(partial)
                self._save_description(partial, layout)
        except SafetensorError as error:  # which is how a full disk is told
            raise OSError(f"{target} cannot be written: {error}") from error
        finally:
            for name, module in modules.items():
                cast(module, module.device, kept[name])
        self.source = target

    def _save_description(self, directory: Path, layout: str) -> None:
        """What diffusers and we need to know beside the weights; not where they came from."""
        for config in directory.glob("*/config.json"):
            kept = json.loads(config.read_text())
            kept.pop("_name_or_path", None)
            config.write_text(json.dumps(kept, indent=2))
        description = saved_scheduler(
            self.schedule_config,
            self.prediction,
            self.defaults.sampler,
            self.defaults.spacing,
            layout,
            self.learns_variance,
        )
        (directory / "scheduler").mkdir()
        (directory / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(description, indent=2)
        )
        write_model_index(directory, layout, description["_class_name"])
        self.defaults.write(directory)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Pipeline:
        """Move all networks; returns self."""
        cast(self.unet, device, dtype).to(memory_format=torch.channels_last)
        cast(self.autoencoder, device, dtype)
        if self.text is not None:
            cast(self.text.model, device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.unet.device

    @property
    def learns_variance(self) -> bool:
        """Whether the U-Net says the reverse process's variance too; unguided ddpm takes it."""
        return self.unet.config.out_channels == 2 * self.unet.config.in_channels

    @property
    def diffusers_class(self) -> str | None:
        """The pipeline of diffusers that opens the saved model; None where there is none."""
        return pipeline_class(self.text is not None, not self.autoencoder.is_identity)

    @property
    def default_size_px(self) -> int:
        """Side of the pictures the model was trained on."""
        return self.unet.config.sample_size * self.autoencoder.downscale

    @property
    def size_multiple_px(self) -> int:
        """Height and width must be multiples of this."""
        return self.autoencoder.downscale * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def model_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the weights on disk; "unsaved" without them."""
        return "unsaved" if self.source is None else weights_hash(self.source)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        num_images: int = 1,
        negative_prompt: str = "",
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw `num_images` pictures of each prompt, prompt by prompt.

        Picture i of the call depends on (seed, i) alone, whatever the batch size.

        Args:
            prompt: one or several; ignored by an unconditional model.
            num_images: pictures of each prompt.
            negative_prompt: what guidance steers away from.
            steps: of the sampler; default: the model's own.
            guidance_scale: 1 switches guidance off; default: the model's own.
            sampler: name in `latentdiff.samplers.SAMPLERS`; default: the model's own.
            spacing: of the steps, in `latentdiff.grids.SPACINGS`; default: the model's own.
            seed: of the call.
            height: in pixels; default: the training size.
            width: in pixels; default: the training size.
            batch_size: pictures drawn at a time; default: 8.
            latents: standard-normal start [pictures, c, h, w] instead of the seed's.
            progress: called with 1 after each step of each picture.

        Raises:
            ValueError: an unknown sampler, a size that is not a multiple, a bad number.
        """
        choices = self.defaults.but(
            num_steps=steps, guidance_scale=guidance_scale, sampler=sampler, spacing=spacing
        )
        find_sampler(choices.sampler)
        prompts = [p for p in _as_list(prompt) for _ in range(num_images)]
        _positive("num_images", num_images)
        size = _DEFAULT_BATCH if batch_size is None else batch_size
        _positive("batch_size", size)
        if not prompts:
            raise ValueError("prompt is an empty list; give at least one text")
        shape = self.latent_shape(height, width)
        if latents is not None and tuple(latents.shape) != (len(prompts), *shape):
            raise ValueError(
                f"latents must have shape {(len(prompts), *shape)}; got {tuple(latents.shape)}"
            )
        images: list[Image.Image] = []
        for first in range(0, len(prompts), size):
            chunk = prompts[first : first + size]
            indices = range(first, first + len(chunk))
            start = (
                normal(shape, seed, indices, "start")
                if latents is None
                else latents[first : first + len(chunk)]
            )
            z = self.painter.draw(
                start.to(self.device, torch.float32),
                chunk,
                indices,
                choices,
                seed=seed,
                negative_prompt=negative_prompt,
                progress=progress,
            )
            images += [to_image(image) for image in self.autoencoder.decode(z)]
        return images

    @property
    def painter(self) -> Painter:
        """What draws, without the autoencoder."""
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
        """The model as `denoise(x, sigma) -> clean` for rows of x that belong to these prompts.

        Guidance doubles the batch inside; pixels are clipped to [-1, 1], as DDPM's code does.

        Args:
            prompts: one for each row; an unconditional model takes none of them.
            negative_prompt: what guidance steers away from.
            scale: of classifier-free guidance; 1 is off.
            with_variance: clean and the learned variance's fraction, for samplers.ddpm; unguided.
        """
        return self.painter.denoiser(prompts, negative_prompt, scale, with_variance)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(c, h, w) of a picture's latent.

        Args:
            height: of the picture in pixels; default: the training size.
            width: likewise.

        Raises:
            ValueError: one of them is not a multiple of `size_multiple_px`.
        """
        multiple, downscale = self.size_multiple_px, self.autoencoder.downscale
        sides = []
        for name, value in (("height", height), ("width", width)):
            side = self.default_size_px if value is None else value
            if side <= 0 or side % multiple:
                near = max(multiple, round(side / multiple) * multiple)
                raise ValueError(
                    f"{name} must be a positive multiple of {multiple} px; got {side}; try {near}"
                )
            sides.append(side // downscale)
        return self.autoencoder.latent_channels, sides[0], sides[1]


def _as_list(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _check_sides(data: DataConfig, multiple_px: int, whose: str) -> None:
    if data.side_step_px % multiple_px:
        name = "data.crop_px or data.size_px" if data.buckets is None else "data.buckets.step_px"
        raise ValueError(
            f"pictures are {data.side_step_px} px ({name}); expected a multiple of {multiple_px} "
            f"for {whose}"
        )
