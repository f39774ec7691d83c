"""Is nothing of a tar executed, opened or written, whatever it holds (pickles, paths, links)?"""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from data_pipelines.show import contact_sheet
from data_pipelines.verify import verify_shards

EXTENSIONS = ("pkl", "pickle", "pyd", "pth", "cls", "json", "txt", "png", "jpg", "latents.npy",
              "tokens.npy", "ten", "mp")  # fmt: skip


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, format="PNG")
    return data.getvalue()


def trap(name: str, path: Path, protocol: int) -> bytes:
    if name.endswith(".npy"):
        data = io.BytesIO()
        np.save(data, np.array([Trap(path)], dtype=object), allow_pickle=True)
        return data.getvalue()
    return pickle.dumps(Trap(path), protocol)


def file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    good = [
        file(f"{key}.{extension}", data)
        for key in ("good1", "good2")
        for extension, data in (("png", picture()), ("txt", b"a good one"), ("json", b"{}"))
    ]
    with tarfile.open(path, "w") as tar:
        for info, data in [*good[:3], *members, *good[3:]]:
            tar.addfile(info, io.BytesIO(data))


def use_everything(tar: Path, tmp_path: Path) -> set[str]:
    """Index, verify, load and show a tar; returns the keys that were delivered."""
    index_shards([str(tar)], workers=1)
    verify_shards([str(tar)], workers=1)
    captions = {"languages": {"en": 0.5, "*": 0.5}}  # reads the .json too
    config = DataConfig.model_validate(
        {"shards": [str(tar)], "size_px": 8, "captions": captions, "max_bad_rate": 1.0}
    )
    delivered = {
        key
        for batch in islice(Loader(config, 0, 2), 8)
        for key, valid in zip(batch.keys, batch.valid, strict=True)
        if valid
    }
    contact_sheet([str(tar)], tmp_path / "sheet.png", num=1)
    return delivered


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_no_pickle_is_opened(tmp_path: Path, extension: str, protocol: int) -> None:
    name, sprung = f"bad.{extension}", tmp_path / "sprung"
    data = trap(name, sprung, protocol)
    others = [("png", picture()), ("txt", b"bad"), ("json", b"{}")]
    rest = [file(f"bad.{e}", d) for e, d in others if not name.endswith(f".{e}")]
    write(tmp_path / "x.tar", [file(name, data), *rest])
    delivered = use_everything(tmp_path / "x.tar", tmp_path)
    assert {"good1", "good2"} <= delivered
    assert not sprung.exists()
    os.mkdir(sprung)  # the trap is a real one
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Trap(sprung), protocol))


@pytest.mark.parametrize(
    "member",
    [
        file("../escaped.txt", b"x"),
        file("../../escaped.png", picture()),
        file("/tmp/latentdiff-escaped.txt", b"x"),
        file("a/../../escaped.json", b"{}"),
        file("good1/../escaped.txt", b"x"),
        special("good3.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("good3.txt", tarfile.LNKTYPE, "../../etc/passwd"),
        special("good3.txt", tarfile.SYMTYPE, "good1.txt"),
        special("good3.json", tarfile.CHRTYPE),
        special("good3.png", tarfile.BLKTYPE),
        special("good3.txt", tarfile.FIFOTYPE),
        special("../escaped", tarfile.DIRTYPE),
    ],
    ids=lambda member: f"{member[0].name} {member[0].type.decode()}",
)
def test_no_path_of_a_tar_is_opened_or_written(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "one" / "two"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    write(inside / "x.tar", [member])
    assert use_everything(inside / "x.tar", inside) == {"good1", "good2"}
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {Path(name).parent for name in written} == {Path("one/two")}
    assert not Path("/tmp/latentdiff-escaped.txt").exists()
