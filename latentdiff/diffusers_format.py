"""How is a model described in diffusers' layout? Its index, and the hash of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"  # the model in the box

# pipeline of diffusers -> what its directory holds
_LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "StableDiffusionPipeline": {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    },
    "DDPMPipeline": {"unet": ("diffusers", "UNet2DModel")},
}
_UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")  # of one layout


def pipeline_class(has_text: bool, has_autoencoder: bool) -> str | None:
    """The pipeline of diffusers whose layout holds such a model; None where there is none."""
    match has_text, has_autoencoder:
        case True, True:
            return "StableDiffusionPipeline"
        case False, False:
            return "DDPMPipeline"
        case _:
            return None


def is_unconditional(directory: Path) -> bool:
    """Whether a model directory holds an unconditional model of pixels (DDPM)."""
    index = directory / "model_index.json"
    if not index.is_file():
        return False
    try:
        return json.loads(index.read_text(encoding="utf-8")).get("_class_name") in _UNCONDITIONAL
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{index} is not diffusers' model index: {error}") from error


def check_model_directory(model: str | Path) -> Path:
    """A model's local directory; a hub id (`owner/name`) is fetched by huggingface_hub.

    Raises:
        ValueError: there is no such directory, or it is no model directory.
    """
    path = Path(model)
    if not path.exists() and _looks_like_hub_id(str(model)):
        from diffusers import DiffusionPipeline

        try:
            path = Path(DiffusionPipeline.download(str(model)))
        except OSError as error:
            raise ValueError(
                f"model {model} is no directory here, and the hub did not give one of that name "
                f"({type(error).__name__}); give a directory in diffusers' layout or a hub id"
            ) from error
    if not path.is_dir():
        raise ValueError(
            f"model directory {model} not found; give a directory in diffusers' layout, a hub id "
            "such as stabilityai/stable-diffusion-2-1, or no model for the one in the box"
        )
    layout = _LAYOUTS["DDPMPipeline" if is_unconditional(path) else "StableDiffusionPipeline"]
    missing = [c for c in (*layout, "scheduler") if not (path / c).is_dir()]
    if missing or not (path / "model_index.json").is_file():
        raise ValueError(
            f"{model} is not a model directory: it lacks "
            f"{', '.join(missing) or 'model_index.json'}; expected diffusers' layout "
            f"(model_index.json, {'/, '.join(layout)}/, scheduler/)"
        )
    return path


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and " " not in model


def write_model_index(directory: Path, pipeline: str, scheduler: str) -> None:
    """model_index.json, with which `diffusers.DiffusionPipeline.from_pretrained` opens the model.

    Args:
        directory: of the model.
        pipeline: diffusers' class: StableDiffusionPipeline | DDPMPipeline.
        scheduler: diffusers' class of the scheduler.
    """
    import diffusers

    index: dict[str, object] = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        **_LAYOUTS[pipeline],
        "scheduler": ("diffusers", scheduler),
    }
    if pipeline == "StableDiffusionPipeline":
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))


def weights_hash(directory: Path) -> str:
    """First 16 hex digits of the SHA-256 over all safetensors, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
