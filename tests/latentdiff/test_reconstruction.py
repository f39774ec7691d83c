"""Are PSNR, SSIM and the sheet of reconstructions what they say?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader
from data_pipelines.pixels import to_image
from latentdiff.pictures import grid, save_png
from latentdiff.reconstruction import peak_signal_to_noise, score_reconstructions
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig
from vae.latent_norm import LatentNorm

CPU = torch.device("cpu")


class Brighter(Autoencoder):
    """Pixel space that comes back a little brighter."""

    def __init__(self, by: float) -> None:
        super().__init__(None, LatentNorm.from_scalars(), 3, 1)
        self.by = by

    def decode(self, z: Tensor) -> Tensor:
        return z + self.by


@pytest.fixture
def data(assets: Path) -> DataConfig:
    return DataConfig(shards=(str(assets / "val-*.tar"),), size_px=32)


# PSNR


@pytest.mark.parametrize(("difference", "psnr_db"), [(0.2, 20.0), (0.02, 40.0), (2.0, 0.0)])
def test_psnr_of_a_constant_difference(difference: float, psnr_db: float) -> None:
    # 10 log10(1 / MSE) with pictures in [0, 1], where the difference is half as large
    target = torch.full((2, 3, 4, 4), -1.0)
    found = peak_signal_to_noise(target + difference, target)
    torch.testing.assert_close(found, torch.full((2,), psnr_db), rtol=1e-4, atol=1e-4)


def test_psnr_is_per_picture_and_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    generator = torch.Generator().manual_seed(0)
    one, two = (torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1 for _ in range(2))
    found = peak_signal_to_noise(one, two)
    for i in range(3):
        expected = peak_signal_noise_ratio((one[i] + 1) / 2, (two[i] + 1) / 2, data_range=1.0)
        torch.testing.assert_close(found[i], expected)
    assert torch.equal(peak_signal_to_noise(one, one), torch.full((3,), 100.0))  # the ceiling


# Scores


def test_the_identity_is_perfect(data: DataConfig) -> None:
    score, sheet = score_reconstructions(Autoencoder.build(IdentityConfig()), data, CPU)
    assert (score.num_images, score.psnr_db) == (30, 100.0)
    assert score.ssim == pytest.approx(1.0, abs=1e-4)
    rows = np.asarray(sheet)  # originals, reconstructions, originals, reconstructions
    assert np.array_equal(rows[0:32], rows[34:66])
    assert np.array_equal(rows[68:100], rows[102:134])


def test_scores_are_means_over_pictures_however_they_are_batched(data: DataConfig) -> None:
    loader = Loader(data, seed=0, batch_size=1)
    images = torch.stack([loader.image(i) for i in range(30)])
    expected = peak_signal_to_noise((images + 0.1).clamp(-1, 1), images).mean().item()
    for batch_size in (30, 7):
        score, _ = score_reconstructions(Brighter(0.1), data, CPU, batch_size=batch_size)
        assert score.psnr_db == pytest.approx(expected, rel=1e-5)
        assert 0 < score.ssim < 1
    worse, _ = score_reconstructions(Brighter(0.4), data, CPU)
    assert worse.psnr_db < score.psnr_db and worse.ssim < score.ssim


def test_the_number_of_pictures_can_be_limited(data: DataConfig) -> None:
    score, _ = score_reconstructions(Brighter(0.1), data, CPU, max_images=4)
    assert score.num_images == 4


# The sheet


@pytest.mark.parametrize(
    ("num_shown", "columns", "rows"), [(1, 1, 2), (5, 5, 2), (16, 16, 2), (17, 16, 4), (99, 16, 4)]
)
def test_the_size_of_the_sheet(data: DataConfig, num_shown: int, columns: int, rows: int) -> None:
    _, sheet = score_reconstructions(Brighter(0.0), data, CPU, num_shown)
    assert sheet.size == (columns * 34 - 2, rows * 34 - 2)


def test_the_sheet_shows_originals_over_their_reconstructions(data: DataConfig) -> None:
    _, sheet = score_reconstructions(Brighter(0.3), data, CPU, num_shown=17)
    loader = Loader(data, seed=0, batch_size=1)
    pixels = np.asarray(sheet)
    for i in (0, 3, 16):
        image = loader.image(i)
        left, top = 34 * (i % 16), 68 * (i // 16)
        cell = pixels[top : top + 66, left : left + 32]
        assert np.array_equal(cell[:32], np.asarray(to_image(image)))
        assert np.array_equal(cell[34:], np.asarray(to_image(image + 0.3)))
    assert (pixels[68:, 34:] == 255).all()  # nothing beside the last one


@pytest.mark.parametrize("num_shown", [0, -1])
def test_a_sheet_of_nothing(data: DataConfig, num_shown: int) -> None:
    with pytest.raises(ValueError, match=rf"num_shown must be at least 1; got {num_shown}"):
        score_reconstructions(Brighter(0.0), data, CPU, num_shown)


def test_a_size_that_does_not_fit(assets: Path, tiny_autoencoder: Path) -> None:
    data = DataConfig(shards=(str(assets / "val-*.tar"),), size_px=30)
    with pytest.raises(ValueError, match=r"image of 30x30 px: .* multiples of 4"):
        score_reconstructions(Autoencoder.load(tiny_autoencoder), data, CPU)


# Grids and files


@pytest.mark.parametrize(
    ("num", "columns", "size"), [(1, None, (8, 4)), (4, None, (18, 10)), (5, 2, (18, 16))]
)
def test_grids(num: int, columns: int | None, size: tuple[int, int]) -> None:
    images = [Image.new("RGB", (8, 4), (i, 0, 0)) for i in range(num)]
    sheet = grid(images, columns)
    assert sheet.size == size
    across = columns or round(num**0.5)
    for i in range(num):
        assert sheet.getpixel((i % across * 10, i // across * 6)) == (i, 0, 0)
    with pytest.raises(ValueError, match="a grid needs at least one picture; got 0"):
        grid([])


def test_pngs_carry_their_story_and_the_same_bytes(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    story = {"prompt": "rote Äpfel 🍎", "seed": 3}
    for name in ("a.png", "b.png"):
        save_png(image, tmp_path / name, story)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as back:
        assert isinstance(back, PngImageFile)
        assert {name: str(text) for name, text in back.text.items()} == {
            "prompt": "rote Äpfel 🍎",
            "seed": "3",
        }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_png_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (8, 4), "red"), path)
    before = path.read_bytes()

    def full(self: Image.Image, file: Path, **_: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(Image.new("RGB", (8, 4), "blue"), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
