"""Do webdataset and open_clip read our shards, and pair what we pair?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import webdataset
from open_clip_train import data
from PIL import Image
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader
from data_pipelines.make import make_shards
from data_pipelines.shards import read_shard
from data_pipelines.transforms import to_tensor


@pytest.fixture(scope="module")
def made(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards that `latentdiff data make` wrote from a folder of PNG, JPEG and WebP pictures."""
    folder = tmp_path_factory.mktemp("made")
    for i, sample in enumerate(read_shard(assets / "val-000000.tar")):
        name = folder / "src" / "deep.er" / f"{i:03d}"
        name.parent.mkdir(parents=True, exist_ok=True)
        (folder / "one.png").write_bytes(sample["png"])
        extension = ("png", "jpg", "webp")[i % 3]
        Image.open(folder / "one.png").convert("RGB").save(f"{name}.{extension}")
        name.with_suffix(".txt").write_bytes(sample["txt"])
    made = make_shards(folder / "src", folder / "out", max_count=10)
    assert len(made.shards) == 3
    return f"{folder}/out/shard-{{000000..000002}}.tar"


def ours(shards: str) -> dict[str, tuple[str, Tensor]]:
    """Our pairs: caption and picture by key."""
    loader = Loader(DataConfig(shards=(shards,), size_px=64), 0, 30)
    batch = next(iter(loader))
    assert len(loader) == 30 and batch.valid.all()
    pairs = zip(batch.captions, batch.images, strict=True)
    return dict(zip(batch.keys, pairs, strict=True))


def test_webdataset_pairs_what_we_pair(made: str) -> None:
    found = {
        sample["__key__"]: (
            sample["txt"].strip(),
            to_tensor(next(sample[e] for e in ("png", "jpg", "webp") if e in sample)),
        )
        for sample in webdataset.WebDataset(made, shardshuffle=False).decode("pil")  # pyright: ignore[reportAttributeAccessIssue]  # it exports lazily
    }
    expected = ours(made)
    assert found.keys() == expected.keys()
    for key, (caption, picture) in found.items():
        assert caption == expected[key][0]
        torch.testing.assert_close(picture, expected[key][1], rtol=0, atol=2.5 / 127.5)


@pytest.mark.parametrize("is_train", [False, True])
def test_open_clip_pairs_what_we_pair(
    made: str, is_train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # webdataset marks the end of a shard by an empty dict, which open_clip 3.3 does not know yet
    plain = partial(data.tar_file_expander, eof_value=None)
    monkeypatch.setattr(data, "tar_file_expander", plain)
    captions: list[str] = []

    def tokenize(text: str) -> Tensor:
        captions.append(text.strip())
        return torch.tensor([[len(captions) - 1]])

    arguments = SimpleNamespace(
        train_data=made,
        val_data=made,
        train_num_samples=30,
        val_num_samples=30,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        workers=0,
        world_size=1,
        batch_size=10,
    )
    info = data.get_wds_dataset(arguments, to_tensor, is_train, tokenizer=tokenize)
    found: dict[str, Tensor] = {}
    for images, numbers in info.dataloader:
        found.update(zip((captions[int(n)] for n in numbers), images, strict=True))
    expected = dict(ours(made).values())
    assert found.keys() == expected.keys() and len(found) > 20
    for caption, picture in found.items():
        torch.testing.assert_close(picture, expected[caption], rtol=0, atol=2.5 / 127.5)
