"""A program for test_cli_export.py: two real ranks train a run.

Usage: python train_ranks.py CONFIG PORT. The ranks are forked, so that torch is imported once.
"""

from __future__ import annotations

import os
import sys

import diffusers
import torch

from latentdiff.config import DiffusionRun, load
from latentdiff.training.diffusion import train_diffusion

NUM_RANKS = 2


def main(path: str, port: str) -> int:
    """Fork the ranks; 0 if all ended well."""
    torch.set_num_threads(1)
    config = load(path)
    assert isinstance(config, DiffusionRun)
    assert diffusers.UNet2DModel  # imported where it is first used: in each rank
    children = []
    for rank in range(NUM_RANKS):
        if (pid := os.fork()) == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            code = 1
            try:
                train_diffusion(config)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
