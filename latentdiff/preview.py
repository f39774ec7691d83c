"""What do latents look like before they are decoded? A linear guess at their colours.

Each cell of a latent is about the colour of the pixels it stands for: a matrix [c + 1, 3] explains
some nine tenths of the decoded colours' variance, at no cost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data_pipelines.pixels import to_image
from latentdiff.caches import cache_directory
from latentdiff.pictures import grid, save_png
from vae.autoencoder import Autoencoder

# What the fit learns from: pictures of square patches. With smaller ones it gets worse, for an
# autoencoder sees beyond a cell and nothing beyond the rim; more pictures add little.
_NUM_PICTURES = 4
_PATCHES = 6  # a side
_PATCH_CELLS = 4

_PICTURE_PX = 256
_SHEET_PX = 1024


@dataclass(frozen=True)
class Projection:
    """Colours from latents: rgb = weights[:c]^T z + weights[c], cell by cell.

    Attributes:
        weights: [c + 1, 3], float32.
    """

    weights: Tensor

    def pixels(self, z: Tensor) -> Tensor:
        """Normalised latents [b, c, h, w] -> [b, 3, h, w] in [-1, 1], on their device.

        Raises:
            ValueError: they have another number of channels.
        """
        channels = len(self.weights) - 1
        if z.shape[1] != channels:
            raise ValueError(
                f"this projection is of latents of {channels} channels; got {z.shape[1]}; fit one "
                "to their autoencoder"
            )
        weights = self.weights.to(z.device)
        colours = torch.einsum("bchw,cd->bdhw", z.float(), weights[:-1])
        return (colours + weights[-1].view(1, 3, 1, 1)).nan_to_num(0.0).clamp(-1, 1)

    def image(self, z: Tensor) -> Image.Image:
        """Latents [b, c, h, w] as a grid of pictures, each cell a square of pixels."""
        images = [to_image(pixels) for pixels in self.pixels(z).cpu()]
        columns = math.ceil(math.sqrt(len(images)))
        side = max(images[0].size)
        factor = max(1, min(_PICTURE_PX // side, _SHEET_PX // (side * columns)))
        size = (images[0].width * factor, images[0].height * factor)
        return grid([i.resize(size, Image.Resampling.NEAREST) for i in images], columns)


@torch.no_grad()
def fit(autoencoder: Autoencoder) -> Projection:
    """The projection that explains an autoencoder's latents best, by least squares.

    It learns from pictures of patches in random colours, which it encodes: no data is needed, and
    latents of pictures are closer to those that are drawn than random ones are. It explains 0.91
    of the variance of the colours of the box's drawings, as much as a fit to those very drawings
    does; a fit to decoded random latents explains 0.67.

    Args:
        autoencoder: on any device, in any precision; pixel space gives the pixels themselves.
    """
    pictures = _patchworks(_PATCH_CELLS * autoencoder.downscale)
    weight = next(autoencoder.parameters(), None)
    latents = [
        autoencoder.encode(batch if weight is None else batch.to(weight.device)).float().cpu()
        for batch in pictures.split(1)
    ]
    z = torch.cat(latents).movedim(1, -1).flatten(0, 2).double()  # [cells, c]
    colours = F.avg_pool2d(pictures, autoencoder.downscale).movedim(1, -1).flatten(0, 2).double()
    known = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    # channels may depend on each other: what rounding alone tells apart gets no weight
    solved = torch.linalg.lstsq(known, colours, rcond=1e-5, driver="gelsy")
    return Projection(solved.solution.float())


def projection_of(autoencoder: Autoencoder, key: str | None = None) -> Projection:
    """`fit`, kept in the user's cache for the next time that these very weights are used.

    Args:
        autoencoder: as for `fit`.
        key: stands for its weights, such as their model's hash. None: they are hashed; what has
            weights in other places than its state_dict, packed ones, is fitted each time.
    """
    path = _cache_path(autoencoder, key)
    kept = None if path is None else _read(path, autoencoder.latent_channels)
    if kept is not None:
        return kept
    projection = fit(autoencoder)
    if path is not None:
        _write(path, projection)
    return projection


class PreviewWriter:
    """Shows a drawing while it is drawn: latents after each step -> a PNG, now and then.

    This is state: the time of the latest picture, and whether trouble was told. Between pictures a
    call costs nothing and does not wait for a GPU.

    Attributes:
        path: of the PNG, replaced as a whole.
        projection: of the latents.
        every_s: seconds between two pictures, at least.
        clock: seconds.
    """

    def __init__(
        self,
        path: Path,
        projection: Projection,
        every_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.projection = projection
        self.every_s = every_s
        self.clock = clock
        self._next = -math.inf
        self._has_warned = False

    def __call__(self, step: int, z: Tensor, indices: Sequence[int]) -> None:
        """Write latents [b, c, h, w], if it is time.

        A full disk does not end the drawing: it is warned of once.

        Args:
            step: of the sampler, from 0.
            z: normalised clean latents, as they seem after it.
            indices: [b], the pictures' numbers.
        """
        if self.clock() < self._next:
            return
        story = {"step": step, "pictures": " ".join(map(str, indices))}
        try:
            save_png(self.projection.image(z), self.path, story)
        except OSError as error:
            if not self._has_warned:
                warnings.warn(
                    f"no preview: {self.path} cannot be written ({error.strerror or error}); "
                    "drawing goes on",
                    stacklevel=2,
                )
            self._has_warned = True
        self._next = self.clock() + self.every_s  # of a slow disk: from the end of writing


def _patchworks(patch_px: int) -> Tensor:
    """Pictures of square patches in random colours [b, 3, side, side]: always the same ones."""
    source = torch.Generator().manual_seed(0)
    colours = torch.rand(_NUM_PICTURES, 3, _PATCHES, _PATCHES, generator=source) * 2 - 1
    return F.interpolate(colours, scale_factor=patch_px, mode="nearest")


def _cache_path(autoencoder: Autoencoder, key: str | None) -> Path | None:
    """Named after the weights and the norm of the latents; None where nothing can be kept."""
    if key is None and _hides_weights(autoencoder):
        return None
    digest = hashlib.sha256(json.dumps([_NUM_PICTURES, _PATCHES, _PATCH_CELLS, key]).encode())
    norm = {"shift": autoencoder.norm.shift, "scale": autoencoder.norm.scale}
    weights = autoencoder.state_dict() if key is None else {}
    for name, value in {**weights, **norm}.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    try:
        return cache_directory() / "previews" / f"{digest.hexdigest()[:32]}.json"
    except ValueError:  # no home
        return None


def _hides_weights(network: nn.Module) -> bool:
    """Whether tensors are plain attributes of a part (`latentdiff.lean.packing`): not hashed."""
    values = (value for part in network.modules() for value in vars(part).values())
    return any(isinstance(value, Tensor) for value in values)


def _read(path: Path, channels: int) -> Projection | None:
    """What was kept; None if nothing was, or the file is not as we write it."""
    try:
        weights = torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError):
        return None
    is_ours = weights.shape == (channels + 1, 3) and bool(weights.isfinite().all())
    return Projection(weights) if is_ours else None


def _write(path: Path, projection: Projection) -> None:
    """Keep it; without a sound where that fails, for it only saves time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(projection.weights.tolist()), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
