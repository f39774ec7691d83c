"""Are the names that are known without torch those that the code behind them has?"""

from __future__ import annotations

import re

import pytest

from latentdiff import attention, choices, grids, samplers
from latentdiff.devices import resolve_device
from latentdiff.speed import Speed


def test_names_are_those_of_the_code() -> None:
    assert tuple(samplers.SAMPLERS) == choices.SAMPLERS
    assert grids.SPACINGS == choices.SPACINGS
    assert set(attention.NAMES) == set(choices.ATTENTIONS)


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:3", "mps", "meta", "tpu", "cpu:x"])
def test_a_device_that_is_refused_at_once_is_refused_later_too(name: str) -> None:
    try:
        choices.check_device(name)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            resolve_device(name)


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"unknown pet 'Catt'; did you mean cat\? known: cat, dog"):
        choices.check_choice("pet", "Catt", ("cat", "dog"))
    with pytest.raises(ValueError, match=r"unknown pet 'xyz'; known: none"):
        choices.check_choice("pet", "xyz", ())


def test_a_picture_that_fits_or_its_nearest_size() -> None:
    choices.check_image_size(64, 128, 16)
    told = "image is 50x9 px; sides must be multiples of 16; give height 16 and width 48 to have"
    with pytest.raises(ValueError, match=told):
        choices.check_image_size(50, 9, 16)


def test_openvino_takes_nothing_that_is_torchs() -> None:
    Speed(backend="openvino", tiled=True, tiny_decoder="x")
    for name, value in (("compile", True), ("low_memory", True), ("quantise", "int8")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} is of --backend torch"):
            Speed(backend="openvino", **{name: value})  # pyright: ignore[reportArgumentType] # one of several
