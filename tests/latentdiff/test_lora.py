"""Is a merged LoRA what diffusers and peft compute with it, and are the laws of sums kept?"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_rig import (
    CONV,
    QUERY,
    apply,
    assert_close,
    factors,
    kohya,
    outputs,
    tiny_stable_diffusion,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.lora import merge, merge_into, read_lora

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
              "conv_shortcut", "time_emb_proj", "conv_in", "linear_1", "conv"]  # fmt: skip
TOWER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_stable_diffusion()


def save_by_diffusers(base: Any, directory: Path, with_settings: bool = True, **lora: Any) -> Any:
    """Random adapters in a copy of the pipeline, written as diffusers' training scripts do."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = copy.deepcopy(base)
    targets = lora.pop("targets", EVERYWHERE)
    # diffusers reads its own names of the attention's layers only where there are no others
    rename = convert_state_dict_to_diffusers if targets == ATTENTION else dict
    tower = TOWER[:4] if targets == ATTENTION else TOWER
    torch.manual_seed(2)
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, **lora}
    pipe.unet.add_adapter(LoraConfig(target_modules=targets, **config))
    config = {name: value for name, value in config.items() if "pattern" not in name}
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=tower, **config))
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    unet, text = (rename(get_peft_model_state_dict(m)) for m in modules.values())
    settings = _collate_lora_metadata(modules) if with_settings else {}
    type(pipe).save_lora_weights(directory, unet, text, **settings)
    return pipe


# The same as diffusers and peft


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ATTENTION},
        {"lora_alpha": 6},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 3, CONV: 1}, "lora_alpha": 7},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 9, "with_settings": False},  # which forgets the 9
    ],
    ids=["attention", "everywhere", "patterns", "rslora", "no settings"],
)
def test_merge_is_what_diffusers_computes(base: Any, tmp_path: Path, lora: dict[str, Any]) -> None:
    save_by_diffusers(base, tmp_path, **lora)
    theirs = copy.deepcopy(base)
    theirs.load_lora_weights(tmp_path, adapter_name="a")
    plain = outputs(base.unet, base.text_encoder)
    for weight in (1.0, 0.5, -0.3):
        theirs.set_adapters(["a"], [weight])
        ours = apply(base, (tmp_path, weight))
        assert_close(ours, outputs(theirs.unet, theirs.text_encoder))
        assert all((a - b).norm() > 1e-2 * b.norm() for a, b in zip(ours, plain, strict=True))


def test_merge_is_what_diffusers_fuses(base: Any, tmp_path: Path) -> None:
    save_by_diffusers(base, tmp_path, lora_alpha=6)
    theirs = copy.deepcopy(base)
    theirs.load_lora_weights(tmp_path)
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora_weights()
    unet, text = merge(
        read_lora(tmp_path), 0.7, base.unet.state_dict(), base.text_encoder.state_dict()
    )
    for ours, module in ((unet, theirs.unet), (text, theirs.text_encoder)):
        torch.testing.assert_close(ours, dict(module.state_dict()), rtol=1e-5, atol=1e-6)


def test_dora_of_weight_1_is_what_peft_computes(base: Any, tmp_path: Path) -> None:
    theirs = save_by_diffusers(base, tmp_path, use_dora=True, lora_alpha=6)
    with torch.no_grad():
        for name, value in (*theirs.unet.named_parameters(),):
            if "lora_B" in name:
                value.mul_(1.5)  # away from the lengths at which the magnitudes started
    from peft.utils import get_peft_model_state_dict

    unet = get_peft_model_state_dict(theirs.unet)
    assert any("lora_magnitude_vector" in name for name in unet)
    path = tmp_path / "dora.safetensors"
    settings = json.dumps({"unet.lora_alpha": 6})
    tensors = {f"unet.{k}": v.contiguous() for k, v in unet.items()}
    save_file(tensors, path, {"lora_adapter_metadata": settings})
    ours = apply(base, (path, 1.0))
    assert_close(ours, outputs(theirs.unet, base.text_encoder))


WIDE = "up_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize(
    ("kind", "module", "lora", "roles"),
    [
        ("loha", QUERY, {}, "w1_a w1_b w2_a w2_b"),
        ("loha", CONV, {}, "w1_a w1_b w2_a w2_b"),
        ("loha", CONV, {"use_effective_conv2d": True}, "t1 t2 w1_a w1_b w2_a w2_b"),
        ("lokr", CONV, {"alpha": 3}, "w1 w2"),  # which LyCORIS scales by 1, whatever alpha is
        ("lokr", f"{QUERY[:-11]}.ff.net.0.proj", {"decompose_both": True}, "w1_a w1_b w2_a w2_b"),
        ("lokr", WIDE, {}, "w1 w2_a w2_b"),
        ("lokr", WIDE, {"use_effective_conv2d": True}, "t2 w1 w2_a w2_b"),
    ],
)
def test_lycoris_products_are_what_peft_computes(
    base: Any, tmp_path: Path, kind: str, module: str, lora: dict[str, Any], roles: str
) -> None:
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    torch.manual_seed(6)
    config = {"r": 3, "alpha": 5, "target_modules": [module], "init_weights": False, **lora}
    config = LoHaConfig(**config) if kind == "loha" else LoKrConfig(**config)
    unet = inject_adapter_in_model(config, copy.deepcopy(base.unet))
    layer: Any = unet.get_submodule(module)
    learned = {
        name.replace(".default", ""): value.detach().clone()
        for name, value in layer.named_parameters()
        if "base_layer" not in name
    }
    names = [f"{'hada' if kind == 'loha' else 'lokr'}_{role}" for role in roles.split()]
    assert sorted(learned) == names
    prefix = "lora_unet_" + module.replace(".", "_")
    tensors = {f"{prefix}.{name}": value for name, value in learned.items()}
    tensors[f"{prefix}.alpha"] = torch.tensor(float(config.alpha))
    save_file(tensors, tmp_path / "x.safetensors")
    merged, _ = merge(read_lora(tmp_path / "x.safetensors"), 1.0, base.unet.state_dict())
    name = f"{module}.weight"
    change = layer.get_delta_weight("default").detach()
    ours = merged[name] - base.unet.state_dict()[name]
    torch.testing.assert_close(ours, change, rtol=1e-4, atol=1e-6)
    assert change.abs().max() > 1e-3


# Laws


@pytest.fixture(scope="module")
def two_files(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("two")
    made = factors(base)
    save_file(kohya(made), directory / "a.safetensors")
    other = {k: (down.flip(0), up * 0.7, 2.0) for k, (down, up, _) in made.items() if "attn" in k}
    save_file(kohya(other), directory / "b.safetensors")
    return directory / "a.safetensors", directory / "b.safetensors"


def in_double(base: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    unet, text = base.unet.state_dict(), base.text_encoder.state_dict()
    return {k: v.double() for k, v in unet.items()}, {k: v.double() for k, v in text.items()}


def test_merging_is_linear_in_the_weight(base: Any, two_files: tuple[Path, Path]) -> None:
    lora, states = read_lora(two_files[0]), in_double(base)
    one, half = merge(lora, 1.0, *states), merge(lora, -0.3, *states)
    for start, whole, part in zip(states, one, half, strict=True):
        for name in start:
            torch.testing.assert_close(
                part[name] - start[name], -0.3 * (whole[name] - start[name]), rtol=1e-9, atol=1e-12
            )


def test_files_add_up_in_any_order(base: Any, two_files: tuple[Path, Path]) -> None:
    a, b = (read_lora(path) for path in two_files)
    states = in_double(base)
    torch.testing.assert_close(
        merge(a, 0.5, *merge(b, 0.9, *states)), merge(b, 0.9, *merge(a, 0.5, *states))
    )
    torch.testing.assert_close(
        merge(a, 0.5, *merge(a, 0.5, *states)), merge(a, 1.0, *states)
    )  # the same file twice
    torch.testing.assert_close(merge(a, -1.0, *merge(a, 1.0, *states)), states)
    torch.testing.assert_close(merge(a, 0.0, *states), states)


def test_the_base_is_untouched_and_shared(base: Any, two_files: tuple[Path, Path]) -> None:
    states = base.unet.state_dict(), base.text_encoder.state_dict()
    before = copy.deepcopy(states)
    merged = merge(read_lora(two_files[1]), 1.0, *states)
    torch.testing.assert_close(states, before, rtol=0, atol=0)
    for new, old in zip(merged, states, strict=True):
        assert list(new) == list(old)
        changed = {name for name in old if new[name] is not old[name]}
        assert changed == {
            n for n in old if "attn" in n and n.endswith(".weight") and "norm" not in n
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(
    base: Any, two_files: tuple[Path, Path], dtype: torch.dtype
) -> None:
    states = [{k: v.to(dtype) for k, v in state.items()} for state in in_double(base)]
    wide = [{k: v.float() for k, v in state.items()} for state in states]
    lora = read_lora(two_files[0])
    ours, exact = merge(lora, 0.7, *states), merge(lora, 0.7, *wide)
    for a, b in zip(ours, exact, strict=True):
        assert {v.dtype for v in a.values()} == {dtype}
        torch.testing.assert_close(a, {k: v.to(dtype) for k, v in b.items()}, rtol=0, atol=0)


def test_half_precision_files(base: Any, tmp_path: Path) -> None:
    made = kohya(factors(base))
    for dtype in (torch.float16, torch.bfloat16):
        rounded = {name: value.to(dtype) for name, value in made.items()}
        save_file(rounded, tmp_path / "half.safetensors")
        save_file({n: v.float() for n, v in rounded.items()}, tmp_path / "wide.safetensors")
        a, b = (apply(base, (tmp_path / f"{n}.safetensors", 1.0)) for n in ("half", "wide"))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_memory_format_is_kept(base: Any, two_files: tuple[Path, Path]) -> None:
    unet = copy.deepcopy(base.unet).to(memory_format=torch.channels_last)
    merged, _ = merge(read_lora(two_files[0]).part("unet"), 1.0, unet.state_dict())
    assert merged[f"{CONV}.weight"].is_contiguous(memory_format=torch.channels_last)
    assert not merged[f"{CONV}.weight"].is_contiguous()


def test_merge_into_modules(base: Any, two_files: tuple[Path, Path]) -> None:
    unet, text = copy.deepcopy(base.unet), copy.deepcopy(base.text_encoder)
    merge_into(read_lora(two_files[0]), 0.5, unet, text)
    merge_into(read_lora(two_files[1]).part("unet"), -0.2, unet)
    merge_into(read_lora(two_files[1]).part("text"), -0.2, text=text)
    assert_close(outputs(unet, text), apply(base, (two_files[0], 0.5), (two_files[1], -0.2)))


@pytest.mark.gpu
def test_merge_on_a_gpu(base: Any, two_files: tuple[Path, Path]) -> None:
    states = [{k: v.cuda() for k, v in s.items()} for s in in_double(base)]
    lora = read_lora(two_files[0])
    for ours, theirs in zip(
        merge(lora, 0.7, *states), merge(lora, 0.7, *in_double(base)), strict=True
    ):
        assert {v.device.type for v in ours.values()} == {"cuda"}
        torch.testing.assert_close({k: v.cpu() for k, v in ours.items()}, theirs)


# What the products mean


def one_layer(base: Any, path: Path, module: str, **tensors: Tensor) -> Tensor:
    """The change of one module's weight by a file of these tensors."""
    names = {"lora_up": "lora_up.weight", "lora_mid": "lora_mid.weight"}
    names["lora_down"] = "lora_down.weight"
    prefix = "lora_unet_" + module.replace(".", "_")
    save_file({f"{prefix}.{names.get(k, k)}": v for k, v in tensors.items()}, path)
    state = {k: v.double() for k, v in base.unet.state_dict().items()}
    merged, _ = merge(read_lora(path), 1.0, state)
    return merged[f"{module}.weight"] - state[f"{module}.weight"]


def test_locon_is_three_convolutions_in_a_row(base: Any, tmp_path: Path) -> None:
    torch.manual_seed(4)
    down, mid, up = torch.randn(5, 8, 1, 1), torch.randn(6, 5, 3, 3), torch.randn(8, 6, 1, 1)
    change = one_layer(
        base,
        tmp_path / "x.safetensors",
        CONV,
        lora_down=down,
        lora_mid=mid,
        lora_up=up,
        alpha=torch.tensor(2.5),
    )
    x = torch.randn(1, 8, 5, 5, dtype=torch.float64)
    conv = nn.functional.conv2d
    row = conv(conv(conv(x, down.double()), mid.double()), up.double()) * 2.5 / 5
    torch.testing.assert_close(conv(x, change), row)


def test_dora_sets_the_lengths_of_rows_or_columns(base: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    before = base.unet.state_dict()[f"{QUERY}.weight"].double()
    lengths = torch.rand(16) + 0.5
    for shape, axis in (((16, 1), 1), ((16,), 1), ((1, 16), 0)):
        change = one_layer(
            base,
            tmp_path / "x.safetensors",
            QUERY,
            lora_down=down,
            lora_up=up,
            dora_scale=lengths.reshape(shape),
        )
        after = before + change
        torch.testing.assert_close(after.norm(dim=axis), lengths.double())
        plain = before + up.double() @ down.double()
        cosine = nn.functional.cosine_similarity(after, plain, dim=axis)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
