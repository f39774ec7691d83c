"""Are pictures cut, resized and mirrored inside their bounds, and the same at every call?"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.transforms import resize_square, to_image, to_tensor, transform


def coordinates(width: int, height: int) -> Image.Image:
    """Each pixel's colour is its place: red is x, green is y."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate({"shards": ["x.tar"], **values})


def places(image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of each pixel of a transformed `coordinates` picture."""
    pixels = np.asarray(to_image(image)).astype(int)
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


# Squares


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20), (21, 20)])
@pytest.mark.parametrize("where", list(itertools.product((0.0, 0.3, 1.0), repeat=2)))
def test_squares_lie_inside(size: tuple[int, int], where: tuple[float, float]) -> None:
    square = resize_square(coordinates(*size), 20, where)
    x, y = places(to_tensor(square))
    assert square.size == (20, 20)
    left, top = round((size[0] - 20) * where[0]), round((size[1] - 20) * where[1])
    assert np.array_equal(x[0], np.arange(left, left + 20))
    assert np.array_equal(y[:, 0], np.arange(top, top + 20))


def test_the_centre_is_the_centre() -> None:
    x, y = places(transform(coordinates(60, 20), config(size_px=20), seed=0, position=0))
    assert (x.min(), x.max(), y.min(), y.max()) == (20, 39, 0, 19)


def test_resizing_keeps_the_mean_and_the_ends() -> None:
    image = transform(coordinates(64, 64), config(size_px=16), seed=0, position=0)
    x, y = places(image)
    assert image.shape == (3, 16, 16)
    assert abs(x.mean() - 31.5) < 0.5 and abs(y.mean() - 31.5) < 0.5
    assert x[0, 0] < 4 and x[0, -1] > 59
    larger = transform(coordinates(16, 16), config(size_px=64), seed=0, position=0)
    assert larger.shape == (3, 64, 64)


# Draws


def test_random_crops_are_windows_inside_and_reach_every_place() -> None:
    chosen = config(size_px=20, crop_px=16)
    corners = set()
    for position in range(400):
        x, y = places(transform(coordinates(20, 20), chosen, seed=0, position=position))
        left, top = x[0, 0], y[0, 0]
        assert np.array_equal(x, np.broadcast_to(np.arange(left, left + 16), (16, 16)))
        assert np.array_equal(y.T, np.broadcast_to(np.arange(top, top + 16), (16, 16)))
        corners.add((left, top))
    assert corners == set(itertools.product(range(5), range(5)))


def test_random_squares_of_oblong_pictures() -> None:
    chosen = config(size_px=20, crop="random")
    lefts = []
    for position in range(200):
        x, y = places(transform(coordinates(30, 20), chosen, seed=0, position=position))
        assert np.array_equal(x[0], np.arange(x[0, 0], x[0, 0] + 20)) and y[0, 0] == 0
        lefts.append(x[0, 0])
    assert set(lefts) == set(range(11))


def test_half_of_the_pictures_are_mirrored() -> None:
    chosen = config(size_px=20, flip=True)
    mirrored = 0
    for position in range(400):
        x, _ = places(transform(coordinates(20, 20), chosen, seed=0, position=position))
        assert x[0].tolist() in (list(range(20)), list(range(19, -1, -1)))
        mirrored += x[0, 0] == 19
    assert abs(mirrored - 200) < 50  # five standard errors


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    chosen = config(size_px=24, crop_px=16, crop="random", flip=True)
    image = coordinates(50, 40)
    cells = list(itertools.product((0, 1), range(20)))
    drawn = {cell: transform(image, chosen, *cell) for cell in cells}
    for cell in reversed(cells):
        assert torch.equal(transform(image, chosen, *cell), drawn[cell])
    assert len({tuple(value.flatten().tolist()) for value in drawn.values()}) > 35


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
    one, two = (transform(coordinates(90, 70), chosen, 0, position) for position in (1, 2))
    assert one.shape == (3, output_px, output_px)
    assert torch.equal(one, two) == deterministic


def test_a_crop_must_fit() -> None:
    with pytest.raises(ValueError, match=r"crop_px must be at most size_px; got 65 > 64; lower"):
        config(crop_px=65)
