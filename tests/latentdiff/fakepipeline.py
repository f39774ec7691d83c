"""A pipeline that draws at once: what would be drawn decides the colour, so tests can compare."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from latentdiff.speed import Speed


class FakePipeline:
    """Of `Pipeline` what the command uses.

    Attributes:
        calls: keyword arguments of `stream`, with the prompts.
        before_each: called with a picture's index before it is drawn.
    """

    def __init__(self) -> None:
        self.speed = Speed()
        self.device: Any = "cpu"
        self.dtype: Any = "torch.float32"
        self.loaded: list[tuple[Path, list[tuple[Path, float]]]] = []
        self.calls: list[dict[str, Any]] = []
        self.before_each: Any = lambda index: None

    def load(self, model: Path, loras: Sequence[tuple[Path, float]] = ()) -> FakePipeline:
        self.loaded.append((model, list(loras)))
        return self

    def to(self, device: Any, dtype: Any) -> FakePipeline:
        self.device, self.dtype = device, dtype
        return self

    def inference(self) -> Any:
        return SimpleNamespace(autoencoder=None)

    def plan(self, prompts: Sequence[str], **options: Any) -> Any:
        assert len(options["negative_prompt"]) == len(prompts)
        return SimpleNamespace(steps_per_picture=options["steps"])

    def stream(
        self,
        prompts: Sequence[str],
        *,
        indices: Sequence[int],
        num_images: int,
        negative_prompt: Sequence[str],
        batch_size: int,
        progress: Any,
        preview: Any,
        **settings: Any,
    ) -> Iterator[tuple[int, Image.Image]]:
        self.calls.append(
            {
                "prompts": list(prompts),
                "negatives": list(negative_prompt),
                "indices": list(indices),
                "num_images": num_images,
                "batch_size": batch_size,
                **settings,
            }
        )
        size = (settings["width"] or 16, settings["height"] or 16)
        for first in range(0, len(indices), batch_size):
            batch = list(indices[first : first + batch_size])
            for step in range(settings["steps"]):
                progress(len(batch))
                preview(step, None, batch)
            for place, index in enumerate(batch):
                self.before_each(index)
                # like rounding, the batch has a say in it
                what = (
                    prompts[index // num_images],
                    negative_prompt[index // num_images],
                    index,
                    place,
                    len(batch),
                    sorted((k, str(v)) for k, v in settings.items() if k not in ("image", "mask")),
                    [settings[k].tobytes() for k in ("image", "mask") if k in settings],
                )
                digest = hashlib.sha256(repr(what).encode()).digest()
                yield index, Image.new("RGB", size, (digest[0], digest[1], digest[2]))


def picture(path: Path, size: tuple[int, int] = (64, 64), colour: str = "white") -> Path:
    """A picture of one colour in a file."""
    Image.new("RGB", size, colour).save(path)
    return path
