"""What can this machine do? Versions, devices, attention, bfloat16, caches, and what to mend."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from latentdiff import __version__
from latentdiff.attention import choose, report
from latentdiff.attention_trials import TOLERANCE
from latentdiff.caches import cache_directory, size_bytes
from latentdiff.devices import resolve_device

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "xformers",
    "openvino",
    "torchao",
    "triton",
)
SD1_HEAD_DIMS = (40, 80, 160)  # Stable Diffusion 1.x, from the finest level
_CPU_FEATURES = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
)
_ENOUGH_DISK_BYTES = 2 << 30  # compiled graphs, exports and pictures
_GIB = 1 << 30

Facts = dict[str, Any]


def examine(device_name: str = "auto") -> Facts:
    """All facts, ready for JSON. Takes seconds; loads no model and asks no network.

    Args:
        device_name: whose attention and precision are measured: auto, cpu, cuda, cuda:N or mps.

    Raises:
        ValueError: no such device on this machine.
    """
    with warnings.catch_warnings(record=True) as told:  # torch says so why it sees no GPU
        warnings.simplefilter("always")
        device = resolve_device(device_name)
    facts: Facts = {
        "latentdiff": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_built_for": _build(),
        "device": str(device),
        "devices": [_cpu(), *_gpus()],
        "half_precision": _half_precision(device),
        "attention": _attention(device),
        "caches": _caches(),
    }
    facts["warnings"] = [
        *_gpu_warnings([str(warning.message) for warning in told]),
        *_thread_warnings(facts["devices"][0]),
        *_precision_warnings(facts["half_precision"], device),
        *_xformers_warnings(facts),
        *_cache_warnings(facts["caches"]),
    ]
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    hip = getattr(torch.version, "hip", None)
    return "CPU" if hip is None else f"ROCm {hip}"


def _cpu() -> Facts:
    """The CPU as torch sees it; memory as this process may use it."""
    read = getattr(torch.cpu, "get_capabilities", dict)  # newer torch only
    known = read()
    return {
        "name": "cpu",
        "model": known.get("cpu_name") or platform.processor() or platform.machine(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in _CPU_FEATURES if known.get(name)],
    }


def usable_cores() -> int:
    """Logical cores that this process may use: its affinity, and its container's share of time."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _gpus() -> list[Facts]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
                "free_bytes": torch.cuda.mem_get_info(index)[0],
                "capability": f"{capability[0]}.{capability[1]}",
                "bf16": capability >= (8, 0),
                "tf32": capability >= (8, 0),
                "fp8": capability >= (8, 9),
            }
        )
    if torch.backends.mps.is_available():
        gpus.append({"name": "mps", "model": platform.processor()})
    return gpus


def _half_precision(device: torch.device) -> list[Facts]:
    """A product and a convolution in each half precision against float32 of the same inputs."""
    checks = []
    for dtype in (torch.bfloat16, torch.float16):
        facts: Facts = {"dtype": str(dtype).removeprefix("torch.")}
        try:
            off = half_precision_difference(device, dtype)
            checks.append(facts | off | {"is_right": max(off.values()) <= TOLERANCE[dtype]})
        except RuntimeError as error:  # no such kernels on this device
            checks.append(facts | {"is_right": False, "problem": str(error).splitlines()[0]})
    return checks


@torch.inference_mode()
def half_precision_difference(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from float32 on the CPU, over the largest value; of two operations."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def off(operation: Any, *inputs: torch.Tensor) -> float:
        expected = operation(*(x.float() for x in inputs))
        got = operation(*(x.to(device) for x in inputs)).float().cpu()
        return float((got - expected).abs().max().nan_to_num(torch.inf) / expected.abs().max())

    image = draw(2, 64, 32, 32).to(memory_format=torch.channels_last)
    weight = draw(64, 64, 3, 3).to(memory_format=torch.channels_last)
    return {
        "product_difference": off(torch.matmul, draw(256, 320), draw(320, 256)),
        "convolution_difference": off(lambda x, w: F.conv2d(x, w, padding=1), image, weight),
    }


def _attention(device: torch.device) -> Facts:
    """Every back-end at Stable Diffusion 1.x's shapes: 512 px on a GPU, 256 on a CPU."""
    size_px = 256 if device.type == "cpu" else 512
    num_tokens = (size_px // 8) ** 2
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.half
    trials = report(device, dtype, SD1_HEAD_DIMS, num_tokens)
    chosen = choose("auto", device, dtype, SD1_HEAD_DIMS, num_tokens)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "size_px": size_px,
        "backends": [
            {
                "name": trial.name,
                "runs": trial.problem is None,
                "problem": trial.problem,
                "ms": trial.ms,
                "difference": trial.difference,
            }
            for trial in trials
        ],
        "auto": {"name": chosen.name, "reason": chosen.reason},
    }


def _caches() -> list[Facts]:
    """Our own, and the hub's, from which models are taken."""
    found = [("what latentdiff keeps", cache_directory())]
    found += [("models and data of the Hugging Face hub", hub_cache())]
    return [
        {
            "what": what,
            "path": str(path),
            "bytes": size_bytes(path),
            "free_bytes": shutil.disk_usage(_nearest(path)).free,
            "is_writable": os.access(_nearest(path), os.W_OK),
        }
        for what, path in found
    ]


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetches; asked of the environment, as it does itself."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    hub = Path(os.environ.get("HF_HOME", home), "hub")
    for variable in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        hub = Path(os.environ.get(variable, hub))
    return Path(os.path.expandvars(hub.expanduser()))


def _nearest(path: Path) -> Path:
    """The directory, or the first above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _warning(problem: str, fix: str) -> dict[str, str]:
    return {"problem": problem, "fix": fix}


def _gpu_warnings(told: list[str]) -> list[dict[str, str]]:
    """An NVIDIA GPU that torch cannot use."""
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if torch.cuda.is_available() or not has_driver:
        return []
    if torch.version.cuda is None:
        problem = f"this machine has an NVIDIA driver, but torch is built for {_build()}"
        return [_warning(problem, "install the CUDA build of torch, from pytorch.org")]
    why = next((text.partition(" (Triggered")[0] for text in told if "CUDA" in text), "")
    return [
        _warning(
            f"this machine has an NVIDIA driver, but torch sees no GPU. {why}".strip(),
            f"torch is built for CUDA {torch.version.cuda}: ask nvidia-smi whether the driver is "
            "new enough and the GPU visible",
        )
    ]


def _thread_warnings(cpu: Facts) -> list[dict[str, str]]:
    threads, cores = cpu["threads"], cpu["usable_cores"]
    if threads > cores:
        problem = f"torch computes with {threads} threads, but this process may use {cores} cores"
        return [_warning(problem, f"set OMP_NUM_THREADS={cores}")]
    limit = os.environ.get("OMP_NUM_THREADS")
    if limit is not None and (threads == 1 < cores or 2 * threads < cores):
        problem = f"torch computes on {threads} of {cores} cores, for OMP_NUM_THREADS is {limit}"
        return [_warning(problem, "unset OMP_NUM_THREADS to draw faster on the CPU")]
    return []


def _precision_warnings(checks: list[Facts], device: torch.device) -> list[dict[str, str]]:
    return [
        _warning(f"{check['dtype']} is wrong on {device}", "use --dtype float32")
        for check in checks
        if not check["is_right"]
    ]


def _xformers_warnings(facts: Facts) -> list[dict[str, str]]:
    """The package is there, for a GPU, and does not run."""
    tried = next(b for b in facts["attention"]["backends"] if b["name"] == "xformers")
    if facts["versions"]["xformers"] is None or tried["runs"]:
        return []
    if not facts["device"].startswith("cuda"):
        return []
    problem = f"xformers {facts['versions']['xformers']} is installed but does not run"
    return [_warning(f"{problem}: {tried['problem']}", "the other back-ends serve as well")]


def _cache_warnings(caches: list[Facts]) -> list[dict[str, str]]:
    ours = caches[0]
    found = []
    if not ours["is_writable"]:
        problem = f"{ours['path']} cannot be written: nothing is kept for the next run"
        found.append(_warning(problem, "set LATENTDIFF_CACHE to a directory of yours"))
    if ours["free_bytes"] < _ENOUGH_DISK_BYTES:
        left = f"{ours['free_bytes'] / _GIB:.1f} GiB"
        problem = f"{left} of disk are left at {ours['path']}"
        found.append(_warning(problem, "free some, or set LATENTDIFF_CACHE to another disk"))
    return found
