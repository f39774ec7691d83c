"""Are pictures cut, resized and mirrored inside their bounds, and the same at every call?"""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import transforms
from data_pipelines.config import DataConfig
from data_pipelines.pixels import to_image
from data_pipelines.transforms import (
    Picture,
    cover,
    fit,
    load_picture,
    resize,
    to_float,
    to_tensor,
)


def coordinates(width: int, height: int) -> Image.Image:
    """Each pixel's colour is its place: red is x, green is y."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"shards": ["x.tar"], **values})


def load(
    image: Image.Image,
    chosen: DataConfig,
    seed: int = 0,
    position: int = 0,
    shape: tuple[int, int] | None = None,
) -> Picture:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=0)
    shape = shape or (chosen.output_px, chosen.output_px)
    picture = load_picture(data.getvalue(), "x.tar:a.png", shape, chosen, seed, position)
    assert picture.pixels.shape == (*shape, 3) and picture.pixels.dtype == np.uint8
    assert picture.pixels.flags.c_contiguous and picture.pixels.flags.writeable
    assert picture.original_size == (image.height, image.width)
    return picture


def places(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of each pixel of a `coordinates` picture."""
    pixels = picture.pixels.astype(int)
    return pixels[..., 0], pixels[..., 1]


# Tensors


def test_every_byte_survives_the_round_trip() -> None:
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)


def test_colours_and_sides_keep_their_places() -> None:
    tensor = to_tensor(coordinates(5, 3))
    assert tensor.shape == (3, 3, 5)
    red = ((tensor[0] + 1) * 127.5).round()
    assert red[0].tolist() == [0, 1, 2, 3, 4]
    assert to_image(tensor).size == (5, 3)


def test_values_outside_are_clipped() -> None:
    tensor = torch.tensor([-7.0, -1.001, 1.001, 7.0]).view(1, 1, 4).expand(3, 1, 4)
    assert np.asarray(to_image(tensor))[0, :, 0].tolist() == [0, 0, 255, 255]
    half = to_image(torch.zeros(3, 2, 2, dtype=torch.bfloat16, requires_grad=True))
    assert np.asarray(half).min() == np.asarray(half).max() == 128


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (0, 4, 4), (2, 64, 48)])
def test_a_batch_is_the_same_bit_for_bit(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    images = to_float(torch.from_numpy(pixels))
    assert images.shape == (shape[0], 3, *shape[1:]) and images.dtype == torch.float32
    assert images.is_contiguous()
    for image, expected in zip(images, pixels, strict=True):
        assert torch.equal(image, to_tensor(Image.fromarray(expected)))
    out = torch.full(images.shape, 7.0)
    assert to_float(torch.from_numpy(pixels), out) is out and torch.equal(out, images)


def test_every_byte_of_a_batch_survives_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    (image,) = to_float(pixels)
    assert np.array_equal(np.asarray(to_image(image)), pixels[0].numpy())


# Parts that have a shape's aspect ratio


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (21, 20), (1, 300), (255, 7)])
@pytest.mark.parametrize("shape", [(20, 20), (32, 48), (48, 32), (64, 8)])
@pytest.mark.parametrize("where", list(itertools.product((0.0, 0.3, 1.0), repeat=2)))
def test_parts_lie_inside_and_touch_both_ends(
    size: tuple[int, int], shape: tuple[int, int], where: tuple[float, float]
) -> None:
    top, left, height, width = cover(*size, shape, where)
    assert 0 <= top <= top + height <= size[0] and 0 <= left <= left + width <= size[1]
    assert height == size[0] or width == size[1]  # as large as can be
    assert abs(height * shape[1] / shape[0] - width) <= max(1, shape[1] / shape[0])
    assert top == round((size[0] - height) * where[0])
    assert left == round((size[1] - width) * where[1])


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (21, 20)])
def test_the_middle_is_not_resampled_where_it_fits(size: tuple[int, int]) -> None:
    square = fit(np.array(coordinates(*size)), (20, 20)).astype(int)
    left, top = (size[0] - 20) // 2, (size[1] - 20) // 2
    assert np.array_equal(square[0, :, 0], np.arange(left, left + 20))
    assert np.array_equal(square[:, 0, 1], np.arange(top, top + 20))


def test_the_centre_is_the_centre() -> None:
    x, y = places(load(coordinates(60, 20), config(size_px=20)))
    assert (x.min(), x.max(), y.min(), y.max()) == (20, 39, 0, 19)


def test_resizing_keeps_the_mean_and_the_ends() -> None:
    x, y = places(load(coordinates(64, 64), config(size_px=16)))
    assert abs(x.mean() - 31.5) < 0.5 and abs(y.mean() - 31.5) < 0.5
    assert x[0, 0] < 4 and x[0, -1] > 59
    load(coordinates(16, 16), config(size_px=64))


@pytest.mark.parametrize(
    ("size", "shape"),
    [((64, 64), (32, 32)), ((50, 70), (40, 20)), ((20, 20), (64, 48)), ((400, 300), (16, 16))],
)
def test_resizing_is_pillows_lanczos(
    size: tuple[int, int], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.LANCZOS)
    found = resize(pixels, shape)
    assert found.shape == (*shape, 3) and found.flags.writeable
    assert np.abs(found.astype(int) - np.asarray(image)).max() <= 2
    assert np.array_equal(resize(np.asfortranarray(pixels), shape), found)
    monkeypatch.setattr(transforms, "_HAS_LANCZOS", False)  # torch before 2.12
    assert np.array_equal(resize(pixels, shape), np.asarray(image))
    assert resize(pixels, shape).flags.writeable


# Draws


def test_random_crops_are_windows_inside_and_reach_every_place() -> None:
    chosen = config(size_px=20, crop_px=16)
    corners = set()
    for position in range(400):
        picture = load(coordinates(20, 20), chosen, position=position)
        x, y = places(picture)
        left, top = x[0, 0], y[0, 0]
        assert np.array_equal(x, np.broadcast_to(np.arange(left, left + 16), (16, 16)))
        assert np.array_equal(y.T, np.broadcast_to(np.arange(top, top + 16), (16, 16)))
        assert picture.crop_top_left == (top, left)
        corners.add((left, top))
    assert corners == set(itertools.product(range(5), range(5)))


def test_random_squares_of_oblong_pictures() -> None:
    chosen = config(size_px=20, crop="random")
    lefts = []
    for position in range(200):
        picture = load(coordinates(30, 20), chosen, position=position)
        x, y = places(picture)
        assert np.array_equal(x[0], np.arange(x[0, 0], x[0, 0] + 20)) and y[0, 0] == 0
        assert picture.crop_top_left == (0, x[0, 0])
        lefts.append(x[0, 0])
    assert set(lefts) == set(range(11))


def test_half_of_the_pictures_are_mirrored() -> None:
    chosen = config(size_px=20, flip=True)
    mirrored = 0
    for position in range(400):
        x, _ = places(load(coordinates(20, 20), chosen, position=position))
        assert x[0].tolist() in (list(range(20)), list(range(19, -1, -1)))
        mirrored += x[0, 0] == 19
    assert abs(mirrored - 200) < 50  # five standard errors


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("shape", [(24, 24), (16, 32), (32, 16)])
def test_buckets_take_their_shape_from_the_batch(crop: str, shape: tuple[int, int]) -> None:
    chosen = config(crop=crop, flip=True, buckets={"base_px": [24], "step_px": 8})
    for position in range(30):
        picture = load(coordinates(61, 43), chosen, position=position, shape=shape)
        x, _ = places(picture)
        assert (np.diff(x[0]) > 0).all() or (np.diff(x[0]) < 0).all()


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (93, 37)])
@pytest.mark.parametrize(
    "values", [{"crop": "random"}, {"crop": "random", "flip": True}, {"crop_px": 16, "flip": True}]
)
def test_the_corner_says_where_the_cut_lies_in_the_whole_picture(
    size: tuple[int, int], values: dict[str, Any]
) -> None:
    """The whole picture, resized and mirrored as the cut is, has the cut's pixels at its corner."""
    chosen = config(size_px=20, **values)
    scale = 20 / min(size)
    whole_size = round(size[0] * scale), round(size[1] * scale)
    whole = resize(np.array(coordinates(*size)), (whole_size[1], whole_size[0])).astype(int)
    for position in range(20):
        picture = load(coordinates(*size), chosen, position=position)
        top, left = picture.crop_top_left
        px = chosen.output_px
        assert 0 <= top <= whole_size[1] - px and 0 <= left <= whole_size[0] - px
        x, _ = places(picture)
        source = whole[:, ::-1] if x[0, 0] > x[0, -1] else whole
        window = source[top : top + px, left : left + px]
        assert np.abs(picture.pixels[2:-2, 2:-2] - window[2:-2, 2:-2]).max() <= 2 / scale


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    chosen = config(size_px=24, crop_px=16, crop="random", flip=True)
    image = coordinates(50, 40)
    cells = list(itertools.product((0, 1), range(20)))
    drawn = {cell: load(image, chosen, *cell).pixels for cell in cells}
    for cell in reversed(cells):
        assert np.array_equal(load(image, chosen, *cell).pixels, drawn[cell])
    assert len({value.tobytes() for value in drawn.values()}) > 35


def test_no_generator_is_made_where_nothing_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(transforms, "stream", forbidden)
    load(coordinates(50, 40), config(size_px=24))
    with pytest.raises(AssertionError):
        load(coordinates(50, 40), config(size_px=24, flip=True))


def test_pictures_keep_their_own_memory() -> None:
    """Decoding into one buffer must not change the pictures that came before."""
    data = io.BytesIO()
    coordinates(64, 64).save(data, "JPEG")
    chosen = config(size_px=64)
    first = load_picture(data.getvalue(), "x", (64, 64), chosen, 0, 0).pixels
    before = first.copy()
    other = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(other, "JPEG")
    load_picture(other.getvalue(), "x", (64, 64), chosen, 0, 0)
    assert np.array_equal(first, before)


@pytest.mark.parametrize(
    ("values", "deterministic", "output_px"),
    [
        ({}, True, 64),
        ({"crop": "random"}, False, 64),
        ({"crop_px": 32}, False, 32),
        ({"flip": True}, False, 64),
    ],
)
def test_configs_say_what_they_deliver(
    values: dict[str, Any], deterministic: bool, output_px: int
) -> None:
    chosen = config(**values)
    assert (chosen.is_deterministic, chosen.output_px) == (deterministic, output_px)
    one, two = (load(coordinates(90, 70), chosen, 0, position).pixels for position in (1, 2))
    assert one.shape == (output_px, output_px, 3)
    assert np.array_equal(one, two) == deterministic


def test_a_crop_must_fit() -> None:
    with pytest.raises(ValueError, match=r"crop_px must be at most size_px; got 65 > 64; lower"):
        config(crop_px=65)
