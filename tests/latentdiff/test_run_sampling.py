"""Are the grids of a run those of its prompts and seed, however they are drawn?"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from looking import ONE, looking_run, make_clip, make_parts, trainee
from PIL import Image
from torchrun import ROOT, torchrun

from latentdiff.config import DiffusionRun
from latentdiff.parallel import World
from latentdiff.pictures import grid
from latentdiff.training.sampling import draw_chunks, draw_grid, painter_of
from latentdiff.training.trainee import Trainee

SCRIPT = str(ROOT / "tests" / "latentdiff" / "looking_ranks.py")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def pictures(found: Trainee, config: DiffusionRun, world: World = ONE) -> dict[int, Any]:
    prompts = ["a red apple", "a cat", "two stars", "a tree", "a green tree"]
    drawn = draw_chunks(found.model, found.network, config, prompts, 2, world)
    return {number: images for number, images in drawn if number is not None}


@pytest.mark.parametrize("train_text", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_grid_is_what_generate_draws(
    assets: Path, parts: Path, train_text: bool, guidance_scale: float
) -> None:
    samples = {"guidance_scale": guidance_scale}
    config = looking_run(assets, parts, train_text=train_text, samples=samples)
    found = trainee(config)
    drawn = draw_grid(found.model, found.network, config, ONE)
    found.network.eval()
    expected = found.model.generate(
        list(config.samples.prompts),
        num_images=2,
        batch_size=4,
        steps=2,
        sampler="euler_ancestral",
        guidance_scale=guidance_scale,
    )
    assert drawn is not None and len({image.tobytes() for image in expected}) == 6
    # generate's lean U-Net rounds otherwise than the one that is trained
    differences = np.asarray(drawn, int) - np.asarray(grid(expected), int)
    assert np.abs(differences).max() <= 1


def test_the_step_grid_is_the_runs_and_a_continued_models_own(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts, samples={"spacing": "karras", "num_steps": 3})
    found = trainee(config)
    expected = draw_grid(found.model, found.network, config, ONE)
    found.model.defaults = found.model.defaults.but(spacing="trailing")  # as if it had been saved
    assert draw_grid(found.model, found.network, config, ONE) == expected

    plain = config.samples.model_dump(exclude={"spacing"})
    other = config.model_copy(update={"init_from": "box", "samples": type(config.samples)(**plain)})
    assert draw_grid(found.model, found.network, other, ONE) != expected
    found.model.defaults = found.model.defaults.but(spacing="karras")
    assert draw_grid(found.model, found.network, other, ONE) == expected


def test_chunks_are_the_same_on_any_number_of_ranks(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    expected = pictures(found, config)
    assert [len(expected[n]) for n in range(3)] == [2, 2, 1]
    for num_ranks in (2, 5):
        together: dict[int, Any] = {}
        for rank in range(num_ranks):
            own = pictures(found, config, World(ONE.device, rank, num_ranks))
            assert not own.keys() & together.keys()
            together |= own
        assert together.keys() == expected.keys()
        for number, images in expected.items():
            assert all(map(np.array_equal, together[number], images))


def test_all_ranks_call_the_network_equally_often(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    calls: list[int] = []
    found.network.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for rank in range(2):
        calls.clear()
        pictures(found, config, World(ONE.device, rank, 2))
        counts.append(len(calls))
    assert counts[0] == counts[1] == 2 * 2  # two turns of two steps


def test_drawing_leaves_the_modes_and_the_random_numbers_of_training_alone(
    assets: Path, parts: Path
) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    state = torch.random.get_rng_state()
    drawn = draw_grid(found.model, found.network, config, ONE)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.network.training and all(w.grad is None for w in found.weights.values())
    assert draw_grid(found.model, found.network, config, ONE) == drawn
    with torch.no_grad():
        for weight in found.weights.values():
            weight.mul_(1.5)
    assert draw_grid(found.model, found.network, config, ONE) != drawn


def test_a_chunk_in_the_making_does_not_change_how_others_use_the_network(
    assets: Path, parts: Path
) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    drawing = draw_chunks(found.model, found.network, config, ["a", "b"], 1, ONE)
    next(drawing)
    assert found.network.training and torch.is_grad_enabled()
    drawing.close()


def test_pictures_that_are_not_finite_are_grey_and_told(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    whole = draw_grid(found.model, found.network, config, ONE)
    decode = found.model.autoencoder.decode
    seen: list[int] = []

    def fail(z: torch.Tensor) -> torch.Tensor:
        seen.append(len(z))
        if len(z) == 4 or (len(z) == 1 and sum(size == 1 for size in seen) == 2):
            raise FloatingPointError("overflow")
        return decode(z)

    found.model.autoencoder.decode = fail
    with pytest.warns(UserWarning) as caught:
        drawn = draw_grid(found.model, found.network, config, ONE)
    (warning,) = caught
    assert str(warning.message).startswith(
        "1 of 6 sample pictures are not finite and stay grey, such as number 1 ('a red apple')"
    )
    assert isinstance(whole, Image.Image) and isinstance(drawn, Image.Image)
    drawn_pixels, pixels = np.array(drawn, np.int16), np.array(whole, np.int16)
    assert (drawn_pixels[:32, 34:66] == 128).all()  # number 1: first row, second column
    drawn_pixels[:32, 34:66] = pixels[:32, 34:66]
    assert abs(drawn_pixels - pixels).max() <= 1  # the others: decoded one at a time


def test_a_model_without_text_draws_too(assets: Path, parts: Path) -> None:
    unet = {"channels": [16, 16], "layers_per_block": 1, "head_dim": 8, "norm_num_groups": 4}
    unet["cross_attention"] = []
    config = DiffusionRun.model_validate(
        {
            "kind": "diffusion",
            "out": str(parts / "run"),
            "data": {"shards": [str(assets / "train-*.tar")], "size_px": 16},
            "unet": unet,
            "samples": {"num_images": 3, "num_steps": 2, "sampler": "ddpm"},
            "loop": {"num_steps": 1},
        }
    )
    found = trainee(config)
    assert painter_of(found.model, found.network, config).encode is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw_grid(found.model, found.network, config, ONE)
    assert drawn is not None and drawn.size == (34, 34)


# Real ranks


def look(num_ranks: int, assets: Path, parts: Path, runs: list[Any]) -> list[list[dict[str, Any]]]:
    """What each rank computed, run by run."""
    done = torchrun(num_ranks, [SCRIPT, str(parts), str(assets), json.dumps(runs)])
    assert done.returncode == 0, done.stderr
    folder = parts / f"{num_ranks}-ranks"
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return [list(row) for row in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def runs(assets: Path, parts: Path) -> list[dict[str, Any]]:
    make_clip(parts / "clip")
    evaluation = {
        "data": {"shards": [str(assets / "val-000000.tar")], "size_px": 32},
        "metrics": ["fid", "kid", "clip_score"],
        "num_images": 10,
        "batch_size": 4,
        "features": str(parts / "clip"),
        "clip": str(parts / "clip"),
    }
    modes = [("ddp", False), ("fsdp", True)]
    return [
        {"evaluation": evaluation, "train_text": train_text, "parallel": {"mode": mode}}
        for mode, train_text in modes
    ]


@pytest.fixture(scope="module")
def alone(assets: Path, parts: Path, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found[0] for found in look(1, assets, parts, runs)]


@pytest.mark.parametrize("num_ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_see_what_one_process_sees(
    assets: Path, parts: Path, runs: list[Any], alone: list[dict[str, Any]], num_ranks: int
) -> None:
    """Validation, grid and metrics: bit for bit, before a step of training and after it."""
    for one, ranks in zip(alone, look(num_ranks, assets, parts, runs), strict=True):
        assert one["second"] != one["first"][0] and one["training"]
        assert [found["grid"] for found in ranks] == [one["grid"], *[None] * (num_ranks - 1)]
        assert sorted(n for found in ranks for n in found["kept"]) == one["kept"]
        for found in ranks:
            assert {**found, "grid": 0, "kept": 0} == {**one, "grid": 0, "kept": 0}


def test_modes_see_the_same(alone: list[dict[str, Any]]) -> None:
    copies, sharded = alone
    assert sharded["first"] == pytest.approx(copies["first"], rel=1e-6, nan_ok=True)
    assert sharded["scores"] == pytest.approx(copies["scores"], rel=1e-2)
