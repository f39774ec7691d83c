"""Is the asked device found, or refused in one line that says what to use?"""

from __future__ import annotations

import os

import pytest
import torch

from latentdiff.devices import autocast, cast, choose_algorithms, resolve_device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends that the machine has so many CUDA devices, and MPS or not."""

    def pretend(num_cuda: int, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def test_auto_takes_the_fastest(machine) -> None:
    machine(num_cuda=1, mps=True)
    assert resolve_device("auto") == torch.device("cuda")
    machine(num_cuda=0, mps=True)
    assert resolve_device("auto") == torch.device("mps")
    machine(num_cuda=0)
    assert resolve_device("auto") == torch.device("cpu")


def test_devices_by_name(machine) -> None:
    machine(num_cuda=2, mps=True)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps"):
        assert resolve_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:-1", "CPU", "meta", "xpu"])
def test_unknown_devices_are_named(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_device(name)
    message = f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("num_cuda", "name", "message"),
    [
        (0, "cuda", r"device 'cuda' asked for, but 0 CUDA device\(s\) are here; use --device cpu"),
        (0, "cuda:0", r"device 'cuda:0' asked for, but 0 CUDA device\(s\) are here"),
        (2, "cuda:2", r"device 'cuda:2' asked for, but 2 CUDA device\(s\) are here"),
        (2, "mps", r"device 'mps' asked for, but there is none here; use cpu or auto"),
    ],
)
def test_missing_devices_are_named(machine, num_cuda: int, name: str, message: str) -> None:
    machine(num_cuda)
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_bf16_runs_matrix_products_in_bfloat16_and_fp32_does_not() -> None:
    a = torch.ones(4, 4)
    with autocast(torch.device("cpu"), "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_modules_are_cast_in_place(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(2, 2)
    assert cast(module, "cpu", dtype) is module
    assert module.weight.dtype == dtype


def test_networks_are_not_cast_to_other_types() -> None:
    message = "dtype torch.float64 is not for networks; use float32, bfloat16 or float16"
    with pytest.raises(ValueError, match=message):
        cast(torch.nn.Linear(2, 2), "cpu", torch.float64)


def test_algorithms_are_the_fastest_or_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_algorithms(deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
        choose_algorithms(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
