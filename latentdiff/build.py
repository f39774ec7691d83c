"""How does a config become objects? By explicit match; nothing is imported by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from latentdiff.config import (
    CLIPTextConfig,
    NoTextConfig,
    OpenCLIPTextConfig,
    SmallTextConfig,
    TextConfig,
)
from latentdiff.configobjective import (
    EDMWeighting,
    MinSNRWeighting,
    P2Weighting,
    SoftMinSNRWeighting,
    UniformWeighting,
    WeightingConfig,
)
from latentdiff.loss import Weighting, edm, min_snr, p2, soft_min_snr
from latentdiff.text import TextEncoder, new_tower, train_tokenizer


def build_weighting(config: WeightingConfig, sigma_data: float) -> Weighting | None:
    """SNR -> weight of the clean sample's squared error; None where the network's own counts."""
    match config:
        case UniformWeighting():
            return None
        case MinSNRWeighting():
            return partial(min_snr, gamma=config.gamma)
        case SoftMinSNRWeighting():
            return partial(soft_min_snr, gamma=config.gamma)
        case P2Weighting():
            return partial(p2, gamma=config.gamma, k=config.k)
        case EDMWeighting():
            return partial(edm, sigma_data=sigma_data)


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

            return load_openclip(config.name, config.weights, config.skip_layers)
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
