"""What is to be encoded of one shard: which samples, and what are their pictures and texts?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.buckets import BucketPlan
from data_pipelines.captions import draw_caption
from data_pipelines.config import DataConfig
from data_pipelines.decode import clean_text, decode_json
from data_pipelines.ledger import BadSample, Reason
from data_pipelines.reader import Reader
from data_pipelines.shards import IMAGE_EXTENSIONS
from data_pipelines.sidecar import FIXED_COLUMNS, read_table
from data_pipelines.storage import Storage
from data_pipelines.transforms import load_picture

Skipped = tuple[str, Reason, str]  # key, reason, detail
_COLUMNS = ("key", "fault", "fault_detail", "extensions", "offsets", "sizes", "crcs", "width",
            "height", "caption")  # fmt: skip
_TRANSIENT = ("network", "missing shard")  # says nothing of the sample: the next run may succeed


class ShardError(OSError):
    """A shard could not be read now."""


@dataclass(frozen=True)
class Row:
    """A sample to be read.

    Attributes:
        number: in the shard's sidecar.
        key: of the sample.
        members: extension -> (offset, size, crc).
        caption: as stored.
        metadata: from img2dataset's table; None: it has a .json.
        shape: (h, w) in pixels that its pictures get.
    """

    number: int
    key: str
    members: dict[str, tuple[int, int, int]]
    caption: str
    metadata: dict[str, Any] | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Read:
    """A sample that was read and decoded.

    Attributes:
        row: which.
        pictures: one a crop, uint8 [h, w, 3].
        crops: what SDXL tells the model of each: original_size and target_size (height, width)
            and crop_top_left (y, x), in pixels; see `transforms.Picture`.
        texts: drawn captions.
        metadata: of the .json or the table.
    """

    row: Row
    pictures: list[np.ndarray]
    crops: list[dict[str, Any]]
    texts: list[str]
    metadata: dict[str, Any]


class PictureShard:
    """One indexed tar of pictures.

    Args:
        url: of the tar.
        num_bytes: its size.
        sidecar: its path or URL.
        config: how pictures are cut and captions drawn.
        crops: pictures of a sample.
        captions: texts of a sample.
        seed: of both, for this shard alone (see `shard_seed`).
        storage: how remote files are read.
        reader: of payloads.
    """

    def __init__(
        self,
        url: str,
        num_bytes: int,
        sidecar: str,
        config: DataConfig,
        crops: int,
        captions: int,
        seed: int,
        storage: Storage,
        reader: Reader,
    ) -> None:
        self.url = url
        self.num_bytes = num_bytes
        self.sidecar = sidecar
        self.config = config
        self.crops = crops
        self.captions = captions
        self.seed = seed
        self.storage = storage
        self.reader = reader

    def rows(
        self, kept: np.ndarray | None, skip: Callable[[Skipped], None]
    ) -> tuple[list[Row], int]:
        """The samples to be read, in tar order, and how many the filter left out.

        Args:
            kept: numbers of the rows that a filter lets in; None: all usable ones.
            skip: told of each sample that cannot be used, whatever the filter says.
        """
        table = read_table(self.sidecar, _COLUMNS, storage=self.storage)
        columns = {name: table[name].to_pylist() for name in _COLUMNS}
        usable = np.array([fault is None for fault in columns["fault"]], dtype=bool)
        for i in np.flatnonzero(~usable).tolist():
            skip((columns["key"][i], columns["fault"][i], columns["fault_detail"][i] or ""))
        chosen = np.flatnonzero(usable) if kept is None else np.asarray(kept)
        shapes = self._shapes(columns["width"], columns["height"], chosen)
        tables = self._metadata(columns["extensions"], chosen)
        found = []
        for i, shape in zip(chosen.tolist(), shapes, strict=True):
            if shape is None:
                size = f"{columns['width'][i]}x{columns['height'][i]} px"
                skip((columns["key"][i], "aspect ratio", f"no bucket for {size}"))
                continue
            places = zip(
                columns["offsets"][i], columns["sizes"][i], columns["crcs"][i], strict=True
            )
            found.append(
                Row(
                    number=i,
                    key=columns["key"][i],
                    members=dict(zip(columns["extensions"][i], places, strict=True)),
                    caption=columns["caption"][i] or "",
                    metadata=tables.get(i),
                    shape=shape,
                )
            )
        return found, int(usable.sum()) - len(chosen)

    def read(self, row: Row) -> Read | Skipped:
        """Read and decode one sample; may be called from several threads.

        Raises:
            ShardError: the shard cannot be reached.
            ValueError: the config asks for what the sample's metadata lacks.
        """
        name = f"{self.url}:{row.key}"
        try:
            metadata = row.metadata
            if metadata is None:
                metadata = decode_json(self._payload(row, "json"), name)
            extension = next(e for e in row.members if e in IMAGE_EXTENSIONS)
            data = self._payload(row, extension)
            loaded = [
                load_picture(data, name, row.shape, self.config, self.seed, position)
                for position in self._positions(row, self.crops)
            ]
            caption = clean_text(row.caption)
            texts = [
                draw_caption(caption, metadata, self.config.captions, self.seed, position)
                for position in self._positions(row, self.captions)
            ]
        except BadSample as error:
            if error.reason in _TRANSIENT:
                raise ShardError(str(error)) from error
            return row.key, error.reason, str(error)
        return Read(
            row=row,
            pictures=[picture.pixels for picture in loaded],
            crops=[
                {
                    "original_size": list(picture.original_size),
                    "crop_top_left": list(picture.crop_top_left),
                    "target_size": list(row.shape),
                }
                for picture in loaded
            ],
            texts=texts,
            metadata=metadata,
        )

    def _positions(self, row: Row, count: int) -> range:
        return range(row.number * count, (row.number + 1) * count)

    def _payload(self, row: Row, extension: str) -> memoryview | bytes:
        offset, size, crc = row.members[extension]
        name = f"{self.url}:{row.key}.{extension}"
        return self.reader.payload(self.url, self.num_bytes, offset, size, crc, name)

    def _shapes(
        self, widths: list[int | None], heights: list[int | None], chosen: np.ndarray
    ) -> list[tuple[int, int] | None]:
        """(h, w) in pixels of each sample's pictures; None where no bucket fits."""
        if self.config.buckets is None:
            side = self.config.output_px
            return [(side, side)] * len(chosen)
        plan = BucketPlan(self.config.buckets, 1)
        sizes = np.array([(widths[i] or 0, heights[i] or 0) for i in chosen.tolist()])
        numbers, _ = plan.assign(*sizes.reshape(-1, 2).T)
        return [None if n < 0 else plan.shapes[n] for n in numbers.tolist()]

    def _metadata(
        self, extensions: list[list[str]], chosen: np.ndarray
    ) -> dict[int, dict[str, Any]]:
        """Metadata, from img2dataset's table, of the samples without a .json."""
        bare = [i for i in chosen.tolist() if "json" not in extensions[i]]
        if not bare:
            return {}
        table = read_table(self.sidecar, storage=self.storage)
        names = [name for name in table.column_names if name not in FIXED_COLUMNS]
        rows = table.select(names).take(bare).to_pylist()
        return {
            i: {name: value for name, value in row.items() if value is not None}
            for i, row in zip(bare, rows, strict=True)
        }


def shard_seed(seed: int, name: str, source: str) -> int:
    """The seed of one shard: it follows from what the shard is, not from where it stands."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{source}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
