"""Do shards of latents hold what the model makes of the pictures, however the run went?"""

from __future__ import annotations

import io
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from precompute_rig import (
    contents,
    data,
    latents,
    new_autoencoder,
    new_encoders,
    picture,
    raw,
    spoil,
    three_shards,
)

from data_pipelines.config import BucketConfig, CaptionConfig
from data_pipelines.index import index_shards, open_index
from data_pipelines.latentinfo import read_info
from data_pipelines.shards import Sample, write_shards
from data_pipelines.transforms import load_picture
from latentdiff.cli import run
from latentdiff.encoding import Encoders, Pictures, encode, encode_batch, load_encoders
from latentdiff.pairing import model_hash
from latentdiff.precompute import PrecomputeReport, precompute
from vae.autoencoder import Autoencoder

DRIVER = Path(__file__).parent / "precompute_driver.py"


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return new_encoders()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return three_shards(tmp_path / "pictures")


def test_latents_ids_and_metadata_are_those_of_the_pairs(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    told: list[tuple[str, int, int | None]] = []
    report = precompute(
        data(shards),
        encoders,
        out,
        batch_size=4,
        progress=lambda *a: told.append(a),
    )
    assert report == PrecomputeReport(3, 3, 23, {}, True)
    counted = [done for stage, done, _ in told if stage == "samples"]
    assert counted[-1] == 23 and all(a <= b for a, b in pairwise(counted))
    found, sources = latents(out), raw(shards)
    assert list(found) == list(sources)
    assert encoders.text is not None
    for key, sample in found.items():
        source = sources[key]
        shown = load_picture(source["png"], key, (16, 16), data(shards), 0, 0)
        pixels = torch.from_numpy(shown.pixels).permute(2, 0, 1)[None]
        mean, std = encoders.autoencoder.moments(pixels / 127.5 - 1)
        expected = torch.cat([mean, std]).numpy()
        assert sample["latents.npy"].shape == (1, 2, 4, 8, 8)
        np.testing.assert_allclose(sample["latents.npy"][0], expected, rtol=2e-3, atol=2e-3)
        caption = source["txt"].decode()
        assert sample["txt"] == caption
        np.testing.assert_array_equal(
            sample["tokens.npy"], encoders.text.tokenize([caption]).numpy()
        )
        assert sample["json"] == {
            **json.loads(source["json"]),
            "width": 16,
            "height": 16,
            "latentdiff_crops": [
                {
                    "original_size": list(shown.original_size),
                    "crop_top_left": list(shown.crop_top_left),
                    "target_size": [16, 16],
                }
            ],
            "latentdiff_captions": [caption],
        }

    info = read_info(out)
    assert info.model == "tiny" and info.model_hash == encoders.model_hash
    assert (info.downscale, info.channels, info.kind, info.text_length) == (2, 4, "moments", 12)
    assert info.empty_ids == tuple(encoders.text.tokenize([""])[0].tolist())
    assert info.fingerprint == open_index(sorted(map(str, shards.glob("*.tar")))).fingerprint
    assert [(s.name, s.num_samples) for s in info.shards] == [
        ("train-000000.tar", 10),
        ("train-000001.tar", 10),
        ("train-000002.tar", 3),
    ]
    assert info.data["size_px"] == 16 and "num_workers" not in info.data


def test_the_index_of_the_latents_is_made_too(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    precompute(data(shards), encoders, tmp_path / "latents")
    tars = sorted(str(path) for path in (tmp_path / "latents").glob("*.tar"))
    assert all(Path(f"{tar}.index.parquet").exists() for tar in tars)
    assert open_index(tars).num_samples.tolist() == [10, 10, 3]
    assert open_index(tars).bad == {}


def test_no_kill_and_no_number_of_ranks_changes_a_byte(
    assets: Path, tmp_path: Path, run_python: Any
) -> None:
    for name in ("train-000000.tar", "train-000002.tar"):
        shutil.copy(assets / name, tmp_path)
    new_autoencoder().save(tmp_path / "vae")
    repository = str(Path(__file__).parents[2])
    done = run_python(
        str(DRIVER),
        str(tmp_path / "*.tar"),
        str(tmp_path / "vae"),
        str(tmp_path),
        OMP_NUM_THREADS="1",
        PYTHONPATH=repository,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    num_kills, num_files = (int(word) for word in done.stdout.split() if word.isdecimal())
    assert num_kills >= 8 and num_files == 6  # two tars, their records, settings, latents.json


def test_crops_captions_and_samples(shards: Path, encoders: Encoders, tmp_path: Path) -> None:
    config = data(
        shards,
        size_px=24,
        crop_px=16,
        crop="random",
        flip=True,
        captions=CaptionConfig(templates={"{text}": 1, "photo: {text}": 1}),
    )
    many: dict[str, Any] = {"crops": 3, "captions": 4, "batch_size": 4}
    precompute(config, encoders, tmp_path / "moments", **many)
    moments = latents(tmp_path / "moments")
    assert encoders.text is not None
    for sample in moments.values():
        assert sample["latents.npy"].shape == (3, 2, 4, 8, 8)
        texts = sample["json"]["latentdiff_captions"]
        assert len(texts) == 4 and {t.removeprefix("photo: ") for t in texts} == {sample["txt"]}
        np.testing.assert_array_equal(sample["tokens.npy"], encoders.text.tokenize(texts).numpy())
        assert len(sample["json"]["latentdiff_crops"]) == 3
    differ = [not np.array_equal(*s["latents.npy"][:2]) for s in moments.values()]
    assert all(differ)
    assert len({tuple(s["json"]["latentdiff_captions"]) for s in moments.values()}) == 23

    for seed in (0, 1):
        out = tmp_path / f"samples-{seed}"
        precompute(config, encoders, out, **many, kind="samples", seed=seed)
    drawn, other = latents(tmp_path / "samples-0"), latents(tmp_path / "samples-1")
    scores = []
    for key, sample in drawn.items():
        assert sample["latents.npy"].shape == (3, 1, 4, 8, 8)
        mean, std = moments[key]["latents.npy"].astype(np.float32).swapaxes(0, 1)
        scores.append((sample["latents.npy"][:, 0].astype(np.float32) - mean) / std)
        assert not np.array_equal(sample["latents.npy"], other[key]["latents.npy"])
    z = np.concatenate(scores).ravel()  # 17,664 standard normal numbers
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    assert np.unique(np.round(scores[0], 3)).size > 500  # each crop has its own noise


def test_buckets_keep_each_pictures_shape(shards: Path, encoders: Encoders, tmp_path: Path) -> None:
    buckets = BucketConfig(base_px=(64,), step_px=8, max_aspect=2, max_crop=0.25)
    out = tmp_path / "latents"
    assert precompute(data(shards, buckets=buckets), encoders, out, batch_size=3).num_samples == 23
    found, sources = latents(out), raw(shards)
    assert set(found) == set(sources)
    shapes = set()
    for key, sample in found.items():
        assert sample["__key__"] == key
        width, height = Image.open(io.BytesIO(sources[key]["png"])).size
        h, w = sample["json"]["height"], sample["json"]["width"]
        shapes.add((h, w))
        assert sample["latents.npy"].shape == (1, 2, 4, h // 2, w // 2)
        assert h * w <= 64 * 64 and 0.75 <= (w / h) / (width / height) <= 1 / 0.75
    assert len(shapes) >= 4
    assert open_index([str(out / "train-000001.tar")]).num_samples.tolist() == [10]


def test_a_shard_whose_data_has_changed_is_made_again_alone(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    precompute(data(shards), encoders, out)
    before = contents(out)
    assert precompute(data(shards), encoders, out).num_written == 0
    assert contents(out) == before

    (out / "train-000002.tar.latents.json").unlink()  # a tar without its record counts for nothing
    with open(out / "train-000001.tar", "ab") as file:
        file.write(b"\0")
    assert precompute(data(shards), encoders, out).num_written == 2
    assert contents(out) == before

    changed = [Sample("new", picture(32, 32, 99), "png", "new")]
    write_shards(changed, tmp_path / "new", "train")
    shutil.move(tmp_path / "new" / "train-000000.tar", shards / "train-000001.tar")
    assert precompute(data(shards), encoders, out) == PrecomputeReport(3, 1, 14, {}, True)
    after = contents(out)
    assert after["train-000000.tar"] == before["train-000000.tar"]
    assert [s.num_samples for s in read_info(out).shards] == [10, 1, 3]


def test_more_shards_join_those_that_are_there(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    precompute(data(shards), encoders, tmp_path / "whole")
    out = tmp_path / "parts"
    for name in ("train-000002.tar", "train-000000.tar", "train-000001.tar"):
        config = data(shards, shards=(f"{shards}/{name}",), num_workers=0)
        assert precompute(config, encoders, out).is_whole
    assert contents(out) == contents(tmp_path / "whole")


def test_a_rank_alone_leaves_the_folder_unfinished(
    shards: Path, encoders: Encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "latents"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert precompute(data(shards), encoders, out) == PrecomputeReport(1, 1, 10, {}, False)
    with pytest.raises(ValueError, match=r"has no latents\.json; expected latents that"):
        read_info(out)
    monkeypatch.setenv("RANK", "0")
    assert precompute(data(shards), encoders, out) == PrecomputeReport(2, 2, 13, {}, True)
    assert len(read_info(out).shards) == 3
    with pytest.raises(ValueError, match="rank must be from 0 to 1; got 2"):
        precompute(data(shards), encoders, out, rank=2)


def test_batches_have_one_shape_and_keep_the_order_of_each() -> None:
    autoencoder = new_autoencoder()
    random = np.random.default_rng(0)
    shapes = [(8, 8, 3), (8, 16, 3), (16, 8, 3)]
    given = [
        Pictures([random.integers(0, 256, shapes[i * i % 3], np.uint8) for _ in range(2)], i)
        for i in range(17)
    ]
    found = list(encode(autoencoder, iter(given), batch_size=5))
    assert sorted(p.sample for p in found) == list(range(17))
    for pictures in found:
        for crop, moments in zip(pictures.crops, pictures.moments, strict=True):
            alone = encode_batch(autoencoder, crop[None])[0]
            np.testing.assert_allclose(moments, alone, atol=1e-5)


def test_encoders_are_opened_without_the_unet(tmp_path: Path, tiny_model: Path) -> None:
    model = load_encoders(str(tiny_model), device="cpu")
    assert model.text is not None and model.name == str(tiny_model)
    assert model.model_hash == model_hash(Autoencoder.load(tiny_model))
    half = load_encoders(str(tiny_model), device="cpu", dtype="bf16")
    assert half.model_hash == model.model_hash
    assert next(half.autoencoder.parameters()).dtype == torch.bfloat16

    new_autoencoder().save(tmp_path / "vae")
    assert load_encoders(str(tmp_path / "vae"), device="cpu").text is None
    mixed = load_encoders(str(tmp_path / "vae"), text=str(tiny_model), device="cpu")
    assert mixed.text is not None and mixed.model_hash == model_hash(new_autoencoder())
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, fp16; got 'fp8'"):
        load_encoders("box", dtype="fp8")
    with pytest.raises(ValueError, match="autoencoder nowhere/at/all not found"):
        load_encoders("nowhere/at/all")


def test_command_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new_autoencoder().save(tmp_path / "vae")
    out = tmp_path / "latents"
    command = ["data", "precompute", f"{shards}/*.tar", "--model", str(tmp_path / "vae")]
    command += ["--out", str(out), "--device", "cpu"]
    assert run(command) == 2
    assert "error: give --size-px, the side of the pictures, or" in capsys.readouterr().err
    spoil(shards)
    assert run([*command, "--size-px", "16", "--flip", "--batch-size", "4"]) == 0
    assert capsys.readouterr().out == (
        f"{out}: 21 samples in 3 shards, 3 of them new; skipped 1 no caption, 1 bad image\n"
    )
    assert not read_info(out).tokenizer_hash and "tokens.npy" not in latents(out)["000"]
    assert run([*command, "--size-px", "24"]) == 2
    assert "data.flip: True, False; data.size_px: 16, 24" in capsys.readouterr().err

    for wrong, message in (
        (["--buckets", "wide"], "--buckets takes sides in pixels, such as 512 or 512,1024; got"),
        (["--bucket-step", "8"], "--bucket-step goes with --buckets; give both or neither"),
        (["--size-px", "16", "--crop", "left"], "crop: "),
        (["--config", "ddpm_emoji", "--model", str(out)], "is not an autoencoder"),
    ):
        assert run([*command, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert run([*command[:3], "--select", "nowhere", "--out", str(out), "--size-px", "16"]) == 2
    assert "error: " in capsys.readouterr().err
    assert run(["data", "precompute", "--help"]) == 0
    assert "Example: latentdiff data precompute" in " ".join(capsys.readouterr().out.split())


def test_imports_stay_light() -> None:
    """`latentdiff --help` must not pay for torch."""
    import subprocess

    code = "import sys, latentdiff.cli.data; print('torch' in sys.modules, 'numpy' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_index_of_inputs_may_be_there_already(
    shards: Path, encoders: Encoders, tmp_path: Path
) -> None:
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    index_shards(tars, tmp_path / "index", workers=1)
    config = data(shards, index=str(tmp_path / "index"))
    assert precompute(config, encoders, tmp_path / "latents").num_samples == 23
