"""How does an OpenCLIP text tower become transformers' CLIP format?"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.text import TextEncoder

_VOCABULARY_SIZE = 49408  # of CLIP's byte-pair vocabulary


def load_openclip(name: str, weights: str | None, skip_layers: int = 0) -> TextEncoder:
    """Create an OpenCLIP model and convert its text tower.

    Args:
        name: open_clip's model name, such as ViT-H-14.
        weights: a pretrained tag or a local file; None for random weights.
        skip_layers: last layers that are left out.

    Raises:
        ValueError: open_clip knows no such model or tag.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"unknown OpenCLIP model {name!r}; known: {open_clip.list_models()}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is not None and weights not in tags and not Path(weights).is_file():
        raise ValueError(f"unknown weights {weights!r} of {name}; expected a file or one of {tags}")
    model = open_clip.create_model(name, pretrained=weights)
    return convert_openclip(model, skip_layers)


def convert_openclip(model: Any, skip_layers: int = 0) -> TextEncoder:
    """The text tower of an open_clip model (CLIP or CustomTextCLIP) in transformers' format.

    Prompts get open_clip's token ids, padding included, but for broken Unicode and HTML entities,
    which open_clip mends first and a CLIPTokenizer takes as they are.

    Args:
        model: of open_clip.
        skip_layers: last layers that are left out before the final norm, as Stable Diffusion 2.x
            does with one.

    Raises:
        ValueError: the tower is not a plain CLIP transformer, or has no more layers than that.
    """
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tower = getattr(model, "text", model)
    if (problem := _why_not_plain(tower)) is not None:
        raise ValueError(
            f"{type(tower).__name__} is not a plain CLIP text transformer: {problem}; "
            "choose a model with one, such as ViT-H-14"
        )
    num_layers = len(tower.transformer.resblocks)
    if skip_layers >= num_layers:
        raise ValueError(
            f"skip_layers must be below the tower's {num_layers} layers; got {skip_layers}"
        )
    blocks = tower.transformer.resblocks[: num_layers - skip_layers]
    context, width = tower.positional_embedding.shape
    vocabulary = tower.token_embedding.weight.shape[0]
    act = blocks[0].mlp.gelu
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=blocks[0].mlp.c_fc.out_features,
        projection_dim=model.state_dict().get("text_projection", torch.empty(0, width)).shape[1],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        max_position_embeddings=context,
        hidden_act="quick_gelu" if isinstance(act, open_clip.model.QuickGELU) else "gelu",
        layer_norm_eps=tower.ln_final.eps,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    converted = CLIPTextModel(config)
    inner = getattr(converted, "text_model", converted)  # transformers up to 5.3 nests it
    inner.load_state_dict(_rename(tower.state_dict(), len(blocks)))
    vocab, merges = _vocabulary()
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,  # pyright: ignore[reportArgumentType]  # transformers' hint lacks pairs
        pad_token="!",  # id 0, which open_clip pads with
        split_special_tokens=True,  # "!" in a prompt is a word as any other, not padding
        model_max_length=context,
    )
    return TextEncoder(tokenizer, converted)


def _why_not_plain(tower: Any) -> str | None:
    """What transformers' CLIP text tower could not express, or None."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(tower, "ln_final"):
        return "it has no residual blocks with a final norm"
    if tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None:
        return "its attention is not causal over the tokens alone"
    if (size := tower.token_embedding.weight.shape[0]) != _VOCABULARY_SIZE:
        return f"its vocabulary has {size} entries, CLIP's {_VOCABULARY_SIZE}"
    weights = sum(name.startswith("transformer.") for name in tower.state_dict())
    if weights != 12 * len(blocks):  # two norms and four projections, a weight and a bias each
        return "its blocks have weights that CLIP's lack"
    act = blocks[0].mlp.gelu
    if getattr(act, "approximate", "none") != "none":
        return f"its activation is {act}"
    return None


def _rename(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        out[f"final_layer_norm.{kind}"] = state[f"ln_final.{kind}"]
        for i in range(layers):
            theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            parts = state[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                out[f"{ours}.self_attn.{name}_proj.{kind}"] = part
            for a, b in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                out[f"{ours}.{b}.{kind}"] = state[f"{theirs}.{a}.{kind}"]
    return out


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own byte-pair vocabulary, from the file that open_clip ships."""
    import open_clip.tokenizer as theirs

    text = gzip.decompress(Path(theirs.default_bpe()).read_bytes()).decode()
    lines = text.split("\n")[1 : _VOCABULARY_SIZE - 512 - 2 + 1]  # less bytes and ends
    merges = [(a, b) for a, b in (line.split() for line in lines)]
    symbols = list(theirs.bytes_to_unicode().values())
    symbols += [s + "</w>" for s in symbols]
    symbols += ["".join(m) for m in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    return {s: i for i, s in enumerate(symbols)}, merges
