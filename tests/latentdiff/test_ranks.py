"""Do two real ranks come to the same verdicts, and to the numbers that one would?"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torchrun import ROOT, torchrun

DRIVER = str(ROOT / "tests" / "latentdiff" / "ranks_driver.py")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank found."""
    out = tmp_path_factory.mktemp("ranks")
    done = torchrun(2, [DRIVER, request.param, str(out)])
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank-{i}.json").read_text()) for i in range(2)]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("fault", ["nan", "inf", "spike"])
def test_a_fault_of_one_rank_is_skipped_by_all(
    ranks: list[dict[str, Any]], fault: str, where: int
) -> None:
    first, second = (found[f"{fault} on {where}"] for found in ranks)
    assert first["verdicts"] == second["verdicts"] == [0, 0, 0, 0, 1, 0, 0]
    assert first["kept"] == second["kept"] == [False] * 4 + [True] + [False] * 2  # bit for bit
    assert first["diverged"] is second["diverged"] is None
    assert first["state"] == second["state"]


def test_after_the_limit_all_ranks_keep_the_last_good_weights(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["limit"] for found in ranks)
    assert first["verdicts"] == second["verdicts"] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert first["kept"] == second["kept"] == [False] * 3 + [True] * 5
    assert first["diverged"] == second["diverged"] == [6, 3]
    assert first["state"] == second["state"]


def test_measures_are_those_of_one_rank(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["measured"] for found in ranks)
    assert first == second
    assert first["losses"] == {  # of 0, 1, 2, 3, 5, each seen twice
        "loss": 2.2,
        "loss_last": 2.2,
        "samples": 10.0,
        "loss_t/0-0.5": 1.0,
        "loss_t/0.5-1": 4.0,
    }
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    squares = [parameter.detach().square().sum().item() for parameter in module.parameters()]
    moved = sum(square * (0.01 * i) ** 2 for i, square in enumerate(squares))
    assert first["ratio"] == pytest.approx((moved / sum(squares)) ** 0.5, rel=1e-4)
