"""Does a preview look like its picture, cost nothing between two, and never end a drawing?"""

from __future__ import annotations

import errno
import io
import json
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipelines.pixels import to_image, to_pixels
from latentdiff import preview
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.packing import pack
from latentdiff.preview import PreviewWriter, Projection, fit, projection_of
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig
from vae.latent_norm import LatentNorm

MIX = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.7, 0.3], [0.4, 0.4, -0.6], [1.0, 0.0, 0.2]])
SHIFT = torch.tensor([0.1, -0.3, 0.2, 0.5])


class Linear(nn.Module):
    """Latents that are the mixed mean colours of 8 x 8 px: their colours are known exactly."""

    def __init__(self, mix: Tensor = MIX) -> None:
        super().__init__()
        self.mix = nn.Parameter(mix)

    def encode(self, image: Tensor) -> Any:
        means = F.avg_pool2d(image, 8)
        mixed = torch.einsum("bdhw,cd->bchw", means, self.mix) + SHIFT.view(1, 4, 1, 1)
        return SimpleNamespace(latents=mixed)


def linear(mix: Tensor = MIX, scale: float = 1.7) -> Autoencoder:
    norm = LatentNorm.from_scalars(scale=scale, shift=0.2)
    return Autoencoder(Linear(mix), norm, latent_channels=4, downscale=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "previews"


# The projection


def test_known_colours_are_found() -> None:
    autoencoder = linear()
    image = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    expected = F.avg_pool2d(image, 8)
    got = fit(autoencoder).pixels(autoencoder.encode(image))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_pixel_space_is_its_own_preview() -> None:
    projection = fit(Autoencoder.build(IdentityConfig()))
    expected = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    torch.testing.assert_close(projection.weights, expected, atol=1e-5, rtol=0)


def test_a_preview_has_the_colours_of_the_picture(assets: Path, repository: Path) -> None:
    source = repository / "latentdiff" / "pretrained" / "vae"
    config = json.loads((source / "config.json").read_text())
    box = Autoencoder.from_weights(
        config, load_file(source / "diffusion_pytorch_model.safetensors")
    )
    with torch.no_grad():
        z = box.encode(_pictures(assets / "val-000000.tar"))
        decoded = F.avg_pool2d(box.decode(z).clamp(-1, 1), box.downscale)
    guessed = fit(box).pixels(z)
    spread = (decoded - decoded.mean((0, 2, 3), keepdim=True)).square().mean()
    assert 1 - (guessed - decoded).square().mean() / spread > 0.88  # 0.91
    for channel in range(3):  # and no colour is bought with another
        pair = torch.stack([guessed[:, channel].flatten(), decoded[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9


def _pictures(shard: Path) -> Tensor:
    """Those of a tar on white, 64 px."""
    found = []
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith((".png", ".jpg", ".webp")):
                data = tar.extractfile(member)
                assert data is not None
                drawn = Image.open(io.BytesIO(data.read())).convert("RGBA")
                page = Image.new("RGBA", drawn.size, "white")
                page.alpha_composite(drawn)
                found.append(to_pixels(page, 64, 64))
    assert len(found) > 8
    return torch.stack(found)


def test_it_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = fit(linear())
    torch.manual_seed(2)
    assert torch.equal(fit(linear()).weights, first.weights)


def test_half_precision_is_close() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    half = fit(linear().bfloat16())
    assert half.weights.dtype == torch.float32
    guessed = half.pixels(linear().encode(image))
    torch.testing.assert_close(guessed, F.avg_pool2d(image, 8), atol=0.02, rtol=0)


def test_channels_that_depend_on_each_other_get_small_weights() -> None:
    class Bent(Linear):
        def encode(self, image: Tensor) -> Any:
            one = (F.avg_pool2d(image, 8) * 3).tanh()
            return SimpleNamespace(latents=torch.cat([one, one[:, :1] / 3 + one[:, 1:2] / 7], 1))

    # float32's rounding in the fourth channel is no information
    bent = Autoencoder(Bent(), LatentNorm.from_scalars(), latent_channels=4, downscale=8)
    assert fit(bent).weights.abs().max() < 2


def test_other_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"is of latents of 4 channels; got 3; fit one"):
        fit(linear()).pixels(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 4, 16, 16), (256, 256)),
        ((1, 4, 64, 48), (192, 256)),
        ((1, 4, 5, 5), (255, 255)),
        ((1, 4, 300, 300), (300, 300)),
        ((4, 4, 16, 16), (514, 514)),
        ((30, 4, 16, 16), (6 * 160 + 10, 5 * 160 + 8)),  # smaller, where many must fit
    ],
)
def test_cells_are_shown_large(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    assert fit(linear()).image(torch.zeros(shape)).size == size


def test_pictures_are_in_order_and_cells_are_squares() -> None:
    projection = Projection(torch.cat([torch.eye(3), torch.zeros(1, 3)]))
    z = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sheet = np.asarray(projection.image(z))
    for i, picture in enumerate(z):
        shown = sheet[:256, i * 258 : i * 258 + 256]
        cells = shown.reshape(4, 64, 4, 64, 3)
        assert (cells == cells[:, :1, :, :1]).all()
        assert (cells[:, 0, :, 0] == np.asarray(to_image(picture))).all()


def test_what_is_not_finite_is_shown_all_the_same() -> None:
    z = torch.zeros(1, 3, 2, 2)
    z[0, :, 0, 0], z[0, :, 0, 1], z[0, 0, 1, 1] = torch.nan, torch.inf, -torch.inf
    pixels = Projection(torch.cat([torch.eye(3), torch.zeros(1, 3)])).pixels(z)
    assert bool((pixels.abs() <= 1).all())


# The cache


def test_a_fit_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = projection_of(linear())
    (path,) = cache.iterdir()
    assert torch.tensor(json.loads(path.read_text())).shape == (5, 3)
    monkeypatch.setattr(preview, "fit", lambda _: pytest.fail("fitted again"))
    assert torch.equal(projection_of(linear()).weights, first.weights)


def test_other_weights_or_norms_have_their_own(cache: Path) -> None:
    kept = [projection_of(linear(mix, scale)) for mix in (MIX, MIX * 2) for scale in (1.0, 2.0)]
    assert len(list(cache.iterdir())) == 4
    assert not torch.equal(kept[0].weights, kept[1].weights)
    assert not torch.equal(kept[0].weights, kept[2].weights)


def box(gain: float = 1.0) -> Autoencoder:
    """The model's own, with louder or quieter colours."""
    config = json.loads((PRETRAINED / "vae" / "config.json").read_text())
    weights = load_file(PRETRAINED / "vae" / "diffusion_pytorch_model.safetensors")
    name = "encoder.conv_in.weight"
    return Autoencoder.from_weights(config, {**weights, name: weights[name] * gain})


def test_weights_that_cannot_be_hashed_are_not_mistaken_for_others(cache: Path) -> None:
    """Packed convolutions are in no state_dict: two autoencoders would have one name."""
    kept = []
    for gain in (1.0, 0.5):
        packed = box(gain)
        if not pack(packed):
            pytest.skip("this torch or CPU cannot pack weights")
        kept.append(projection_of(packed).weights)
        torch.testing.assert_close(kept[-1], fit(box(gain)).weights, atol=1e-3, rtol=0)
    assert not torch.allclose(*kept, atol=0.01)
    assert not cache.exists()
    assert projection_of(packed, key="a") is not None
    assert len(list(cache.iterdir())) == 1


def test_a_key_stands_for_the_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = projection_of(linear(), key="a")
    other = projection_of(linear(MIX * 2), key="b")
    assert not torch.equal(first.weights, other.weights)
    projection_of(linear(scale=2.0), key="a")  # the norm is not the key's business
    projection_of(linear())
    assert len(list(cache.iterdir())) == 4
    monkeypatch.setattr(preview, "fit", lambda _: pytest.fail("fitted again"))
    monkeypatch.setattr(Autoencoder, "state_dict", lambda _: pytest.fail("hashed"))
    assert torch.equal(projection_of(linear(), key="a").weights, first.weights)
    assert torch.equal(projection_of(linear(), key="b").weights, other.weights)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[[1, 2]]", '{"a": 1}', "[[NaN, 0, 0]]", "\xff", "[[1],[2,3]]"]
)
def test_a_damaged_file_is_made_anew(cache: Path, content: str) -> None:
    first = projection_of(linear())
    (path,) = cache.iterdir()
    whole = path.read_text()
    path.write_bytes(content.encode("latin-1"))
    assert torch.equal(projection_of(linear()).weights, first.weights)
    assert path.read_text() == whole


def test_values_that_are_not_finite_are_made_anew(cache: Path) -> None:
    first = projection_of(linear())
    (path,) = cache.iterdir()
    path.write_text(json.dumps([[float("nan")] * 3] * 5))
    assert torch.equal(projection_of(linear()).weights, first.weights)


def test_without_a_place_to_keep_it_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = projection_of(linear())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "file" / "below"))
    assert torch.equal(projection_of(linear()).weights, first.weights)

    def no_home() -> Path:
        raise ValueError("there is no home directory")

    monkeypatch.setattr(preview, "cache_directory", no_home)
    assert torch.equal(projection_of(linear()).weights, first.weights)


# The file


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def writer(tmp_path: Path) -> PreviewWriter:
    return PreviewWriter(tmp_path / "preview.png", fit(linear()), clock=Clock())


def test_a_preview_is_written_now_and_then(writer: PreviewWriter, tmp_path: Path) -> None:
    steps = []
    z = torch.zeros(2, 4, 8, 8)
    clock: Any = writer.clock
    for step in range(12):  # a step takes 0.2 s
        writer(step, z + step / 10, [6, 7])
        with Image.open(writer.path) as shown:
            shown.load()
            steps.append(int(shown.info["step"]))
            assert shown.info["pictures"] == "6 7"
        assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]
        clock.now += 0.2
    assert steps == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]


def test_it_shows_the_latents(writer: PreviewWriter) -> None:
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    writer(0, z, [0])
    with Image.open(writer.path) as shown:
        assert shown.tobytes() == writer.projection.image(z).tobytes()


def test_between_two_pictures_nobody_looks_at_the_latents(writer: PreviewWriter) -> None:
    writer(0, torch.zeros(1, 4, 8, 8), [0])
    untouchable: Any = None
    writer(1, untouchable, [0])


def test_a_full_disk_is_told_once_and_ends_nothing(
    writer: PreviewWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))

    z = torch.zeros(1, 4, 8, 8)
    clock: Any = writer.clock
    with monkeypatch.context() as patched:
        patched.setattr(preview, "save_png", full)
        with pytest.warns(UserWarning, match="cannot be written .No space left on device.; draw"):
            writer(0, z, [0])
        clock.now += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            writer(1, z, [0])
    assert not writer.path.exists()
    clock.now += 1
    writer(2, z, [0])  # there is room again
    assert writer.path.is_file()


def test_a_missing_directory_ends_nothing(tmp_path: Path) -> None:
    writer = PreviewWriter(tmp_path / "gone" / "preview.png", fit(linear()))
    with pytest.warns(UserWarning, match="No such file or directory"):
        writer(0, torch.zeros(1, 4, 8, 8), [0])


@pytest.mark.gpu
def test_a_gpu_is_waited_for_only_when_a_picture_is_due(tmp_path: Path) -> None:
    clock = Clock()
    projection = fit(linear().cuda())
    torch.testing.assert_close(projection.weights, fit(linear()).weights, atol=1e-3, rtol=0)
    writer = PreviewWriter(tmp_path / "preview.png", projection, clock=clock)
    z = torch.randn(2, 4, 8, 8, device="cuda")
    torch.testing.assert_close(
        projection.pixels(z).cpu(), projection.pixels(z.cpu()), atol=1e-3, rtol=0
    )
    writer(0, z, [0, 1])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        writer(1, z + 1, [0, 1])
    finally:
        torch.cuda.set_sync_debug_mode(before)
