"""Does the index find each payload at its place, and is every broken tar told apart?"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from data_pipelines.index import scan
from data_pipelines.shards import Sample, expand_shards, read_shard, write_shards

BLOCK = 512
THREE = {
    f"{key}.{extension}": f"{key} {extension} ".encode() * size
    for key in ("a", "b", "c")
    for extension, size in (("json", 1), ("png", 200), ("txt", 3))
}


def write_tar(path: Path, members: Mapping[str, bytes] | list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return str(path)


def headers(path: str) -> list[int]:
    """Byte offsets of all headers."""
    with tarfile.open(path) as tar:
        return [info.offset for info in tar]


# Whole tars


def test_offsets_read_back_the_exact_payloads(assets: Path) -> None:
    shards = expand_shards(str(assets / "*.tar"))
    index = scan(shards)
    expected = [(shard, sample) for shard in shards for sample in read_shard(shard)]
    assert len(index.samples) == len(expected) == 201
    for entry, (shard, sample) in zip(index.samples, expected, strict=True):
        assert (entry.shard, entry.key) == (shard, sample.pop("__key__"))
        assert {extension: entry.read(extension) for extension in entry.members} == sample
        assert entry.image_extension == "png"
        assert entry.metadata()["key"] == entry.key


def test_long_foreign_and_nested_names(tmp_path: Path) -> None:
    keys = ["日本/猫", "x" * 150, "a/" * 120 + "end"]
    samples = [Sample(key, key.encode(), "webp", f"caption of {key}") for key in keys]
    (info,) = write_shards(samples, tmp_path, "t")
    index = scan([str(info.path)])
    assert [entry.key for entry in index.samples] == keys
    for entry in index.samples:
        assert entry.read("webp").decode() == entry.key
        assert entry.read("txt").decode() == f"caption of {entry.key}"


def test_only_files_count_and_extensions_are_lower_case(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("d/a.b.JPG", "d/a.TXT", "d/a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
        link = tarfile.TarInfo("d/a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (entry,) = scan([str(path)]).samples
    assert (entry.key, set(entry.members)) == ("d/a", {"b.jpg", "txt", "jpg"})
    assert entry.metadata() == {}


def test_where_lets_in_what_matches(assets: Path) -> None:
    shards = expand_shards(str(assets / "train-*.tar"))
    every = scan(shards).samples
    where = {"style": ("fluent-3d", "fluent-flat"), "skin_tone": (False,)}
    some = scan(shards, where).samples
    assert [e.key for e in some] == [
        e.key for e in every if e.metadata()["style"] in where["style"]
    ]
    assert 0 < len(some) < len(every)
    with pytest.raises(
        ValueError,
        match=r"no sample in 3 shard\(s\) matches where=\{'style': \('oil',\)\}; expected at least",
    ):
        scan(shards, {"style": ("oil",)})
    with pytest.raises(ValueError, match="no sample in 3"):
        scan(shards, {"no such field": (1,)})


def test_the_fingerprint_names_the_data(tmp_path: Path, assets: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    one = scan([write_tar(tmp_path / "one" / "x.tar", THREE)]).fingerprint
    assert scan([write_tar(tmp_path / "two" / "x.tar", THREE)]).fingerprint == one
    changed = {**THREE, "b.txt": b"longer than it was before"}
    assert scan([write_tar(tmp_path / "three" / "x.tar", changed)]).fingerprint != one
    renamed = {name.replace("c.", "d."): payload for name, payload in THREE.items()}
    assert scan([write_tar(tmp_path / "three" / "x.tar", renamed)]).fingerprint != one
    assert scan([write_tar(tmp_path / "three" / "y.tar", THREE)]).fingerprint != one
    shards = expand_shards(str(assets / "train-*.tar"))
    assert scan(shards[::-1]).fingerprint != scan(shards).fingerprint


# Broken tars


def cut_in_header(data: bytearray, at: list[int]) -> None:
    del data[at[4] + 100 :]


def cut_at_a_members_edge(data: bytearray, at: list[int]) -> None:
    del data[at[4] :]


def cut_at_the_end_mark(data: bytearray, at: list[int]) -> None:
    del data[at[8] + 2 * BLOCK :]


def cut_in_payload(data: bytearray, at: list[int]) -> None:
    del data[at[4] + BLOCK + 100 :]


def cut_in_padding(data: bytearray, at: list[int]) -> None:
    del data[at[5] - 1 :]


def flipped_first_header(data: bytearray, at: list[int]) -> None:
    data[at[0]] ^= 1


def flipped_middle_header(data: bytearray, at: list[int]) -> None:
    data[at[4] + 3] ^= 1


def flipped_last_header(data: bytearray, at: list[int]) -> None:
    data[at[8] + 130] ^= 64


def zeroed_header(data: bytearray, at: list[int]) -> None:
    data[at[4] : at[4] + BLOCK] = bytes(BLOCK)


def zeroed_first_header(data: bytearray, at: list[int]) -> None:
    data[at[0] : at[0] + BLOCK] = bytes(BLOCK)


def huge_size(data: bytearray, at: list[int]) -> None:
    info = tarfile.TarInfo("b.png")
    info.size = 2**33 - 1
    data[at[4] : at[4] + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)


def html_instead(data: bytearray, at: list[int]) -> None:
    data[:] = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 40


def empty(data: bytearray, at: list[int]) -> None:
    data.clear()


def garbage_at_the_end(data: bytearray, at: list[int]) -> None:
    data[-1] = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_in_header, r"has a broken header before its end at byte 5120; write it again"),
        (cut_at_a_members_edge, r"is cut: its end mark is missing at byte 5120; write it again"),
        (cut_at_the_end_mark, r"is cut: its end mark is missing at byte \d+; write it again"),
        (cut_in_payload, r"is not a readable tar \(unexpected end of data\); write it again"),
        (cut_in_padding, r"is not a readable tar \(unexpected end of data\)"),
        (flipped_first_header, r"is not a readable tar \(.*\); write it again"),
        (flipped_middle_header, r"has a broken header before its end at byte 5120"),
        (flipped_last_header, r"has a broken header before its end at byte \d+"),
        (zeroed_header, r"has a broken header before its end at byte 5120"),
        (zeroed_first_header, r"has a broken header before its end at byte 0"),
        (huge_size, r"is not a readable tar \(unexpected end of data\)"),
        (html_instead, r"is not a readable tar"),
        (empty, r"is not a readable tar \(empty file\)"),
        (garbage_at_the_end, r"has a broken header before its end"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_broken_tars(
    tmp_path: Path, damage: Callable[[bytearray, list[int]], None], message: str
) -> None:
    whole = write_tar(tmp_path / "whole.tar", THREE)
    data = bytearray(Path(whole).read_bytes())
    damage(data, headers(whole))
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.tar {message}"):
        scan([whole, str(path)])


def test_no_flipped_bit_in_a_header_gives_another_index(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", THREE)
    data, path = Path(whole).read_bytes(), tmp_path / "x.tar"

    def entries(shard: str) -> list[tuple[str, dict]]:
        return [(entry.key, dict(entry.members)) for entry in scan([shard]).samples]

    expected, detected = entries(whole), 0
    for start in headers(whole):
        for offset in range(start, start + BLOCK, 5):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << offset % 8
            path.write_bytes(flipped)
            try:
                assert entries(str(path)) == expected, offset
            except ValueError:
                detected += 1
    assert detected > 800  # all but bytes that tar itself ignores


def test_no_cut_gives_another_index(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", THREE)
    data, path = Path(whole).read_bytes(), tmp_path / "x.tar"
    end = headers(whole)[-1] + 2 * BLOCK  # of the last payload
    for size in range(0, end + 2 * BLOCK, 61):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"x\.tar .*; write it again"):
            scan([str(path)])
    path.write_bytes(data[: end + 2 * BLOCK])  # the end mark without its padding
    assert len(scan([str(path)]).samples) == 3


def test_a_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        scan([str(tmp_path / "nowhere.tar")])


# Samples that are not whole


def test_a_sample_without_a_picture(tmp_path: Path) -> None:
    members = {name: payload for name, payload in THREE.items() if name != "b.png"}
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        ValueError, match=r"x\.tar: sample b has no picture; found \['json', 'txt'\]"
    ):
        scan([path])


def test_a_sample_without_a_caption(tmp_path: Path) -> None:
    members = {name: payload for name, payload in THREE.items() if name != "b.txt"}
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        ValueError, match=r"x\.tar: sample b has no \.txt caption; found \['json', 'png'\]"
    ):
        scan([path])


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [*THREE.items(), ("a.png", b"other"), ("a.txt", b"x")])
    with pytest.raises(
        ValueError, match=r"x\.tar: sample a has two members \.png; keys must be unique within"
    ):
        scan([path])
    path = write_tar(tmp_path / "y.tar", [*THREE.items(), ("c.PNG", b"other")])
    with pytest.raises(ValueError, match=r"sample c has two members \.png"):
        scan([path])
    one, two = (write_tar(tmp_path / f"{i}.tar", THREE) for i in range(2))
    assert len(scan([one, two]).samples) == 6  # in two tars it is no mistake


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"{", r"x\.tar:a\.json is not JSON \(Expecting property name"),
        (b"\xff{}", r"x\.tar:a\.json is not JSON \('utf-8' codec|x\.tar:a\.json is not JSON"),
        (b"[1]", r"x\.tar:a\.json must be a JSON object; got a list"),
        (b"[" * 100_000, r"x\.tar:a\.json is not JSON"),
    ],
    ids=["cut", "bytes", "list", "deep"],
)
def test_metadata_that_is_none(tmp_path: Path, payload: bytes, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", {**THREE, "a.json": payload})
    with pytest.raises(ValueError, match=message):
        scan([path], {"style": ("noto",)})
    with pytest.raises(ValueError, match=message):
        scan([path]).samples[0].metadata()


def test_a_tar_that_is_cut_after_it_was_indexed(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "x.tar", THREE))
    entry = scan([str(path)]).samples[1]
    path.write_bytes(path.read_bytes()[: entry.members["txt"].offset + 4])
    with pytest.raises(ValueError, match=r"x\.tar:b\.txt: 4 of 18 bytes; the tar was cut after"):
        entry.read("txt")
