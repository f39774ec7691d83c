"""Does training on stored latents and token ids see what it would see of pictures and captions?"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.encoding import Encoders, load_encoders
from latentdiff.loss import drop_captions, drop_ids
from latentdiff.pairing import check_model, check_tokenizer
from latentdiff.precompute import precompute
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import TextEncoder
from latentdiff.training.feed import clean_latents
from latentdiff.training.micro import Recipe, prepare
from vae.autoencoder import Autoencoder

SIZE_PX = 16


@pytest.fixture(scope="module")
def pictures(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one indexed shard."""
    folder = tmp_path_factory.mktemp("pictures")
    tar = shutil.copy(assets / "val-000000.tar", folder)
    index_shards([str(tar)], workers=1)
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_model: Path) -> Encoders:
    return load_encoders(str(tiny_model), device="cpu")


def batches(folder: Path, payload: str, count: int = 4) -> list[Batch]:
    config = DataConfig.model_validate(
        {"shards": (f"{folder}/*.tar",), "size_px": SIZE_PX, "payload": payload}
    )
    return list(islice(Loader(config, seed=3, batch_size=10), count))


def store(pictures: Path, encoders: Encoders, out: Path, **options: Any) -> Path:
    config = DataConfig(shards=(f"{pictures}/*.tar",), size_px=SIZE_PX)
    precompute(config, encoders, out, batch_size=8, **options)
    return out


def by_key(found: list[Batch], values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        key: row
        for batch, rows in zip(found, values, strict=True)
        for key, row in zip(batch.keys, rows, strict=True)
    }


def test_stored_moments_are_those_of_the_pictures(
    pictures: Path, encoders: Encoders, tmp_path: Path
) -> None:
    stored = batches(store(pictures, encoders, tmp_path / "latents"), "latents", 3)
    fresh = batches(pictures, "images", 3)  # an epoch of each: 30 samples
    means = [batch.latents[:, 0].float() for batch in stored if batch.latents is not None]
    expected = [encoders.autoencoder.encode(batch.images) for batch in fresh]
    found, wanted = by_key(stored, means), by_key(fresh, expected)
    assert found.keys() == wanted.keys() and len(found) == 30
    for key, mean in found.items():
        torch.testing.assert_close(mean, wanted[key], rtol=2e-3, atol=5e-3)  # float16


def drawn(autoencoder: Autoencoder, batch: Batch, seed: int) -> torch.Tensor:
    """The latents that a run trains on."""
    schedule, objective = NoiseSchedule.linear(), DiffusionObjectiveConfig()
    recipe = Recipe(seed, 10, schedule, "epsilon", objective, 4, 4, True)
    return clean_latents(autoencoder, prepare(batch, recipe))


def test_a_draw_of_stored_moments_is_a_draw_of_the_picture(
    pictures: Path, encoders: Encoders, tmp_path: Path
) -> None:
    out = store(pictures, encoders, tmp_path / "latents")
    (stored,), (fresh,) = batches(out, "latents", 1), batches(pictures, "images", 1)
    found = drawn(encoders.autoencoder, stored, 3)
    assert found.shape == (10, 4, 4, 4) and found.dtype == torch.float32
    assert stored.latents is not None
    mean, std = stored.latents.float().unbind(1)
    noise = (found - mean) / std
    encoded = drawn(encoders.autoencoder, fresh, 3)
    fresh_mean, fresh_std = encoders.autoencoder.moments(fresh.images)
    torch.testing.assert_close(  # the same noise at the same position of the run
        noise, (encoded - fresh_mean) / fresh_std, rtol=1e-2, atol=2e-2
    )
    assert not torch.equal(found, drawn(encoders.autoencoder, stored, 4))


def test_stored_samples_are_taken_as_they_are(
    pictures: Path, encoders: Encoders, tmp_path: Path
) -> None:
    (batch,) = batches(store(pictures, encoders, tmp_path / "l", kind="samples"), "latents", 1)
    assert batch.latents is not None and batch.latents.shape == (10, 1, 4, 4, 4)
    found = drawn(encoders.autoencoder, batch, 3)
    assert torch.equal(found, batch.latents[:, 0].float())


def test_stored_ids_condition_as_their_captions_do(
    pictures: Path, encoders: Encoders, tmp_path: Path, tiny_model: Path
) -> None:
    text = TextEncoder.load(tiny_model).float().eval()
    out = store(pictures, encoders, tmp_path / "latents")
    loader = Loader(DataConfig(shards=(f"{out}/*.tar",), size_px=SIZE_PX, payload="latents"), 3, 10)
    assert loader.latents is not None and loader.latents.empty_ids is not None
    check_model(loader.latents, encoders.autoencoder)
    check_tokenizer(loader.latents, text)
    (batch,), (fresh,) = islice(loader, 1), batches(pictures, "images", 1)
    captions = dict(zip(fresh.keys, fresh.captions, strict=True))
    for other in batches(pictures, "images", 3):
        captions |= dict(zip(other.keys, other.captions, strict=True))
    texts = [captions[key] for key in batch.keys]
    assert batch.tokens is not None and batch.tokens.dtype == torch.int32
    assert torch.equal(batch.tokens.long(), text.tokenize(texts))

    uniform = torch.from_numpy(np.linspace(0, 1, 10))
    empty = torch.tensor(loader.latents.empty_ids)
    ids = drop_ids(batch.tokens, empty, uniform, 0.35)
    with torch.no_grad():
        found = text.encode_ids(ids)
        expected = text.encode(drop_captions(texts, uniform, 0.35))
    assert torch.equal(found.tokens, expected.tokens)
    assert (ids == empty.to(ids)).all(1).tolist() == [True] * 4 + [False] * 6
    assert torch.equal(drop_ids(batch.tokens, empty, uniform, 0.0), batch.tokens)


def test_a_tar_that_the_folder_does_not_know(
    pictures: Path, encoders: Encoders, tmp_path: Path
) -> None:
    out = store(pictures, encoders, tmp_path / "latents")
    tar = out / "val-000000.tar"
    shutil.copy(tar, out / "other.tar")  # by another model, say: nothing in it tells
    message = r"other\.tar \(\d+ bytes\) is not among the latents that .*latents\.json names"
    with pytest.raises(ValueError, match=message):
        batches(out, "latents", 1)
    (out / "other.tar").unlink()
    batches(out, "latents", 1)
    with open(tar, "ab") as file:
        file.write(bytes(10_240))
    with pytest.raises(ValueError, match=r"val-000000\.tar .* is not among the latents"):
        batches(out, "latents", 1)
