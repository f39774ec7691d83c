"""Do all ranks come to the verdict of the one that failed?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latentdiff.parallel import World
from latentdiff.training.agreement import on_all, on_first


class _Gathered(World):
    """A rank whose peers' outcomes are given."""

    def gather(self, value: Any) -> list[Any]:
        return [value, *PEERS] if self.is_first else [PEERS[0], value]


PEERS: list[Any] = []


def test_one_ranks_error_is_everyones() -> None:
    PEERS[:] = [([], (True, "it is green"))]
    for rank in (0, 1):
        world = _Gathered(torch.device("cpu"), rank, 2)
        with pytest.raises(ValueError, match=rf"^rank {1 - rank}: it is green$"):
            on_all(world, lambda: 5)
    PEERS[:] = [([], None)]
    world = _Gathered(torch.device("cpu"), 0, 2)
    with pytest.raises(OSError, match=r"^rank 0: KeyError: 'green'$"):
        on_first(world, lambda: {}["green"])
    PEERS[:] = [([7], None)]
    assert on_all(world, lambda: 5) == [5, 7]
