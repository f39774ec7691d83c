"""Do hashes tell models apart that make other latents or ids, and only those?"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from data_pipelines.latentinfo import LatentSettings
from latentdiff.config import SmallTextConfig
from latentdiff.pairing import check_model, check_tokenizer, model_hash, tokenizer_hash
from latentdiff.text import TextEncoder, new_tower, train_tokenizer
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig, KLConfig, TinyConfig
from vae.latent_norm import LatentNorm

CAPTIONS = ["a red apple", "a blue car on a road", "Ein Hund läuft durch den Wald", "two cats"] * 20


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    return Autoencoder.build(KLConfig.model_validate(shape)).eval()


def new_text(vocab_size: int = 560, length: int = 16) -> TextEncoder:
    tokenizer = train_tokenizer(CAPTIONS, vocab_size, length)
    config = SmallTextConfig(width=16, layers=1, heads=2, context_length=length)
    return TextEncoder(tokenizer, new_tower(config, tokenizer))


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return new_text()


def settings(autoencoder: Autoencoder, text: TextEncoder | None) -> LatentSettings:
    return LatentSettings(
        model="models/old",
        model_hash=model_hash(autoencoder),
        tokenizer_hash=None if text is None else tokenizer_hash(text),
        downscale=2,
        channels=4,
        dtype="fp32",
        seed=0,
        data={},
    )


def test_what_makes_the_same_latents_has_the_same_hash(
    autoencoder: Autoencoder, tmp_path: Path
) -> None:
    here = model_hash(autoencoder)
    assert len(here) == 64 and here == model_hash(autoencoder)
    other = copy.deepcopy(autoencoder)
    assert model_hash(other.to(memory_format=torch.channels_last)) == here
    assert model_hash(other.half()) == here
    autoencoder.save(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    values = json.loads(config.read_text())
    # what another version of diffusers may write besides
    config.write_text(json.dumps({**values, "_diffusers_version": "9.0", "sample_size": 1024}))
    assert model_hash(Autoencoder.load(tmp_path / "saved")) == here
    with torch.no_grad():
        other = copy.deepcopy(autoencoder)
        other.model.decoder.conv_in.weight += 1
        other.model.post_quant_conv.weight += 1
    assert model_hash(other) == here  # another decoder for the same latents


def test_what_makes_other_latents_has_another_hash(autoencoder: Autoencoder) -> None:
    hashes = {model_hash(autoencoder)}
    for name in ("encoder.conv_in.weight", "encoder.conv_out.bias", "quant_conv.weight"):
        other = copy.deepcopy(autoencoder)
        with torch.no_grad():
            other.model.get_parameter(name).view(-1)[0] += 1e-2
        hashes.add(model_hash(other))
    for norm in (
        LatentNorm.from_scalars(0.18215),
        LatentNorm.from_scalars(1.0, 0.1),
        LatentNorm(torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 2.0])),
    ):
        other = copy.deepcopy(autoencoder)
        other.norm = norm
        hashes.add(model_hash(other))
    groups = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    regrouped = Autoencoder.build(KLConfig.model_validate(groups))
    regrouped.model.load_state_dict(autoencoder.model.state_dict())
    hashes.add(model_hash(regrouped))
    hashes.add(model_hash(Autoencoder.build(TinyConfig(block_out_channels=(8, 8)))))
    hashes.add(model_hash(Autoencoder.build(IdentityConfig())))
    assert len(hashes) == 10


def test_tokenizers_are_told_apart_by_what_they_do(text: TextEncoder, tmp_path: Path) -> None:
    here = tokenizer_hash(text)
    text.tokenize(["a cat", "something longer than the other one"])  # which sets its padding
    assert tokenizer_hash(text) == here
    text.save(tmp_path / "saved")
    assert tokenizer_hash(TextEncoder.load(tmp_path / "saved")) == here
    for extra in (tmp_path / "saved" / "tokenizer" / "tokenizer.json",):
        extra.unlink()  # published models have vocab.json and merges.txt alone
    bare = CLIPTokenizer.from_pretrained(tmp_path / "saved" / "tokenizer")
    bare.model_max_length = 16
    assert tokenizer_hash(TextEncoder(bare, text.model)) == here
    others = [tokenizer_hash(new_text(540)), tokenizer_hash(new_text(560, 12))]
    assert len({here, *others}) == 3


def test_a_wrong_pair_is_refused(autoencoder: Autoencoder, text: TextEncoder) -> None:
    stored = settings(autoencoder, text)
    check_model(stored, autoencoder)
    check_tokenizer(stored, text)
    other = copy.deepcopy(autoencoder)
    other.norm = LatentNorm.from_scalars(0.5)
    with pytest.raises(
        ValueError,
        match=rf"encoded by another autoencoder \(hash {stored.model_hash[:12]}, here "
        rf"{model_hash(other)[:12]}\); precompute again with --model .* called models/old",
    ):
        check_model(stored, other)
    with pytest.raises(
        ValueError,
        match=rf"made by another tokenizer \(hash {str(stored.tokenizer_hash)[:12]}, here .*"
        "precompute again with --model .* called models/old",
    ):
        check_tokenizer(stored, new_text(540))
    with pytest.raises(ValueError, match=r"these latents have no token ids; .* as --text"):
        check_tokenizer(settings(autoencoder, None), text)
