"""Does OpenVINO give the networks' numbers, and does an export outlive its process unharmed?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from latentdiff.backends import openvino, openvino_export
from latentdiff.backends.openvino import TOLERANCES, OpenVINO
from latentdiff.backends.precision import relative_error
from latentdiff.lean.unet import LeanUNet

pytest.importorskip("openvino", reason="an optional extra, latentdiff[openvino]")

CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 2,
    "block_out_channels": [16, 32],
    "cross_attention_dim": 8,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def filled(network: nn.Module) -> Any:
    """The network with weights, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for weight in network.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def unet() -> LeanUNet:
    return filled(LeanUNet(CONFIG))


@pytest.fixture(scope="module")
def exported(unet: LeanUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's openvino folder with the export and one compiled shape."""
    directory = tmp_path_factory.mktemp("model") / "openvino"
    with patch(
        "openvino_telemetry.Telemetry", side_effect=AssertionError("it reports to a server")
    ):
        openvino.unet(unet, directory).prepare(*(x.shape for x in inputs(unet)))
    return directory


@pytest.fixture
def directory(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    shutil.copytree(exported, tmp_path / "openvino")
    return tmp_path / "openvino"


def inputs(
    unet: LeanUNet, b: int = 1, rows: int = 2, h: int = 8, w: int = 8, n: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b)
    with torch.inference_mode():
        noisy = torch.randn(b, 4, h, w, generator=generator)
        text = unet.texts(torch.randn(rows, n, 8, generator=generator))
        return noisy, unet.times(torch.tensor([500.0])), text


def forbidden(*args: object) -> Any:
    raise AssertionError("this was to be read from the disk")


def error_of(run: OpenVINO, unet: LeanUNet, **shape: int) -> float:
    given = inputs(unet, **shape)
    with torch.inference_mode():
        return relative_error(run(*given), unet(*given))


# Numbers


@pytest.mark.parametrize(
    "shape",
    [
        dict(b=1, rows=2),
        dict(b=1, rows=1),
        dict(b=3, rows=6),
        dict(b=3, rows=3),
        dict(h=12, w=2),
        dict(h=2, w=2),
        dict(n=1),
        dict(n=77),
    ],
)
def test_one_export_gives_the_unets_numbers_for_all_shapes(
    shape: dict[str, int], unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "export", forbidden)
    run = openvino.unet(unet, directory)
    assert run.is_exported
    assert error_of(run, unet, **shape) < 1e-5


def test_bfloat16_rounds_and_no_more(unet: LeanUNet, directory: Path) -> None:
    if "BF16" not in openvino_capabilities():
        pytest.skip("this CPU computes no bfloat16: OpenVINO takes float32 instead")
    assert 1e-4 < error_of(openvino.unet(unet, directory, torch.bfloat16), unet) < 3e-2


def openvino_capabilities() -> list[str]:
    from openvino import Core

    return Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_a_result_is_the_callers(unet: LeanUNet, directory: Path) -> None:
    run = openvino.unet(unet, directory)
    noisy, time, text = inputs(unet)
    first = run(noisy, time, text)
    kept = first.clone()
    assert not torch.equal(run(2 * noisy, time, text), kept)
    assert torch.equal(first, kept)


def test_inputs_may_lie_in_memory_as_they_like(unet: LeanUNet, directory: Path) -> None:
    run = openvino.unet(unet, directory)
    noisy, time, text = inputs(unet)
    expected = run(noisy, time, text)
    views = noisy.contiguous(memory_format=torch.channels_last), time, text.mT.contiguous().mT
    assert torch.equal(run(*views), expected)
    assert run(noisy.bfloat16(), time, text.requires_grad_(False)).dtype == torch.float32


def test_wrong_numbers_are_refused(
    unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = openvino.unet(unet, directory)
    monkeypatch.setattr(unet, "forward", lambda *given: 1.001 * LeanUNet.forward(unet, *given))
    wanted = "OpenVINO in f32 differs from PyTorch by 0.001 .* 2x4x8x8, .* expected at most 0.0001"
    with pytest.raises(ValueError, match=wanted):
        run.prepare(*(x.shape for x in inputs(unet, b=2, rows=4)))
    assert len(list(directory.glob("*/*.compiled"))) == 1  # nothing wrong is kept


def test_a_shape_that_the_export_does_not_have_is_refused(unet: LeanUNet, directory: Path) -> None:
    noisy, time, text = inputs(unet)
    with pytest.raises(ValueError, match=r"OpenVINO cannot run inputs of shapes 1x3x8x8, .*off"):
        openvino.unet(unet, directory)(noisy[:, :3], time, text)


# What is kept on disk


def test_the_next_process_exports_and_compiles_nothing(
    unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVINO, "_compiled", forbidden)
    assert error_of(openvino.unet(unet, directory), unet) < 1e-5


def test_other_weights_are_another_export(unet: LeanUNet, directory: Path) -> None:
    other = filled(LeanUNet(CONFIG))
    assert openvino.unet(other, directory).is_exported
    other.conv_out.bias[0] += 1e-3
    assert not openvino.unet(other, directory).is_exported


def test_other_options_are_another_export(unet: LeanUNet, directory: Path) -> None:
    assert not openvino.unet(unet, directory, options="merged 0.5").is_exported


@pytest.mark.parametrize("identity", [None, "files of today"])
def test_another_network_of_the_same_weights_is_another_export(
    identity: str | None, unet: LeanUNet, directory: Path
) -> None:
    """How many heads share the channels of attention is in no weight's shape."""
    heads = filled(LeanUNet({**CONFIG, "attention_head_dim": 4}))
    assert all(map(torch.equal, heads.parameters(), unet.parameters()))
    home = openvino.unet(unet, directory, identity=identity)._home
    assert openvino.unet(heads, directory, identity=identity)._home != home


def test_an_identity_stands_for_the_weights(
    unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_export, "_hash_of_weights", forbidden)  # seconds, of a large one
    run = openvino.unet(unet, directory, identity="files of today")
    assert not run.is_exported
    (hashed,) = directory.iterdir()
    shutil.copytree(hashed, run._home)
    assert error_of(openvino.unet(unet, directory, identity="files of today"), unet) < 1e-5
    assert not openvino.unet(unet, directory, identity="other files").is_exported
    monkeypatch.undo()
    assert openvino.unet(unet, directory)._home == hashed


def test_whether_it_is_exported_can_be_asked_before_weights_are_there(
    unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        empty = LeanUNet(CONFIG)
        heads = LeanUNet({**CONFIG, "attention_head_dim": 4})
    assert not openvino.is_exported(empty, directory, "files")
    run = openvino.unet(unet, directory, torch.bfloat16, "merged 0.5", "files")
    shutil.copytree(next(directory.iterdir()), run._home)
    assert run.is_exported
    assert openvino.is_exported(empty, directory, "files", "merged 0.5")
    assert openvino.is_exported(LeanUNet(CONFIG).half(), directory, "files", "merged 0.5")
    assert not openvino.is_exported(empty, directory, "files")
    assert not openvino.is_exported(empty, directory, "other files", "merged 0.5")
    assert not openvino.is_exported(heads, directory, "files", "merged 0.5")
    assert not openvino.is_exported(empty, None, "files", "merged 0.5")
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    assert not openvino.is_exported(empty, directory, "files", "merged 0.5")


@pytest.mark.parametrize("name", ["torch.__version__", "openvino.__version__"])
def test_another_version_is_another_export(
    name: str, unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(name, "0.0")
    assert not openvino.unet(unet, directory).is_exported


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def noise(content: bytes) -> bytes:
    return content[:-4000] + bytes(byte ^ 0x5A for byte in content[-4000:])


@pytest.mark.parametrize(
    ("pattern", "damage", "said"),
    [
        ("*.compiled", half, "compiled"),
        ("*.compiled", noise, "compiled"),
        ("model.xml", half, "exported"),
        ("model.bin", half, "exported"),
    ],
)
def test_damage_is_said_and_repaired(
    pattern: str,
    damage: Callable[[bytes], bytes],
    said: str,
    unet: LeanUNet,
    directory: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def export(network: nn.Module, inputs: object, home: Path) -> None:  # what takes seconds
        shutil.copytree(exported / home.name, home)

    monkeypatch.setattr(openvino, "export", export)
    (path,) = directory.glob(f"*/{pattern}")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"is damaged .*; {said} again"):
        # a new shape: the known one needs no model.xml
        assert (
            error_of(openvino.unet(unet, directory), unet, n=6 if said == "exported" else 5) < 1e-5
        )
    monkeypatch.setattr(OpenVINO, "_compiled", forbidden)
    assert error_of(openvino.unet(unet, directory), unet) < 1e-5


def test_changed_weights_on_disk_are_noticed(unet: LeanUNet, directory: Path) -> None:
    (path,) = directory.glob("*/model.bin")
    content = bytearray(path.read_bytes())
    middle = len(content) // 8 * 4
    torch.frombuffer(content, dtype=torch.float32)[middle // 4 :][:2000].neg_()
    path.write_bytes(content)
    with (
        pytest.warns(UserWarning, match="its relative error is"),
        pytest.raises(
            ValueError, match=r"differs from PyTorch .* or delete .* if that may be damaged"
        ),
    ):
        error_of(openvino.unet(unet, directory), unet)


def test_where_the_model_cannot_be_written_the_users_cache_is(
    unet: LeanUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    for directory in (None, tmp_path / "no" / "model" / "openvino"):
        home = openvino_export.find_home(directory, unet, [], "")
        assert home.parent == tmp_path / "cache" / "openvino"
    home = openvino_export.find_home(tmp_path / "openvino", unet, [], "")
    assert home.parent == tmp_path / "openvino"


def test_old_exports_make_room(tmp_path: Path) -> None:
    import os

    for age in range(6):
        (tmp_path / str(age)).mkdir()
        (tmp_path / str(age) / "model.xml").touch()
        os.utime(tmp_path / str(age), (1000 - age, 1000 - age))
    (tmp_path / "other").mkdir()
    openvino_export._forget_old(tmp_path / "0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "other"]


def test_large_networks_keep_two_shapes_in_memory(
    unet: LeanUNet, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "_KEPT_BYTES", 0)
    run = openvino.unet(unet, directory)
    for b in (1, 2, 1, 3):
        assert error_of(run, unet, b=b, rows=b) < 1e-5
    assert [shapes[0][0] for shapes in run._requests] == [1, 3]


# What cannot be


def test_what_cannot_be_is_said(unet: LeanUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"float32 or bfloat16; got torch\.float16; name one"):
        openvino.unet(unet, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weights in float32 on the CPU; got torch\.bfloat16"):
        openvino.unet(filled(LeanUNet(CONFIG)).bfloat16())
    monkeypatch.setattr(openvino, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'latentdiff\[openvino\]'"):
        openvino.unet(unet)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    run = OpenVINO(Branches(), [openvino_export.Input("x", (2, 2), {})], tmp_path / "openvino")
    with pytest.raises(ValueError, match=r"Branches cannot be exported to OpenVINO: .*leave"):
        run(torch.ones(2, 2))
    assert TOLERANCES.keys() == {torch.float32, torch.bfloat16}
