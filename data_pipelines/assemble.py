"""How does a draw become a picture, or latents, with its caption? In arrays of the whole step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from data_pipelines.batch import Batch
from data_pipelines.captions import draw_caption
from data_pipelines.config import CaptionConfig, DataConfig
from data_pipelines.dataset import Dataset, ShardRows
from data_pipelines.decode import clean_text, decode_caption, decode_json
from data_pipelines.draws import Draws
from data_pipelines.headers import MAX_IMAGE_BYTES, check_size
from data_pipelines.latentinfo import INFO, LatentsInfo, read_info
from data_pipelines.latents import draw_numbers, read_latents, read_tokens
from data_pipelines.ledger import BadSample
from data_pipelines.manifest import split
from data_pipelines.reader import Reader
from data_pipelines.transforms import Picture, load_picture

Bad = list[tuple[int, BadSample]]  # places in the batch and what is wrong there
_PLAIN = CaptionConfig()
CROPS = "latentdiff_crops"  # field of the .json of latents: sizes and cut of each crop


@dataclass(frozen=True)
class Blank:
    """What threads fill with the samples of a step; one entry a place.

    Attributes:
        keys: [b].
        captions: [b].
        sizes: int32 [b, 3, 2]: original size, corner of the cut, target size.
        pixels: uint8 [b, h, w, 3].
        latents: float16 [b, 2 | 1, c, h, w].
        tokens: int32 [b, length].
    """

    keys: list[str]
    captions: list[str]
    sizes: np.ndarray
    pixels: np.ndarray | None
    latents: np.ndarray | None
    tokens: np.ndarray | None


class Assembler:
    """Reads and decodes the samples of draws.

    Args:
        config: what is read and how it is transformed.
        datasets: in the order of the config's sources.
        reader: of payloads.
        seed: of crops and captions.
        with_images: False leaves pictures and latents out.

    Raises:
        ValueError: latents without their `latents.json`, or of data sets that don't fit together.
    """

    def __init__(
        self,
        config: DataConfig,
        datasets: Sequence[Dataset],
        reader: Reader,
        seed: int,
        with_images: bool = True,
    ) -> None:
        self.config = config
        self.datasets = datasets
        self.reader = reader
        self.seed = seed
        self.with_images = with_images
        self.latents = _latents_info(datasets) if config.payload == "latents" else None
        self.refused: dict[int, BadSample] = {}  # by id
        self._needs_metadata = config.captions != _PLAIN

    def blank(self, draws: Draws) -> Blank:
        """Empty arrays for the samples of some draws."""
        count = len(draws)
        height, width = draws.shape or (self.config.output_px, self.config.output_px)
        pixels = latents = tokens = None
        info = self.latents
        if self.with_images and info is None:
            pixels = np.zeros((count, height, width, 3), np.uint8)
        if self.with_images and info is not None:
            latents = np.zeros((count, *info.shape(height, width)[1:]), np.float16)
        if info is not None and info.tokenizer_hash is not None:
            assert info.text_length is not None
            tokens = np.zeros((count, info.text_length), np.int32)
        sizes = np.zeros((count, 3, 2), np.int32)
        return Blank([""] * count, [""] * count, sizes, pixels, latents, tokens)

    def fill(self, draws: Draws, blank: Blank, start: int, stop: int) -> Bad:
        """Put the samples of the places `start` to `stop` into `blank`.

        Returns:
            The places of those that cannot be used; pixels and latents stay zero there.
        """
        places = [i for i in range(start, stop) if draws.ids[i] >= 0]
        if self.latents is not None:
            return self._fill_latents(draws, blank, places, self.latents)
        bad: Bad = []
        for i in places:
            rows, row, position = self._find(draws, i)
            blank.keys[i] = rows.key(row)
            if self.refused and (known := self.refused.get(int(draws.ids[i]))) is not None:
                bad.append((i, known))
                continue
            try:
                caption = self._caption(rows, row, position)
                if blank.pixels is not None:
                    picture = self.picture(draws, i)
                    blank.pixels[i] = picture.pixels
                    target = picture.pixels.shape[:2]
                    blank.sizes[i] = (picture.original_size, picture.crop_top_left, target)
                blank.captions[i] = caption
            except BadSample as error:
                bad.append((i, error))
            except Exception as error:
                error.add_note(f"while reading {_name(rows, row)}")
                raise
        return bad

    def picture(self, draws: Draws, i: int) -> Picture:
        """The picture of place `i`.

        Raises:
            BadSample: it cannot be used.
        """
        rows, row, position = self._find(draws, i)
        shape = draws.shape or (self.config.output_px, self.config.output_px)
        payload = self._payload(rows, row, "picture")
        return load_picture(payload, _name(rows, row), shape, self.config, self.seed, position)

    def batch(self, draws: Draws, blank: Blank, bad: Sequence[int]) -> Batch:
        """The batch of a step, once `blank` is filled."""
        valid = draws.ids >= 0
        valid[list(bad)] = False
        arrays = (blank.pixels, blank.latents, blank.tokens)
        pixels, latents, tokens = (None if a is None else torch.from_numpy(a) for a in arrays)
        return Batch(
            step=draws.step,
            num_planned=draws.num_planned,
            positions=draws.positions,
            ids=draws.ids,
            valid=valid,
            keys=tuple(blank.keys),
            captions=tuple(blank.captions),
            pixels=pixels,
            latents=latents,
            tokens=tokens,
            original_size=blank.sizes[:, 0],
            crop_top_left=blank.sizes[:, 1],
            target_size=blank.sizes[:, 2],
        )

    def captions(self, draws: Draws, positions: Sequence[int]) -> list[str]:
        """The captions that the first sample of `draws` has at some positions.

        Raises:
            BadSample: it cannot be used.
        """
        rows, row, _ = self._find(draws, 0)
        stored = self._stored(rows, row)
        return [self._draw(rows, row, stored, position) for position in positions]

    def _fill_latents(
        self, draws: Draws, blank: Blank, places: list[int], info: LatentsInfo
    ) -> Bad:
        bad: dict[int, BadSample] = {}
        at = np.array(places, dtype=np.int64)
        groups = list(self._by_shard(draws, at))
        positions = draws.positions[at].tolist()
        height, width = draws.shape or (self.config.output_px, self.config.output_px)
        crops = draw_numbers(self.seed, positions, info.crops, "latent_crop")
        wanted = []
        if blank.latents is not None:
            wanted.append(
                ("picture", read_latents, crops, info.shape(height, width), blank.latents)
            )
        if blank.tokens is not None:
            texts = draw_numbers(self.seed, positions, info.captions, "latent_caption")
            shape = (info.captions, blank.tokens.shape[1])
            wanted.append(("tokens", read_tokens, texts, shape, blank.tokens))
        for use, read, which, shape, target in wanted:
            for rows, own, numbers in groups:
                payloads, good = [], []
                for n, payload in zip(numbers, self._payloads(rows, own, use), strict=True):
                    if isinstance(payload, BadSample):
                        bad[places[n]] = payload
                    else:
                        payloads.append(payload)
                        good.append(n)
                if not payloads:
                    continue
                names = [f"{rows.url}:{rows.key(int(draws.rows[places[n]]))}" for n in good]
                faults: Bad = []
                to = (target, at[good].tolist())
                read(payloads, which[good], names, shape=shape, faults=faults, to=to)
                bad.update((places[good[k]], error) for k, error in faults)
        for rows, own, numbers in groups:
            here = at[numbers]
            blank.sizes[here, 0, 0] = blank.sizes[here, 2, 0] = rows.heights[own]
            blank.sizes[here, 0, 1] = blank.sizes[here, 2, 1] = rows.widths[own]
            for n, row in zip(numbers, own.tolist(), strict=True):
                i = places[n]
                blank.keys[i] = rows.key(row)
                try:
                    if self.config.micro_conditioning:
                        blank.sizes[i] = self._latent_sizes(rows, row, int(crops[n]))
                    if blank.tokens is None:
                        blank.captions[i] = self._caption(rows, row, positions[n])
                except BadSample as error:
                    bad[i] = error
        for i in bad:  # what is bad in one member is bad in all
            blank.captions[i] = ""
            blank.sizes[i] = 0
            for target in (blank.latents, blank.tokens):
                if target is not None:
                    target[i] = 0
        return sorted(bad.items())

    def _by_shard(
        self, draws: Draws, at: np.ndarray
    ) -> Iterator[tuple[ShardRows, np.ndarray, list[int]]]:
        """(shard, rows [m] in it, numbers [m] in `at`) of some places, in the tars' order."""
        sources, shards, rows = draws.sources[at], draws.shards[at], draws.rows[at]
        numbers = np.lexsort((rows, shards, sources))
        starts = np.flatnonzero(
            (np.diff(sources[numbers], prepend=-1) != 0)
            | (np.diff(shards[numbers], prepend=-1) != 0)
        )
        for part in np.split(numbers, starts[1:]):
            if len(part):
                first = int(part[0])
                shard = self.datasets[sources[first]].rows(int(shards[first]))
                yield shard, rows[part], part.tolist()

    def _find(self, draws: Draws, i: int) -> tuple[ShardRows, int, int]:
        rows = self.datasets[draws.sources[i]].rows(int(draws.shards[i]))
        return rows, int(draws.rows[i]), int(draws.positions[i])

    def _payload(self, rows: ShardRows, row: int, use: str) -> memoryview | bytes:
        span = rows.members[use]
        size = int(span.sizes[row])
        name = _name(rows, row, use)
        if size < 0:
            raise BadSample("bad latents", f"{name} is missing; precompute the latents again")
        if use in _LIMITS:
            check_size(_LIMITS[use], size, name)
        offset, crc = int(span.offsets[row]), int(span.crcs[row])
        return self.reader.payload(rows.url, rows.num_bytes, offset, size, crc, name)

    def _payloads(
        self, rows: ShardRows, own: np.ndarray, use: str
    ) -> list[memoryview | bytes | BadSample]:
        """The payloads of some rows of a shard, or what is wrong with them."""
        offsets, sizes, crcs = (values[own].tolist() for values in rows.members[use])
        sizes = [-1 if size > MAX_IMAGE_BYTES else size for size in sizes]
        found: list[memoryview | bytes | BadSample] = []
        quick = self.reader.payloads(rows.url, rows.num_bytes, offsets, sizes, crcs)
        for row, payload in zip(own.tolist(), quick, strict=True):
            try:
                found.append(self._payload(rows, row, use) if payload is None else payload)
            except BadSample as error:
                found.append(error)
        return found

    def _caption(self, rows: ShardRows, row: int, position: int) -> str:
        return self._draw(rows, row, self._stored(rows, row), position)

    def _stored(self, rows: ShardRows, row: int) -> tuple[str, dict[str, object]]:
        """The caption of the .txt, and the metadata where the config asks for it."""
        if rows.members["txt"].sizes[row] >= 0:
            text = decode_caption(self._payload(rows, row, "txt"), _name(rows, row, "txt"))
        else:
            text = clean_text(rows.stored_caption(row))
        return text, self._metadata(rows, row) if self._needs_metadata else {}

    def _draw(
        self, rows: ShardRows, row: int, stored: tuple[str, dict[str, object]], position: int
    ) -> str:
        if not self._needs_metadata:
            return stored[0]
        try:
            return draw_caption(*stored, self.config.captions, self.seed, position)
        except BadSample as error:
            name = f"{rows.url}:{rows.key(row)}"
            raise BadSample(error.reason, f"{name}: {error}") from error

    def _metadata(self, rows: ShardRows, row: int) -> dict[str, object]:
        if rows.members["json"].sizes[row] < 0:
            return rows.stored_metadata(row)
        return decode_json(self._payload(rows, row, "json"), _name(rows, row, "json"))

    def _latent_sizes(self, rows: ShardRows, row: int, crop: int) -> np.ndarray:
        """Original size, corner and target size [3, 2] that an encoded crop had."""
        try:
            stored = self._metadata(rows, row)[CROPS][crop]  # pyright: ignore[reportIndexIssue]
            names = ("original_size", "crop_top_left", "target_size")
            return np.array([stored[name] for name in names], np.int32).reshape(3, 2)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadSample(
                "bad json", f"{_name(rows, row, 'json')}: no {CROPS} ({error}); precompute again"
            ) from error


_LIMITS: dict[str, Literal["picture", "caption", "json"]] = {
    "picture": "picture",
    "txt": "caption",
    "json": "json",
}


def _name(rows: ShardRows, row: int, use: str = "picture") -> str:
    extension = {"picture": rows.extensions[row], "tokens": "tokens.npy"}.get(use, use)
    return f"{rows.url}:{rows.key(row)}.{extension}"


def _latents_info(datasets: Sequence[Dataset]) -> LatentsInfo:
    """What the folders of latents say of themselves; they must agree, and know the tars."""
    tars = [
        (os.path.dirname(url) or ".", url, num_bytes)
        for dataset in datasets
        for url, num_bytes in zip(
            dataset.shards.urls, dataset.shards.num_bytes.tolist(), strict=True
        )
    ]
    folders = {folder for folder, _, _ in tars}
    infos = [read_info(folder) for folder in sorted(folders)]
    known = {
        (folder, shard.name): shard.num_bytes
        for folder, info in zip(sorted(folders), infos, strict=True)
        for shard in info.shards
    }
    for folder, url, num_bytes in tars:
        if known.get((folder, split(url)[1])) != num_bytes:
            raise ValueError(
                f"{url} ({num_bytes} bytes) is not among the latents that {folder}/{INFO} names, "
                "so that another model may have made it; leave it out, or precompute it there"
            )
    for other, folder in zip(infos[1:], sorted(folders)[1:], strict=True):
        for name in ("model_hash", "tokenizer_hash", "kind", "crops", "captions", "text_length"):
            if getattr(other, name) != getattr(infos[0], name):
                raise ValueError(
                    f"latents in {folder} have {name} {getattr(other, name)}, those in "
                    f"{sorted(folders)[0]} {getattr(infos[0], name)}; precompute them alike"
                )
    return infos[0]
