"""How do pictures become latents? The networks for it, and batch after batch through them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from latentdiff.devices import cast, resolve_device
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.pairing import model_hash
from latentdiff.text import TextEncoder
from vae.autoencoder import Autoencoder

T = TypeVar("T")
R = TypeVar("R")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_AHEAD = 2  # batches at the network or waiting for it


@dataclass(frozen=True)
class Encoders:
    """What turns a pair into numbers.

    Attributes:
        name: that it was asked for by.
        autoencoder: picture -> latent.
        text: its tokenizer turns captions into ids; None: captions stay text.
        dtype: of the autoencoder: fp32, bf16 or fp16.
        model_hash: of the autoencoder as it was loaded.
    """

    name: str
    autoencoder: Autoencoder
    text: TextEncoder | None
    dtype: str
    model_hash: str


def load_encoders(
    model: str, text: str | None = None, device: str = "auto", dtype: str = "fp32"
) -> Encoders:
    """Open the autoencoder and the tokenizer, and nothing else, of a model.

    Args:
        model: `box`, a model's or an autoencoder's directory, or the hub id of either.
        text: a model whose tokenizer is used instead.
        device: auto, cpu, cuda, cuda:N or mps; torchrun's LOCAL_RANK chooses among several.
        dtype: of the autoencoder: fp32, bf16 or fp16.

    Raises:
        ValueError: one of them is not there, or of no use.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is None:
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        chosen = torch.device("cuda", number)
    source = str(PRETRAINED) if model == "box" else model
    autoencoder = Autoencoder.load(source).float().eval().requires_grad_(False)
    tower = text or (source if _has_text(source) else None)
    tower = str(PRETRAINED) if tower == "box" else tower
    encoder = None if tower is None else TextEncoder.load(tower)
    loaded = model_hash(autoencoder)  # in bfloat16 it would have another
    cast(autoencoder, chosen, DTYPES[dtype]).to(memory_format=torch.channels_last)
    return Encoders(model, autoencoder, encoder, dtype, loaded)


@dataclass(eq=False)
class Pictures:
    """The pictures of one sample, to be encoded.

    Attributes:
        crops: uint8 [h, w, 3] each, of one shape.
        sample: what belongs to them; it is handed through.
        moments: filled in: a crop's float32 [2, c, h, w], mean and standard deviation.
    """

    crops: list[np.ndarray]
    sample: Any
    moments: list[np.ndarray] = field(default_factory=list)


def encode(
    autoencoder: Autoencoder, samples: Iterable[Pictures], batch_size: int
) -> Iterator[Pictures]:
    """Encode pictures of any shapes, `batch_size` of one shape at a time.

    A batch is what follows from the samples' order alone, so that its last bits do too.

    Yields:
        The samples with their `moments`, each as soon as its last crop is encoded.
    """
    waiting: dict[tuple[int, ...], list[tuple[Pictures, np.ndarray]]] = {}
    running: deque[tuple[list[tuple[Pictures, np.ndarray]], Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(1) as network:

        def start(batch: list[tuple[Pictures, np.ndarray]]) -> None:
            stacked = np.stack([crop for _, crop in batch])
            running.append((batch, network.submit(encode_batch, autoencoder, stacked)))

        def finish(most: int) -> Iterator[Pictures]:
            while len(running) > most:
                batch, moments = running.popleft()
                for (pictures, _), row in zip(batch, moments.result(), strict=True):
                    pictures.moments.append(row)
                    if len(pictures.moments) == len(pictures.crops):
                        yield pictures

        for pictures in samples:
            for crop in pictures.crops:
                batch = waiting.setdefault(crop.shape, [])
                batch.append((pictures, crop))
                if len(batch) == batch_size:
                    start(waiting.pop(crop.shape))
                    yield from finish(_AHEAD)
        for batch in waiting.values():
            start(batch)
            yield from finish(_AHEAD)
        yield from finish(0)


@torch.inference_mode()
def encode_batch(autoencoder: Autoencoder, pictures: np.ndarray) -> np.ndarray:
    """uint8 [b, h, w, 3] -> posterior moments, float32 [b, 2, c, h/d, w/d] on the CPU."""
    device = _device(autoencoder)
    pixels = torch.from_numpy(pictures)
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    image = pixels.to(device).permute(0, 3, 1, 2)  # [b, 3, h, w], channels last in memory
    mean, std = autoencoder.moments(image.float().div_(127.5).sub_(1))
    return torch.stack([mean, std], dim=1).float().cpu().numpy()


def ahead(
    pool: ThreadPoolExecutor | None, function: Callable[[T], R], items: Iterable[T], most: int
) -> Iterator[R]:
    """`map` in order with at most `most` calls started ahead; without a pool, one at a time."""
    if pool is None:
        yield from map(function, items)
        return
    started: deque[Future[R]] = deque()
    try:
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) >= most:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        for future in started:
            future.cancel()


def _device(autoencoder: Autoencoder) -> torch.device:
    return next(autoencoder.parameters()).device


def _has_text(model: str) -> bool:
    """Whether this is a model, with a text tower, rather than an autoencoder alone."""
    path = Path(model)
    if path.is_dir() or model.count("/") != 1:
        return (path / "text_encoder").is_dir()
    from diffusers import DiffusionPipeline

    try:
        return "text_encoder" in DiffusionPipeline.load_config(model)
    except OSError:  # an autoencoder's id; where the hub is out of reach, loading it said so
        return False
