"""What is read from the shards, and how is it turned into pictures and captions?"""

from __future__ import annotations

from string import Formatter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CaptionConfig(_Frozen):
    """Which caption a draw of a sample yields.

    Attributes:
        fields: share of draws by where the caption stands: `txt` (the .txt member) or a metadata
            field, such as a second caption by a model; a sample that lacks one uses the others.
        languages: share of draws by tag of the entries in the .json member's `captions` list
            ([{"lang": "de", "text": ...}, ...]; an entry of `kind` k other than label has the tag
            `lang:k`); `*` stands for all tags that are not named, evenly. Null: the .txt member.
        templates: texts with {text} and any metadata field, with their weights.
        article: share of English captions that get "a" or "an" in front.
        empty: `keep` an empty caption (the model learns it as no caption), or `skip` the sample.
    """

    fields: dict[str, float] = {"txt": 1.0}
    languages: dict[str, float] | None = None
    templates: dict[str, float] = {"{text}": 1.0}
    article: float = Field(default=0.0, ge=0, le=1)
    empty: Literal["keep", "skip"] = "keep"

    @model_validator(mode="after")
    def _weights(self) -> CaptionConfig:
        for name in ("fields", "languages", "templates"):
            weights = getattr(self, name)
            if weights is None:
                continue
            if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
                raise ValueError(
                    f"{name} must have weights >= 0 with a positive sum; got {weights}"
                )
        return self

    @model_validator(mode="after")
    def _templates_parse(self) -> CaptionConfig:
        for template in self.templates:
            try:
                fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
            except ValueError as error:
                raise ValueError(
                    f"template {template!r} cannot be read ({error}); write fields as {{text}} "
                    "and a brace as {{"
                ) from error
            if any(not f or f.isdecimal() or set(f) & set(".[") for f in fields):
                raise ValueError(
                    f"template {template!r} must name plain fields; got {fields}; write {{text}}"
                )
        return self


class BucketConfig(_Frozen):
    """Shapes of batches, so that pictures keep their aspect ratio (see `buckets.py`).

    Attributes:
        base_px: resolutions; a bucket's area is at most the square of one. With several, a picture
            goes to the largest one that it fills without being enlarged.
        step_px: widths and heights are multiples of this.
        max_aspect: longer side / shorter side of a bucket, at most.
        max_crop: share of a picture's area that may be cut away; what needs more is left out, and
            the ledger says so.
        chapter_steps: batches that are planned together; leftovers are carried to a chapter's end.
    """

    base_px: tuple[int, ...] = (512,)
    step_px: int = Field(default=64, ge=8)
    max_aspect: float = Field(default=2.0, ge=1)
    max_crop: float = Field(default=0.25, ge=0, lt=1)
    chapter_steps: int = Field(default=256, ge=1)

    @model_validator(mode="after")
    def _steps_fit(self) -> BucketConfig:
        if not self.base_px or any(base < self.step_px for base in self.base_px):
            raise ValueError(
                f"base_px must name resolutions of at least step_px; got {list(self.base_px)} with "
                f"step_px {self.step_px}; lower step_px"
            )
        return self


class OrderConfig(_Frozen):
    """How samples are shuffled (see `order.py`).

    Attributes:
        streams: canonical streams, which ranks divide among themselves; a divisor of the batch size
            that the number of ranks divides keeps every rank to its own share of the shards (but
            for buckets, whose batches are mixed from all streams).
        block_samples: neighbouring samples of a stream that are shuffled together. A stream has the
            shards of one block open, so this bounds the cache.
    """

    streams: int = Field(default=1, ge=1)
    block_samples: int = Field(default=262_144, ge=1)


class StorageConfig(_Frozen):
    """How tars that are not on a local disk are read.

    Attributes:
        retries: further tries after a request that failed.
        deadline_s: seconds that a request may take, with all its tries.
        cache_dir: folder of local copies; null: `latentdiff` in the user's cache folder.
        cache_gb: size of all copies, at most, in 10^9 bytes; 0: none, every read is a request.
        prefetch_threads: downloads at a time.
    """

    retries: int = Field(default=4, ge=0)
    deadline_s: float = Field(default=60.0, gt=0)
    cache_dir: str | None = None
    cache_gb: float = Field(default=50.0, ge=0)
    prefetch_threads: int = Field(default=2, ge=1)


class SourceConfig(_Frozen):
    """One data set of a mixture.

    Attributes:
        shards: paths or URLs of tars; braces and globs are expanded.
        weight: its share of the draws, relative to the other sources' weights.
        select: a selection that `latentdiff data select` wrote.
        where: SQL over the index, or metadata field -> values that are let in.
        index: folder of the index; null: beside the tars.
    """

    shards: tuple[str, ...] = ()
    weight: float = Field(default=1.0, gt=0)
    select: str | None = None
    where: str | dict[str, tuple[str | int | bool, ...]] = {}
    index: str | None = None

    @model_validator(mode="after")
    def _names_shards(self) -> SourceConfig:
        if bool(self.shards) == (self.select is not None):
            raise ValueError(
                "give shards, or select: a file of `latentdiff data select`, which names its own "
                f"shards; got shards {list(self.shards)} and select {self.select}"
            )
        return self


class DataConfig(_Frozen):
    """Shards of image-caption pairs.

    Attributes:
        shards: paths or URLs of tars; braces and globs are expanded.
        select: a selection that `latentdiff data select` wrote, instead of `shards`.
        where: SQL over the index, or metadata field -> values that are let in.
        index: folder of the index; null: beside the tars.
        mixture: several data sets with weights, instead of `shards`.
        payload: `images`, or `latents` as `latentdiff data precompute` writes them.
        size_px: pictures are resized so that the shorter side has this length, then cut square.
        crop_px: side of a random square cut out of that picture; null keeps it whole.
        crop: where a picture is cut that has another shape than its batch.
        flip: mirror half of the pictures.
        scaled_decode: let JPEG's decoder shrink pictures that are larger than needed.
        buckets: shapes of batches by aspect ratio, instead of `size_px` and `crop_px`.
        micro_conditioning: read original size and cut of latents from their .json; pictures come
            with theirs anyway.
        captions: which caption a draw yields.
        order: how samples are shuffled.
        storage: how tars that are not on a local disk are read.
        max_bad_rate: share of samples that may be unusable before the run stops.
        num_workers: decoding threads; 0 decodes where the batch is asked for.
    """

    shards: tuple[str, ...] = ()
    select: str | None = None
    where: str | dict[str, tuple[str | int | bool, ...]] = {}
    index: str | None = None
    mixture: tuple[SourceConfig, ...] = ()
    payload: Literal["images", "latents"] = "images"
    size_px: int = Field(default=64, ge=8)
    crop_px: int | None = Field(default=None, ge=8)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    scaled_decode: bool = True
    buckets: BucketConfig | None = None
    micro_conditioning: bool = False
    captions: CaptionConfig = CaptionConfig()
    order: OrderConfig = OrderConfig()
    storage: StorageConfig = StorageConfig()
    max_bad_rate: float = Field(default=0.01, ge=0, le=1)
    num_workers: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if self.mixture and (self.shards or self.select or self.where or self.index):
            raise ValueError(
                "mixture names its own shards, select, where and index; leave them out beside it"
            )
        if not self.mixture:
            _ = self.sources
        if self.crop_px is not None and self.crop_px > self.size_px:
            raise ValueError(
                f"crop_px must be at most size_px; got {self.crop_px} > {self.size_px}; "
                "lower crop_px or raise size_px"
            )
        if self.buckets is not None and self.crop_px is not None:
            raise ValueError(
                f"buckets shape the pictures themselves; got crop_px {self.crop_px}; set it to null"
            )
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The data sets: those of the mixture, or the one."""
        if self.mixture:
            return self.mixture
        return (
            SourceConfig(
                shards=self.shards, select=self.select, where=self.where, index=self.index
            ),
        )

    @property
    def output_px(self) -> int:
        """Side of the square pictures that are delivered; of the largest square bucket."""
        if self.buckets is not None:
            return max(self.buckets.base_px)
        return self.crop_px or self.size_px

    @property
    def side_step_px(self) -> int:
        """What all sides of the pictures that are delivered are multiples of."""
        return self.output_px if self.buckets is None else self.buckets.step_px

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample's picture is the same at every draw, so that it can be cached."""
        return (
            self.crop_px is None
            and self.crop == "center"
            and not self.flip
            and self.buckets is None
            and self.payload == "images"
        )
