"""Are cached latents those that would be encoded as they are drawn?"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.schedule import NoiseSchedule
from latentdiff.training.feed import clean_latents
from latentdiff.training.latents import LatentCache
from latentdiff.training.micro import Recipe, prepare
from vae.autoencoder import Autoencoder

CPU = torch.device("cpu")


@pytest.fixture
def data(assets: Path) -> DataConfig:
    return DataConfig(shards=(str(assets / "val-*.tar"),), size_px=16)


def recipe(seed: int, cache: LatentCache | None = None) -> Recipe:
    """Of a model whose autoencoder makes 4x4 of 16 px."""
    schedule, objective = NoiseSchedule.linear(), DiffusionObjectiveConfig()
    return Recipe(seed, 12, schedule, "epsilon", objective, 4, 4, True, cache=cache)


def batches(data: DataConfig, batch_size: int, count: int) -> list[Batch]:
    return list(islice(Loader(data, seed=5, batch_size=batch_size), count))


def test_cached_and_fresh_latents_agree(data: DataConfig, tiny_autoencoder: Path) -> None:
    autoencoder = Autoencoder.load(tiny_autoencoder).eval()
    cache = LatentCache.encode(autoencoder, Loader(data, 5, 1), CPU)
    assert cache.mean.shape == cache.std.shape == (30, 4, 4, 4)
    assert cache.mean.dtype == torch.float16 and (cache.std > 0).all()
    drawn = []
    for batch in batches(data, 10, 6):  # two epochs
        micro = prepare(batch, recipe(5, cache))
        assert micro.pixels is None
        cached = clean_latents(autoencoder, micro)
        fresh = clean_latents(autoencoder, prepare(batch, recipe(5)))
        assert cached.dtype == fresh.dtype == torch.float32
        torch.testing.assert_close(cached, fresh, rtol=2e-3, atol=5e-3)  # float16 moments
        drawn.append(cached)
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:]))


def test_moments_are_taken_as_stored_latents_lie() -> None:
    cache = LatentCache(torch.rand(5, 4, 2, 2).half(), torch.rand(5, 4, 2, 2).half())
    taken = cache.take(np.array([3, -1, 3, 0]))
    assert taken.shape == (4, 2, 4, 2, 2) and taken.dtype == torch.float16
    assert torch.equal(taken[0], taken[2]) and torch.equal(taken[0, 0], cache.mean[3])
    assert torch.equal(taken[3, 1], cache.std[0])
    assert (taken[1] == 0).all()


def test_the_posteriors_noise_depends_on_the_position_alone(data: DataConfig) -> None:
    (large,), small = batches(data, 12, 1), batches(data, 4, 3)
    whole = prepare(large, recipe(5)).posterior
    parts = [prepare(batch, recipe(5)).posterior for batch in small]
    assert whole is not None and whole.shape == (12, 4, 4, 4)
    assert torch.equal(whole, torch.cat([part for part in parts if part is not None]))
    other = prepare(large, recipe(6)).posterior
    assert other is not None and not torch.equal(whole, other)
    assert abs(whole.mean()) < 0.2 and abs(whole.std() - 1) < 0.2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_picture_is_counted_and_never_drawn(
    assets: Path, tiny_autoencoder: Path, tmp_path: Path, num_workers: int
) -> None:
    tar = Path(shutil.copy(assets / "val-000000.tar", tmp_path))
    index_shards([str(tar)], workers=1)
    data = DataConfig(shards=(str(tar),), size_px=16, num_workers=num_workers)
    loader = Loader(data, 5, 10, with_images=False)
    damaged = bytearray(tar.read_bytes())
    damaged[int(loader.datasets[0].rows(0).members["picture"].offsets[7]) + 20] ^= 0xFF
    tar.write_bytes(damaged)
    LatentCache.encode(Autoencoder.load(tiny_autoencoder).eval(), loader, CPU)
    epoch = list(islice(loader, 3))
    missing = [int(i) for batch in epoch for i in batch.ids[~batch.valid]]
    assert missing == [7]
    assert loader.ledger.counts == {"crc mismatch": 1}
