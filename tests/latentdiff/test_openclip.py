"""Does a converted OpenCLIP text tower read the same tokens and say the same as open_clip's own?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.build import build_text
from latentdiff.config import OpenCLIPTextConfig
from latentdiff.openclip import convert_openclip, load_openclip
from latentdiff.text import TextEncoder

NAME = "latentdiff-test-tiny"
CONTEXT = 12
VISION: dict[str, Any] = {
    "image_size": 32,
    "layers": 1,
    "width": 32,
    "head_width": 16,
    "patch_size": 16,
}
TEXT: dict[str, Any] = {
    "context_length": CONTEXT,
    "vocab_size": 49408,
    "width": 32,
    "heads": 2,
    "layers": 2,
}
PROMPTS = [
    "a red apple",
    "",
    "  two   spaces\tand\na line ",
    "Größe, café & ÜBER-ALL",
    "日本語のりんご 🍎👩‍🚀",
    "don't, we'll, it's: 1234 abc123",
    "wow! yes!!! !",  # "!" alone is id 0, which pads
    "tokens " * 40,  # cut
    "a_b-c (d) [e] {f} \"g\" 'h' <i>",
]


def new_model(kind: str = "CLIP", quick_gelu: bool = False, **text: Any) -> Any:
    import open_clip.model as theirs

    torch.manual_seed(0)
    model = getattr(theirs, kind)(
        16,
        theirs.CLIPVisionCfg(**VISION),
        theirs.CLIPTextCfg(**{**TEXT, **text}),
        quick_gelu=quick_gelu,
    ).eval()
    tower = getattr(model, "text", model)
    for parameter in tower.transformer.parameters():  # biases and norms start at 0 and 1
        parameter.data += 0.1 * torch.randn_like(parameter)
    tower.ln_final.bias.data.normal_()
    return model


def hidden_states(model: Any, ids: Tensor) -> Tensor:
    """open_clip's encode_text as far as ln_final, as it stands in open_clip.model.CLIP."""
    tower = getattr(model, "text", model)
    x = tower.token_embedding(ids) + tower.positional_embedding
    return tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))


def test_last_layers_can_be_left_out() -> None:
    """Stable Diffusion 2.x takes the penultimate layer's output through the final norm."""
    model = new_model(layers=3)
    encoder = convert_openclip(model, skip_layers=1).eval()
    ids = encoder.tokenize(PROMPTS)
    x = model.token_embedding(ids) + model.positional_embedding
    with torch.no_grad():
        for block in model.transformer.resblocks[:2]:
            x = block(x, attn_mask=model.attn_mask)
        expected = model.ln_final(x)
        torch.testing.assert_close(encoder(ids).tokens, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^skip_layers must be below the tower's 3 layers; got 3"):
        convert_openclip(model, skip_layers=3)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_hidden_states_are_open_clips(kind: str, quick_gelu: bool) -> None:
    model = new_model(kind, quick_gelu)
    encoder = convert_openclip(model).eval()
    ids = encoder.tokenize(PROMPTS)
    with torch.no_grad():
        expected = hidden_states(model, ids)
        torch.testing.assert_close(encoder(ids).tokens, expected, rtol=0, atol=1e-5)
        tower = getattr(model, "text", model)
        projected = encoder.pooled(ids) @ tower.text_projection
        torch.testing.assert_close(projected, model.encode_text(ids), rtol=0, atol=1e-5)
    assert expected.std() > 0.5


def test_token_ids_are_open_clips_padding_included(tmp_path: Path) -> None:
    import open_clip

    encoder = convert_openclip(new_model())
    expected = open_clip.SimpleTokenizer(context_length=CONTEXT)(PROMPTS)
    assert encoder.tokenize(PROMPTS).tolist() == expected.tolist()
    assert (expected[0] == 0).sum() == CONTEXT - 5

    encoder.save(tmp_path)
    again = TextEncoder.load(tmp_path).eval()
    assert again.tokenize(PROMPTS).tolist() == expected.tolist()
    with torch.no_grad():
        assert torch.equal(again(expected).tokens, encoder.eval()(expected).tokens)


def test_models_are_found_by_name_with_weights_from_a_file(tmp_path: Path) -> None:
    import open_clip

    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{NAME}.json")
    model = new_model()
    weights = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)

    encoder = build_text(OpenCLIPTextConfig(name=NAME, weights=str(weights)))
    assert encoder is not None
    ids = open_clip.get_tokenizer(NAME)(PROMPTS)
    assert encoder.tokenize(PROMPTS).tolist() == ids.tolist()
    with torch.no_grad():
        tokens = encoder.eval()(ids).tokens
        torch.testing.assert_close(tokens, hidden_states(model, ids), rtol=0, atol=1e-5)
    assert load_openclip(NAME, None).width == 32  # random weights


def test_unknown_names_and_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown OpenCLIP model 'ViT-H-41'; known: \[.*ViT-H-14"):
        load_openclip("ViT-H-41", None)
    message = r"unknown weights 'laion' of ViT-H-14; expected a file or one of .*laion2b"
    with pytest.raises(ValueError, match=message):
        load_openclip("ViT-H-14", "laion")


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("CLIP", {"vocab_size": 32000}, "its vocabulary has 32000 entries, CLIP's 49408"),
        ("CustomTextCLIP", {"no_causal_mask": True}, "its attention is not causal"),
        ("CustomTextCLIP", {"embed_cls": True}, "its attention is not causal"),
        ("CLIP", {"ls_init_value": 0.1}, "its blocks have weights that CLIP's lack"),
        ("CLIP", {"act_kwargs": {"approximate": "tanh"}}, r"its activation is GELU\(approx"),
    ],
)
def test_other_towers_are_refused_rather_than_bent(kind: str, text: dict, problem: str) -> None:
    model = new_model(kind, **text)
    with pytest.raises(ValueError, match=f"is not a plain CLIP text transformer: {problem}"):
        convert_openclip(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is not a plain CLIP text transformer: it has no"):
        convert_openclip(torch.nn.Linear(2, 2))
