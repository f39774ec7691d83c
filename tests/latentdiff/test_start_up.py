"""What is imported between the shell and the first step? No library that drawing does not use."""

from __future__ import annotations

import json
from typing import Any

import pytest

# What each costs to import on one core, warm: diffusers and transformers 3 s together, torch's
# compiler (_dynamo) 1.4 s, torchvision 0.5 s, matplotlib 0.3 s, duckdb and pyarrow 0.1 s.
NEVER = (
    "diffusers", "transformers", "open_clip", "torchvision", "peft", "accelerate",
    "huggingface_hub", "torch._dynamo", "torch._inductor", "sympy", "duckdb", "pyarrow",
    "webdataset", "fsspec", "aiohttp", "matplotlib", "pandas", "scipy", "tensorboard",
    "torchmetrics", "latentdiff.config", "latentdiff.training",
)  # fmt: skip

NETWORKS = """
import torch
from latentdiff.lean.clip import LeanText
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import read_ahead, read_config, read_weights
from pathlib import Path
from vae.autoencoder import Autoencoder
box = Path({box!r})
read_ahead([box / "unet", box / "vae", box / "text_encoder"])
with torch.inference_mode():
    text = LeanText.load(box)
    place = box / "unet"
    unet = LeanUNet.from_weights(read_config(place), read_weights(place))
    place = box / "vae"
    autoencoder = Autoencoder.from_weights(read_config(place), read_weights(place))
    tokens = text.encode(["a red apple", ""]).tokens
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    two = unet(z, unet.times(torch.tensor([500.0])), unet.texts(tokens))
    assert two.shape == (2, 4, 8, 8) and two.isfinite().all()
    assert autoencoder.decode(z).shape == (1, 3, 32, 32)
    assert autoencoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 8, 8)
"""
REPORT = """
import json, sys
print(json.dumps([name for name in {never!r} if name in sys.modules]))
"""


@pytest.fixture
def imported(run_python: Any, repository: Any) -> Any:
    """Which of NEVER are imported after a fresh Python has run a text."""

    def run(text: str) -> list[str]:
        box = str(repository / "latentdiff" / "pretrained")
        done = run_python("-c", text.format(box=box) + REPORT.format(never=NEVER))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])  # the command says what it drew

    return run


def test_the_networks_of_the_box(imported: Any) -> None:
    assert imported(NETWORKS) == []


def test_a_picture_of_the_box(imported: Any) -> None:
    draw = 'import latentdiff\nlatentdiff.load().generate("a red apple", steps=1)'
    assert imported(draw) == []


def test_the_command(imported: Any, tmp_path: Any) -> None:
    line = ["sample", "--prompt", "a red apple", "--steps", "1", "--out", str(tmp_path)]
    run = f"import latentdiff.cli as cli\nassert cli.run({line!r}) == 0"
    assert imported(run) == []


def test_this_test_sees_what_is_imported(imported: Any) -> None:
    assert imported("import huggingface_hub, latentdiff.config") == [
        "huggingface_hub",
        "latentdiff.config",
    ]


def test_the_weights_of_a_text_tower_are_not_made_up_first(imported: Any) -> None:
    """On torch's meta device an embedding's random start imports torch's compiler, 1.4 s."""
    made_up = 'import torch\ntorch.nn.Embedding(2, 2, device="meta")'
    assert "torch._dynamo" in imported(made_up), "torch got better: lean/clip.py may be simpler"
