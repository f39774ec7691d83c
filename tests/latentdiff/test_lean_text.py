"""Does the lean text tower give transformers' numbers, alone and with its tokenizer?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.lean.clip import LeanText, LeanTower, why_not
from latentdiff.lean.weights import Unsupported, read_weights
from latentdiff.pipeline import PRETRAINED
from latentdiff.text import TextEncoder

PROMPTS = ["a red apple, fluent 3d", "", "Ein ÄPFELCHEN", "👩‍🚀 with a 🍎!", "word " * 60]

SHAPE: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=12, bos_token_id=97, eos_token_id=98,
)  # fmt: skip


def their_tower(cls: Any = CLIPTextModel, **settings: Any) -> Any:
    """transformers' tower with random weights, none of them near zero or one."""
    torch.manual_seed(0)
    tower = cls(CLIPTextConfig(**{**SHAPE, **settings})).eval()
    for parameter in tower.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return tower


def token_ids() -> torch.Tensor:
    ids = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    for row, end in enumerate((3, 11, 6)):
        ids[row, end:] = 98
    return ids


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_id", [2, 98])
@torch.inference_mode()
def test_a_tower_is_that_of_transformers(activation: str, eos_id: int) -> None:
    theirs = their_tower(hidden_act=activation, eos_token_id=eos_id)
    ours = LeanTower.from_weights(theirs.config.to_dict(), theirs.state_dict())
    ids = token_ids()
    expected = theirs(ids, output_hidden_states=True)
    assert error(ours(ids), expected.last_hidden_state) < 1e-5
    assert error(ours.pooled(ids), expected.pooler_output) < 1e-5
    for skip in range(3):  # what diffusers' pipeline does for clip_skip
        states = theirs.final_layer_norm(expected.hidden_states[-(skip + 1)])
        if skip:
            assert error(ours(ids, skip), states) < 1e-5
            assert error(ours(ids, skip), expected.last_hidden_state) > 0.01
    assert error(ours(ids[:, :5]), theirs(ids[:, :5]).last_hidden_state) < 1e-5


@torch.inference_mode()
def test_a_token_sees_none_behind_it() -> None:
    theirs = their_tower()
    ours = LeanTower.from_weights(theirs.config.to_dict(), theirs.state_dict())
    ids = token_ids()
    changed = ids.clone()
    changed[:, 7:] = 5
    assert torch.equal(ours(ids)[:, :7], ours(changed)[:, :7])
    assert not torch.equal(ours(ids)[:, 7:], ours(changed)[:, 7:])


@torch.inference_mode()
def test_names_of_all_ages_and_a_whole_clip() -> None:
    theirs = their_tower()
    expected = theirs(token_ids()).last_hidden_state
    plain = dict(theirs.state_dict())
    old = {f"text_model.{name}": value for name, value in plain.items()}
    old["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    whole = {**old, "logit_scale": torch.ones(()), "vision_model.x.weight": torch.ones(3)}
    nested = {"model_type": "clip", "text_config": theirs.config.to_dict(), "projection_dim": 7}
    for config, weights in (
        (theirs.config.to_dict(), plain),
        (theirs.config.to_dict(), old),
        (nested, whole),
    ):
        assert error(LeanTower.from_weights(config, weights)(token_ids()), expected) < 1e-5


@torch.inference_mode()
def test_a_tower_with_a_projection_has_the_same_hidden_states() -> None:
    theirs = their_tower(CLIPTextModelWithProjection)
    ours = LeanTower.from_weights(theirs.config.to_dict(), theirs.state_dict())
    assert error(ours(token_ids()), theirs(token_ids()).last_hidden_state) < 1e-5


def test_what_a_config_leaves_out_is_transformers_default() -> None:
    with torch.device("meta"):
        ours = LeanTower({})
    theirs = CLIPTextConfig()
    assert {name: getattr(theirs, name) for name in ours.config} == ours.config


def test_towers_for_the_library() -> None:
    assert why_not({"model_type": "clip_text_model"}) is None
    assert why_not({"model_type": "t5"}) == "a t5 is no CLIP text tower"
    with pytest.raises(Unsupported, match="hidden_act is relu; supported: quick_gelu, gelu"):
        LeanTower({"hidden_act": "relu"})


def test_weights_of_another_tower() -> None:
    theirs = their_tower()
    config, weights = theirs.config.to_dict(), dict(theirs.state_dict())
    with pytest.raises(
        ValueError, match=r"text_model.final_layer_norm.weight of shape \(16,\); it"
    ):
        LeanTower.from_weights(
            config | {"hidden_size": 16},
            {"final_layer_norm.weight": torch.ones(32)}
            | {k: v for k, v in _of_width(config, 16).items() if k != "final_layer_norm.weight"},
        )
    del weights["encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.fc1.bias of shape \(48,\); there is none; "
    ):
        LeanTower.from_weights(config, weights)


def _of_width(config: dict[str, Any], width: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        tower = LeanTower(config | {"hidden_size": width})
    return {name: torch.zeros(value.shape) for name, value in tower.state_dict().items()}


@pytest.mark.parametrize("skip", [-1, 3])
def test_layers_to_skip_that_are_not_there(skip: int) -> None:
    theirs = their_tower()
    ours = LeanTower.from_weights(theirs.config.to_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match=rf"must be from 0 to 2, .* has 3 layers; got {skip}; 0"):
        ours(token_ids(), skip)
    with pytest.raises(ValueError, match="13 tokens are too many; this text tower reads up to 12"):
        ours(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_precision(dtype: torch.dtype) -> None:
    theirs = their_tower()
    ours = LeanTower.from_weights(theirs.config.to_dict(), theirs.state_dict(), dtype=dtype)
    states = ours(token_ids())
    assert states.dtype == ours.dtype == dtype
    assert error(states.float(), theirs(token_ids()).last_hidden_state) < 0.05


# Both together


@pytest.fixture(scope="module")
def box() -> LeanText:
    return LeanText.load(PRETRAINED)


@torch.inference_mode()
def test_the_box_is_as_with_transformers(box: LeanText) -> None:
    theirs = TextEncoder.load(PRETRAINED).float().eval()
    assert torch.equal(box.tokenize(PROMPTS), theirs.tokenize(PROMPTS))
    ids = box.tokenize(PROMPTS)
    assert error(box.encode(PROMPTS).tokens, theirs.encode(PROMPTS).tokens) < 1e-5
    assert error(box.pooled(ids), theirs.pooled(ids)) < 1e-5
    for skip in range(4):
        assert error(box.hidden(ids, skip), theirs.hidden(ids, skip)) < 1e-5
        assert torch.equal(box(ids, skip).tokens, box.encode(PROMPTS, skip).tokens)
    for name in ("width", "context_length", "bos_id", "eos_id", "pad_id"):
        assert getattr(box, name) == getattr(theirs, name)
    assert [box.ids(text) for text in PROMPTS] == [theirs.ids(text) for text in PROMPTS]


@torch.inference_mode()
def test_one_row_does_not_depend_on_its_neighbours(box: LeanText) -> None:
    together = box.encode(PROMPTS).tokens
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert error(box.encode([prompt]).tokens[0], row) < 1e-5


def test_nothing_is_to_be_trained(box: LeanText) -> None:
    assert not box.training and not any(p.requires_grad for p in box.parameters())


def test_weights_from_elsewhere(box: LeanText) -> None:
    """As merging a LoRA does: the same directory, changed weights."""
    weights = read_weights(PRETRAINED / "text_encoder")
    changed = {**weights, "text_model.final_layer_norm.bias": torch.full((256,), 3.0)}
    text = LeanText.from_weights(PRETRAINED, box.model.config, changed)
    assert text.model.final_layer_norm.bias.unique().item() == 3


def test_a_directory_that_is_saved_by_the_library(tmp_path: Path) -> None:
    theirs = TextEncoder.load(PRETRAINED).float().eval()
    theirs.save(tmp_path)
    tower = tmp_path / "text_encoder" / "model.safetensors"
    save_file(load_file(tower), tower.with_name("model.fp16.safetensors"))
    tower.unlink()
    with torch.inference_mode():
        tokens = LeanText.load(tmp_path).encode(PROMPTS).tokens
        assert error(tokens, theirs.encode(PROMPTS).tokens) < 1e-5
