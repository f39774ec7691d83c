"""How are a LoRA's layers named: in kohya's, LyCORIS', diffusers' and peft's files, in a model?

All are compared as *targets*: the part of the model ("unet", "text", or "other" for what no model
of ours has), a dot, and the module's name with underscores for its dots, which is all that kohya's
names keep of it: `unet.mid_block_attentions_0_proj_in`. A text tower's `text_model.` is left out,
as some files and some versions of transformers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# how a key ends -> what the tensor is; what stands before is the module's name
_ROLES = {
    "down": r"\.lora_down\.weight|\.lora_A(\.\w+)?\.weight"
    r"|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(\.\w+)?\.weight"
    r"|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "mid": r"\.lora_mid\.weight",  # LoCon: a 3x3 convolution between two 1x1
    "alpha": r"(_lora|\.lora)?\.alpha",
    "magnitude": r"\.lora_magnitude_vector(\.\w+)?(\.weight)?",  # peft's DoRA: one an output
    "dora_scale": r"\.dora_scale",  # LyCORIS' DoRA: one an output or one an input
    **{f"hada_{n}": rf"\.hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{n}": rf"\.lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_ENDS = {role: re.compile(rf"(?:{pattern})\Z") for role, pattern in _ROLES.items()}

# how a key begins -> part of the model; what stands behind is the module's name
_BEGINS = {
    "lora_unet_": "unet",
    "unet.": "unet",
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text",
    "lora_te1_": "text",
    "text_encoder.": "text",
    "text_encoders.clip_l.transformer.": "text",
}
_PEFT = "base_model.model."  # before any of the above or none
# without one of them, the first module says it: diffusers' attention processors, peft's directories
_UNET = re.compile(
    r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks"
    r"|conv_in|conv_out|time_embed|time_embedding)([._]|\Z)"
)
_TEXT = re.compile(
    r"(text_model|encoder[._]layers|embeddings|final_layer_norm|text_projection)[._]"
)

# what else such files hold, by a piece of the key
_OTHER_KINDS = {
    "oft_": "OFT",
    "on_input": "(IA)^3",
    ".diff": "full differences",
    "w_norm": "norms",
    "bundle_emb": "textual inversions",
    "emb_params": "textual inversions",
    "lora_embedding": "embeddings",
    ".bias": "biases",
}

_RESIDUAL = {  # diffusers' names inside a residual block -> the original code's
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ORIGINAL = {  # outside the blocks
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+?)\.(\d+)\.(.+)")
_IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Key:
    """What the key of a tensor says.

    Attributes:
        part: "unet", "text" or "other".
        name: the module's, as the file has it, without what says the part.
        role: what the tensor is to the module: down, up, mid, alpha, hada_w1_a...
        layer: the key up to the role, for messages.
    """

    part: str
    name: str
    role: str
    layer: str

    @property
    def target(self) -> str:
        """Part and module, the same in every format."""
        flat = flatten(self.name.replace(".processor.", "."))
        if self.part == "text":  # diffusers once named the tower's projections as the U-Net's
            flat = re.sub(r"_self_attn_to_(q|k|v|out)\Z", r"_self_attn_\1_proj", flat)
            flat = flat.removeprefix("text_model_")
        elif flat.endswith("_to_out"):  # likewise; the U-Net's is a list with a dropout
            flat += "_0"
        return f"{self.part}.{flat}"


def parse_key(key: str) -> Key | None:
    """A key of a file, taken apart; None where it is of no format known here."""
    for role, pattern in _ENDS.items():
        if found := pattern.search(key):
            layer = key[: found.start()]
            part, name = _split_part(layer)
            return Key(part, name, role, layer)
    return None


def _split_part(layer: str) -> tuple[str, str]:
    name = layer.removeprefix(_PEFT)
    for begin, part in _BEGINS.items():
        if name.startswith(begin):
            return part, name.removeprefix(begin)
    name = name.removeprefix("lycoris_")
    if _UNET.match(name):
        return "unet", name
    return ("text", name) if _TEXT.match(name) else ("other", name)


def flatten(name: str) -> str:
    """A module's name as kohya writes it."""
    return name.replace(".", "_")


def other_kinds(keys: Iterable[str]) -> list[str]:
    """What keys without a known format are, where their names tell."""
    return sorted({kind for key in keys for piece, kind in _OTHER_KINDS.items() if piece in key})


def model_targets(unet: Iterable[str], text: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Which weight of a model a target means.

    Args:
        unet: names of the U-Net's tensors in diffusers' format.
        text: names of the text tower's in transformers', with or without `text_model.`.

    Returns:
        target -> (part, name of the tensor). The U-Net's modules are there under the original
        code's names too.
    """
    modules = [name.removesuffix(".weight") for name in unet if name.endswith(".weight")]
    targets = {
        f"unet.{flatten(original)}": ("unet", f"{module}.weight")
        for module, original in original_names(modules).items()
    }
    targets |= {f"unet.{flatten(module)}": ("unet", f"{module}.weight") for module in modules}
    for name in text:
        module = name.removeprefix("text_model.").removesuffix(".weight")
        if name.endswith(".weight"):
            targets[f"text.{flatten(module)}"] = ("text", name)
    return targets


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """What the original code (CompVis' openaimodel) calls the modules of diffusers' U-Net.

    There each residual block, down- or upsampling counts as a block of its own, along the network:
    input_blocks, middle_block and output_blocks. kohya's SDXL networks and LyCORIS use these names.

    Args:
        modules: all of the U-Net's, as the counts come from them.

    Returns:
        diffusers' name -> the original one, of the modules that have one.
    """
    found = {module: match for module in modules if (match := _IN_BLOCK.fullmatch(module))}
    first = _first_blocks(found.values())
    attends = {(m[1], m[2], m[4]) for m in found.values() if m[3] == "attentions"}
    names: dict[str, str] = {}
    for module in modules:
        if module in _ORIGINAL:
            names[module] = _ORIGINAL[module]
        elif middle := _IN_MIDDLE.fullmatch(module):
            place = 1 if middle[1] == "attentions" else 2 * int(middle[2])
            names[module] = f"middle_block.{place}.{_RESIDUAL.get(middle[3], middle[3])}"
        elif match := found.get(module):
            side, block, kind, index, inner = match.groups()
            start, count = first[side, block]
            if kind == "resnets":
                place = f"{start + int(index)}.0.{_RESIDUAL.get(inner, inner)}"
            elif kind == "attentions":
                place = f"{start + int(index)}.1.{inner}"
            elif kind == "downsamplers":
                place = f"{start + count}.0.op"
            else:  # an upsampling ends the block before it
                behind = 2 if (side, block, str(count - 1)) in attends else 1
                place = f"{start + count - 1}.{behind}.{inner}"
            names[module] = f"{'input' if side == 'down' else 'output'}_blocks.{place}"
    return names


def _first_blocks(found: Iterable[re.Match[str]]) -> dict[tuple[str, str], tuple[int, int]]:
    """(down | up, block) -> number of its first original block, and its residual blocks."""
    kinds: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for match in found:
        kinds.setdefault((match[1], match[2]), set()).add((match[3], match[4]))
    after = {"down": 1, "up": 0}  # input_blocks.0 is conv_in
    first: dict[tuple[str, str], tuple[int, int]] = {}
    for side, block in sorted(kinds, key=lambda at: (at[0], int(at[1]))):
        members = [kind for kind, _ in kinds[side, block]]
        count = members.count("resnets")
        first[side, block] = after[side], count
        after[side] += count + members.count("downsamplers")
    return first


_BASES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 256: "the model in the box"}

_FAMILIES = {  # of other networks than Stable Diffusion's U-Net
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux",
    r"joint_blocks|lora_te3_|text_encoder_3\.": "SD 3",
    r"motion_modules": "AnimateDiff",
    r"^(transformer|lora_transformer)[._]|blocks[._]\d+[._](self|cross)_attn": "a transformer",
    r"lora_te2_|text_encoder_2\.|transformer_blocks[._](?!0[._])\d+[._]": "SDXL",
}


def name_base(cross_width: int) -> str:
    """A base model by the width of its text, as a message says it."""
    known = _BASES.get(cross_width)
    return f"{cross_width} wide" + (f", as {known}'s" if known else "")


def name_family(
    layers: Iterable[str], cross_width: int | None, metadata: Mapping[str, str]
) -> str | None:
    """What a LoRA was made for, from its keys, its width and what kohya noted; None: unknown.

    Args:
        layers: keys up to the role.
        cross_width: inputs of its cross-attention's keys; None where it has none.
        metadata: of the file.
    """
    names = list(layers)
    noted = metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture")
    behind = f" (its metadata say {noted[:80]})" if noted else ""
    for pattern, family in _FAMILIES.items():
        if any(re.search(pattern, name) for name in names):
            return f"{family}{behind}"
    if cross_width is not None:
        return f"a text {name_base(cross_width)}{behind}"
    return f"another model{behind}" if noted else None
