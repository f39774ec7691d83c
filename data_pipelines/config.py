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
        languages: share of draws by tag of the entries in the .json member's `captions` list
            ([{"lang": "de", "text": ...}, ...]; an entry of `kind` k other than label has the tag
            `lang:k`); `*` stands for all tags that are not named, evenly. Null: the .txt member.
        templates: texts with {text} and any metadata field, with their weights.
        article: share of English captions that get "a" or "an" in front.
    """

    languages: dict[str, float] | None = None
    templates: dict[str, float] = {"{text}": 1.0}
    article: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _weights(self) -> CaptionConfig:
        for name, weights in (("languages", self.languages), ("templates", self.templates)):
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


class DataConfig(_Frozen):
    """Shards of image-caption pairs.

    Attributes:
        shards: paths of tars; braces and globs are expanded.
        size_px: pictures are resized so that the shorter side has this length, then cut square.
        crop_px: side of a random square cut out of that picture; null keeps it whole.
        crop: where the square is taken when a picture is not square.
        flip: mirror half of the pictures.
        where: metadata field -> values that are let in.
        captions: which caption a draw yields.
        num_workers: decoding threads.
    """

    shards: tuple[str, ...]
    size_px: int = Field(default=64, ge=8)
    crop_px: int | None = Field(default=None, ge=8)
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    where: dict[str, tuple[str | int | bool, ...]] = {}
    captions: CaptionConfig = CaptionConfig()
    num_workers: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _crop_fits(self) -> DataConfig:
        if self.crop_px is not None and self.crop_px > self.size_px:
            raise ValueError(
                f"crop_px must be at most size_px; got {self.crop_px} > {self.size_px}; "
                "lower crop_px or raise size_px"
            )
        return self

    @property
    def output_px(self) -> int:
        """Side of the pictures that are delivered."""
        return self.crop_px or self.size_px

    @property
    def is_deterministic(self) -> bool:
        """Whether a sample's picture is the same at every draw, so that it can be cached."""
        return self.crop_px is None and self.crop == "center" and not self.flip
