"""How does a config become objects? By explicit match; nothing is imported by name."""

from __future__ import annotations

from collections.abc import Iterable

from latentdiff.config import (
    CLIPTextConfig,
    NoTextConfig,
    OpenCLIPTextConfig,
    ScheduleConfig,
    SmallTextConfig,
    TextConfig,
)
from latentdiff.schedule import NoiseSchedule
from latentdiff.text import TextEncoder, new_tower, train_tokenizer


def build_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """The forward process that a config describes."""
    match config.kind:
        case "linear":
            return NoiseSchedule.linear(config.num_timesteps, config.beta_start, config.beta_end)
        case "scaled_linear":
            return NoiseSchedule.scaled_linear(
                config.num_timesteps, config.beta_start, config.beta_end
            )
        case "cosine":
            return NoiseSchedule.cosine(config.num_timesteps)


def build_text(config: TextConfig, captions: Iterable[str] = ()) -> TextEncoder | None:
    """The text tower that a config names; None for an unconditional model.

    Args:
        config: which tower.
        captions: what a new byte-pair vocabulary is learned from (small towers alone).
    """
    match config:
        case NoTextConfig():
            return None
        case CLIPTextConfig():
            return TextEncoder.load(config.pretrained)
        case OpenCLIPTextConfig():
            from latentdiff.openclip import load_openclip

            return load_openclip(config.name, config.weights)
        case SmallTextConfig() if config.pretrained is not None:
            return TextEncoder.load(config.pretrained)
        case SmallTextConfig():
            if config.tokenizer.pretrained is not None:
                from transformers import CLIPTokenizer

                tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer.pretrained)
                tokenizer.model_max_length = config.context_length
            else:
                tokenizer = train_tokenizer(
                    captions, config.tokenizer.vocab_size, config.context_length
                )
            return TextEncoder(tokenizer, new_tower(config, tokenizer))
