"""How does a picture become a square tensor in [-1, 1]?"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.randomness import stream


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, h, w] in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def to_image(tensor: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] -> RGB picture; values outside are clipped."""
    scaled = ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return Image.fromarray(scaled.to("cpu", torch.uint8).permute(1, 2, 0).numpy())


def resize_square(image: Image.Image, size_px: int, where: tuple[float, float]) -> Image.Image:
    """Cut the largest square at relative place `where` (0..1 in x and y), resize it by Lanczos."""
    side = min(image.size)
    left = round((image.width - side) * where[0])
    top = round((image.height - side) * where[1])
    box = (left, top, left + side, top + side)
    if image.size == (size_px, size_px):
        return image
    return image.resize((size_px, size_px), Image.Resampling.LANCZOS, box=box)


def transform(image: Image.Image, config: DataConfig, seed: int, position: int) -> Tensor:
    """The picture of one draw: cut, resized, mirrored; float32 [3, output_px, output_px]."""
    random = stream(seed, position, "crop").random(5)
    where = (random[0], random[1]) if config.crop == "random" else (0.5, 0.5)
    image = resize_square(image, config.size_px, where)
    if config.crop_px is not None:
        room = config.size_px - config.crop_px + 1
        left, top = int(random[2] * room), int(random[3] * room)
        image = image.crop((left, top, left + config.crop_px, top + config.crop_px))
    if config.flip and random[4] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(image)
