"""What is a LoRA file, and what are a model's weights with it? Read one, merge it with a weight.

What it does to a layer: lora_factors; what its keys mean: lora_formats.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from latentdiff.lora_factors import Factors, rank
from latentdiff.lora_formats import (
    Key,
    model_targets,
    name_base,
    name_family,
    other_kinds,
    parse_key,
)

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# of peft's settings: what gives the layers another meaning
_UNREAD = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "use_qalora",
           "use_bdlora", "kasa_config", "monteclora_config", "velora_config")  # fmt: skip
_BASE_CHANGERS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KINDS = {"LoRA": "down|up|mid", "LoHa": "hada_", "LoKr": "lokr_"}  # by role
_METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps peft's config in a file


@dataclass(frozen=True)
class Lora:
    """A LoRA file.

    Attributes:
        path: where it was read.
        layers: target (see lora_formats) -> what is learned of it.
        metadata: of the file; kohya's training notes.
    """

    path: Path
    layers: Mapping[str, Factors]
    metadata: Mapping[str, str]

    def part(self, name: str) -> Lora:
        """Of `name` "unet" or "text": the layers that are not the other one's."""
        other = {"unet": "text.", "text": "unet."}[name]
        kept = {t: factors for t, factors in self.layers.items() if not t.startswith(other)}
        return Lora(self.path, kept, self.metadata)


def parse_lora_argument(text: str) -> tuple[Path, float]:
    """Take `FILE` or `FILE:WEIGHT` of the command line apart; the weight is 1 if not given.

    A colon belongs to the name where such a file is there, or where no number is behind it (a drive
    of Windows).

    Raises:
        ValueError: there is no file name, or the weight is no finite number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        if not text.strip():
            raise ValueError("a LoRA needs a file: FILE or FILE:WEIGHT; got an empty text")
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError:
        if head.endswith(".safetensors"):
            raise ValueError(
                f"the weight of LoRA {head} must be a number; got {tail!r}; "
                f"write {head}:0.7 for instance"
            ) from None
        return Path(text), 1.0
    if not head.strip() or not math.isfinite(weight):
        raise ValueError(f"a LoRA is FILE or FILE:WEIGHT with a finite weight; got {text!r}")
    return Path(head), weight


def read_lora(path: str | Path) -> Lora:
    """Read a LoRA of kohya's, LyCORIS', diffusers' or peft's making.

    Args:
        path: a safetensors file, or a directory with one (peft's, with adapter_config.json; or
            unet/ and text_encoder/ of peft's).

    Raises:
        ValueError: there is none, it is a pickle, damaged, no LoRA, of an unknown kind, incomplete
            or not finite.
    """
    path = Path(path)
    found: dict[str, tuple[Key, dict[str, Tensor]]] = {}
    scales: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for file in _files(path):
        tensors, noted = _read_tensors(file)
        metadata |= noted
        parts = _collect(file, tensors, found)
        config = file.with_name(_PEFT_CONFIG)
        if file.name == _PEFT_WEIGHTS and config.is_file():
            scales |= dict.fromkeys(parts, _read_peft(config, config.read_bytes(), ""))
        elif _METADATA_KEY in noted:
            for part, prefix in (("unet", "unet."), ("text", "text_encoder.")):
                scales[part] = _read_peft(file, noted[_METADATA_KEY], prefix)
    layers: dict[str, Factors] = {}
    for target, (key, roles) in found.items():
        alpha = roles.pop("alpha", None)
        scale = _scale(path, key, roles, alpha, scales.get(key.part, {}))
        layers[target] = Factors(roles, scale, key.layer)
        _check_factors(path, layers[target])
    return Lora(path, layers, metadata)


def _files(path: Path) -> list[Path]:
    """The safetensors that a path means."""
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"LoRA {path} is a pickle, which can run code when it is opened, and is not read; "
            "download its .safetensors version, or convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'lora.safetensors')"
        )
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"LoRA {path} not found; give a .safetensors file or peft's directory")
    inner = [path / part / _PEFT_WEIGHTS for part in ("unet", "text_encoder")]
    for files in ([path / _PEFT_WEIGHTS], [file for file in inner if file.is_file()]):
        if files and all(file.is_file() for file in files):
            return files
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"LoRA directory {path} must hold {_PEFT_WEIGHTS} or one other .safetensors file; "
            f"it holds {len(files)}; give the file itself (a whole model is given with --model)"
        )
    return files


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata() or {}  # noqa: SIM118  # it is no dict
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"LoRA {file} is damaged or not in safetensors' format: {error}; download it again"
        ) from error


def _collect(
    file: Path, tensors: Mapping[str, Tensor], found: dict[str, tuple[Key, dict[str, Tensor]]]
) -> set[str]:
    """Sort tensors into `found` by target and role; returns the parts of the model seen."""
    keys = {name: parse_key(name) for name in tensors}
    unknown = [name for name, key in keys.items() if key is None]
    if len(unknown) == len(keys):
        raise ValueError(
            f"{file} holds no LoRA but {_some(unknown) or 'nothing'}{_kinds(unknown)}; expected "
            "keys such as X.lora_down.weight or X.lora_A.weight; a whole model is given with "
            "--model"
        )
    if unknown:
        raise ValueError(
            f"LoRA {file} holds more than is read here: {_some(unknown)}{_kinds(unknown)}; "
            "LoRA, LoCon, LoHa, LoKr and DoRA are read"
        )
    for name, key in keys.items():
        assert key is not None
        tensor = tensors[name]
        if not (tensor.is_floating_point() or key.role == "alpha"):
            raise ValueError(f"LoRA {file}: {name} is {tensor.dtype}; expected floating point")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"LoRA {file}: {name} is not finite; its training went wrong")
        _, roles = found.setdefault(key.target, (key, {}))
        if key.role in roles:
            raise ValueError(f"LoRA {file} holds {name} twice, in two ways of naming it")
        roles[key.role] = tensor
    return {key.part for key in keys.values() if key is not None}


def _kinds(keys: Iterable[str]) -> str:
    kinds = other_kinds(keys)
    return f" ({', '.join(kinds)})" if kinds else ""


def _some(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {more} more" if more > 0 else "")


def _read_peft(source: Path, text: str | bytes, prefix: str) -> dict[str, Any]:
    """The settings of peft that decide the scale, of those whose names begin with `prefix`."""
    try:
        config = json.loads(text)
        config = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        patterns = dict(config.get("alpha_pattern") or {})
        alphas = [a for a in (config.get("lora_alpha"), *patterns.values()) if a is not None]
        if not all(math.isfinite(alpha) for alpha in alphas):
            raise ValueError("an alpha is not finite")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source} does not hold peft's settings of a LoRA: {error}") from error
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{source} is of peft's {config['peft_type']}; expected LORA")
    if unread := [name for name in _UNREAD if config.get(name)]:
        raise ValueError(f"{source}: {unread[0]} is not read here; train without it")
    if (start := str(config.get("init_lora_weights"))).startswith(_BASE_CHANGERS):
        raise ValueError(
            f"{source}: init_lora_weights={start} changed the base model too, which is not here; "
            "save with peft's path_initial_model_for_weight_conversion"
        )
    exact = [re.sub(r"\A\^|\\(?=\.)|\$\Z", "", pattern) for pattern in patterns]
    if unread := [p for p in exact if re.search(r"[^\w.]", p)]:
        raise ValueError(f"{source}: alpha_pattern {unread[0]!r} is no module's name; write it out")
    config["alpha_pattern"] = dict(zip(exact, patterns.values(), strict=True))
    return config


def _scale(
    path: Path,
    key: Key,
    roles: Mapping[str, Tensor],
    alpha: Tensor | None,
    settings: Mapping[str, Any],
) -> float:
    """Multiplier of the change: alpha / rank; 1 where the file and peft's settings say no alpha."""
    size = rank(roles)
    if size == 0:
        raise ValueError(f"LoRA {path}: {key.layer} has rank 0; it is damaged")
    if size is None:  # LoKr of two whole matrices
        return 1.0
    if alpha is not None:
        if alpha.numel() != 1:
            raise ValueError(f"LoRA {path}: alpha of {key.layer} is not one number")
        return float(alpha) / size
    value = settings.get("lora_alpha")
    for module, other in settings.get("alpha_pattern", {}).items():
        if f".{key.name}".endswith(f".{module}"):
            value = other
            break
    if value is None:
        return 1.0
    return float(value) / (math.sqrt(size) if settings.get("use_rslora") else size)


def _check_factors(path: Path, factors: Factors) -> None:
    shapes = {role: list(t.shape) for role, t in factors.tensors.items()}
    kinds = {kind for kind, pattern in _KINDS.items() if any(re.match(pattern, r) for r in shapes)}
    if len(kinds) > 1:
        raise ValueError(
            f"LoRA {path}: {factors.layer} is of several kinds: {', '.join(sorted(kinds))}"
        )
    try:
        outputs, inputs, *_ = factors.shape
    except KeyError as error:
        raise ValueError(
            f"LoRA {path} is incomplete: {factors.layer} has {', '.join(shapes) or 'an alpha'} "
            f"but no {error.args[0]}"
        ) from None
    except (RuntimeError, IndexError, ValueError):
        raise ValueError(
            f"LoRA {path}: the factors of {factors.layer} do not fit each other: {shapes}"
        ) from None
    for role in shapes.keys() & {"magnitude", "dora_scale"}:
        axis = "inputs" if role == "dora_scale" and factors.is_by_input else "outputs"
        expected = inputs if axis == "inputs" else outputs
        if factors.tensors[role].numel() != expected:
            raise ValueError(
                f"LoRA {path}: {role} of {factors.layer} has shape {shapes[role]}; expected one "
                f"number for each of {expected} {axis}"
            )


def _fits(shape: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether a change may be added: a linear layer is as good as a 1x1 convolution."""
    flat = (base[0], math.prod(base[1:]))
    return shape == base or (shape[2:] in ((), (1, 1)) and (shape[0], math.prod(shape[1:])) == flat)


def merge(
    lora: Lora,
    weight: float,
    unet: Mapping[str, Tensor],
    text: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model with a LoRA in them.

    Computed in float32 where each tensor is, and rounded to its type. Several files add up, in any
    order but for DoRA's.

    Args:
        lora: of `read_lora`.
        weight: how much of it; 0 nothing, 1 as trained, negative the other way.
        unet: the U-Net's tensors under diffusers' names; left as they are.
        text: the text tower's under transformers' names, with or without `text_model.`; likewise.

    Returns:
        (unet, text): new mappings, in which only the tensors that the LoRA changes are new.

    Raises:
        ValueError: the LoRA is of another model, the weight is not finite, the model's weights are
            quantised, or a merged weight is too large for its type.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight of LoRA {lora.path} must be finite; got {weight}")
    targets = find_targets(lora, unet, text)
    merged = {"unet": dict(unet), "text": dict(text or {})}
    for target, factors in lora.layers.items():
        part, name = targets[target]
        merged[part][name] = _merged(merged[part][name], factors, weight, lora.path, name)
    return merged["unet"], merged["text"]


def merge_into(
    lora: Lora, weight: float, unet: nn.Module | None = None, text: nn.Module | None = None
) -> None:
    """Merge a LoRA into diffusers' U-Net and transformers' text tower in place; see `merge`.

    A LoRA of both needs both modules, or `lora.part("unet")`. On an error the modules are as they
    were.

    Raises:
        ValueError: as `merge`.
    """
    modules = {"unet": unet, "text": text}
    states = {part: {} if m is None else m.state_dict() for part, m in modules.items()}
    for part, merged in zip(states, merge(lora, weight, **states), strict=True):
        for name, tensor in merged.items():
            if tensor is not states[part][name]:
                states[part][name].copy_(tensor)


@torch.no_grad()
def _merged(base: Tensor, factors: Factors, weight: float, path: Path, name: str) -> Tensor:
    if not base.is_floating_point() or base.itemsize < 2:
        raise ValueError(
            f"{name} is {base.dtype}: quantised weights take no LoRA; merge first, then quantise"
        )
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    merged = wide.add_(factors.change(wide), alpha=weight).to(base.dtype)
    if not all(torch.isfinite(extreme) for extreme in merged.aminmax()):  # NaN is both of them
        raise ValueError(
            f"{name} with LoRA {path} at weight {weight} is too large for {base.dtype}; "
            "use a smaller weight, or --dtype bfloat16 or float32"
        )
    return merged


def find_targets(
    lora: Lora, unet: Mapping[str, Tensor], text: Mapping[str, Tensor] | None = None
) -> Mapping[str, tuple[str, str]]:
    """Which weights of a model the LoRA changes: target -> (unet | text, name).

    Raises:
        ValueError: a layer of the LoRA has no weight of its shape in the model.
    """
    model = {"unet": unet, "text": text or {}}
    targets = model_targets(model["unet"], model["text"])
    lost = [factors.layer for target, factors in lora.layers.items() if target not in targets]
    unlike: list[str] = []
    for target, factors in lora.layers.items():
        if target in targets:
            part, name = targets[target]
            shape = tuple(model[part][name].shape)
            if not _fits(factors.shape, shape):
                unlike.append(f"{factors.layer} is {list(factors.shape)}, here {list(shape)}")
    if not (lost or unlike):
        return targets
    problems = []
    for layers, what in ((lost, "are not here"), (unlike, "have other shapes")):
        if layers:
            problems.append(
                f"{len(layers)} of its {len(lora.layers)} layers {what}: {_some(layers)}"
            )
    widths = [f.shape[1] for t, f in lora.layers.items() if t.endswith("attn2_to_k")]
    names = [factors.layer for factors in lora.layers.values()]
    family = name_family(names, widths[0] if widths else None, lora.metadata)
    here = [t.shape[1] for name, t in model["unet"].items() if name.endswith("attn2.to_k.weight")]
    raise ValueError(
        f"LoRA {lora.path} is of another model: {'; '.join(problems)}. "
        + (f"It was made for {family}. " if family else "")
        + (f"This model's text is {name_base(here[0])}" if here else "This model has no text")
        + "; use a LoRA of the same base model"
    )
