"""Are bad samples left out and accounted for, and shards that fail left to the next run?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from precompute_rig import (
    contents,
    data,
    latents,
    new_autoencoder,
    new_encoders,
    spoil,
    three_shards,
)

from data_pipelines.latentinfo import ShardRecord, read_info
from data_pipelines.ledger import TooManyBadSamples
from latentdiff.encoding import Encoders
from latentdiff.pairing import model_hash
from latentdiff.precompute import PrecomputeReport, precompute
from vae.latent_norm import LatentNorm


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return new_encoders()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return three_shards(tmp_path / "pictures")


def test_bad_samples_are_left_out_and_accounted_for(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    spoil(shards)
    out = tmp_path / "latents"
    report = precompute(data(shards), encoders, out, batch_size=4)
    assert report.num_samples == 21
    assert report.skipped == {"bad image": 1, "no caption": 1}
    assert sorted(latents(out)) == [f"{i:03d}" for i in range(23) if i not in (12, 15)]
    info = read_info(out)
    assert [(s.num_samples, s.skipped) for s in info.shards] == [
        (10, {}),
        (8, {"bad image": 1, "no caption": 1}),
        (3, {}),
    ]
    record = ShardRecord.model_validate_json((out / "train-000001.tar.latents.json").read_bytes())
    assert [(key, reason) for key, reason, _ in record.skipped_keys] == [
        ("012", "bad image"),
        ("015", "no caption"),
    ]
    again = precompute(data(shards), encoders, out)
    assert (again.num_written, again.skipped) == (0, report.skipped)


def test_too_many_bad_samples_stop_the_run(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    spoil(shards)
    out = tmp_path / "latents"
    with pytest.raises(TooManyBadSamples, match="bad image"):
        precompute(data(shards, max_bad_rate=0.001), encoders, out)
    assert not (out / "latents.json").exists() and not list(out.glob(".*.part"))
    assert "train-000001.tar" not in contents(out)
    assert precompute(data(shards), encoders, out).is_whole


def test_a_filter_is_told_from_bad_samples(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    spoil(shards)
    out = tmp_path / "latents"
    report = precompute(data(shards, where="aesthetic >= 2"), encoders, out)  # samples from 8 on
    assert report.skipped == {"bad image": 1, "no caption": 1} and report.num_samples == 13
    info = read_info(out)
    assert [(s.num_samples, s.filtered, sum(s.skipped.values())) for s in info.shards] == [
        (2, 8, 0),
        (8, 0, 2),
        (3, 0, 0),
    ]


def test_a_latent_that_is_not_finite_is_bad(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    loud = new_autoencoder()
    loud.norm = LatentNorm.from_scalars(1e7)
    changed = Encoders("loud", loud, encoders.text, "fp32", model_hash(loud))
    with pytest.raises(TooManyBadSamples, match="the latent is not finite in float16"):
        precompute(data(shards), changed, tmp_path / "latents")


def test_a_shard_that_cannot_be_read_waits_for_the_next_run(
    shards: Path, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipelines.ledger import BadSample
    from data_pipelines.reader import Reader

    out, payload = tmp_path / "latents", Reader.payload

    def failing(self: Reader, url: str, *arguments: Any) -> Any:
        if "000001" in url:
            raise BadSample("network", f"{url}: timed out")
        return payload(self, url, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "payload", failing)
        with pytest.raises(
            OSError, match=r"1 of 3 shards could not be read, the first .*timed out"
        ):
            precompute(data(shards), encoders, out)
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "train-000000.tar",
        "train-000002.tar",
    ]
    assert not (out / "latents.json").exists()
    assert precompute(data(shards), encoders, out) == PrecomputeReport(3, 1, 23, {}, True)
