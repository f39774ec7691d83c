"""Do the ledgers of all ranks add up, judge as one, and survive kills and other ranks?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from threadranks import run_ranks

from data_pipelines.config import DataConfig
from data_pipelines.ledger import Account, BadSample, Skip, TooManyBadSamples
from data_pipelines.loader import Loader
from latentdiff.training.ledgers import ledger_path, orphaned_ledgers, sum_accounts, write_ledger

BATCH = 12
BAD = {3: "cut", 40: "bad image", 77: "bad image", 101: "no caption"}


def skip(position: int, reason: Any = "cut") -> Skip:
    return Skip("x.tar", f"k{position}", reason, f"x.tar:k{position}: {reason}", position)


@pytest.fixture
def data(assets: Path) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": [str(assets / "train-*.tar")], "max_bad_rate": 1.0, "order": {"streams": 12}}
    )


def read(data: DataConfig, out: Path, start: int, stop: int, num_ranks: int = 1) -> list[Account]:
    """What the ranks of a run read from one step to another, with some bad samples."""

    def rank(world: Any) -> Account:
        loader = Loader(
            data,
            0,
            BATCH,
            start * BATCH,
            rank=world.rank,
            num_ranks=num_ranks,
            with_images=False,
            ledger_path=ledger_path(out, world),
            orphaned_ledgers=orphaned_ledgers(out, world),
        )
        for index, reason in BAD.items():
            loader.refuse(index, BadSample(reason, f"{index} is bad"))  # pyright: ignore[reportArgumentType]  # known reasons
        batches = iter(loader)
        assert loader.ledger.num_skipped >= 0  # a run takes its ledgers over before it reads
        for _ in range(start, stop):
            next(batches)
        batches.close()
        return loader.ledger.account()

    return run_ranks(num_ranks, rank)


def files(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def skips(out: Path) -> list[tuple[int, str]]:
    found = [json.loads(line) for path in out.glob("ledger-*.jsonl") for line in path.open()]
    return sorted((entry["position"], entry["key"]) for entry in found)


# Other ranks


def test_no_skip_is_lost_or_counted_twice_on_other_ranks(data: DataConfig, tmp_path: Path) -> None:
    (whole,) = read(data, tmp_path / "whole", 0, 60)
    out = tmp_path / "run"
    # of each part the last steps come after its last checkpoint, and so again
    for start, stop, num_ranks in ((0, 15, 4), (12, 26, 2), (24, 33, 1), (31, 50, 6), (48, 60, 3)):
        accounts = read(data, out, start, stop, num_ranks)
        assert len(accounts) == num_ranks
        assert files(out) == [f"ledger-{rank}.jsonl" for rank in range(num_ranks)]
    total = Account.sum(accounts)
    assert total.counts == whole.counts and total.num_skipped > 12
    assert total.num_delivered == whole.num_delivered == 60 * BATCH - total.num_skipped
    assert skips(out) == skips(tmp_path / "whole")
    assert {r: s.position for r, s in total.examples.items()} == {
        r: s.position for r, s in whole.examples.items()
    }


def test_a_kill_while_orphans_are_taken_over_counts_none_twice(
    data: DataConfig, tmp_path: Path
) -> None:
    (whole,) = read(data, tmp_path / "whole", 0, 40)
    out = tmp_path / "run"
    read(data, out, 0, 30, num_ranks=4)
    left = {path: path.read_bytes() for path in out.iterdir()}
    read(data, out, 30, 30, num_ranks=2)
    for path, text in left.items():
        if path.name in ("ledger-2.jsonl", "ledger-3.jsonl"):  # it came to no unlink
            path.write_bytes(text)
    total = Account.sum(read(data, out, 30, 40, num_ranks=2))
    assert total.counts == whole.counts and total.num_delivered == whole.num_delivered
    assert skips(out) == skips(tmp_path / "whole")


def test_a_run_from_the_start_begins_anew(data: DataConfig, tmp_path: Path) -> None:
    read(data, tmp_path, 0, 30, num_ranks=4)
    assert skips(tmp_path)
    (account,) = read(data, tmp_path, 0, 0)
    assert (account.num_delivered, account.num_skipped) == (0, 0)
    assert files(tmp_path) == ["ledger-0.jsonl"] and skips(tmp_path) == []


def test_only_the_first_rank_takes_over_and_only_ledgers(tmp_path: Path) -> None:
    for name in ("ledger-0", "ledger-2", "ledger-10", "ledger-x", "ledger", "ledger-3.old"):
        (tmp_path / f"{name}.jsonl").touch()
    (tmp_path / "ledger.json").touch()
    first, second = run_ranks(2, lambda world: orphaned_ledgers(tmp_path, world))
    assert [path.name for path in first] == ["ledger-10.jsonl", "ledger-2.jsonl"]
    assert second == []


# Together


def account(num_delivered: int, *skips: Skip) -> Account:
    counts: dict[str, int] = {}
    examples: dict[str, Skip] = {}
    for each in skips:
        counts[each.reason] = counts.get(each.reason, 0) + 1
        examples.setdefault(each.reason, each)
    return Account(num_delivered, counts, examples)


def test_accounts_add_up_and_the_first_of_each_reason_is_the_example() -> None:
    one = account(5, skip(9), skip(30, "bad image"))
    two = account(7, skip(4), skip(31, "bad image"), skip(33, "no image"))
    totals = run_ranks(2, lambda world: sum_accounts((one, two)[world.rank], world, 1.0))
    assert totals[0] == totals[1]
    assert (totals[0].num_delivered, totals[0].num_skipped, totals[0].num_bad) == (12, 5, 5)
    assert totals[0].counts == {"cut": 2, "bad image": 2, "no image": 1}
    positions = {reason: each.position for reason, each in totals[0].examples.items()}
    assert positions == {"cut": 4, "bad image": 30, "no image": 33}


def test_too_many_bad_samples_end_the_run_on_all_ranks_alike() -> None:
    own = [account(995, *map(skip, range(5))), account(1_000, *map(skip, range(15)))]

    def judged(rate: float) -> list[str]:
        def rank(world: Any) -> str:
            try:
                sum_accounts(own[world.rank], world, rate)
            except TooManyBadSamples as error:
                return str(error)
            return ""

        return run_ranks(2, rank)

    assert judged(0.01) == ["", ""]  # one of the ranks has 1.5 %, both together 20 of 2015
    message = (
        "20 of 2015 samples cannot be used, more than max_bad_rate 0.0099 allows: 20 cut (such as "
        "x.tar:k0: cut); mend the shards (latentdiff data verify names each fault) or raise "
        "data.max_bad_rate"
    )
    assert judged(0.0099) == [message, message]


def test_a_rank_alone_ends_the_run_only_where_all_together_would() -> None:
    own = account(490, *map(skip, range(10)))
    own.check(0.01, num_ranks=2)  # 10 of 1000, if the other had none
    with pytest.raises(TooManyBadSamples, match="11 of 1002 samples cannot be used"):
        account(490, *map(skip, range(11))).check(0.01, num_ranks=2)
    with pytest.raises(TooManyBadSamples, match="11 of 501 samples cannot be used"):
        account(490, *map(skip, range(11))).check(0.01)


# ledger.json


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    odd = Skip("ä.tar", "\udcff", "bad image", "\udcff: broken", 8)
    write_ledger(tmp_path, account(5, skip(3), skip(9)), 4)
    write_ledger(tmp_path, account(90, skip(3), odd, skip(9), skip(7, "no image")), 8)
    assert json.loads((tmp_path / "ledger.json").read_text()) == {
        "step": 8,
        "delivered": 90,
        "skipped": {
            "cut": {"count": 2, "example": _entry(skip(3))},
            "bad image": {"count": 1, "example": _entry(odd)},
            "no image": {"count": 1, "example": _entry(skip(7, "no image"))},
        },
    }
    assert files(tmp_path) == ["ledger.json"]
    write_ledger(tmp_path, account(3), 1)
    empty = json.loads((tmp_path / "ledger.json").read_text())
    assert empty == {"step": 1, "delivered": 3, "skipped": {}}


def _entry(each: Skip) -> dict[str, Any]:
    return {name: getattr(each, name) for name in ("shard", "key", "reason", "detail", "position")}
