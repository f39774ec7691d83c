"""What does a picture's file tell of how it was drawn? All that it takes to draw it again.

A PNG has text chunks for people, `parameters` for other programs, and `story`: JSON that is read
back. Nothing in a story is run; the files that it names are opened to compare their hashes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from latentdiff import __version__
from latentdiff.choices import DTYPES, check_choice, check_device
from latentdiff.drawing.namedfiles import LoraFile
from latentdiff.drawing.parameters import write_parameters
from latentdiff.drawing.wish import MOST_IN_PATH, Wish, check_wish, read_fields
from latentdiff.speed import Speed

CHUNK = "story"
_FORMAT = 1
_MAX_CHARS = 1 << 20
_MOST_PICTURES = 1 << 20  # an index beyond it is no picture's
MOST_ROWS = 4096  # pictures at a time that can be told
_HASH = re.compile(r"[0-9a-f]{16,64}|unsaved")
_ROUNDING = ("attention", "backend", "compile", "sliced")  # all they may change


@dataclass(frozen=True)
class Story:
    """How a picture was drawn.

    Attributes:
        wish: what was asked for, and what the model's defaults made of the rest.
        index: the picture's number; with the seed it decides all randomness.
        batch: (its place, how many) of the pictures drawn together: rounding depends on it.
        model_hash: first 16 hex digits of the weights' SHA-256.
        model: directory or hub id as it was given; None for the model in the box.
        loras: merged into it.
        files: SHA-256 of the wish's init_image and mask.
        device: as it was asked for.
        dtype: likewise.
        speed: likewise.
        version: of latentdiff.
    """

    wish: Wish
    index: int = 0
    batch: tuple[int, int] = (0, 1)
    model_hash: str = "unsaved"
    model: str | None = None
    loras: tuple[LoraFile, ...] = ()
    files: Mapping[str, str] | None = None
    device: str = "auto"
    dtype: str = "auto"
    speed: Speed = field(default_factory=Speed)
    version: str = __version__

    @property
    def decides(self) -> tuple[object, ...]:
        """Equal for two pictures that differ by rounding at most."""
        return (
            replace(self.wish, init_image=None, mask=None),
            self.index,
            self.model_hash,
            tuple((lora.hash, lora.weight) for lora in self.loras),
            tuple(sorted((self.files or {}).items())),
            self.dtype,
            tuple(v for k, v in asdict(self.speed).items() if k not in _ROUNDING),
        )

    def chunks(self, width: int, height: int) -> dict[str, str]:
        """Names and values of a PNG's text chunks.

        Args:
            width: of the picture, pixels.
            height: likewise.
        """
        wish = self.wish
        told = {
            "prompt": wish.prompt,
            "index": self.index,
            "negative_prompt": wish.negative_prompt,
            "steps": wish.steps,
            "guidance_scale": wish.guidance,
            "sampler": wish.sampler,
            "spacing": wish.spacing,
            "seed": wish.seed,
            "model": self.model_hash,
            "latentdiff": self.version,
        }
        model = "latentdiff" if self.model is None else Path(self.model).name
        loras = {lora.path.stem: lora.hash for lora in self.loras}
        return {
            **{name: str(value) for name, value in told.items()},
            "parameters": write_parameters(
                wish, (width, height), model, self.model_hash, loras, self.version
            ),
            CHUNK: self.to_json(),
        }

    def to_json(self) -> str:
        """For `parse_story`."""
        wish = {
            f.name: value
            for f in fields(Wish)
            if (value := getattr(self.wish, f.name)) != f.default
        }
        speed = {
            f.name: value
            for f in fields(Speed)
            if (value := getattr(self.speed, f.name)) != f.default
        }
        values = {
            "format": _FORMAT,
            "latentdiff": self.version,
            "wish": wish,
            "index": self.index,
            "batch": self.batch,
            "model": {"name": self.model, "hash": self.model_hash},
            "loras": [asdict(lora) for lora in self.loras],
            "files": dict(self.files or {}),
            "device": self.device,
            "dtype": self.dtype,
            "speed": speed,
        }
        return json.dumps(values, ensure_ascii=False, default=str)  # str: of a path


def parse_story(text: str, where: str) -> Story:
    """A story from its JSON.

    Args:
        text: of the chunk.
        where: it was found, for errors.

    Raises:
        ValueError: too long, damaged, of a later version, or what no model could draw.
    """
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{where}: its story has {len(text):,} characters; at most {_MAX_CHARS:,}")
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(f"an object expected; got {text[:40]!r}")
        if values.get("format") != _FORMAT:
            raise ValueError(
                f"it is of format {str(values.get('format'))[:20]}; this version of latentdiff "
                f"reads {_FORMAT}"
            )
        return _parse(values)
    except KeyError as error:
        raise ValueError(f"{where}: its story lacks {error}; it is damaged") from None
    except RecursionError:
        raise ValueError(f"{where}: its story is nested too deeply; it is damaged") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: its story cannot be read: {error}") from None


def _parse(values: Mapping[str, Any]) -> Story:
    wish = Wish(**read_fields(values["wish"], "wish"))
    check_wish(wish)
    place, rows = values["batch"]
    if not 0 <= _whole(values["index"], "index") < _MOST_PICTURES:
        raise ValueError(
            f"index must be from 0 to {_MOST_PICTURES - 1}; got {values['index']!s:.40}"
        )
    if not 0 <= _whole(place, "batch") < _whole(rows, "batch") <= MOST_ROWS:
        raise ValueError(
            f"batch must be a place and a larger number, at most {MOST_ROWS}; "
            f"got {values['batch']!s:.40}"
        )
    model = values["model"]
    check_device(_of(str, values["device"], "device"))
    check_choice("dtype", _of(str, values["dtype"], "dtype"), DTYPES)
    kinds = {f.name: type(f.default) for f in fields(Speed)}
    for name, value in values["speed"].items():
        check_choice("speed", name, tuple(kinds))
        kind = kinds[name]
        if kind is type(None):  # None, or a name
            _name(value, name)
        else:
            _of(kind, value, name)
    return Story(
        wish=wish,
        index=values["index"],
        batch=(place, rows),
        model_hash=_hash(model["hash"]),
        model=None if model["name"] is None else _name(model["name"], "model"),
        loras=tuple(
            LoraFile(
                Path(_name(lora["path"], "path")),
                float(_of(int | float, lora["weight"], "weight")),
                _hash(lora["hash"]),
            )
            for lora in values["loras"]
        ),
        files={str(name): _hash(found) for name, found in values["files"].items()},
        device=values["device"],
        dtype=values["dtype"],
        speed=Speed(**values["speed"]),
        version=_of(str, values["latentdiff"], "latentdiff"),
    )


def _of(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise TypeError(f"{name} must be of type {wanted}; got {value!r:.40}")
    return value


def _name(value: Any, name: str) -> str:
    """Of a file or a model; a stranger's has no need to fill the screen."""
    if len(_of(str, value, name)) > MOST_IN_PATH:
        raise ValueError(f"{name} has {len(value):,} characters; at most {MOST_IN_PATH:,}")
    return value


def _whole(value: Any, name: str) -> int:
    return _of(int, value, name)


def _hash(value: Any) -> str:
    if not _HASH.fullmatch(_of(str, value, "hash")):
        raise ValueError(f"{value!r:.40} is no SHA-256")
    return value
