"""Does every shipped config load by name and describe models that fit together?

A shipped config may start from what another one exports (`pretrained: runs/...`), which no checkout
has. Here the exporter's config stands for it: the shapes come from there, without weights.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.buildschedule import build_schedule
from latentdiff.config import (
    AutoencoderRun,
    ContrastiveRun,
    DiffusionRun,
    SmallTextConfig,
    load,
)
from latentdiff.configfile import dump_config, load_config, shipped_configs
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import Conditioning, new_tower, train_tokenizer
from latentdiff.training.contrastive import ImageTower
from latentdiff.training.shapes import shapes_of, without_weights
from latentdiff.unet import as_network, new_unet
from vae.autoencoder import Autoencoder

NAMES = sorted(shipped_configs())
TINY = """
kind: diffusion
out: runs/tiny
data: {shards: [a.tar], size_px: 32}
autoencoder: {kind: identity}
text: {kind: small, width: 16, layers: 1, heads: 2}
unet: {channels: [16, 32], cross_attention: [false, true], head_dim: 8, norm_num_groups: 4}
loop: {num_steps: 1}
"""


def exporter(directory: str) -> AutoencoderRun | ContrastiveRun:
    """The shipped config whose run leaves its model in `directory`."""
    for name in NAMES:
        run = load(name)
        if run.export == directory and not isinstance(run, DiffusionRun):
            return run
    raise AssertionError(f"no shipped config exports {directory}")


def tower_of(config: SmallTextConfig) -> Any:
    """The text tower; its vocabulary is only as long as these few words make it."""
    return new_tower(config, train_tokenizer(["a cat"], 600, config.context_length))


def test_there_are_configs_for_the_whole_path() -> None:
    kinds = {load(name).kind for name in NAMES}
    assert kinds == {"autoencoder", "contrastive", "diffusion"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_load_by_name_and_survive_a_dump(name: str, tmp_path: Path) -> None:
    run = load(name)
    assert run.out.startswith("runs/")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(run))
    assert load(path) == run


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_build_models_that_fit(name: str) -> None:
    run = load(name)
    size_px = run.data.output_px
    with torch.device("meta"):
        image = torch.empty(2, 3, size_px, size_px)
        match run:
            case AutoencoderRun():
                autoencoder = Autoencoder.build(run.autoencoder)
                z, _ = autoencoder.moments(image)
                assert autoencoder.model.decoder(z).shape == image.shape
            case ContrastiveRun():
                tower = tower_of(run.text)
                assert ImageTower(run.image, tower.config.hidden_size)(image).shape == (
                    2,
                    tower.config.hidden_size,
                )
            case DiffusionRun():
                pass  # below, without weights
    if isinstance(run, DiffusionRun):
        with without_weights():
            shapes = shapes_of(run)
            latents = torch.zeros(2, 3, size_px, size_px)
            if not shapes.autoencoder.is_identity:
                side = size_px // shapes.autoencoder.downscale
                latents = torch.zeros(2, shapes.autoencoder.latent_channels, side, side)
            cond = None
            if shapes.text is not None:
                ids = torch.zeros(2, shapes.text.context_length, dtype=torch.int64)
                cond = Conditioning(shapes.text.model(ids).last_hidden_state)
            network = as_network(shapes.unet, False)
            assert network(latents, torch.zeros(2), cond).shape == latents.shape
    if isinstance(run, DiffusionRun):
        schedule = build_schedule(run.schedule)
        assert isinstance(schedule, NoiseSchedule) and run.schedule.kind != "edm"
        assert schedule.num_timesteps == run.schedule.num_timesteps


@pytest.mark.parametrize("name", NAMES)
def test_shipped_diffusion_runs_and_their_text_towers_see_training_shards_alone(name: str) -> None:
    run = load(name)
    text = run.text if isinstance(run, DiffusionRun) else None
    if isinstance(text, SmallTextConfig) and text.pretrained is not None:
        text_run = exporter(text.pretrained)
        assert text_run.data.shards == run.data.shards  # no held-out picture through the tower
        assert all("train-" in shard for shard in run.data.shards)


def test_an_unconditional_unet_takes_no_text() -> None:
    run = load_tiny("text={kind: none}", "unet.cross_attention=[false, false]")
    assert isinstance(run, DiffusionRun)
    with torch.device("meta"):
        unet = new_unet(run.unet, 3, 32, None)
        noisy = torch.empty(2, 3, 32, 32)
        assert as_network(unet)(noisy, torch.zeros(2), None).shape == noisy.shape


def test_latents_that_cannot_be_halved_are_refused() -> None:
    run = load_tiny()
    assert isinstance(run, DiffusionRun)
    message = (
        "latents of side 9 cannot be halved 1 times; use fewer unet.channels or a larger data.size"
    )
    with pytest.raises(ValueError, match=message):
        new_unet(run.unet, 4, 9, 16)


def load_tiny(*overrides: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(TINY)
        return load(path, overrides)


def test_the_tiny_config_is_valid() -> None:
    assert isinstance(load_tiny(), DiffusionRun)
    assert load_tiny("cache_latents=true").cache_latents


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cache_latents=true", "data.crop=random"],
            "cache_latents needs pictures that are the same at every draw; got crop random, "
            "crop_px None, flip False; use crop: center, crop_px: null, flip: false, buckets: "
            "null, or cache_latents: false",
        ),
        (["cache_latents=true", "data.crop_px=16"], "cache_latents needs .* crop_px 16"),
        (["cache_latents=true", "data.flip=true"], "cache_latents needs .* flip True"),
        (["cache_latents=true", "data.payload=latents"], "data.payload is latents, so nothing"),
        (
            ["unet.cross_attention=[true]"],
            "unet: cross_attention needs one entry a level; got 1 for 2 channels",
        ),
        (
            ["text={kind: none}"],
            "unet.cross_attention is on but text.kind is none; set every entry of "
            "unet.cross_attention to false, or choose a text tower",
        ),
        (
            ["unet.cross_attention=[false, false]"],
            "text.kind is small but no entry of unet.cross_attention is true; switch one on, or "
            "set text.kind: none",
        ),
        (
            ["unet.self_attention=[false, true, false]"],
            "unet: self_attention needs one entry a level; got 3 for 2 channels",
        ),
        (
            ["unet.self_attention=[false, true]"],
            "unet.self_attention is on but text.kind is small, where the levels of "
            "unet.cross_attention attend to themselves too; leave unet.self_attention out",
        ),
        (["unet.dropout=1.0"], "unet.dropout: got 1.0; expected a value"),
        (["samples.sampler=dpm"], "samples.sampler: unknown sampler 'dpm'; known: ddpm, ddim"),
        (["samples.spacing=kerras"], "samples.spacing: unknown spacing 'kerras'; known: trailing"),
        (
            ["schedule={kind: edm}", "objective.prediction=edm"],
            "samples.spacing trailing needs numbered timesteps, which schedule.kind edm lacks; set "
            "samples.spacing: karras or exponential",
        ),
        (["samples.num_images=0"], "samples.num_images: got 0; expected a value"),
        (
            ["unet.channels=[16, 36]"],
            r"unet: channels must be multiples of head_dim \(8\) and norm_num_groups \(4\); got 36",
        ),
        (
            ["text.heads=3"],
            "text: heads must divide width; got 3 for a width of 16; choose a divisor",
        ),
        (
            ["loop.batch_size=6", "loop.accumulation=4"],
            "loop: accumulation must divide batch_size; got 6 / 4; choose a divisor",
        ),
        (
            ["samples.num_steps=30", "schedule.num_timesteps=20"],
            r"samples.num_steps must be at most schedule.num_timesteps \(20\); got 30",
        ),
        (
            ["init_from=box"],
            "init_from takes autoencoder, text, unet and schedule from box; leave out autoencoder, "
            "text, unet, or set init_from: null",
        ),
        (
            ["text={kind: none}", "train_text=true", "unet.cross_attention=[false, false]"],
            "train_text is true but text.kind is none; set train_text: false",
        ),
        (["samples.prompts=[]"], r"samples.prompts: got \(\)|samples.prompts: got \[\]"),
        (["data.crop_px=64"], "data: crop_px must be at most size_px; got 64 > 32"),
        (["text.tokenizer.vocab_size=100"], "text.tokenizer.vocab_size: got 100; expected a value"),
        (["objective.prediction=eps"], "objective.prediction: got 'eps'; expected 'epsilon', 'v'"),
        (["optimiser.lr=1"], "optimiser: unknown key; did you mean optimizer"),
    ],
)
def test_impossible_combinations_name_their_keys(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^({message})") as caught:
        load_tiny(*overrides)
    assert "\n" not in str(caught.value)


def test_load_and_load_config_agree() -> None:
    name = next(name for name in NAMES if load(name).kind == "diffusion")
    assert load_config(DiffusionRun, name) == load(name)
    assert load(name, ["optimizer.lr=0.5"]).optimizer.lr == 0.5


# The big ones and the small one for tests


BIG = ("sd15_256", "sd15_512", "sd2_v_768")


def header(name: str) -> str:
    """The comment that a config opens with."""
    lines = shipped_configs()[name].read_text(encoding="utf-8").splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_opens_with_its_command_its_time_and_its_result(name: str) -> None:
    opening = header(name)
    assert f"--config {name}" in opening
    assert "# Time: " in opening or "#   latentdiff train" in opening
    assert "# Result: " in opening


@pytest.mark.parametrize("name", BIG)
def test_big_configs_say_what_was_not_run_and_read_stored_latents(name: str) -> None:
    run = load(name)
    assert isinstance(run, DiffusionRun)
    assert "# Result: not run here." in header(name) and "# Hardware: " in header(name)
    assert run.data.payload == "latents" and run.loop.precision == "bf16"
    assert run.validation is not None and run.evaluation is not None
    assert set(run.validation.data.shards).isdisjoint(run.data.shards)
    assert run.loop.batch_size % 64 == 0 and run.data.order.streams == 64
    assert run.objective.caption_dropout == 0.1 and run.ema.decay == 0.9999


def test_stable_diffusion_continues_at_512_what_it_learned_at_256() -> None:
    small, large = load("sd15_256"), load("sd15_512")
    assert isinstance(small, DiffusionRun) and isinstance(large, DiffusionRun)
    assert large.init_from == small.export and small.export_dtype == "fp32"
    assert large.objective == small.objective
    assert large.data.buckets is not None and large.data.buckets.base_px == (512,)


def test_the_debug_config_divides_among_many_ranks_and_proves_its_data() -> None:
    run = load("debug_cpu")
    assert isinstance(run, DiffusionRun)
    assert run.loop.device == "cpu" and run.loop.log_positions
    assert all(run.loop.batch_size % ranks == 0 for ranks in (1, 2, 3, 4, 6, 12))
    assert run.validation is not None and run.loop.sample_every is not None
    assert run.loop.num_steps * run.loop.batch_size > 171  # more than an epoch of tests/assets
