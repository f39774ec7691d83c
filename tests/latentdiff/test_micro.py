"""Does a batch become a micro-batch that positions alone decide, with nothing left out?"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.batch import Batch
from latentdiff.build import build_weighting
from latentdiff.config import SmallTextConfig
from latentdiff.configobjective import DiffusionObjectiveConfig, MinSNRWeighting
from latentdiff.loss import drop_captions, loss_weight
from latentdiff.loss import target as target_of
from latentdiff.randomness import normal, uniform
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule
from latentdiff.text import TextEncoder, new_tower, train_tokenizer
from latentdiff.training.feed import clean_latents
from latentdiff.training.latents import LatentCache
from latentdiff.training.micro import MicroBatch, Recipe, own_tokenizer, prepare
from latentdiff.training.noise import draw_noise, timestep_draws
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig, KLConfig

SEED, BATCH = 3, 24
EVERYTHING = DiffusionObjectiveConfig(
    prediction="v",
    weighting=MinSNRWeighting(gamma=5.0),
    stratified_timesteps=True,
    offset_noise=0.1,
    input_perturbation=0.1,
    caption_dropout=0.3,
)


def tokenize(captions: Sequence[str]) -> Tensor:
    return torch.tensor([[zlib.crc32(caption.encode()), len(caption)] for caption in captions])


EMPTY = tokenize([""])[0]


def make_recipe(**changes: Any) -> Recipe:
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    plain = Recipe(SEED, BATCH, schedule, "v", EVERYTHING, 4, 2, True, tokenize)
    return replace(plain, **changes)


def make_batch(payload: str = "pixels", first: int = 2 * BATCH, count: int = BATCH) -> Batch:
    """Places `first` on; of each the payload and the caption are its own."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (100, 8, 8, 3), np.uint8))
    channels = {"moments": 2, "samples": 1}.get(payload, 0)
    latents = torch.from_numpy(random.random((100, channels, 4, 4, 4), np.float32)).half()
    here, sizes = np.arange(first, first + count), np.zeros((count, 2), np.int32)
    return Batch(
        step=first // BATCH,
        num_planned=BATCH,
        positions=here,
        ids=here % 7,
        valid=np.ones(count, dtype=bool),
        keys=tuple(map(str, here)),
        captions=tuple(f"a cat of {i}" if channels == 0 else "" for i in here),
        pixels=pixels[here] if payload == "pixels" else None,
        latents=latents[here] if channels else None,
        tokens=torch.arange(200, dtype=torch.int32).view(100, 2)[here] if channels else None,
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
    )


def without(batch: Batch, *places: int) -> Batch:
    """The batch with empty places, as the loader leaves them."""
    valid = batch.valid.copy()
    captions = list(batch.captions)
    tensors = {
        name: value.clone()
        for name in ("pixels", "latents", "tokens")
        if (value := getattr(batch, name)) is not None
    }
    for place in places:
        valid[place], captions[place] = False, ""
        for value in tensors.values():
            value[place] = 0
    return replace(batch, valid=valid, captions=tuple(captions), **tensors)


def tensors_of(micro: MicroBatch) -> dict[str, Tensor]:
    found = {name: value for name, value in vars(micro).items() if isinstance(value, Tensor)}
    return found | {f"numbers.{name}": value for name, value in vars(micro.numbers).items()}


# What decides


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("payload", ["pixels", "moments", "samples"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (NoiseSchedule.cosine(), "v"),
        (FlowSchedule(shift=2.0), "flow"),
        (EDMSchedule(), "edm"),
    ],
)
def test_micro_batches_are_cuts_of_the_batch_to_the_bit(
    schedule: Schedule, prediction: str, payload: str, count: int
) -> None:
    recipe = make_recipe(schedule=schedule, prediction=prediction, with_proof=True)
    batch = without(make_batch(payload), 5, 23)
    whole = prepare(batch, recipe)
    parts = [prepare(part, recipe) for part in batch.split(BATCH // count)]
    assert all(len(part) == count and part.num_planned == BATCH for part in parts)
    for name, value in tensors_of(whole).items():
        together = torch.cat([tensors_of(part)[name] for part in parts])
        assert together.dtype == value.dtype and torch.equal(together, value), name
    assert [p for part in parts for p in part.positions] == whole.positions
    assert whole.proof is not None
    for field in fields(whole.proof):
        together = [value for part in parts for value in getattr(part.proof, field.name)]
        assert together == getattr(whole.proof, field.name), field.name


def test_float64_timesteps_are_cuts_too() -> None:
    """They differed in the last bit: what computes the end of a vector has another sigmoid."""
    recipe = make_recipe(schedule=FlowSchedule(), prediction="flow", batch_size=960)
    batch = replace(make_batch(), positions=np.arange(BATCH))
    many = [replace(batch, positions=batch.positions + i * BATCH) for i in range(40)]
    whole = torch.cat([prepare(b, recipe).t for b in many])
    parts = [prepare(part, recipe).t for b in many for part in b.split(8)]
    assert torch.equal(torch.cat(parts), whole) and whole.dtype == torch.float64


def test_another_seed_is_another_draw() -> None:
    one, two = (prepare(make_batch(), make_recipe(seed=seed)) for seed in (3, 4))
    for name in ("noise", "extra_noise", "posterior", "t"):
        assert not torch.equal(getattr(one, name), getattr(two, name)), name


# What it says


def test_it_is_what_the_schedule_and_the_counters_say() -> None:
    recipe, batch = make_recipe(), make_batch()
    micro = prepare(batch, recipe)
    positions, shape = range(2 * BATCH, 3 * BATCH), (4, 4, 4)
    assert (micro.step, micro.positions) == (2, list(positions))
    assert micro.ids == [p % 7 for p in positions] and micro.valid.tolist() == [1.0] * BATCH

    t = recipe.schedule.draw_timesteps(timestep_draws(positions, SEED, BATCH, stratified=True))
    assert torch.equal(micro.t, t)
    noise = draw_noise(shape, positions, SEED, 0.1)
    extra = 0.1 * normal(shape, SEED, positions, "input_perturbation")
    assert torch.equal(micro.noise, noise)
    assert torch.equal(micro.perturbed_noise, noise + extra)
    assert micro.posterior is not None
    assert torch.equal(micro.posterior, normal(shape, SEED, positions, "posterior"))

    clean = torch.randn(BATCH, *shape)
    noisy = recipe.schedule.add_noise(clean, noise + extra, t)
    assert torch.equal(micro.numbers.add_noise(clean, micro.perturbed_noise), noisy)
    expected = target_of(recipe.schedule, clean, noise, t, "v")
    assert torch.equal(micro.numbers.target(clean, micro.noise), expected)
    weight = loss_weight(build_weighting(EVERYTHING.weighting, 1.0), recipe.schedule.snr(t), "v")
    assert torch.equal(micro.numbers.weight, weight.float())

    draws = torch.from_numpy(uniform(SEED, positions, "caption_drop"))
    kept = drop_captions(list(batch.captions), draws, 0.3)
    assert 0 < kept.count("") < BATCH
    assert micro.token_ids is not None and torch.equal(micro.token_ids, tokenize(kept))


def test_plain_objectives_have_no_extra_noise_and_no_text_no_ids() -> None:
    objective = DiffusionObjectiveConfig()
    micro = prepare(make_batch(), make_recipe(objective=objective, tokenize=None))
    assert micro.extra_noise is None and micro.token_ids is None and micro.proof is None
    assert micro.perturbed_noise is micro.noise


def test_stored_ids_are_dropped_as_captions_are() -> None:
    batch = without(make_batch("moments"), 4)
    micro = prepare(batch, make_recipe())
    draws = uniform(SEED, batch.positions.tolist(), "caption_drop")
    assert micro.token_ids is not None and micro.token_ids.dtype == torch.int64
    assert batch.tokens is not None and 0 < (draws < 0.3).sum() < BATCH
    for i, row in enumerate(micro.token_ids):
        kept = draws[i] >= 0.3 and i != 4
        assert torch.equal(row, batch.tokens[i].long() if kept else EMPTY), i


@pytest.mark.parametrize("payload", ["pixels", "moments", "samples"])
def test_empty_places_keep_their_place_and_change_no_other(payload: str) -> None:
    recipe, batch = make_recipe(), make_batch(payload)
    full, holed = prepare(batch, recipe), prepare(without(batch, 0, 7), recipe)
    assert holed.valid.tolist() == [float(i not in (0, 7)) for i in range(BATCH)]
    others = [i for i in range(BATCH) if i not in (0, 7)]
    for name, value in tensors_of(full).items():
        found = tensors_of(holed)[name]
        assert found.shape == value.shape and torch.equal(found[others], value[others]), name
        assert found.isfinite().all()


def test_all_that_a_step_needs_can_be_moved() -> None:
    micro = prepare(make_batch("moments"), make_recipe())
    moved = micro.to(lambda tensor: tensor.clone())
    assert moved.t is micro.t
    for name, value in tensors_of(micro).items():
        there = tensors_of(moved)[name]
        assert torch.equal(there, value), name
        assert name == "t" or there is not value, name


# Proof


def test_the_proof_tells_any_change() -> None:
    recipe, batch = make_recipe(with_proof=True), make_batch()
    proof = prepare(batch, recipe).proof
    assert proof is not None
    assert len(set(proof.noise)) == len(set(proof.data)) == BATCH
    draws = uniform(SEED, batch.positions.tolist(), "caption_drop")
    assert proof.dropped == (draws < 0.3).tolist() and proof.valid == [True] * BATCH

    assert batch.pixels is not None
    pixels = batch.pixels.clone()
    pixels[3, 0, 0, 0] ^= 1
    other = prepare(replace(batch, pixels=pixels), recipe).proof
    assert other is not None and other.noise == proof.noise
    assert [a != b for a, b in zip(other.data, proof.data, strict=True)].index(True) == 3
    captions = (*batch.captions[:4], "a dog", *batch.captions[5:])
    other = prepare(replace(batch, captions=captions), recipe).proof
    assert other is not None and [*other.data[:4], *other.data[5:]] == [
        *proof.data[:4],
        *proof.data[5:],
    ]
    assert other.data[4] != proof.data[4]

    for strength in ("offset_noise", "input_perturbation"):
        objective = EVERYTHING.model_copy(update={strength: 0.2})
        other = prepare(batch, replace(recipe, objective=objective)).proof
        assert other is not None and other.data == proof.data
        assert not set(other.noise) & set(proof.noise)


def test_the_proof_holds_stored_ids_too() -> None:
    recipe, batch = make_recipe(with_proof=True), make_batch("moments")
    assert batch.tokens is not None
    tokens = batch.tokens.clone()
    tokens[6, 1] += 1
    one, two = (prepare(b, recipe).proof for b in (batch, replace(batch, tokens=tokens)))
    assert one is not None and two is not None
    assert [i for i in range(BATCH) if one.data[i] != two.data[i]] == [6]


def test_no_caption_is_dropped_where_there_is_no_text() -> None:
    proof = prepare(make_batch(), make_recipe(with_proof=True, tokenize=None)).proof
    assert proof is not None and not any(proof.dropped)


# Clean latents


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    config = KLConfig(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_attention=False,
    )
    return Autoencoder.build(config).eval()


def test_pixels_are_encoded_with_their_own_noise(autoencoder: Autoencoder) -> None:
    batch = make_batch()
    micro = prepare(batch, make_recipe())
    clean = clean_latents(autoencoder, micro)
    mean, std = autoencoder.moments(batch.images)
    noise = normal((4, 4, 4), SEED, micro.positions, "posterior")
    assert torch.equal(clean, (mean + std * noise).detach()) and not clean.requires_grad
    assert clean.dtype == torch.float32 and clean.shape == micro.noise.shape


def test_stored_moments_are_drawn_from_and_samples_taken(autoencoder: Autoencoder) -> None:
    batch = make_batch("moments")
    micro = prepare(batch, make_recipe())
    assert batch.latents is not None and micro.posterior is not None and micro.pixels is None
    mean, std = batch.latents.float().unbind(1)
    assert torch.equal(clean_latents(autoencoder, micro), mean + std * micro.posterior)
    batch = make_batch("samples")
    micro = prepare(batch, make_recipe())
    assert batch.latents is not None and micro.posterior is None
    assert torch.equal(clean_latents(autoencoder, micro), batch.latents[:, 0].float())


def test_cached_latents_are_as_stored_ones(autoencoder: Autoencoder) -> None:
    moments = torch.rand(7, 2, 4, 4, 4).half()
    cache = LatentCache(moments[:, 0], moments[:, 1])
    batch = replace(make_batch(), pixels=None)
    batch.ids[3] = -1
    micro = prepare(batch, make_recipe(cache=cache))
    stored = replace(batch, latents=moments[torch.from_numpy(batch.ids)])
    assert stored.latents is not None
    stored.latents[3] = 0
    expected = clean_latents(autoencoder, prepare(stored, make_recipe()))
    assert torch.equal(clean_latents(autoencoder, micro), expected)


def test_pixel_space_draws_no_posterior() -> None:
    batch = make_batch()
    recipe = make_recipe(latent_channels=3, downscale=1, has_posterior=False)
    micro = prepare(batch, recipe)
    assert micro.posterior is None and micro.noise.shape == (BATCH, 3, 8, 8)
    identity = Autoencoder.build(IdentityConfig())
    assert torch.equal(clean_latents(identity, micro), batch.images)


# A tokenizer in two threads


def test_the_thread_has_a_tokenizer_of_its_own() -> None:
    """One that is shared raises "Already borrowed" when both threads set its padding."""
    config = SmallTextConfig(width=16, layers=1, heads=2, context_length=16)
    words = train_tokenizer(["a red apple", "a cat"] * 9, 600, 16)
    text = TextEncoder(words, new_tower(config, words))
    alone = own_tokenizer(text)
    captions = [f"a red cat {i}" for i in range(50)]
    expected = text.tokenize(captions)
    assert torch.equal(alone(captions), expected)
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                assert torch.equal(alone(captions), expected)
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():  # as sampling may do in the loop's thread
        words(captions, padding="longest")
        words(captions, padding="max_length", max_length=8, truncation=True)
    thread.join()
    assert not faults
