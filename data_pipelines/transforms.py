"""How does a picture become pixels of a batch's shape, and those a tensor in [-1, 1]?"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data_pipelines.config import DataConfig
from data_pipelines.decode import decode_image
from data_pipelines.headers import Data
from data_pipelines.randomness import stream

# Bit for bit Pillow-SIMD's Lanczos, within 2 of 255 of Pillow's and several times as fast. Older
# torch takes Pillow's.
_HAS_LANCZOS = hasattr(torch.ops.aten, "_upsample_lanczos2d_aa")


@dataclass(frozen=True, slots=True)
class Picture:
    """The picture of one draw.

    Attributes:
        pixels: uint8 [h, w, 3].
        original_size: (h, w) that it had before it was resized.
        crop_top_left: (y, x) of its corner in the whole picture, resized and mirrored as it is
            here, in pixels; SDXL (Podell et al. 2023, 2.2) tells it to the model.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def load_picture(
    data: Data, name: str, shape: tuple[int, int], config: DataConfig, seed: int, position: int
) -> Picture:
    """Decode a picture and shape it for one draw: resized to cover, cut, mirrored.

    Args:
        data: the encoded picture.
        name: of the sample, for errors.
        shape: (h, w) of the batch: a bucket's, or `config.output_px` twice.
        config: how it is cut.
        seed: of the run.
        position: of the draw.

    Raises:
        BadSample: it cannot be decoded.
    """
    inner = None if config.buckets is not None else config.crop_px
    covered = shape if inner is None else (config.size_px, config.size_px)
    at_least = covered if config.scaled_decode else None
    buffer = _buffer()
    pixels, original_size = decode_image(data, name, at_least, buffer)

    is_random = config.crop == "random" or inner is not None or config.flip
    random = stream(seed, position, "crop").random(5).tolist() if is_random else _CENTER
    where = (random[1], random[0]) if config.crop == "random" else (0.5, 0.5)
    height, width = pixels.shape[:2]
    top, left, cut_h, cut_w = cover(height, width, covered, where)
    pixels = resize(pixels[top : top + cut_h, left : left + cut_w], covered)

    # from here on in pixels of the resized picture
    corner_y, corner_x = round(top * covered[0] / cut_h), round(left * covered[1] / cut_w)
    if inner is not None:
        room = config.size_px - inner + 1
        left, top = int(random[2] * room), int(random[3] * room)
        pixels = pixels[top : top + inner, left : left + inner]
        corner_y, corner_x = corner_y + top, corner_x + left
    if config.flip and random[4] < 0.5:
        whole = round(width * covered[1] / cut_w)
        pixels, corner_x = pixels[:, ::-1], max(whole - corner_x - shape[1], 0)
    is_lent = np.may_share_memory(pixels, buffer)
    pixels = np.array(pixels) if is_lent else np.ascontiguousarray(pixels)
    return Picture(pixels, original_size, (corner_y, corner_x))


_CENTER = [0.5] * 5
_BUFFER_BYTES = 4 << 20  # pictures of up to 1.4 megapixels
_of_thread = threading.local()


def _buffer() -> np.ndarray:
    """Where this thread's decoded pictures lie until they are resized."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = np.empty(_BUFFER_BYTES, np.uint8)
    return _of_thread.buffer


def cover(
    height: int, width: int, shape: tuple[int, int], where: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The largest part of a picture with a shape's aspect ratio: (top, left, height, width).

    Args:
        height: of the picture.
        width: of the picture.
        shape: (h, w) to which the part will be resized.
        where: relative place (y, x) of the part, 0 to 1.
    """
    scale = max(shape[0] / height, shape[1] / width)
    cut_h = min(height, max(1, round(shape[0] / scale)))
    cut_w = min(width, max(1, round(shape[1] / scale)))
    return round((height - cut_h) * where[0]), round((width - cut_w) * where[1]), cut_h, cut_w


def fit(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The largest part in the middle of uint8 [h, w, 3] with a shape's aspect ratio, resized."""
    height, width = pixels.shape[:2]
    top, left, cut_h, cut_w = cover(height, width, shape, (0.5, 0.5))
    return resize(pixels[top : top + cut_h, left : left + cut_w], shape)


def resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Lanczos resampling of uint8 [h, w, 3] to `shape`; what has that shape stays as it is."""
    if pixels.shape[:2] == shape:
        return pixels
    pixels = np.ascontiguousarray(pixels)  # faster than torch's own way with strides
    if not _HAS_LANCZOS:
        image = Image.fromarray(pixels)
        return np.array(image.resize((shape[1], shape[0]), Image.Resampling.LANCZOS))
    channels = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # [1, 3, h, w]
    resized = functional.interpolate(channels, size=list(shape), mode="lanczos", antialias=True)
    return resized.permute(0, 2, 3, 1).squeeze(0).numpy()


def to_float(pixels: Tensor, out: Tensor | None = None) -> Tensor:
    """Pictures of a batch, uint8 [b, h, w, 3] -> float32 [b, 3, h, w] in [-1, 1].

    Args:
        pixels: on any device.
        out: memory to write to.
    """
    channels = pixels.permute(0, 3, 1, 2)
    if pixels.device.type != "cpu":
        return channels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1.0
    if out is None:  # numpy asks for huge pages: fresh memory takes a third of torch's time
        out = torch.from_numpy(np.empty(channels.shape, np.float32))
    for picture, target in zip(channels, out, strict=True):  # one at a time stays in the cache
        target.copy_(picture.contiguous()).div_(127.5).sub_(1.0)
    return out


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture -> float32 [3, h, w] in [-1, 1]."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
