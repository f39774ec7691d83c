"""Do all ranks see the same directory?"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from latentdiff.parallel import World
from latentdiff.training.agreement import on_first
from latentdiff.training.commit import write

_TO_BE_SEEN_S = 10.0  # how long a new file may take to show up on another node


def check_shared(root: Path, world: World) -> None:
    """Refuse a directory that is another one on another node."""
    if world.num_ranks == 1:
        return
    name = world.broadcast(f".tmp-seen-by-all-{secrets.token_hex(4)}")

    def leave_token() -> None:
        root.mkdir(parents=True, exist_ok=True)
        write(root / name, "")

    on_first(world, leave_token)
    blind = [rank for rank, seen in enumerate(world.gather(_comes(root / name))) if not seen]
    if world.is_first:
        (root / name).unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"{root} is not the same directory for all ranks: {name}, written by rank 0, is not "
            f"seen by rank {blind[0]}; set `out` to a directory that all nodes share"
        )


def _comes(path: Path) -> bool:
    end = time.monotonic() + _TO_BE_SEEN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
