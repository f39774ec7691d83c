"""A program for test_precompute.py: precompute whole, killed again and again, and by two ranks.

Usage: python precompute_driver.py SHARDS AUTOENCODER OUT. Children are forked, so that torch is
imported once; nothing may have computed in the parent before.
"""

from __future__ import annotations

import os
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipelines.config import DataConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import index_shards
from latentdiff.encoding import Encoders, load_encoders
from latentdiff.precompute import precompute


def child(work: Callable[[], object]) -> int:
    """Fork, do it there, and end without any clean-up."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """0, the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(call: int) -> None:
    """Let this process die, as by kill -9, at one of the calls that change the disk.

    Twenty members that are put into a tar count as one call.
    """
    left = float(call)

    def dying(owner: Any, name: str, weight: float = 1.0) -> None:
        original = getattr(owner, name)

        def step(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= weight
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, step)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "link"), (os, "unlink")):
        dying(owner, name)
    dying(tarfile.TarFile, "addfile", 1 / 20)


def run(shards: str, encoders: Encoders, out: Path, rank: int, num_ranks: int) -> None:
    config = DataConfig(shards=(shards,), size_px=16, flip=True, crop="random", num_workers=2)
    precompute(
        config, encoders, out, batch_size=8, crops=2, rank=rank, num_ranks=num_ranks, kind="samples"
    )


def contents(folder: Path) -> dict[str, bytes]:
    """What must not depend on how it came about: sidecars hold the time of their tar."""
    names = [*folder.glob("*.tar"), *folder.glob("latents*.json"), *folder.glob("*.latents.json")]
    return {path.name: path.read_bytes() for path in names}


def main(shards: str, autoencoder: str, out: Path) -> None:
    torch.set_num_threads(1)
    index_shards(expand_shards(shards), workers=1)
    encoders = load_encoders(autoencoder, device="cpu")

    assert ended(child(lambda: run(shards, encoders, out / "whole", 0, 1))) == 0
    whole = contents(out / "whole")

    num_kills = 0
    for call in range(1, 1000, 2):  # each time a little later, until nothing is left to do

        def work(call: int = call) -> None:
            kill_at(call)
            run(shards, encoders, out / "killed", 0, 1)

        code = ended(child(work))
        there = contents(out / "killed")
        wrong = [name for name, data in there.items() if data != whole[name]]
        assert not wrong, f"after {num_kills} kills these are not whole: {wrong}"
        assert "latents.json" not in there or len(there) == len(whole)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        num_kills += 1
    assert contents(out / "killed") == whole
    again = {path.name: path.stat().st_mtime_ns for path in (out / "killed").glob("*.tar")}
    assert ended(child(lambda: run(shards, encoders, out / "killed", 0, 1))) == 0
    for name, stamp in again.items():
        assert (out / "killed" / name).stat().st_mtime_ns == stamp, f"{name} was written again"

    ranks = [child(lambda r=r: run(shards, encoders, out / "ranks", r, 2)) for r in range(2)]
    assert [ended(pid) for pid in ranks] == [0, 0]
    assert contents(out / "ranks") == whole
    print(f"{num_kills} kills, {len(whole)} files")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
