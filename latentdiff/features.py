"""What do metrics see in pictures? Frozen feature networks, opened without executing any file.

A TorchScript archive is a program: torch's own security policy says to treat it like code that one
runs. So weights come as safetensors, for architectures that are in the libraries.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file('
    f"torch.hub.load_state_dict_from_url('{INCEPTION_URL}', weights_only=True), "
    "'inception.safetensors')\""
)


class FeatureNetwork:
    """uint8 pictures [b, 3, h, w] -> float32 features [b, width] on the CPU.

    Attributes:
        width: of the features.
    """

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self._features = features
        self.width = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The pictures' features."""
        return self._features(images).float().cpu()


def load_features(source: str | None, device: torch.device) -> FeatureNetwork:
    """Open the feature network of FID and KID.

    Args:
        source: InceptionV3's weights as torch-fidelity names them, a `.safetensors` file (which
            gives the FID of the literature); or an image model of transformers, a directory or hub
            id, such as facebook/dinov2-base (Stein et al. 2023 find that its features agree better
            with people).
        device: where it runs.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    if source is None:
        raise ValueError(
            "evaluation.features is null, but fid and kid need a feature network; give an image "
            "model in transformers' format, a directory or hub id such as facebook/dinov2-base, or "
            f"InceptionV3's weights, which are made once by: {_CONVERT}"
        )
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        network = _inception(path).to(device)
        return FeatureNetwork(lambda images: network(images.to(device)))
    if path.is_file():
        raise ValueError(
            f"evaluation.features is {source}; expected .safetensors: TorchScript and pickles are "
            "programs, and nothing from a file is executed here; InceptionV3's weights are made "
            f"once by: {_CONVERT}"
        )
    if not path.is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise ValueError(
            f"evaluation.features {source} not found; give a .safetensors file, or an image model "
            "in transformers' format, a directory or hub id"
        )
    return FeatureNetwork(_image_model(source, device))


def load_clip(source: str, device: torch.device) -> Any:
    """CLIPScore of torchmetrics on a CLIP model of transformers, a directory or hub id.

    Raises:
        ValueError: it is not there.
    """
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    try:
        model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
        processor: Any = CLIPProcessor.from_pretrained(source)
    except OSError as error:
        raise _not_found("evaluation.clip", source, "a CLIP model", error) from error
    longest = model.config.text_config.max_position_embeddings

    def process(**inputs: Any) -> Any:
        # torchmetrics cuts long captions' ids, and with them the end, where CLIP reads its feature
        cut = {"truncation": True, "max_length": longest} if "text" in inputs else {}
        return processor(**inputs, **cut)

    towers: Any = _Towers(model.eval().requires_grad_(False).to(device))
    return CLIPScore(lambda: (towers, process), sync_on_compute=False).to(device)


class _Towers(nn.Module):
    """CLIP as torchmetrics calls it: transformers from 5.0 on gives more than the features."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *arguments: Tensor) -> Tensor:
        return _features_of(self.model.get_image_features(*arguments))

    def get_text_features(self, *arguments: Tensor) -> Tensor:
        return _features_of(self.model.get_text_features(*arguments))


def _image_model(source: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """An image model's pooled features, or those that CLIP and its like compare with texts."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        model: Any = AutoModel.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False
        )
        processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _not_found("evaluation.features", source, "an image model", error) from error
    model.eval().requires_grad_(False).to(device)

    def features(images: Tensor) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        if hasattr(model, "get_image_features"):
            return _features_of(model.get_image_features(pixels))
        return _features_of(model(pixels))

    return features


def _features_of(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    pooled = output.last_hidden_state[:, 0] if pooled is None else pooled
    return pooled.flatten(1)


def _inception(path: Path) -> nn.Module:
    """The InceptionV3 of FID, with the original's way of resizing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); make it anew by: {_CONVERT}") from error
    # torch-fidelity unpickles its weights wherever they come from: what it gets is our own pickle
    pickled: Any = io.BytesIO()
    torch.save(weights, pickled)
    pickled.seek(0)
    try:
        metric = FrechetInceptionDistance(
            feature=2048, feature_extractor_weights_path=pickled, antialias=False
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            "InceptionV3 needs torch-fidelity; pip install 'latentdiff[evaluation]', or give "
            "evaluation.features an image model in transformers' format"
        ) from error
    except RuntimeError as error:  # names or shapes of the weights
        raise ValueError(
            f"{path} does not hold InceptionV3's weights as torch-fidelity names them; make it by: "
            f"{_CONVERT}"
        ) from error
    return metric.inception


def _not_found(key: str, source: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{key} {source} is not {what} in transformers' format with safetensors "
        f"({str(error).splitlines()[0]}); give a directory or a hub id"
    )
