"""How does a prompt become conditioning? Tokenizer and text tower in transformers' CLIP format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # whoever only draws has no config
    from latentdiff.config import SmallTextConfig


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about the text.

    Attributes:
        tokens: [b, n, d] hidden states, for cross-attention; or what a network made of them.
        is_pair: the rows are two halves of guidance, which look at the same noisy samples.
    """

    tokens: Tensor
    is_pair: bool = False

    def __len__(self) -> int:
        """Prompts in the batch."""
        return self.tokens.shape[0]

    def repeat(self, count: int) -> Conditioning:
        """The batch `count` times in a row."""
        return Conditioning(self.tokens.repeat(count, 1, 1))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Batches one after the other."""
        return Conditioning(torch.cat([p.tokens for p in parts]))


class TextEncoder(nn.Module):
    """A CLIP tokenizer and a CLIP text tower.

    Attributes:
        tokenizer: transformers' CLIPTokenizer.
        model: transformers' CLIPTextModel.
    """

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.model: Any = model

    @property
    def width(self) -> int:
        """Width d of the hidden states."""
        return self.model.config.hidden_size

    @property
    def context_length(self) -> int:
        """Tokens n of a prompt, begin and end included."""
        return self.model.config.max_position_embeddings

    @property
    def bos_id(self) -> int:
        """The token that begins a text."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """The token that stands behind the end."""
        return self.tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        """A text's tokens, however many, without begin and end."""
        # without `verbose`, transformers warns of what is longer than the tower reads at once
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def hidden(self, token_ids: Tensor, skip_layers: int = 0) -> Tensor:
        """Token ids [b, n] on any device -> hidden states [b, n, d] after the last layer norm.

        Args:
            token_ids: as `tokenize` makes them.
            skip_layers: last layers that are left out: CLIP skip, as diffusers counts it.

        Raises:
            ValueError: there are not so many layers.
        """
        num_layers = self.model.config.num_hidden_layers
        if not 0 <= skip_layers < num_layers:
            raise ValueError(
                f"CLIP skip must be from 0 to {num_layers - 1}, for this text tower has "
                f"{num_layers} layers; got {skip_layers}; 0 leaves none out"
            )
        ids = token_ids.to(self.model.device)
        if skip_layers == 0:
            return self.model(ids).last_hidden_state
        states = self.model(ids, output_hidden_states=True).hidden_states[-1 - skip_layers]
        # transformers had a text_model in the tower up to 5.3
        return getattr(self.model, "text_model", self.model).final_layer_norm(states)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids int64 [b, n], padded; what is too long is cut."""
        encoded = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.context_length,
            truncation=True,
            return_tensors="pt",
        )
        return encoded.input_ids

    def forward(self, token_ids: Tensor) -> Conditioning:
        """Token ids [b, n] -> hidden states after the last layer norm."""
        return Conditioning(self.model(token_ids).last_hidden_state)

    def pooled(self, token_ids: Tensor) -> Tensor:
        """Token ids [b, n] -> hidden state at the end token [b, d]."""
        return self.model(token_ids).pooler_output

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts -> conditioning, on the tower's device."""
        return self(self.tokenize(prompts).to(self.model.device))

    def encode_ids(self, token_ids: Tensor) -> Conditioning:
        """Ids of `tokenize`, of any integer type and on any device [b, n] -> conditioning."""
        return self(token_ids.to(self.model.device, torch.int64, non_blocking=True))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer/` and `text_encoder/` below `directory`."""
        save_tokenizer(self.tokenizer, Path(directory) / "tokenizer")
        # The published towers' names: transformers had a text_model in the tower up to 5.3, and
        # newer ones leave it out in files too, which older ones would read as no weights at all.
        inner = getattr(self.model, "text_model", self.model).state_dict()
        named = {f"text_model.{name}": value for name, value in inner.items()}
        self.model.save_pretrained(Path(directory) / "text_encoder", state_dict=named)

    @classmethod
    def load(cls, directory: str | Path) -> TextEncoder:
        """Open `tokenizer/` and `text_encoder/` below a directory, or the same of a hub id.

        Raises:
            ValueError: there is no such directory or hub id, or it holds no text tower.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        path = Path(directory)
        if path.is_dir() and not (path / "text_encoder" / "config.json").is_file():
            raise ValueError(
                f"{directory} holds no text tower; expected text_encoder/ and tokenizer/ in it"
            )
        if not path.is_dir() and str(directory).count("/") != 1:
            raise ValueError(f"text tower {directory} not found; give a directory or a hub id")
        source, tower, words = str(directory), "text_encoder", "tokenizer"
        if not path.is_dir() and _is_plain_clip(source):
            tower = words = ""
        try:
            tokenizer = CLIPTokenizer.from_pretrained(source, subfolder=words)
            model = CLIPTextModel.from_pretrained(source, subfolder=tower, use_safetensors=True)
            return cls(tokenizer, model)
        except OSError as error:
            if path.is_dir():
                raise
            raise ValueError(
                f"text tower {directory} is no directory here, and the hub did not give one of "
                f"that name ({type(error).__name__}); give a directory or a hub id"
            ) from error


def new_tower(config: SmallTextConfig, tokenizer: Any) -> nn.Module:
    """A CLIP text tower of the config's shape with fresh weights."""
    from transformers import CLIPTextConfig as TowerConfig
    from transformers import CLIPTextModel

    return CLIPTextModel(
        TowerConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_tokenizer(captions: Iterable[str], vocab_size: int, context_length: int) -> Any:
    """Learn a byte-pair vocabulary in CLIPTokenizer's format (Sennrich et al. 2016).

    Args:
        captions: texts in any languages.
        vocab_size: entries, the 512 byte symbols and two special tokens included.
        context_length: tokens of a prompt.

    Raises:
        ValueError: there is no caption, or no room for the bytes.
    """
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    texts = list(captions)
    if not texts:
        raise ValueError("a vocabulary needs captions to learn from; got none")
    begin, end, word_end = "<|startoftext|>", "<|endoftext|>", "</w>"
    like = CLIPTokenizer().backend_tokenizer  # for its normaliser and its words
    learner = Tokenizer(models.BPE(end_of_word_suffix=word_end))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [a + word_end for a in alphabet]
    num_symbols = len(alphabet) + len(ends) + 2
    if vocab_size < num_symbols:
        raise ValueError(
            f"vocab_size must be at least {num_symbols} (bytes and ends); got {vocab_size}"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        # otherwise numbered as a hash table has them, and pairs of one frequency are merged in the
        # order of these numbers: another vocabulary in every process
        special_tokens=ends,
        end_of_word_suffix=word_end,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]
    merges = [tuple(m) for m in learned[: vocab_size - num_symbols]]
    # CLIP's layout: bytes, bytes that end a word, merges in order, the two special tokens.
    symbols = [*alphabet, *ends]
    symbols += list(dict.fromkeys(a + b for a, b in merges))
    symbols = list(dict.fromkeys(symbols))
    vocab = {symbol: i for i, symbol in enumerate([*symbols, begin, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context_length)  # pyright: ignore[reportArgumentType]  # transformers' hint lacks pairs


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer as transformers opens it, `vocab.json` and `merges.txt` included."""
    tokenizer.backend_tokenizer.no_truncation()  # or the file would tell how it was used last
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(directory)
    tokenizer.backend_tokenizer.model.save(str(directory))


def _is_plain_clip(hub_id: str) -> bool:
    """Whether a hub id is a CLIP model itself rather than a diffusion pipeline."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(hub_id).model_type.startswith("clip")
    except (OSError, ValueError):
        return False
