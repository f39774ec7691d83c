"""Does the doctor say what is true of this machine, and what to mend?"""

from __future__ import annotations

import json
import platform
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff import doctor
from latentdiff.attention import BACKENDS
from latentdiff.cli.doctor import describe
from latentdiff.doctor import examine


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTDIFF_CACHE", str(tmp_path_factory.mktemp("caches")))
        patch.setattr(doctor, "SD1_HEAD_DIMS", (8,))  # milliseconds, not seconds
        return examine("cpu")


def test_facts_are_this_processs(facts: dict[str, Any]) -> None:
    assert facts["python"] == platform.python_version()
    assert torch.__version__.startswith(facts["versions"]["torch"].partition("+")[0])
    cpu = facts["devices"][0]
    assert cpu["threads"] == torch.get_num_threads() and cpu["usable_cores"] >= 1
    assert len(facts["devices"]) == 1 + torch.cuda.device_count() + torch.mps.is_available()
    assert json.loads(json.dumps(facts)) == facts, "ready for JSON"


def test_every_back_end_is_told(facts: dict[str, Any]) -> None:
    backends = {b["name"]: b for b in facts["attention"]["backends"]}
    assert tuple(backends) == BACKENDS
    assert backends["sliced"]["runs"] and backends["sliced"]["difference"] < 1e-5
    assert not backends["cudnn"]["runs"] and "for CUDA" in backends["cudnn"]["problem"]
    assert facts["attention"]["auto"]["name"] == "sdpa"


def test_lines_to_read(facts: dict[str, Any]) -> None:
    lines = list(describe(facts))
    text = "\n".join(lines)
    assert all(name in text for name in (*BACKENDS, *doctor.PACKAGES, "bfloat16", "float16"))
    assert any(line.startswith("  cudnn ") and "cannot run: its kernel" in line for line in lines)
    assert any(line.startswith("  sliced ") and " ms   off float64 by " in line for line in lines)


def test_a_gpu_in_words() -> None:
    gpu = {
        "name": "cuda:0",
        "model": "A GPU",
        "memory_bytes": 8 << 30,
        "free_bytes": 7 << 30,
        "capability": "8.0",
        "bf16": True,
        "tf32": True,
        "fp8": False,
    }
    from latentdiff.cli.doctor import _device

    assert _device(gpu) == (
        "cuda:0        A GPU, 8.0 GiB (7.0 free), capability 8.0, bf16, TF32, no fp8"
    )


def test_half_precision_is_right_where_rounding_is_all_that_differs() -> None:
    checks = {check["dtype"]: check for check in doctor._half_precision(torch.device("cpu"))}
    assert checks["bfloat16"]["is_right"] and checks["float16"]["is_right"]
    assert 1e-4 < checks["bfloat16"]["product_difference"] < 1e-2, (
        "rounded, not float32 in disguise"
    )


def test_wrong_half_precision_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.matmul

    def broken(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return matmul(a, b) * (1.1 if a.dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(torch, "matmul", broken)
    checks = doctor._half_precision(torch.device("cpu"))
    assert [check["is_right"] for check in checks] == [False, True]
    assert doctor._precision_warnings(checks, torch.device("cpu")) == [
        {"problem": "bfloat16 is wrong on cpu", "fix": "use --dtype float32"}
    ]

    monkeypatch.setattr(torch, "matmul", lambda a, b: matmul(a, b) * torch.nan)
    assert not any(check["is_right"] for check in doctor._half_precision(torch.device("cpu")))


def told(warnings: list[dict[str, str]]) -> str:
    return "; ".join(f"{w['problem']}; {w['fix']}" for w in warnings)


TOO_MANY = "torch computes with 64 threads, but this process may use 4 cores; set OMP_NUM_THREADS=4"
TOO_FEW = (
    "torch computes on 1 of 2 cores, for OMP_NUM_THREADS is 1; unset OMP_NUM_THREADS to draw "
    "faster on the CPU"
)


@pytest.mark.parametrize(
    ("threads", "cores", "limit", "expected"),
    [
        (2, 2, None, ""),
        (8, 16, "8", ""),
        (1, 16, None, ""),
        (1, 1, "1", ""),
        (64, 4, None, TOO_MANY),
        (1, 2, "1", TOO_FEW),
    ],
)
def test_threads(
    threads: int, cores: int, limit: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    cpu = {"threads": threads, "usable_cores": cores}
    assert told(doctor._thread_warnings(cpu)) == expected


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("10000 100000", 1), ("", 8)]
)
def test_a_containers_share_of_the_cpu(
    quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(doctor, "_read", lambda path: quota)
    assert doctor.usable_cores() == cores


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    assert told(doctor._gpu_warnings([])) == (
        "this machine has an NVIDIA driver, but torch is built for CPU; "
        "install the CUDA build of torch, from pytorch.org"
    )
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    text = told(
        doctor._gpu_warnings(["CUDA initialization: driver too old (Triggered internally)"])
    )
    assert (
        "torch sees no GPU. CUDA initialization: driver too old; torch is built for CUDA 13" in text
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor._gpu_warnings([]) == []


def test_xformers_that_does_not_run() -> None:
    backend = {"name": "xformers", "runs": False, "problem": "built for torch 2.10"}
    facts = {
        "attention": {"backends": [backend]},
        "versions": {"xformers": "0.0.35"},
        "device": "cuda",
    }
    assert told(doctor._xformers_warnings(facts)).startswith(
        "xformers 0.0.35 is installed but does not run: built for torch 2.10; "
    )
    assert doctor._xformers_warnings(facts | {"device": "cpu"}) == []
    assert doctor._xformers_warnings(facts | {"versions": {"xformers": None}}) == []
    backend["runs"] = True
    assert doctor._xformers_warnings(facts) == []


def test_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "new" / "one"))
    ours = doctor._caches()[0]
    assert (ours["path"], ours["bytes"]) == (str(tmp_path / "new" / "one"), 0)
    assert ours["is_writable"] and ours["free_bytes"] > 0
    (tmp_path / "new" / "one").mkdir(parents=True)
    (tmp_path / "new" / "one" / "file").write_bytes(bytes(77))
    assert doctor._caches()[0]["bytes"] == 77


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/x"},
        {"XDG_CACHE_HOME": "/x", "HF_HOME": "~/models"},
        {"HF_HOME": "/models", "HUGGINGFACE_HUB_CACHE": "/old"},
        {"HF_HUB_CACHE": "/new", "HUGGINGFACE_HUB_CACHE": "/old"},
    ],
)
def test_the_hubs_cache_is_where_the_hub_says(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs = runpy.run_path(str(constants.__file__))  # it reads the environment when it is run
    assert str(doctor.hub_cache()) == theirs["HF_HUB_CACHE"]


def test_a_cache_that_is_full_or_closed() -> None:
    good = {"path": "/c", "is_writable": True, "free_bytes": 9 << 30}
    assert doctor._cache_warnings([good]) == []
    closed = told(doctor._cache_warnings([good | {"is_writable": False}]))
    assert closed.startswith(
        "/c cannot be written: nothing is kept for the next run; set LATENTDIFF"
    )
    full = told(doctor._cache_warnings([good | {"free_bytes": 1 << 29}]))
    assert full.startswith("0.5 GiB of disk are left at /c; free some")


RunLatentdiff = Callable[..., "subprocess.CompletedProcess[str]"]


def test_the_command(run_latentdiff: RunLatentdiff, tmp_path: Path) -> None:
    done = run_latentdiff("doctor", "--json", "--device", "cpu", LATENTDIFF_CACHE=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["attention"]["size_px"] == 256 and facts["device"] == "cpu"


def test_a_device_that_is_not_here(run_latentdiff: RunLatentdiff) -> None:
    done = run_latentdiff("doctor", "--device", "cuda:99")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: device 'cuda:99' asked for, but ")


def test_it_imports_no_model_library(run_python: RunLatentdiff) -> None:
    done = run_python(
        "-c",
        "import sys, latentdiff.doctor as d; d.SD1_HEAD_DIMS = (8,); d.examine('cpu');"
        "print(*sorted({'diffusers', 'transformers', 'openvino', 'xformers'} & set(sys.modules)))",
    )
    assert (done.returncode, done.stdout) == (0, "\n")
