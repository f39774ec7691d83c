"""How do tests start several ranks? By torchrun, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(
    num_ranks: int, command: Sequence[str], timeout_s: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` on some ranks with one thread each; what they said comes back."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, f"--nproc-per-node={num_ranks}", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
