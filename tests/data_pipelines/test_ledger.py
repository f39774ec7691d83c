"""Is each sample that was not delivered counted once, by reason, also over several runs?"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.ledger import (
    REASONS,
    Account,
    BadSample,
    Ledger,
    Skip,
    TooManyBadSamples,
    check_index,
)


def skip(position: int, reason: Any = "bad image") -> Skip:
    assert reason in REASONS
    return Skip("x.tar", f"k{position}", reason, f"x.tar:k{position}: {reason}", position)


def lines(path: Path) -> list[int]:
    return [json.loads(line)["position"] for line in path.read_text().splitlines()]


def test_it_counts_by_reason_and_keeps_the_first_of_each() -> None:
    ledger = Ledger(1.0)
    ledger.record(6, [skip(3), skip(5, "cut")])
    ledger.record(7, [skip(9)])
    ledger.record(8)
    assert (ledger.num_delivered, ledger.num_skipped) == (21, 3)
    assert dict(ledger.counts) == {"bad image": 2, "cut": 1}
    assert ledger.summary() == (
        "2 bad image (such as x.tar:k3: bad image); 1 cut (such as x.tar:k5: cut)"
    )


def test_the_summary_names_the_top_five() -> None:
    ledger = Ledger(1.0)
    for number, reason in enumerate(REASONS[:8]):
        ledger.record(0, [skip(i, reason) for i in range(number + 1)])
    named = [part.split(" (")[0] for part in ledger.summary().split("; ")]
    assert named == [f"{n + 1} {REASONS[n]}" for n in (7, 6, 5, 4, 3)]


# Too many


def test_a_rate_above_the_limit_stops_the_run_and_names_the_top_reasons() -> None:
    ledger = Ledger(0.01)
    ledger.record(2_000, [skip(i, "cut" if i % 3 else "bad json") for i in range(20)])
    with pytest.raises(TooManyBadSamples) as error:
        ledger.record(0, [skip(20)])
    assert str(error.value) == (
        "21 of 2021 samples cannot be used, more than max_bad_rate 0.01 allows: "
        "13 cut (such as x.tar:k1: cut); 7 bad json (such as x.tar:k0: bad json); "
        "1 bad image (such as x.tar:k20: bad image); mend the shards (latentdiff data verify names "
        "each fault) or raise data.max_bad_rate"
    )


def test_a_few_of_the_first_draws_stop_nothing() -> None:
    ledger = Ledger(0.01)
    ledger.record(0, [skip(i) for i in range(10)])
    with pytest.raises(TooManyBadSamples, match=r"11 of 11 samples cannot be used"):
        ledger.record(0, [skip(10)])
    none = Ledger(0.0)
    with pytest.raises(TooManyBadSamples, match=r"1 of 100000 samples"):
        none.record(99_999, [skip(0)])
    Ledger(1.0).record(0, [skip(i) for i in range(3_000)])


@pytest.mark.parametrize("reason", ["aspect ratio", "empty caption"])
def test_what_the_config_leaves_out_is_counted_but_is_not_bad(reason: str) -> None:
    # of a whole chapter at once, long before its other samples come
    ledger = Ledger(0.001)
    ledger.record(10, [skip(0, reason) for _ in range(500)])
    assert ledger.counts[reason] == 500
    ledger.record(0, [skip(1)])
    with pytest.raises(TooManyBadSamples, match=r"2 of 12 samples .*: 2 bad image"):
        ledger.record(0, [skip(2)])


# The file


def test_each_skip_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = Ledger(1.0, path)
    ledger.record(3, [Skip("ä.tar", "猫", "cut", 'a "cut"\n', 2)])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"shard": "ä.tar", "key": "猫", "reason": "cut", "detail": 'a "cut"\n', "position": 2}
    ]
    assert "猫" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_a_run_that_goes_on_takes_over_what_was_before_its_cursor(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(1.0, path)
    first.record(18, [skip(3), skip(11, "cut")])
    first.record(17, [skip(25), skip(30), skip(31)])
    # killed at 40, its last checkpoint at 20: what came later comes again
    second = Ledger(1.0, path, cursor=20)
    assert (second.num_delivered, second.num_skipped) == (18, 2)
    assert lines(path) == [3, 11]
    second.record(17, [skip(25), skip(30), skip(31)])
    assert lines(path) == [3, 11, 25, 30, 31]
    assert (second.num_delivered, second.num_skipped) == (35, 5)
    assert second.counts == first.counts
    assert second.examples["cut"].position == 11


def test_each_rank_counts_its_own_draws() -> None:
    assert Ledger(1.0, cursor=400, num_ranks=4).num_delivered == 100


def test_pictures_without_a_bucket_never_had_a_place(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(1.0, path).record(9, [skip(0, "aspect ratio"), skip(0, "aspect ratio"), skip(4)])
    again = Ledger(1.0, path, cursor=10)
    assert (again.num_delivered, again.num_skipped, again.num_bad) == (9, 3, 1)


def test_a_run_from_the_start_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(1.0, path).record(1, [skip(0)])
    assert Ledger(1.0, path).num_skipped == 0
    assert lines(path) == []


def test_a_file_that_was_cut_by_the_end_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(1.0, path).record(8, [skip(1), skip(2)])
    text = path.read_bytes()
    for cut in range(len(text)):
        path.write_bytes(text[:cut])
        ledger = Ledger(1.0, path, cursor=10)
        whole = text[: cut + 1].count(b"\n")  # all but the line break is enough
        assert ledger.num_skipped == whole
        assert lines(path) == [1, 2][:whole]
    path.write_bytes(b'\xff\xfe\n[1]\n"x"\n{"shard": "x"}\nnull\n' + text)
    assert Ledger(1.0, path, cursor=10).num_skipped == 2


# The index


def test_an_index_with_too_many_bad_samples_is_refused() -> None:
    check_index({}, 0, 0.0)
    check_index({"cut": 10}, 5, 0.01)  # of few samples a few may be bad
    check_index({"cut": 20, "bad image": 80}, 9_900, 0.01)
    with pytest.raises(TooManyBadSamples) as error:
        check_index({"cut": 20, "bad image": 81}, 9_900, 0.01)
    assert str(error.value) == (
        "101 of 10001 samples in the index cannot be used, more than max_bad_rate 0.01 allows: "
        "81 bad image, 20 cut; mend the shards (latentdiff data verify names each fault), leave "
        "them out, or raise data.max_bad_rate"
    )


def test_a_bad_sample_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadSample("cut", "x.tar:k: it ends early")))
    assert (type(error), error.reason, str(error)) == (BadSample, "cut", "x.tar:k: it ends early")


@pytest.mark.parametrize("key", ["a\u2028b", "a\x85b", "a\x1cb", "a\rb", "a\nb", "\udcff"])
def test_names_with_anything_in_them(tmp_path: Path, key: str) -> None:
    path = tmp_path / "ledger.jsonl"
    first = Ledger(1.0, path)
    first.record(8, [Skip("x.tar", key, "cut", key, 1), skip(2)])
    for _ in range(2):
        again = Ledger(1.0, path, cursor=10)
        assert again.counts == first.counts == {"cut": 1, "bad image": 1}
        assert again.num_delivered == 8


def test_places_that_the_plan_left_empty_were_no_samples() -> None:
    assert Ledger(1.0, cursor=400, num_empty=40).num_delivered == 360
    assert Ledger(1.0, cursor=400, num_ranks=4, num_empty=40).num_delivered == 90


def test_pictures_without_a_bucket_left_places_empty(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    left_out = [skip(0, "aspect ratio"), skip(0, "aspect ratio"), skip(40, "aspect ratio")]
    Ledger(1.0, path).record(9, [*left_out, skip(44)])
    again = Ledger(1.0, path, cursor=50, num_empty=7, chapter=40)
    assert again.num_delivered == 50 - 7 - 2 - 1  # those of the chapter under way are in the 7


# Several ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_share_out_all_places_that_are_done(tmp_path: Path, num_ranks: int) -> None:
    Ledger(1.0, tmp_path / "0.jsonl").record(2, [skip(i) for i in range(9)])  # more than a share
    paths = [tmp_path / f"{rank}.jsonl" for rank in range(num_ranks)]
    ledgers = [
        Ledger(1.0, path, 40, num_ranks, num_empty=5, rank=rank) for rank, path in enumerate(paths)
    ]
    total = Account.sum(ledger.account() for ledger in ledgers)
    assert (total.num_delivered, total.num_skipped) == (40 - 5 - 9, 9)


def test_orphans_are_taken_over_up_to_the_cursor_and_removed(tmp_path: Path) -> None:
    own, *orphans = (tmp_path / f"{rank}.jsonl" for rank in range(3))
    twice = [skip(0, "aspect ratio"), skip(0, "aspect ratio")]  # a chapter may draw it twice
    for path, skips in ((own, [*twice, skip(7)]), (orphans[0], [skip(3), skip(41)])):
        Ledger(1.0, path).record(1, skips)
    ledger = Ledger(1.0, own, 40, orphans=orphans)  # the third was never written
    assert lines(own) == [0, 0, 3, 7] and list(tmp_path.iterdir()) == [own]
    assert ledger.counts == {"aspect ratio": 2, "bad image": 2}
    assert ledger.examples["bad image"].position == 3


def test_an_account_stays_what_it_was() -> None:
    ledger = Ledger(1.0)
    ledger.record(5, [skip(1)])
    before = ledger.account()
    ledger.record(5, [skip(2), skip(3, "cut")])
    assert (before.num_delivered, before.counts) == (5, {"bad image": 1})
    assert ledger.account().examples.keys() == {"bad image", "cut"}
    assert pickle.loads(pickle.dumps(before)) == before


def test_one_of_several_ranks_refuses_what_is_too_much_for_all() -> None:
    ledger = Ledger(0.01, num_ranks=4)
    ledger.record(980, [skip(i) for i in range(20)])  # 2 % of its own, 0.5 % of all
    ledger.record(0, [skip(i) for i in range(20, 40)])
    with pytest.raises(TooManyBadSamples, match=r"41 of 4084 samples cannot be used"):
        ledger.record(0, [skip(40)])
