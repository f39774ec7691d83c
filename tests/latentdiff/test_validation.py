"""Is the validation loss what it says, and a matter of the weights alone?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from looking import ONE, SIZE_PX, broken_tar, looking_run, make_parts, trainee

from data_pipelines.config import DataConfig
from data_pipelines.ledger import TooManyBadSamples
from data_pipelines.loader import Loader
from latentdiff.build import build_weighting
from latentdiff.config import DiffusionRun
from latentdiff.encoding import Encoders
from latentdiff.loss import loss_weight, target
from latentdiff.pairing import model_hash
from latentdiff.parallel import World
from latentdiff.precompute import precompute
from latentdiff.randomness import normal
from latentdiff.training.heldout import HeldOut
from latentdiff.training.together import collect, deal, in_evaluation_mode
from latentdiff.training.validation import (
    ValidationLoss,
    read_validation,
    validation_loss,
    validation_timesteps,
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def validate(config: DiffusionRun) -> tuple[ValidationLoss, HeldOut[Any]]:
    found = trainee(config)
    held = read_validation(found.model, config, ONE)
    return validation_loss(found.model, found.network, held, config, ONE), held


def test_it_is_the_mean_over_the_pairs_and_their_timesteps(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    assert config.validation is not None
    result, _ = validate(config)

    found = trainee(config)  # and now one pair at a time, in float64 where it matters
    model, network = found.model, found.network.eval()
    assert model.text is not None
    schedule, loader = model.schedule, Loader(config.validation.data, 0, 1)
    weighting = build_weighting(config.objective.weighting, schedule.sigma_data)
    losses, plain, bins = [], [], [[] for _ in range(10)]
    with torch.no_grad():
        for n in range(20):
            clean = model.autoencoder.encode(loader.image(n)[None])
            ids = model.text.tokenize(loader.captions(n, [n]))
            for k in range(2):
                place = (k + ((n + 0.5) * 0.6180339887498949) % 1) / 2
                t = schedule.draw_timesteps(torch.tensor([place], dtype=torch.float64))
                noise = normal(clean.shape[1:], 0, [n], f"validation_noise-{k}")
                noisy = schedule.add_noise(clean, noise, t)
                output = network(noisy, t.float(), ids, None)
                error = output - target(schedule, clean, noise, t, "v")
                plain.append(error.square().mean().item())
                losses.append(plain[-1] * loss_weight(weighting, schedule.snr(t), "v").item())
                bins[int(t.item() / 100)].append(losses[-1])
    assert result.num_samples == 20
    assert result.loss == pytest.approx(sum(losses) / 40, rel=1e-5)
    assert result.plain == pytest.approx(sum(plain) / 40, rel=1e-5)
    for found_part, part in zip(result.by_timestep, bins, strict=True):
        expected = sum(part) / len(part) if part else math.nan
        assert found_part == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_it_depends_on_the_weights_alone(assets: Path, parts: Path) -> None:
    """Not on the run's seed, its caption drops and noise tricks, nor on what was drawn before."""
    config = looking_run(assets, parts)
    found = trainee(config)
    held = read_validation(found.model, config, ONE)

    def loss(of: DiffusionRun) -> float:
        return validation_loss(found.model, found.network, held, of, ONE).loss

    first = loss(config)
    torch.manual_seed(99)
    plain = {"caption_dropout": 1.0, "offset_noise": 0.0, "input_perturbation": 0.0}
    other = looking_run(assets, parts, seed=7, objective=plain)
    assert first == loss(config) == loss(other)
    with torch.no_grad():
        next(iter(found.weights.values())).mul_(1.01)
    assert loss(config) != first


def test_captions_are_told(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    held = read_validation(found.model, config, ONE)
    first = validation_loss(found.model, found.network, held, config, ONE).loss
    assert found.model.text is not None
    for pairs in held.chunks.values():
        assert pairs.token_ids is not None
        pairs.token_ids[:] = found.model.text.tokenize([""])
    assert validation_loss(found.model, found.network, held, config, ONE).loss != first


def test_a_frozen_tower_says_the_same(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    found = trainee(config)
    held = read_validation(found.model, config, ONE)
    first = validation_loss(found.model, found.network, held, config, ONE)
    frozen = looking_run(assets, parts, train_text=False)
    assert validation_loss(found.model, found.network, held, frozen, ONE) == first


@pytest.mark.parametrize("batch_size", [1, 20, 64])
def test_the_batch_size_changes_rounding_alone(assets: Path, parts: Path, batch_size: int) -> None:
    expected, _ = validate(looking_run(assets, parts))
    found, held = validate(looking_run(assets, parts, validation={"batch_size": batch_size}))
    assert held.numbers == tuple(range(20))
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_there_may_be_fewer_pairs_than_asked_for(assets: Path, parts: Path) -> None:
    result, held = validate(looking_run(assets, parts, validation={"num_samples": 1000}))
    assert result.num_samples == len(held.numbers) == 30 and str(held) == "30 held-out pairs"


def test_dropout_is_off_and_on_again_afterwards(assets: Path, parts: Path) -> None:
    config = looking_run(assets, parts)
    shape = {**config.unet.model_dump(), "dropout": 0.5}
    found = trainee(looking_run(assets, parts, unet=shape))
    held = read_validation(found.model, config, ONE)
    found.model.unet.mid_block.eval()
    modes = [module.training for module in found.network.modules()]
    results = {validation_loss(found.model, found.network, held, config, ONE) for _ in range(3)}
    assert len(results) == 1
    assert [module.training for module in found.network.modules()] == modes
    with pytest.raises(RuntimeError, match="halfway"), in_evaluation_mode(found.network):
        assert not any(module.training for module in found.network.modules())
        raise RuntimeError("halfway")
    assert [module.training for module in found.network.modules()] == modes


@pytest.mark.parametrize("num_timesteps", [1, 4])
def test_timesteps_cover_the_schedule(num_timesteps: int) -> None:
    found = torch.stack(
        [validation_timesteps(range(1024), k, num_timesteps) for k in range(num_timesteps)]
    )
    for k in range(num_timesteps):  # one in each part
        assert found[k].min() >= k / num_timesteps and found[k].max() < (k + 1) / num_timesteps
    counts = torch.histc((found * 1000).floor(), bins=1000, min=0, max=1000)
    mean = 1.024 * num_timesteps
    assert counts.min() >= mean - 2 and counts.max() <= mean + 2


# Held-out data


def test_what_cannot_be_used_is_named_and_the_next_pairs_stand_in(
    assets: Path, parts: Path, tmp_path: Path
) -> None:
    tar = broken_tar(assets, tmp_path, [3, 11, 29])
    result, held = validate(looking_run(assets, parts, tar))
    assert held.numbers == (*range(3), *range(4, 11), *range(12, 22))
    assert result.num_samples == 20
    assert [skip.position for skip in held.skips] == [3, 11]
    assert str(held).startswith("20 held-out pairs; 2 before the last cannot be used: ")
    for skip in held.skips:
        assert f"{skip.reason}: {tar}:{skip.key}" in str(held)


def test_a_sample_counts_the_same_whatever_is_bad_beside_it(
    assets: Path, parts: Path, tmp_path: Path
) -> None:
    """Noise and timestep belong to a sample, not to its place in a list."""
    config = looking_run(assets, parts, validation={"num_samples": 30})
    found = trainee(config)
    whole = read_validation(found.model, config, ONE)
    tar = broken_tar(assets, tmp_path, [0, 7])
    less = read_validation(
        found.model, looking_run(assets, parts, tar, validation={"num_samples": 30}), ONE
    )
    both = HeldOut(whole.chunks, whole.num_chunks, 6, less.numbers, ())
    run = (found.model, found.network)
    assert validation_loss(*run, less, config, ONE) == validation_loss(*run, both, config, ONE)


def test_all_bad_and_too_many_bad(assets: Path, parts: Path, tmp_path: Path) -> None:
    tar = broken_tar(assets, tmp_path, list(range(30)))
    with pytest.raises(TooManyBadSamples, match="30 of 30 samples cannot be used"):
        validate(looking_run(assets, parts, tar))
    data = {"shards": [str(tar)], "size_px": SIZE_PX, "max_bad_rate": 1.0}
    with pytest.raises(ValueError, match=r"none of 30 held-out pairs can be used, such as .*val"):
        validate(looking_run(assets, parts, validation={"data": data}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "random"}, "got validation.data.crop=random; set validation.data.crop: center"),
        ({"crop_px": 16}, "got validation.data.crop_px=16; set validation.data.crop_px: null"),
        ({"flip": True}, "got validation.data.flip=true; set validation.data.flip: false"),
        ({"buckets": {"base_px": [64]}}, "; set validation.data.buckets: null"),
        ({"size_px": 30}, "validation.data.size_px must be a multiple of 4 for this model; got 30"),
    ],
)  # fmt: skip
def test_pictures_that_change_are_refused(
    assets: Path, parts: Path, changes: dict[str, Any], message: str
) -> None:
    data = {"shards": [str(assets / "val-000000.tar")], "size_px": SIZE_PX, **changes}
    config = looking_run(assets, parts, validation={"data": data})
    with pytest.raises(ValueError) as caught:
        read_validation(trainee(config).model, config, ONE)
    assert message in str(caught.value)


def test_stored_latents_are_as_good_as_pictures(assets: Path, parts: Path, tmp_path: Path) -> None:
    config = looking_run(assets, parts)
    expected, _ = validate(config)
    model = trainee(config).model
    data = DataConfig(shards=(str(assets / "val-000000.tar"),), size_px=SIZE_PX)
    encoders = Encoders(
        "tiny", model.autoencoder, model.text, "fp32", model_hash(model.autoencoder)
    )
    precompute(data, encoders, tmp_path / "latents", batch_size=8)
    stored = {"shards": [str(tmp_path / "latents" / "*.tar")], "size_px": SIZE_PX}
    stored["payload"] = "latents"
    result, held = validate(looking_run(assets, parts, validation={"data": stored}))
    assert held.numbers == tuple(range(20))
    assert result.loss == pytest.approx(expected.loss, rel=2e-3)  # float16

    other = trainee(config).model
    with torch.no_grad():
        next(other.autoencoder.model.encoder.parameters()).mul_(2)
    with pytest.raises(ValueError, match="encoded by another autoencoder"):
        read_validation(other, looking_run(assets, parts, validation={"data": stored}), ONE)


# Ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_chunk_is_dealt_once_and_all_have_as_many_turns(num_ranks: int) -> None:
    worlds = [World(ONE.device, rank, num_ranks) for rank in range(num_ranks)]
    turns = [list(deal(5, world)) for world in worlds]
    assert len({len(own) for own in turns}) == 1
    assert sorted(n for own in turns for n in own if n is not None) == list(range(5))
    assert all(n is None or n % num_ranks == rank for rank, own in enumerate(turns) for n in own)


def test_collecting_keeps_the_chunks_order() -> None:
    assert collect({2: "c", 0: "a", 1: "b"}, ONE) == ["a", "b", "c"]
