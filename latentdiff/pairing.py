"""Were these latents and token ids made by this model?"""

from __future__ import annotations

import hashlib
import json

import torch

from data_pipelines.latentinfo import LatentSettings
from latentdiff.text import TextEncoder
from vae.autoencoder import Autoencoder

# What tells a network's function from its weights' names, shapes and values no more.
_FUNCTION = ("act_fn", "norm_num_groups", "latent_magnitude", "latent_shift")
# Texts whose ids tell tokenizers apart: case, accents, both normal forms, figures, signs, space.
_PROBES = (
    "",
    "a photo of a cat",
    "It's the DOG's 1st  birthday!!! #2024 (50%)",
    "Ünïcödé e\u0301 naïve ŒUVRE straße",
    "\t новый 日本語の猫 قطة 🐈‍⬛ &amp; <b>\n",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "word " * 200,
)


@torch.no_grad()
def model_hash(autoencoder: Autoencoder) -> str:
    """SHA-256 of what turns a picture into a latent: the encoder and the latent norm.

    The same on every device, in every memory format, and in float32 and float16, in which the
    weights are compared; a model with another decoder, which reads the same latents, has it too.
    """
    digest = hashlib.sha256()
    model = autoencoder.model
    config = {} if model is None else {name: model.config.get(name) for name in _FUNCTION}
    about = {
        "class": type(model).__name__,
        "config": config,
        "downscale": autoencoder.downscale,
        "shift": autoencoder.norm.shift.float().tolist(),
        "scale": autoencoder.norm.scale.float().tolist(),
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    weights = {} if model is None else model.state_dict()
    for name in sorted(weights):
        if name.startswith(("encoder.", "quant_conv.")):
            value = weights[name].to("cpu", torch.float16).contiguous()
            digest.update(f"\0{name} {tuple(value.shape)}\0".encode())
            digest.update(value.numpy())
    return digest.hexdigest()


def tokenizer_hash(text: TextEncoder) -> str:
    """SHA-256 of what turns a caption into token ids: the words, the length, some texts' ids."""
    digest = hashlib.sha256()
    vocabulary = sorted(text.tokenizer.get_vocab().items())
    digest.update(json.dumps(vocabulary, ensure_ascii=False).encode())
    digest.update(json.dumps(text.tokenize(_PROBES).tolist()).encode())
    return digest.hexdigest()


def check_model(latents: LatentSettings, autoencoder: Autoencoder) -> None:
    """See that the latents are those of the autoencoder that they are to be decoded by.

    Raises:
        ValueError: they are another's.
    """
    here = model_hash(autoencoder)
    if here != latents.model_hash:
        raise ValueError(
            f"these latents were encoded by another autoencoder (hash {latents.model_hash[:12]}, "
            f"here {here[:12]}); precompute again with --model and the model that you train, or "
            f"train with the model that made them, which was called {latents.model}"
        )


def check_tokenizer(latents: LatentSettings, text: TextEncoder) -> None:
    """See that the token ids are those that the text tower's own tokenizer would give.

    Raises:
        ValueError: they are another's, or there are none.
    """
    here = tokenizer_hash(text)
    if latents.tokenizer_hash is None:
        raise ValueError(
            "these latents have no token ids; precompute again with the model that you train as "
            "--model, or as --text beside an autoencoder"
        )
    if here != latents.tokenizer_hash:
        raise ValueError(
            f"these token ids were made by another tokenizer (hash {latents.tokenizer_hash[:12]}, "
            f"here {here[:12]}); precompute again with --model and the model that you train, or "
            f"train with the text tower of the model that made them, which was called "
            f"{latents.model}"
        )
