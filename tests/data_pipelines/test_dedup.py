"""Does de-duplication leave out what it should, keep what it should, and miss no pair?"""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from scipy.fft import dct

from data_pipelines import dedup, scan
from data_pipelines.dedup import band_masks, first_come
from data_pipelines.index import IndexedShards, index_shards
from data_pipelines.phash import grey_picture, hash_greys, hash_shards, phash_name, read_hashes
from data_pipelines.selection import select
from data_pipelines.shards import Sample, write_shards


def picture(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Some shapes, smooth enough to stay the same when scaled."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (480, 400), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, w, h = rng.integers(0, 300, 4).tolist()
        color = tuple(rng.integers(0, 256, 3).tolist())
        draw.ellipse((x, y, x + w + 20, y + h + 20), fill=color)
    return image.resize(size, Image.Resampling.LANCZOS)


def encoded(image: Image.Image, extension: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(extension, extension), **options)
    return buffer.getvalue()


def index_of(folder: Path, *shards: Sequence[bytes], **metadata: Sequence[Any]) -> IndexedShards:
    """Tars with these pictures and their index."""
    number = 0
    for shard, pictures in enumerate(shards):
        samples = []
        for data in pictures:
            values = {name: column[number] for name, column in metadata.items()}
            values = {name: value for name, value in values.items() if value is not None}
            extension = "jpg" if data[:2] == b"\xff\xd8" else "png"
            samples.append(Sample(f"{number:04d}", data, extension, "a caption", values))
            number += 1
        write_shards(samples, folder, f"s{shard}")
    return index_shards(sorted(map(str, folder.glob("*.tar"))), workers=1).shards


def kept(shards: IndexedShards, **options: Any) -> list[list[int]]:
    found = select(shards, workers=1, **options)
    return [found.rows(shard).tolist() for shard in range(len(shards.urls))]


# Exact


def test_the_first_of_equal_pictures_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = (encoded(picture(seed)) for seed in range(3))
    shards = index_of(tmp_path, [a, b, a], [c], [b, b, c, a])
    expected = [[0, 1], [0], []]
    assert kept(shards, dedup="sha256") == expected
    monkeypatch.setattr(scan, "_GROUP_SHARDS", 1)
    monkeypatch.setattr(scan, "_BATCH_ROWS", 2)
    assert kept(shards, dedup="sha256") == expected
    assert kept(shards, dedup="sha256", where="key <> '0000'") == [[1, 2], [0], []]
    rules = select(shards, dedup="sha256").rules
    assert (rules[-1].name, rules[-1].removed) == ("sha256: no equal picture", 5)


def test_equal_size_and_crc_are_not_enough(tmp_path: Path) -> None:
    a = encoded(picture(0))
    one, other = a + b"\1\2\3\4", a + b"\5\6\7\x08"  # bytes after the end of a PNG
    other += forge_crc(other, zlib.crc32(one + b"\0\0\0\0"))
    one += b"\0\0\0\0"
    assert one != other and (len(one), zlib.crc32(one)) == (len(other), zlib.crc32(other))
    shards = index_of(tmp_path, [one, other, one])
    assert kept(shards, dedup="sha256") == [[0, 1]]


def forge_crc(data: bytes, wanted: int) -> bytes:
    """Four bytes after which the CRC-32 is the wanted one: it is linear in them."""
    base = zlib.crc32(data + bytes(4))
    rows = [(zlib.crc32(data + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit)
            for bit in range(32)]  # fmt: skip
    target, answer = wanted ^ base, 0
    for top in reversed(range(32)):
        pivot = next(row for row in rows if row[0] >> top & 1)
        rows = [(v ^ pivot[0], m ^ pivot[1]) if v >> top & 1 else (v, m) for v, m in rows]
        if target >> top & 1:
            target, answer = target ^ pivot[0], answer ^ pivot[1]
    return answer.to_bytes(4, "little")


def test_hashes_of_the_metadata_decide_where_all_have_them(tmp_path: Path) -> None:
    pictures = [encoded(picture(seed)) for seed in (0, 1, 1, 2)]
    same, other = "0" * 64, "F" * 64
    hashes = [same, other, same.replace("0", "1"), other.lower()]
    assert kept(index_of(tmp_path / "all", pictures, sha256=hashes), dedup="sha256") == [[0, 1, 2]]
    for broken in (None, "", "0" * 63, "x" * 64):
        shards = index_of(tmp_path / f"one {broken}", pictures, sha256=[*hashes[:3], broken])
        assert kept(shards, dedup="sha256") == [[0, 1, 3]]
        # what is not kept does not count
        assert kept(shards, dedup="sha256", where="key <> '0003'") == [[0, 1, 2]]


@pytest.mark.parametrize("method", ["sha256", "phash"])
def test_a_tar_that_was_changed_is_refused(tmp_path: Path, method: Any) -> None:
    shards = index_of(tmp_path, [encoded(picture(0))] * 2)
    path = Path(shards.urls[0])
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"s0-000000.tar: the payload at byte \d+ is not the one"):
        select(shards, dedup=method, workers=1)


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    shards = index_of(tmp_path, [encoded(picture(0))] * 2)
    Path(shards.urls[0]).unlink()
    method: Any
    for method in ("sha256", "phash"):
        with pytest.raises(OSError, match=r"s0-000000.tar: not found"):
            select(shards, dedup=method, workers=1)


# Perceptual hash


def reference(grey: np.ndarray) -> int:
    """The pHash of imagehash: two DCTs by scipy, the 8x8 lowest, above their median."""
    low = np.asarray(dct(dct(grey.astype(float), axis=0), axis=1))[:8, :8]
    bits = (low > np.median(low)).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def test_without_a_margin_the_hash_is_phash() -> None:
    greys = np.stack([grey_picture(encoded(picture(seed))) for seed in range(20)])
    assert hash_greys(greys, margin=0).tolist() == [reference(grey) for grey in greys]
    few = np.bitwise_count(hash_greys(greys) ^ hash_greys(greys, margin=0))
    assert few.max() <= 4


def distance(one: bytes, other: bytes) -> int:
    a, b = hash_greys(np.stack([grey_picture(one), grey_picture(other)]))
    return int(np.bitwise_count(a ^ b))


@pytest.mark.parametrize("seed", range(6))
def test_hash_survives_what_the_eye_forgives(seed: int) -> None:
    image = picture(seed, (480, 400))
    original = encoded(image)
    assert distance(original, encoded(image, "jpg", quality=60)) <= 4
    assert distance(original, encoded(image, "webp", quality=60)) <= 4
    assert distance(original, encoded(image.resize((150, 125)))) <= 4
    assert distance(original, encoded(image.point(lambda v: int(0.9 * v + 12)))) <= 4
    turned = image.transpose(Image.Transpose.ROTATE_270)
    exif = Image.Exif()
    exif[0x112] = 8  # shown turned back
    assert distance(original, encoded(turned, "jpg", quality=90, exif=exif.tobytes())) <= 4
    assert distance(original, encoded(turned)) > 10
    assert distance(original, encoded(picture(seed + 100, (480, 400)))) > 10


@pytest.mark.parametrize("seed", range(6))
def test_rounding_decides_nothing_in_a_symmetric_picture(seed: int) -> None:
    half = picture(seed, (240, 400))
    image = Image.new("RGB", (480, 400))
    image.paste(half, (0, 0))
    image.paste(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (240, 0))
    assert distance(encoded(image), encoded(image, "jpg", quality=85)) <= 4


def test_flat_pictures_have_one_hash() -> None:
    flat = [np.full((32, 32), value, np.uint8) for value in range(256)]
    hashes = hash_greys(np.stack(flat))
    assert set(hashes.tolist()) == {0, 1 << 63}  # black has no lowest frequency either
    assert hash_greys(np.zeros((0, 32, 32))).shape == (0,)


# Near duplicates


def nearest_first(hashes: Sequence[int], sizes: Sequence[int], max_distance: int) -> list[int]:
    """The law, word by word: largest first, then in order; out if near one that stays."""
    order = sorted(range(len(hashes)), key=lambda i: (-sizes[i], i))
    stays: list[int] = []
    for i in order:
        if all((hashes[i] ^ hashes[j]).bit_count() > max_distance for j in stays):
            stays.append(i)
    return sorted(stays)


def clustered_hashes(seed: int, count: int) -> list[int]:
    """Hashes with copies, neighbours and chains of neighbours."""
    rng = np.random.default_rng(seed)
    found = [int(value) for value in rng.integers(0, 1 << 63, count // 4)]
    while len(found) < count:
        value = found[int(rng.integers(len(found)))]
        for bit in rng.choice(64, int(rng.integers(0, 5)), replace=False):
            value ^= 1 << int(bit)
        found.append(value)
    return [found[i] for i in rng.permutation(count)]


def index_with_hashes(
    folder: Path, hashes: Sequence[int], sizes: Sequence[int], per_shard: int
) -> IndexedShards:
    """An index without tars, whose hashes are given."""
    urls, sidecars, counts, digests = [], [], [], []
    for start in range(0, len(hashes), per_shard):
        url = folder / f"{start:06d}.tar"
        rows = len(hashes[start : start + per_shard])
        table = {"key": [f"{start + i}" for i in range(rows)], "fault": pa.nulls(rows, pa.string())}
        pq.write_table(pa.table(table), f"{url}.index.parquet")
        values = {
            "row": pa.array(range(rows), pa.int64()),
            "phash": pa.array(hashes[start : start + per_shard], pa.uint64()),
            "pixels": pa.array(sizes[start : start + per_shard], pa.int64()),
        }
        facts = {b"latentdiff.phash": b'{"version": 1, "digest": "%d"}' % start}
        pq.write_table(pa.table(values, metadata=facts), f"{url}.phash.parquet")
        urls.append(str(url))
        sidecars.append(f"{url}.index.parquet")
        counts.append(rows)
        digests.append(str(start))
    numbers = np.array(counts)
    return IndexedShards(
        tuple(urls), tuple(sidecars), numbers, numbers, numbers, tuple(digests), {}
    )


@pytest.mark.parametrize("max_distance", [0, 1, 4, 7])
def test_each_left_out_is_near_one_that_stays_and_no_pair_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_distance: int
) -> None:
    hashes = clustered_hashes(max_distance, 1_000)
    sizes = np.random.default_rng(0).integers(1, 4, len(hashes)).tolist()
    shards = index_with_hashes(tmp_path, hashes, sizes, 300)
    monkeypatch.setattr(scan, "_GROUP_SHARDS", 2)
    monkeypatch.setattr(scan, "_BATCH_ROWS", 97)
    found = select(shards, dedup="phash", max_distance=max_distance, workers=1)
    rows = [300 * shard + row for shard in range(4) for row in found.rows(shard).tolist()]
    assert rows == nearest_first(hashes, sizes, max_distance)


def test_a_chain_is_not_swallowed(tmp_path: Path) -> None:
    chain = [(1 << bits) - 1 for bits in (0, 3, 6, 9, 12)]
    shards = index_with_hashes(tmp_path, chain, [1] * 5, 5)
    assert kept(shards, dedup="phash", max_distance=3) == [[0, 2, 4]]


@pytest.mark.parametrize("max_distance", [1, 3, 4, 8])
@pytest.mark.parametrize("num_hashes", [10, 10**6, 10**9])
def test_hashes_within_the_distance_agree_on_a_mask(max_distance: int, num_hashes: int) -> None:
    masks = band_masks(num_hashes, max_distance)
    rng = np.random.default_rng(0)
    for _ in range(300):
        bits = rng.choice(64, max_distance, replace=False)
        difference = sum(1 << int(bit) for bit in bits)
        assert any(difference & mask == 0 for mask in masks)
    assert all(0 < mask < 1 << 64 for mask in masks)


def test_more_hashes_are_compared_on_more_bits() -> None:
    bits = [min(mask.bit_count() for mask in band_masks(10**n, 4)) for n in (3, 6, 9)]
    assert bits == sorted(bits) and bits[0] < bits[-1]


@pytest.mark.parametrize("seed", range(5))
def test_first_come(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = sorted({(max(a, b), min(a, b)) for a, b in rng.integers(0, 60, (120, 2)) if a != b})
    expected: set[int] = set()
    for later, earlier in pairs:
        if earlier not in expected:
            expected.add(later)
    # one by one is the same as in two calls, cut between two numbers
    removed = np.zeros(60, dtype=bool)
    cut = next(i for i in range(60, len(pairs)) if pairs[i][0] != pairs[i - 1][0])
    for part in (pairs[:cut], pairs[cut:]):
        later, earlier = np.array(part).T
        first_come(earlier, later, removed)
    assert set(np.flatnonzero(removed).tolist()) == expected


def test_the_largest_of_real_pictures_stays(tmp_path: Path) -> None:
    image = picture(0, (480, 400))
    small, large = image.resize((120, 100)), image
    shards = index_of(
        tmp_path,
        [encoded(small), encoded(picture(1)), encoded(large)],
        [encoded(large, "jpg", quality=80), encoded(picture(2))],
    )
    assert kept(shards, dedup="phash") == [[1, 2], [1]]
    assert kept(shards, dedup="phash", where="key <> '0002'") == [[1], [0, 1]]


def test_hashes_are_made_once_and_again_for_other_data(tmp_path: Path) -> None:
    shards = index_of(tmp_path, [encoded(picture(0))], [encoded(picture(1))])
    reports: list[Any] = []
    hash_shards(shards, workers=1, progress=lambda *report: reports.append(report))
    assert reports == [("phash", 1, 2), ("phash", 2, 2)]
    paths = [Path(phash_name(sidecar)) for sidecar in shards.sidecars]
    assert paths[0].name == "s0-000000.tar.phash.parquet"
    before = [path.read_bytes() for path in paths]
    for url in shards.urls:
        shutil.move(url, f"{url}.away")  # what is there is not made again
    hash_shards(shards, workers=1)
    assert [path.read_bytes() for path in paths] == before

    other = index_of(tmp_path, [encoded(picture(7))])
    assert read_hashes(other.sidecars[0], other.digests[0]) is None
    hash_shards(other, workers=1)
    found = read_hashes(other.sidecars[0], other.digests[0])
    assert found is not None
    assert found[1].tolist() == hash_greys(grey_picture(encoded(picture(7)))[None]).tolist()
    paths[0].write_bytes(before[0][:100])
    assert read_hashes(other.sidecars[0], other.digests[0]) is None


def test_a_picture_that_cannot_be_read_stays(tmp_path: Path) -> None:
    good = encoded(picture(0))
    broken = good[:-60]  # its header is whole
    shards = index_of(tmp_path, [broken, good, good])
    assert kept(shards, dedup="phash") == [[0, 1]]


@pytest.mark.parametrize("max_distance", [-1, 17])
def test_distance_has_a_range(tmp_path: Path, max_distance: int) -> None:
    shards = index_with_hashes(tmp_path, [1], [1], 1)
    with pytest.raises(ValueError, match=rf"max_distance must be 0 to 16 .*got {max_distance}"):
        select(shards, dedup="phash", max_distance=max_distance)


def test_many_equal_hashes_are_one(tmp_path: Path) -> None:
    hashes = [0] * 5_000 + [1] + [2] * 5_000
    shards = index_with_hashes(tmp_path, hashes, [1] * len(hashes), 10_001)
    assert kept(shards, dedup="phash") == [[0]]
    assert dedup.MAX_DISTANCE == 16
