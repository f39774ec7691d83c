"""Are batches a pure function of the cursor, and is each caption its own picture's?"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.index import scan
from data_pipelines.loader import Batch, Loader
from data_pipelines.shards import Sample, expand_shards, read_shard, write_shards
from data_pipelines.transforms import to_image, to_tensor

DRAWN: dict[str, Any] = {  # everything that is random, at once
    "size_px": 24,
    "crop_px": 16,
    "crop": "random",
    "flip": True,
    "captions": {"languages": {"en": 0.5, "*": 0.5}, "article": 0.5},
}


@pytest.fixture
def shards(assets: Path) -> str:
    return str(assets / "train-*.tar")


def config(shards: str, **values: Any) -> DataConfig:
    return DataConfig.model_validate({"shards": [shards], **values})


def batches(count: int, *arguments: Any, **options: Any) -> list[Batch]:
    return list(islice(Loader(*arguments, **options), count))


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.position, a.keys, a.captions) == (b.position, b.keys, b.captions)
        assert np.array_equal(a.indices, b.indices)
        assert a.images is not None and b.images is not None
        assert torch.equal(a.images, b.images)


# The cursor


def test_the_same_cursor_gives_the_same_batches(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    whole = batches(10, chosen, 3, 40)  # over two ends of an epoch
    assert [batch.position for batch in whole] == list(range(0, 400, 40))
    for step in (1, 4, 7):
        assert_same(batches(10 - step, chosen, 3, 40, cursor=step * 40), whole[step:])


def test_the_cursor_is_where_the_next_draw_stands(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    loader = Loader(chosen, 0, 8)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    assert loader.cursor == 24
    assert_same(batches(2, chosen, 0, 8, cursor=loader.cursor), list(islice(iterator, 2)))
    assert_same(first, batches(3, chosen, 0, 8))


def test_the_number_of_workers_changes_nothing(shards: str) -> None:
    one, four = (config(shards, num_workers=n, **DRAWN) for n in (1, 4))
    assert_same(batches(3, one, 0, 16), batches(3, four, 0, 16))


def test_the_batch_size_cuts_the_same_draws(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    (large,) = batches(1, chosen, 0, 12)
    small = batches(4, chosen, 0, 3)
    assert large.images is not None
    assert torch.equal(large.images, torch.cat([b.images for b in small if b.images is not None]))
    assert large.captions == sum((b.captions for b in small), ())
    assert large.keys == sum((b.keys for b in small), ())


def test_seeds_give_other_orders_crops_and_captions(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    one, two = batches(1, chosen, 0, 16), batches(1, chosen, 1, 16)
    assert one[0].keys != two[0].keys
    again = batches(1, chosen, 0, 16)
    assert_same(one, again)


def test_an_epoch_delivers_each_sample_once(shards: str) -> None:
    chosen = config(shards, size_px=8)
    delivered = batches(6, chosen, 0, 57, with_images=False)  # 171 samples, two epochs
    assert len(Loader(chosen, 0, 57)) == 171
    epochs = [sum((b.keys for b in delivered[i : i + 3]), ()) for i in (0, 3)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 171
    assert epochs[0] != epochs[1]


# Pictures and captions


def test_each_picture_comes_with_its_own_caption(shards: str) -> None:
    files = {
        sample["__key__"]: sample for shard in expand_shards(shards) for sample in read_shard(shard)
    }
    (batch,) = batches(1, config(shards, size_px=64), 0, 171)
    assert batch.images is not None
    for key, caption, image in zip(batch.keys, batch.captions, batch.images, strict=True):
        assert caption == files[key]["txt"].decode().strip()
        expected = Image.open(io.BytesIO(files[key]["png"])).convert("RGB")
        assert torch.equal(image, to_tensor(expected))
        assert to_image(image).tobytes() == expected.tobytes()


def test_captions_alone(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    alone = batches(3, chosen, 0, 16, with_images=False)
    both = batches(3, chosen, 0, 16)
    assert all(batch.images is None for batch in alone)
    assert [(b.keys, b.captions) for b in alone] == [(b.keys, b.captions) for b in both]


def test_single_pictures_for_caches(shards: str) -> None:
    loader = Loader(config(shards, size_px=16), 0, 8)
    batch = next(iter(loader))
    assert batch.images is not None
    for index, image in zip(batch.indices, batch.images, strict=True):
        assert torch.equal(loader.image(int(index)), image)


def test_where_and_an_index_at_hand(shards: str) -> None:
    chosen = config(shards, size_px=8, where={"style": ["fluent-3d"]})
    (batch,) = batches(1, chosen, 0, 20)
    assert all(key.startswith("fluent-3d_") for key in batch.keys)
    index = scan(expand_shards(shards), chosen.where)
    assert_same([batch], batches(1, chosen, 0, 20, index=index))


# Bad samples


def write(folder: Path, **bad: Any) -> str:
    """Three samples; the one with the key b has the given fields."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(data, format="PNG")
    samples = [
        Sample(key, data.getvalue(), "png", f"caption {key}", {"style": "noto"}) for key in "abc"
    ]
    fields = {**vars_of(samples[1]), **bad}
    (info,) = write_shards([samples[0], Sample(**fields), samples[2]], folder, "x")
    return str(info.path)


def vars_of(sample: Sample) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in sample.__dataclass_fields__}


@pytest.mark.parametrize(
    ("bad", "values", "message"),
    [
        ({"image": b"\x89PNG no picture"}, {}, r"x-000000\.tar:b\.png: not a readable picture"),
        (
            {"metadata": {}},
            {"captions": {"templates": {"{text}, {style}": 1}}},
            r"x-000000\.tar:b: caption template '\{text\}, \{style\}' names the field 'style'",
        ),
        (
            {"metadata": {"captions": "red"}},
            {"captions": {"languages": {"en": 1}}},
            r"x-000000\.tar:b: captions must be a list",
        ),
        (
            {"metadata": [1]},
            {"captions": {"languages": {"en": 1}}},
            r"x-000000\.tar:b\.json must be a JSON object; got a list",
        ),
    ],
    ids=["picture", "template", "captions", "metadata"],
)
def test_an_error_in_a_worker_names_shard_and_key(
    tmp_path: Path, bad: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    loader = Loader(config(write(tmp_path, **bad), size_px=8, **values), 0, 3)
    with pytest.raises(ValueError, match=message):
        next(iter(loader))
    assert loader.cursor == 0  # nothing was handed over


@pytest.mark.parametrize("place", ["first", "middle"])
def test_a_zeroed_block_in_a_payload_is_found_when_it_is_read(tmp_path: Path, place: str) -> None:
    chance = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(chance).save(data, format="PNG")
    path = Path(write(tmp_path, image=data.getvalue()))
    member = scan([str(path)]).samples[1].members["png"]
    start = member.offset + (0 if place == "first" else 1024)
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 512] = bytes(512)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"x-000000\.tar:b\.png: not a readable picture"):
        next(iter(Loader(config(str(path), size_px=8), 0, 3)))


def test_a_caption_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    path.write_bytes(path.read_bytes().replace(b"caption b", b"caption \xff"))
    with pytest.raises(ValueError, match=r"x-000000\.tar:b\.txt: caption is not UTF-8"):
        next(iter(Loader(config(str(path), size_px=8), 0, 3)))


def test_the_metadata_is_not_read_where_no_caption_needs_it(tmp_path: Path) -> None:
    path = Path(write(tmp_path))
    style = json.dumps({"style": "noto"}, separators=(",", ":")).encode()
    path.write_bytes(path.read_bytes().replace(style, b"x" * len(style)))
    (batch,) = batches(1, config(str(path), size_px=8), 0, 3)
    assert sorted(batch.captions) == ["caption a", "caption b", "caption c"]
