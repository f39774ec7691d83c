"""Do shards of latents hold what was written, and is nothing else ever taken for a latent?"""

from __future__ import annotations

import fcntl
import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from data_pipelines.latentinfo import INFO, LatentsInfo, read_info, write_whole
from data_pipelines.latents import (
    LatentSample,
    draw_numbers,
    npy,
    read_latents,
    read_tokens,
    write_latents,
)
from data_pipelines.ledger import BadSample

SHAPE = (3, 2, 4, 8, 6)  # crops, mean and std, channels, height, width


def samples(count: int = 5) -> list[LatentSample]:
    random = np.random.default_rng(0)
    return [
        LatentSample(
            key=f"folder/{i:04d}",
            latents=random.standard_normal(SHAPE).astype(np.float16),
            tokens=random.integers(0, 49408, (2, 77)).astype(np.int32),
            caption=f"Äpfel {i}",
            metadata={"width": 48, "height": 64, "aesthetic": 5.5},
        )
        for i in range(count)
    ]


def payloads(written: list[LatentSample]) -> list[memoryview]:
    return [memoryview(npy(sample.latents, "<f2")) for sample in written]


def info(**changes: object) -> LatentsInfo:
    return LatentsInfo.model_validate(
        {
            "model": "box",
            "model_hash": "a" * 64,
            "downscale": 8,
            "channels": 4,
            "crops": 3,
            "dtype": "fp32",
            "seed": 0,
            "data": {"size_px": 64},
            "fingerprint": "b" * 64,
            "shards": (),
            **changes,
        }
    )


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    written = samples()
    tar = tmp_path / "a.tar"
    made = write_latents(tar, written)
    assert made.num_samples == 5 and made.num_bytes == tar.stat().st_size
    dataset: Any = WebDataset(str(tar), shardshuffle=False).decode()
    read = list(dataset)
    assert [sample["__key__"] for sample in read] == [sample.key for sample in written]
    for got, expected in zip(read, written, strict=True):
        np.testing.assert_array_equal(got["latents.npy"], expected.latents)
        np.testing.assert_array_equal(got["tokens.npy"], expected.tokens)
        assert got["latents.npy"].dtype == np.float16 and got["tokens.npy"].dtype == np.int32
        assert got["txt"] == expected.caption and got["json"] == expected.metadata


def test_numpys_bytes_are_ours() -> None:
    for array in (np.zeros(SHAPE, "<f2"), np.arange(77, dtype="<i4")):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        assert npy(array, array.dtype.str) == file.getvalue()


def test_the_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    first = write_latents(tar, samples())
    (tmp_path / ".b.tar.part").write_bytes(b"left by a killed run" * 1000)
    second = write_latents(tmp_path / "b.tar", samples())
    assert first.sha256 == second.sha256 and tar.stat().st_size % 10240 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    with tarfile.open(tar) as opened:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in opened} == {(0, 0, "latentdiff", 0o644)}


def test_an_error_leaves_nothing_and_keeps_the_shard_that_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[LatentSample]:
        yield from samples(2)
        raise OSError("no space left")

    write_latents(tmp_path / "a.tar", samples(1))
    before = (tmp_path / "a.tar").read_bytes()
    for name in ("a.tar", "b.tar"):
        with pytest.raises(OSError, match="no space left"):
            write_latents(tmp_path / name, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == before


def test_two_processes_never_write_one_shard(tmp_path: Path) -> None:
    with open(tmp_path / ".a.tar.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"a\.tar\.part is being written by another process"):
            write_latents(tmp_path / "a.tar", samples())
    assert not (tmp_path / "a.tar").exists()


def test_a_batch_is_one_crop_of_each_sample() -> None:
    written = samples()
    crops = [2, 0, 1, 1, 2]
    batch = read_latents(payloads(written), crops)
    assert batch.shape == (5, *SHAPE[1:]) and batch.dtype == np.float16 and batch.flags.writeable
    for row, sample, crop in zip(batch, written, crops, strict=True):
        np.testing.assert_array_equal(row, sample.latents[crop])
    np.testing.assert_array_equal(
        read_latents([npy(s.latents, "<f2") for s in written]), [s.latents[0] for s in written]
    )
    tokens = [npy(s.tokens, "<i4") for s in written if s.tokens is not None]
    ids = read_tokens(tokens, np.array([0, 1, 0, 1, 0]))
    assert ids.shape == (5, 77) and ids.dtype == np.int32
    assert written[3].tokens is not None
    np.testing.assert_array_equal(ids[3], written[3].tokens[1])


def test_other_headers_of_the_same_array_are_read_too() -> None:
    array = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(2, 0), allow_pickle=False)
    ours = npy(array, "<f2")
    batch = read_latents([ours, file.getvalue(), ours])
    np.testing.assert_array_equal(batch, np.stack([array[0]] * 3))


def corrupted(kind: str) -> bytes:
    array = samples(1)[0].latents
    good = npy(array, "<f2")
    file = io.BytesIO()
    match kind:
        case "pickle":
            np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "float32":
            np.save(file, array.astype(np.float32))
        case "big endian":
            np.save(file, array.astype(">f2"))
        case "fortran":
            np.save(file, np.asfortranarray(array))
        case "fewer dimensions":
            np.save(file, array[0])
        case "no crops":
            np.save(file, array[:0])
        case "other shape":
            np.save(file, array[:, :, :, :4])
        case "structured":
            np.save(file, np.zeros(3, dtype=[("a", "<f2")]))
        case "version 3":
            np.lib.format.write_array(file, array, version=(3, 0))
        case "cut":
            return good[:-1]
        case "longer":
            return good + b"\0"
        case "cut in the header":
            return good[:50]
        case "empty":
            return b""
        case "code":
            return good.replace(b"'shape': (3,", b"'shape': [1],", 1)
        case "expression":
            return good.replace(b"(3, 2, 4", b"(3*2,  4", 1)
        case "huge header":
            return b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + good[10:]
        case "huge shape":
            return good.replace(b"(3, 2, 4, 8, 6), }    ", b"(999999999, 2, 4, 8, 6)", 1)
        case "a tar":
            return b"HTTP 404" * 100
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "array of"),
        ("float32", r"array of <f4 and shape \(3, 2, 4, 8, 6\); expected <f2 and 5 dimensions"),
        ("big endian", "array of >f2"),
        ("fortran", "the array is in Fortran order; expected C order"),
        ("fewer dimensions", "expected <f2 and 5 dimensions above 0"),
        ("no crops", r"shape \(0, 2, 4, 8, 6\); expected <f2 and 5 dimensions above 0"),
        ("other shape", r"array of shape \(3, 2, 4, 4, 6\); expected \(3, 2, 4, 8, 6\)"),
        ("structured", "is not one that numpy writes for plain numbers"),
        ("version 3", "not a .npy file of version 1.0 or 2.0"),
        ("cut", "2431 bytes; expected 2432"),
        ("longer", "2433 bytes; expected 2432"),
        ("cut in the header", "not a .npy file"),
        ("empty", "not a .npy file"),
        ("code", "is not one that numpy writes"),
        ("expression", "is not one that numpy writes"),
        ("huge header", "not a .npy file"),
        ("huge shape", "is not one that numpy writes"),
        ("a tar", "not a .npy file"),
    ],
)
def test_what_is_no_latent_is_named_and_left_out(kind: str, message: str) -> None:
    good, bad = payloads(samples(2)), memoryview(corrupted(kind))
    names = ["a.tar:1", "a.tar:2", "a.tar:3"]
    with pytest.raises(BadSample, match=rf"^a\.tar:2: .*{message}") as caught:
        read_latents([good[0], bad, good[1]], names=names)
    assert caught.value.reason == "bad latents"

    for order in ([bad, good[0], good[1]], [good[0], bad, good[1]], [good[0], good[1], bad]):
        faults: list[tuple[int, BadSample]] = []
        batch = read_latents(order, [2, 2, 2], shape=SHAPE, faults=faults)
        place = next(i for i, payload in enumerate(order) if payload is bad)
        assert [i for i, _ in faults] == [place] and not batch[place].any()
        kept = [i for i in range(3) if i != place]
        np.testing.assert_array_equal(batch[kept], read_latents(good, [2, 2]))

    faults = []
    assert read_latents([bad, bad], [1, 1], shape=SHAPE, faults=faults).shape == (2, *SHAPE[1:])
    assert [i for i, _ in faults] == [0, 1]


def test_a_batch_is_put_where_it_is_asked_to() -> None:
    written = samples(4)
    whole = read_latents(payloads(written), [0, 1, 2, 0])
    target = np.full((6, *whole.shape[1:]), 7, np.float16)
    to = (target, [5, 0, 2])
    faults: list[tuple[int, BadSample]] = []
    read_latents([*payloads(written[:2]), b"bad"], [0, 1, 0], faults=faults, to=to)
    np.testing.assert_array_equal(target[[5, 0]], whole[:2])
    assert (target[1:5] == 7).all()
    assert [number for number, _ in faults] == [2]


def test_a_batch_of_bad_ones_alone_has_no_shape() -> None:
    faults: list[tuple[int, BadSample]] = []
    assert read_latents([b"", b"x"], [1, 1], faults=faults).size == 0
    assert [i for i, _ in faults] == [0, 1]
    assert read_latents([]).size == 0


def test_a_crop_that_is_not_there_is_our_mistake() -> None:
    for crops in ([0, 3], [-1, 0], [0]):
        with pytest.raises(ValueError, match="2 payloads need as many numbers from 0 to 2; got"):
            read_latents(payloads(samples(2)), crops)


def test_crops_and_captions_are_drawn_by_position() -> None:
    positions = range(100, 1100)
    crops = draw_numbers(7, positions, 4, "latent_crop")
    np.testing.assert_array_equal(crops[50:60], draw_numbers(7, range(150, 160), 4, "latent_crop"))
    assert set(crops) == {0, 1, 2, 3} and np.bincount(crops).min() > 200
    for other in (
        draw_numbers(8, positions, 4, "latent_crop"),
        draw_numbers(7, positions, 4, "latent_caption"),
    ):
        assert (crops != other).mean() > 0.6
    assert not draw_numbers(7, positions, 1, "latent_crop").any()


def test_reading_is_fast() -> None:
    """256 px: 16 KB of moments and 77 ids a sample, in a few microseconds."""
    latents = [memoryview(npy(np.zeros((1, 2, 4, 32, 32)), "<f2"))] * 256
    tokens = [memoryview(npy(np.zeros((1, 77)), "<i4"))] * 256
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        read_latents(latents)
        read_tokens(tokens)
        best = min(best, time.perf_counter() - start)
    assert best / 256 < 50e-6  # 5 on a quiet core


def test_info_round_trips_and_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no latents\.json; expected latents that"):
        read_info(tmp_path)
    written = info()
    write_whole(tmp_path / INFO, written.model_dump_json().encode())
    assert read_info(tmp_path) == written and read_info(f"{tmp_path}/") == written
    assert written.shape(64, 48) == SHAPE and info(kind="samples").shape(8, 8) == (3, 1, 4, 1, 1)
    for change, message in (
        ({"format": 2}, r"latents\.json cannot be used \(format: .*expected format 1; precompute"),
        ({"kind": "pickle"}, r"cannot be used \(kind: "),
    ):
        write_whole(
            tmp_path / INFO,
            json.dumps({**json.loads(written.model_dump_json()), **change}).encode(),
        )
        with pytest.raises(ValueError, match=message):
            read_info(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [INFO]
