"""What is in a batch: each picture with its own caption and sizes, and nothing at empty places?"""

from __future__ import annotations

import io
import shutil
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import caption_of, index, key_of, pixels_of, write_pairs
from PIL import Image
from tars import tar_bytes

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.expand import expand_shards
from data_pipelines.loader import Loader
from data_pipelines.pixels import to_image
from data_pipelines.shards import read_shard
from data_pipelines.transforms import to_float, to_tensor

SIZES = [(16, 16), (32, 16), (16, 24), (24, 16), (48, 48), (128, 16)]
BUCKETS = {"base_px": [16, 32], "step_px": 8, "chapter_steps": 12}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, [30, 11, 32], sizes=SIZES)
    return f"{folder}/*.tar"


def config(shards: str, **values: Any) -> DataConfig:
    return DataConfig.model_validate({"shards": [shards], **values})


def batches(count: int, *arguments: Any, **options: Any) -> list[Batch]:
    return list(islice(Loader(*arguments, **options), count))


# Pictures and captions


def test_each_picture_comes_with_its_own_caption(assets: Path) -> None:
    shards = str(assets / "train-*.tar")
    files = {
        sample["__key__"]: sample for shard in expand_shards(shards) for sample in read_shard(shard)
    }
    (batch,) = batches(1, config(shards, size_px=64), 0, 171)
    for key, caption, image in zip(batch.keys, batch.captions, batch.images, strict=True):
        assert caption == files[key]["txt"].decode().strip()
        expected = Image.open(io.BytesIO(files[key]["png"])).convert("RGB")
        assert torch.equal(image, to_tensor(expected))
        assert to_image(image).tobytes() == expected.tobytes()


def test_each_sample_has_its_own_key_id_caption_and_pixels(pairs: str) -> None:
    loader = Loader(config(pairs, buckets=BUCKETS), 0, 6)
    numbers = set()
    for batch in islice(loader, 24):
        for place in np.flatnonzero(batch.valid):
            number = int(batch.keys[place])
            assert batch.keys[place] == key_of(number)
            assert batch.ids[place] == number  # tars and samples are numbered in order
            assert batch.captions[place] == caption_of(number)
            width, height = SIZES[number % len(SIZES)]
            assert batch.original_size[place].tolist() == [height, width]
            assert batch.pixels is not None
            if (height, width) == tuple(batch.pixels.shape[1:3]):
                assert np.array_equal(batch.pixels[place], pixels_of(number, (width, height)))
                numbers.add(number)
    assert len(numbers) > 10


def test_captions_alone(pairs: str) -> None:
    for values in ({"size_px": 16, "crop": "random", "flip": True}, {"buckets": BUCKETS}):
        chosen = config(pairs, **values)
        alone = batches(5, chosen, 0, 16, with_images=False)
        both = batches(5, chosen, 0, 16)
        assert all(batch.pixels is None and not batch.target_size.any() for batch in alone)
        assert [(b.keys, b.captions) for b in alone] == [(b.keys, b.captions) for b in both]
        with pytest.raises(AssertionError, match="asked for no pictures"):
            _ = alone[0].images


def test_single_pictures_and_captions_for_caches(pairs: str) -> None:
    loader = Loader(config(pairs, size_px=16), 0, 8)
    batch = next(iter(loader))
    for place, number in enumerate(batch.ids.tolist()):
        assert torch.equal(loader.image(number), batch.images[place])
        draws = loader.locate(number)
        assert loader.datasets[0].rows(int(draws.shards[0])).key(int(draws.rows[0])) == key_of(
            number
        )
        assert loader.captions(number, [0, 7]) == [caption_of(number)] * 2


def test_positions_draw_the_captions_of_a_sample(assets: Path) -> None:
    captions = {"languages": {"en": 0.5, "*": 0.5}, "templates": {"{text}": 1, "{text} {style}": 1}}
    loader = Loader(config(str(assets / "train-*.tar"), size_px=8, captions=captions), 0, 171)
    batch = next(iter(loader))
    for place in (0, 50, 170):
        number, position = int(batch.ids[place]), int(batch.positions[place])
        assert loader.captions(number, [position]) == [batch.captions[place]]
        assert len(set(loader.captions(number, range(40)))) > 4


# Sizes


def test_sizes_of_pictures_that_are_cut_square(pairs: str) -> None:
    for batch in batches(12, config(pairs, size_px=8), 0, 6):
        for place, number in enumerate(map(int, batch.keys)):
            width, height = SIZES[number % len(SIZES)]
            assert batch.original_size[place].tolist() == [height, width]
            assert batch.target_size[place].tolist() == [8, 8]
            scale = 8 / min(width, height)  # the shorter side becomes 8, the middle is kept
            corner = [(height * scale - 8) / 2, (width * scale - 8) / 2]
            assert np.abs(batch.crop_top_left[place] - corner).max() <= 0.5


def test_sizes_in_buckets(pairs: str) -> None:
    shapes = set()
    for batch in batches(12, config(pairs, buckets=BUCKETS), 0, 6):
        assert batch.pixels is not None
        shape = tuple(batch.pixels.shape[1:3])
        shapes.add(shape)
        for place in np.flatnonzero(batch.valid):
            height, width = batch.original_size[place]
            assert tuple(batch.target_size[place]) == shape
            scale = max(shape[0] / height, shape[1] / width)
            corner = [(height * scale - shape[0]) / 2, (width * scale - shape[1]) / 2]
            assert np.abs(batch.crop_top_left[place] - corner).max() <= 1
    assert len(shapes) > 2


# Empty places


def test_empty_places_are_zero_and_invalid(pairs: str) -> None:
    loader = Loader(config(pairs, buckets=BUCKETS), 0, 6)
    num_empty = 0
    for batch in islice(loader, 24):
        empty = np.flatnonzero(~batch.valid)
        num_empty += len(empty)
        assert len(batch) == 6 and batch.pixels is not None and len(batch.pixels) == 6
        assert (batch.ids[empty] == -1).all() and (batch.ids[batch.valid] >= 0).all()
        for place in empty:
            assert (batch.keys[place], batch.captions[place]) == ("", "")
            assert not batch.pixels[place].any()
            sizes = (batch.original_size, batch.crop_top_left, batch.target_size)
            assert not any(size[place].any() for size in sizes)
        good = batch.good()
        assert len(good) == batch.valid.sum() and good.valid.all()
        assert good.positions.tolist() == batch.positions[batch.valid].tolist()
        assert good.keys == tuple(key for key in batch.keys if key)
        assert good.pixels is not None
        assert torch.equal(good.pixels, batch.pixels[torch.from_numpy(batch.valid)])
    assert num_empty
    assert not loader.ledger.counts.keys() - {"aspect ratio"}


def test_parts_of_a_batch(pairs: str) -> None:
    batch = next(iter(Loader(config(pairs, size_px=8), 0, 6)))
    assert batch.good() is batch and batch.split(1) == [batch]
    parts = batch.split(3)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert sum((part.captions for part in parts), ()) == batch.captions
    assert np.array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
    assert {part.step for part in parts} == {0}
    assert batch.pixels is not None and torch.equal(batch.images, to_float(batch.pixels))


# img2dataset


@pytest.fixture
def without_json(assets: Path, tmp_path: Path) -> str:
    """A tar of pictures alone, with the table that img2dataset wrote beside it."""
    source = assets / "img2dataset"
    with tarfile.open(source / "00000.tar") as tar:
        members = [
            (info.name, file.read())
            for info in tar
            if info.name.endswith(".jpg") and (file := tar.extractfile(info)) is not None
        ]
    (tmp_path / "00000.tar").write_bytes(tar_bytes(members))
    shutil.copy(source / "00000.parquet", tmp_path)
    index([str(tmp_path / "00000.tar")])
    return str(tmp_path / "00000.tar")


def test_captions_and_metadata_of_img2datasets_table(assets: Path, without_json: str) -> None:
    whole = assets / "img2dataset" / "00000.tar"
    texts = {s["__key__"]: s["txt"].decode() for s in read_shard(whole)}
    plain = Loader(config(without_json, size_px=16), 0, len(texts))
    assert len(plain) == len(texts) > 4
    batch = next(iter(plain))
    assert dict(zip(batch.keys, batch.captions, strict=True)) == texts
    # the same with its .json members, whatever is asked of them
    captions = {"templates": {"{text}: {caption}, {aesthetic} {width} {url} {LANGUAGE} {key}": 1}}
    (drawn,) = batches(1, config(without_json, size_px=16, captions=captions), 0, len(texts))
    (expected,) = batches(1, config(str(whole), size_px=16, captions=captions), 0, len(texts))
    assert drawn.valid.all()
    by_key = dict(zip(expected.keys, expected.captions, strict=True))
    assert dict(zip(drawn.keys, drawn.captions, strict=True)) == by_key


# Captions that are not there


def test_empty_captions_are_kept_or_skipped(tmp_path: Path) -> None:
    (path,) = write_pairs(tmp_path, [4])
    data = Path(path).read_bytes().replace(caption_of(2).encode(), b" " * len(caption_of(2)))
    Path(path).write_bytes(data)
    index([path])
    (kept,) = batches(1, config(path, size_px=8), 0, 4)
    assert kept.valid.all() and sorted(kept.captions)[0] == ""
    loader = Loader(config(path, size_px=8, captions={"empty": "skip"}), 0, 4)
    batch = next(iter(loader))
    assert batch.ids[~batch.valid].tolist() == [2]
    assert dict(loader.ledger.counts) == {"empty caption": 1}
    assert "x-000.tar:00002: the caption is empty" in loader.ledger.summary()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ({"templates": {"{text}, {style}": 1}}, "caption template .* names the field 'style'"),
        ({"fields": {"number": 1}}, "the caption field 'number' must be a text or a list"),
    ],
)
def test_metadata_that_a_caption_cannot_use(
    tmp_path: Path, captions: dict[str, Any], message: str
) -> None:
    (path,) = write_pairs(tmp_path, [3])
    loader = Loader(config(path, size_px=8, captions=captions, max_bad_rate=1), 0, 3)
    assert not next(iter(loader)).valid.any()
    assert dict(loader.ledger.counts) == {"bad json": 3}
    with pytest.raises(ValueError, match=rf"x-000\.tar:0000\d: {message}"):
        loader.captions(0, [0])


def test_the_metadata_is_not_read_where_no_caption_needs_it(tmp_path: Path) -> None:
    (path,) = write_pairs(tmp_path, [3])
    loader = Loader(config(path, size_px=8), 0, 3)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b'"number"', b"xxxxxxxx"))
    assert next(iter(loader)).valid.all()
