"""How is the U-Net compiled by torch.compile, and what of it is kept for the next process?"""

from __future__ import annotations

import os
import shutil
import sys
import warnings

import torch
from torch import nn

from latentdiff.backends import Run
from latentdiff.caches import cache_directory

_CACHE = "TORCHINDUCTOR_CACHE_DIR"  # of kernels, graphs and tuning; Triton's is a folder of it


def compiled(network: nn.Module, device: torch.device | str) -> Run:
    """The network compiled for each shape that it meets, when it first meets it.

    What is compiled is kept in the user's cache, or where TORCHINDUCTOR_CACHE_DIR says: the next
    process traces the network again, which takes seconds, but compiles nothing.

    Args:
        network: LeanUNet, where it is to run.
        device: where that is.

    Raises:
        ValueError: this machine has no compiler for the device, or the cache cannot be written.
    """
    device = torch.device(device)
    _check_compiler(device)
    keep_compiled()
    if device.type != "cuda":
        warnings.warn(
            "compiling for the CPU takes about a minute for each new size of picture or batch, "
            "once: the result is kept",
            stacklevel=2,
        )
    # CUDA graphs are `graphs.Graphs`: torch.compile's own hand out memory that they use again
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    return torch.compile(network, fullgraph=True, dynamic=False, mode=mode)


def keep_compiled() -> None:
    """Let torch.compile keep its work in the user's cache rather than in the system's /tmp.

    To be called before the first use of torch.compile in the process. What torch keeps there are
    pickles and shared objects: the directory is its owner's alone.

    Raises:
        ValueError: it cannot be written.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch writes its default into the environment when it is imported: that is no one's choice
    if os.environ.get(_CACHE, default_cache_dir()) != os.path.abspath(default_cache_dir()):
        return
    directory = cache_directory() / "inductor"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written ({error.strerror}), but compiled networks are kept "
            f"there; set LATENTDIFF_CACHE or {_CACHE} to a directory of yours"
        ) from error
    os.environ[_CACHE] = str(directory)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "torch.compile needs Triton on a GPU, and it is not there or does not know this "
                "GPU; pip install triton, or leave --compile off"
            )
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    if not any(shutil.which(name) for name in names):
        how = "xcode-select --install" if sys.platform == "darwin" else "apt-get install g++"
        raise ValueError(
            f"torch.compile needs a C++ compiler; looked for {', '.join(names)}; install one "
            f"({how}), name it in CXX, or leave --compile off"
        )
