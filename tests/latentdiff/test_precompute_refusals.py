"""Is what would mix, overwrite or repeat latents refused before anything is written?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from precompute_rig import (
    contents,
    data,
    new_autoencoder,
    new_encoders,
    three_shards,
)

from latentdiff.encoding import Encoders
from latentdiff.pairing import model_hash
from latentdiff.precompute import precompute


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return new_encoders()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return three_shards(tmp_path / "pictures")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"size_px": 24}, {}, "other settings (there, here): data.size_px: 16, 24; give it"),
        ({"flip": True}, {"crops": 2}, "crops: 1, 2; data.flip: False, True; give it the same"),
        ({}, {"kind": "samples"}, "kind: moments, samples"),
        ({}, {"seed": 1}, "seed: 0, 1"),
        ({"captions": {"article": 1.0}}, {}, "data.captions.article: 0.0, 1.0"),
        ({"where": "aesthetic > 1"}, {}, "data.where: {}, aesthetic > 1"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
    shards: Path,
    encoders: Encoders,
    tmp_path: Path,
) -> None:
    out = tmp_path / "latents"
    config = data(shards, shards=(f"{shards}/train-000002.tar",))
    precompute(config, encoders, out)
    before = contents(out)
    with pytest.raises(ValueError) as caught:
        precompute(
            config.model_validate({**config.model_dump(), **changes}), encoders, out, **options
        )
    assert message in str(caught.value) and "choose another folder" in str(caught.value)
    assert contents(out) == before


def test_another_model_is_refused_and_another_name_is_not(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    precompute(data(shards), encoders, out)
    other = new_autoencoder(seed=1)
    changed = Encoders("tiny", other, encoders.text, "fp32", model_hash(other))
    with pytest.raises(ValueError, match=r"other settings \(there, here\): model_hash: "):
        precompute(data(shards), changed, out)
    renamed = Encoders("moved", encoders.autoencoder, encoders.text, "fp32", encoders.model_hash)
    assert precompute(data(shards), renamed, out).num_written == 0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"size_px": 15}, {}, "crop_px is 15; expected a multiple of the autoencoder's 2"),
        ({"payload": "latents"}, {}, "data.payload is latents; they are encoded already"),
        ({}, {"crops": 2}, "2 crops would all be the same picture; set data.crop (--crop)"),
        ({}, {"captions": 2}, "2 captions would all be the same text; give data.captions"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
    shards: Path,
    encoders: Encoders,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError) as caught:
        precompute(data(shards, **changes), encoders, tmp_path / "latents", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "latents").exists()


def test_no_tar_is_ever_written_over(shards: Path, encoders: Encoders, tmp_path: Path) -> None:
    before = contents(shards)
    with pytest.raises(
        ValueError, match=r"train-000000\.tar would be written over; choose another"
    ):
        precompute(data(shards), encoders, shards)
    shutil.copytree(shards, tmp_path / "copy")
    with pytest.raises(
        ValueError, match=r"holds tars already, such as train-.*; choose a new folder"
    ):
        precompute(data(shards), encoders, tmp_path / "copy")
    with pytest.raises(ValueError, match=r"would both become .*train-000000\.tar; precompute them"):
        both = (f"{shards}/*.tar", f"{tmp_path}/copy/*.tar")
        precompute(data(shards, shards=both), encoders, tmp_path / "latents")
    assert contents(shards) == before == contents(tmp_path / "copy")
