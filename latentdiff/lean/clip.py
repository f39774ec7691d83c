"""How does a prompt become conditioning without transformers? CLIP's text tower, for inference.

Radford et al. 2021; the weights are transformers' CLIPTextModel. Each of the layers is

    x = x + attention(norm(x))      attention is causal: a token sees those before it
    x = x + mlp(norm(x))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.lean.empty import LayerNorm, Linear
from latentdiff.lean.tokenizer import LeanTokenizer
from latentdiff.lean.weights import Unsupported, read_config, read_weights
from latentdiff.text import Conditioning

# what transformers' CLIPTextConfig says where a file says nothing
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_OLD_EOS_ID = 2  # what the first published configs say instead of 49407, the largest id
_PREFIX = "text_model."  # of the tensors' names, before transformers 5.4


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why this config.json is of no text tower that LeanTower is; None if it is."""
    kind = config.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        return f"a {kind} is no CLIP text tower"
    activation = _text_config(config)["hidden_act"]
    if activation not in _ACTIVATIONS:
        return f"hidden_act is {activation}; supported: {', '.join(_ACTIVATIONS)}"
    return None


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the text tower, which a whole CLIP's config has apart."""
    return {**_DEFAULTS, **(config.get("text_config") or config)}


class LeanTower(nn.Module):
    """transformers' CLIPTextModel; its parameters have the names there, without `text_model.`.

    Attributes:
        config: settings of CLIPTextConfig.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if reason := why_not(config):
            raise Unsupported(reason)
        self.config = _text_config(config)
        width, eps = self.config["hidden_size"], self.config["layer_norm_eps"]
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": _embedding(self.config["vocab_size"], width),
                "position_embedding": _embedding(self.config["max_position_embeddings"], width),
            }
        )
        layers = [_Layer(self.config) for _ in range(self.config["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = LayerNorm(width, eps)

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LeanTower:
        """The tower of a config.json with a CLIPTextModel's weights.

        The names may begin with `text_model.` or not; what belongs to no text tower is left out, as
        a file may hold a whole CLIP.

        Raises:
            Unsupported: `why_not`.
            ValueError: the weights are not those of such a tower.
        """
        with torch.device("meta"):  # no weights are made up only to be replaced
            tower = cls(config)
        own: dict[str, Tensor] = {}
        for name, like in tower.state_dict().items():
            value = weights.get(_PREFIX + name, weights.get(name))
            if value is None or value.shape != like.shape:
                found = "there is none" if value is None else f"it is {tuple(value.shape)}"
                raise ValueError(
                    f"a text tower of this config.json has {_PREFIX}{name} of shape "
                    f"{tuple(like.shape)}; {found}; give the config and weights of one model"
                )
            own[name] = value.to(device, dtype)
        tower.load_state_dict(own, assign=True)
        return tower.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_layer_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return self.final_layer_norm.weight.dtype

    def forward(self, token_ids: Tensor, skip_layers: int = 0) -> Tensor:
        """Hidden states after the last layer norm.

        Args:
            token_ids: integers [b, n].
            skip_layers: how many of the last layers to leave out (CLIP skip as diffusers counts
                it); the layer norm comes after whichever is then last.

        Returns:
            [b, n, d].

        Raises:
            ValueError: there are not so many layers, or the text is too long.
        """
        layers: Any = self.encoder["layers"]
        if not 0 <= skip_layers < len(layers):
            raise ValueError(
                f"CLIP skip must be from 0 to {len(layers) - 1}, for this text tower has "
                f"{len(layers)} layers; got {skip_layers}; 0 leaves none out"
            )
        places: Any = self.embeddings["position_embedding"].weight
        if token_ids.shape[1] > len(places):
            raise ValueError(
                f"{token_ids.shape[1]} tokens are too many; this text tower reads up to "
                f"{len(places)} at once; cut the text or encode it in parts"
            )
        x = self.embeddings["token_embedding"](token_ids) + places[: token_ids.shape[1]]
        for layer in layers[: len(layers) - skip_layers]:
            x = layer(x)
        return self.final_layer_norm(x)

    def pooled(self, token_ids: Tensor) -> Tensor:
        """The last layer norm's state at each text's first end token.

        A config that gives the end token the id 2 was published so by mistake; the end token is
        then the one with the largest id, as it was for OpenAI's tokens.

        Args:
            token_ids: integers [b, n], an end token in each row.

        Returns:
            [b, d].
        """
        eos_id = self.config["eos_token_id"]
        is_end = token_ids if eos_id == _OLD_EOS_ID else (token_ids == eos_id).int()
        rows = torch.arange(len(token_ids), device=token_ids.device)
        return self(token_ids)[rows, is_end.argmax(dim=1)]


def _embedding(num: int, width: int) -> nn.Embedding:
    # nn.Embedding's own start, normal numbers, makes torch import its compiler on the meta device
    return nn.Embedding.from_pretrained(torch.empty(num, width))


class _Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps, inner = (
            config[name] for name in ("hidden_size", "layer_norm_eps", "intermediate_size")
        )
        self.layer_norm1 = LayerNorm(width, eps)
        self.self_attn = _Attention(width, config["num_attention_heads"])
        self.layer_norm2 = LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": Linear(width, inner), "fc2": Linear(inner, width)})
        self.activation = _ACTIVATIONS[config["hidden_act"]]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        wide = self.activation(self.mlp["fc1"](self.layer_norm2(x)))
        return x + self.mlp["fc2"](wide)


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)  # [b, heads, n, d / heads]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class LeanText(nn.Module):
    """A tokenizer and a text tower: what drawing needs of `latentdiff.text.TextEncoder`.

    Attributes:
        tokenizer: words to ids.
        model: ids to hidden states.
    """

    def __init__(self, tokenizer: LeanTokenizer, model: LeanTower) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.model = model

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LeanText:
        """Open `tokenizer/` and `text_encoder/` below a directory.

        Raises:
            Unsupported: it is for transformers' classes to open; the message says why.
            ValueError: a file is damaged or missing.
        """
        path = Path(directory) / "text_encoder"
        weights = read_weights(path, device)
        return cls.from_weights(directory, read_config(path), weights, device, dtype)

    @classmethod
    def from_weights(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LeanText:
        """The tokenizer of a model directory with a tower of these weights (a LoRA's, say).

        Raises:
            Unsupported: it is for transformers' classes to open; the message says why.
            ValueError: a file is damaged or missing, or the weights are of another tower.
        """
        tower = LeanTower.from_weights(config, weights, device, dtype)
        words = LeanTokenizer.load(
            Path(directory) / "tokenizer", tower.config["max_position_embeddings"]
        )
        num_known = tower.config["vocab_size"]
        if words.largest_id >= num_known:
            raise Unsupported(
                f"the tokenizer in {directory} gives ids up to {words.largest_id}; expected less "
                f"than the text tower's vocab_size, {num_known}"
            )
        return cls(words, tower).eval()

    @property
    def width(self) -> int:
        """Width d of the hidden states."""
        return self.model.config["hidden_size"]

    @property
    def context_length(self) -> int:
        """Tokens n that the tower reads at once, begin and end included."""
        return self.tokenizer.context_length

    @property
    def bos_id(self) -> int:
        """The token that begins a text."""
        return self.tokenizer.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """The token that stands behind the end."""
        return self.tokenizer.pad_id

    def ids(self, text: str) -> list[int]:
        """A text's tokens, however many, without begin and end."""
        return self.tokenizer.ids(text)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids int64 [b, n], padded; what is too long is cut."""
        return self.tokenizer.tokenize(prompts)

    def hidden(self, token_ids: Tensor, skip_layers: int = 0) -> Tensor:
        """Ids of `tokenize`, on any device [b, n] -> `LeanTower`'s hidden states [b, n, d]."""
        return self.model(token_ids.to(self.model.device), skip_layers)

    def forward(self, token_ids: Tensor, skip_layers: int = 0) -> Conditioning:
        """Ids of `tokenize`, on any device [b, n] -> conditioning."""
        return Conditioning(self.hidden(token_ids, skip_layers))

    def pooled(self, token_ids: Tensor) -> Tensor:
        """Ids of `tokenize`, on any device [b, n] -> hidden state at the end token [b, d]."""
        return self.model.pooled(token_ids.to(self.model.device))

    def encode(self, prompts: Sequence[str], skip_layers: int = 0) -> Conditioning:
        """Prompts -> conditioning, on the tower's device."""
        return self(self.tokenize(prompts), skip_layers)
