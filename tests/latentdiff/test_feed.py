"""Is a step's data ready, the same on any ranks, and does the feed end when it should?"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.ledger import BadSample
from data_pipelines.loader import Loader
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.schedule import FlowSchedule
from latentdiff.training import feed as feeds
from latentdiff.training.feed import Feed, check_same_data
from latentdiff.training.micro import MicroBatch, Recipe, prepare

CPU = torch.device("cpu")
BATCH, STEPS, SEED = 24, 4, 3


def tokenize(captions: Sequence[str]) -> Tensor:
    return torch.tensor([[zlib.crc32(caption.encode()), len(caption)] for caption in captions])


RECIPE = Recipe(
    seed=SEED,
    batch_size=BATCH,
    schedule=FlowSchedule(shift=2.0),
    prediction="flow",
    objective=DiffusionObjectiveConfig(
        stratified_timesteps=True,
        offset_noise=0.1,
        input_perturbation=0.1,
        caption_dropout=0.3,
    ),
    latent_channels=4,
    downscale=2,
    has_posterior=True,
    tokenize=tokenize,
)


def fields_of(micro: MicroBatch) -> dict[str, Tensor]:
    """All that a micro-batch says of its places."""
    found = {**vars(micro), **vars(micro.numbers), "ids": torch.tensor(micro.ids)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)} | {
        "told": micro.numbers.t,
        "t": micro.t,
    }


@pytest.fixture
def data(assets: Path) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": [str(assets / "train-*.tar")], "size_px": 16, "crop_px": 8, "flip": True}
    )


def make_loader(data: DataConfig, cursor: int = 0, **options: Any) -> Loader:
    return Loader(data, SEED, BATCH, cursor, **options)


def open_feed(data: DataConfig, cursor: int = 0, steps_ahead: int = 2, **options: Any) -> Feed:
    return Feed(make_loader(data, cursor, **options), RECIPE, CPU, steps_ahead)


def by_position(micros: list[MicroBatch]) -> dict[int, dict[str, Tensor]]:
    found = {}
    for micro in micros:
        for i, position in enumerate(micro.positions):
            assert position not in found
            found[position] = {name: value[i] for name, value in fields_of(micro).items()}
    return found


# What it gives


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_ranks", "splits"), [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_a_place_is_the_same_on_any_ranks_in_any_micro_batch(
    data: DataConfig, num_ranks: int, splits: int, num_workers: int
) -> None:
    order = data.order.model_copy(update={"streams": 4})  # ranks get places that lie apart
    data = data.model_copy(update={"order": order, "num_workers": num_workers})
    with open_feed(data) as feed:
        expected = by_position([micro for step in islice(feed, STEPS) for micro in step])
    found = []
    for rank in range(num_ranks):
        with open_feed(data, rank=rank, num_ranks=num_ranks, splits=splits) as feed:
            for number, step in enumerate(islice(feed, STEPS)):
                assert len(step) == splits and {micro.step for micro in step} == {number}
                assert {len(micro) for micro in step} == {BATCH // num_ranks // splits}
                found += step
    together = by_position(found)
    assert sorted(together) == sorted(expected) == list(range(STEPS * BATCH))
    for position, values in expected.items():
        assert values.keys() == together[position].keys() >= {"pixels", "noise", "token_ids"}
        for name, value in values.items():
            assert torch.equal(together[position][name], value), (position, name)


def test_it_goes_on_from_the_state_of_a_step_that_was_consumed(data: DataConfig) -> None:
    with open_feed(data, steps_ahead=3) as feed:
        steps = list(islice(feed, 5))
        wait_until(lambda: feed._loader.cursor == 8 * BATCH)  # the loader has run ahead
        state = feed.state(2)
    assert state["cursor"] == 2 * BATCH
    loader = make_loader(data)
    assert state == {**loader.state(), "cursor": 2 * BATCH}
    loader.restore(state)
    with Feed(loader, RECIPE, CPU) as again:
        for then, now in zip(steps[2:], again, strict=False):
            assert then[0].positions == now[0].positions
            assert torch.equal(then[0].noise, now[0].noise)


def test_it_works_ahead_and_no_further(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def counted(*args: Any) -> MicroBatch:
        done.append(args[0].step)
        return prepare(*args)

    monkeypatch.setattr(feeds, "prepare", counted)
    with open_feed(data) as feed:
        wait_until(lambda: len(done) == 2)
        time.sleep(0.1)
        assert done == [0, 1]
        next(feed)
        wait_until(lambda: len(done) == 3)
        time.sleep(0.1)
        assert done == [0, 1, 2]


def test_the_account_is_that_of_the_step_consumed(data: DataConfig) -> None:
    loader = make_loader(data.model_copy(update={"max_bad_rate": 1.0}))
    for index in range(60):
        loader.refuse(index, BadSample("bad image", f"x.tar:{index}: broken"))
    with Feed(loader, RECIPE, CPU, 3) as feed:
        assert (feed.account.num_delivered, feed.account.num_skipped) == (0, 0)
        delivered = skipped = 0
        for micros in islice(feed, STEPS):
            assert [len(micro) for micro in micros] == [BATCH]  # empty places stay
            valid = int(sum(micro.valid.sum() for micro in micros))
            delivered, skipped = delivered + valid, skipped + BATCH - valid
            assert feed.account.num_delivered == delivered
            assert dict(feed.account.counts) == ({"bad image": skipped} if skipped else {})
    assert skipped > 0


# Waiting, faults, the end


class Gate:
    """Lets steps of the thread through one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Semaphore(0)

        def slow(*args: Any) -> MicroBatch:
            self.open.acquire()
            return prepare(*args)

        monkeypatch.setattr(feeds, "prepare", slow)


def test_it_says_how_long_the_loop_waited(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with open_feed(data) as feed:
        threading.Timer(0.3, gate.open.release).start()
        next(feed)
        assert 0.2 < feed.wait_s < 5
        gate.open.release(4)
        wait_until(lambda: len(feed._ready) == 2)
        before = feed.wait_s
        next(feed)
        assert feed.wait_s - before < 0.1


def test_a_loop_that_gives_up_misses_nothing(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with open_feed(data) as feed:
        asked = []
        assert feed.next_step(lambda: len(asked) == 2 or asked.append(1)) is None  # pyright: ignore[reportArgumentType]  # append says None, which is no
        gate.open.release(2)
        micros = feed.next_step(lambda: False)
        assert micros is not None and micros[0].step == 0
        assert next(feed)[0].step == 1
        gate.open.release(9)


def test_a_fault_of_the_thread_comes_at_its_step(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*args: Any) -> MicroBatch:
        if args[0].step == 2:
            raise ValueError("no such thing")
        return prepare(*args)

    monkeypatch.setattr(feeds, "prepare", faulty)
    with open_feed(data, steps_ahead=3) as feed:
        wait_until(lambda: not feed._thread.is_alive())
        assert [next(feed)[0].step for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="no such thing"):
                next(feed)


def test_too_many_bad_samples_end_the_loop(data: DataConfig) -> None:
    loader = make_loader(data)
    for index in range(len(loader)):
        loader.refuse(index, BadSample("bad image", f"x.tar:{index}: broken"))
    with (
        pytest.raises(ValueError, match="24 of 24 samples cannot be used, more than max_bad_rate"),
        Feed(loader, RECIPE, CPU) as feed,
    ):
        next(feed)


def test_closing_ends_all_threads_whatever_they_do(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    for consumed in range(3):
        with open_feed(data) as feed:
            list(islice(feed, consumed))
        assert set(threading.enumerate()) <= before
    gate = Gate(monkeypatch)
    feed = open_feed(data)
    threading.Timer(0.1, gate.open.release).start()
    feed.close()  # while a step is being prepared
    assert set(threading.enumerate()) - before <= set()
    feed.close()


def test_closing_gives_up_a_server_that_stalls(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(data)
    reader, asked = loader.reader, threading.Event()

    def stall(*args: Any) -> bytes:
        asked.set()
        if reader._stop.wait(20):
            raise RuntimeError("cancelled")
        raise AssertionError("nobody stopped it")

    monkeypatch.setattr(reader, "payload", stall)
    feed = Feed(loader, RECIPE, CPU)
    assert asked.wait(20)
    began = time.monotonic()
    feed.close()
    assert time.monotonic() - began < 3 and not feed._thread.is_alive()


def wait_until(done: Any) -> None:
    give_up = time.monotonic() + 20
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.005)


# Ranks that read different things


def test_ranks_that_would_read_other_data_are_named(data: DataConfig) -> None:
    loader = make_loader(data)
    own = (loader.fingerprint, len(loader))

    def world(*others: Any) -> Any:
        return SimpleNamespace(gather=lambda value: [value, *others])

    check_same_data(loader, world())
    check_same_data(loader, world(own, own))
    with pytest.raises(ValueError) as error:
        check_same_data(loader, world(own, ("f" * 64, 17), own, ("e" * 64, 18)))
    assert str(error.value) == (
        "rank(s) 2, 4 would read other data than rank 0: 17 samples with fingerprint ffffffffffff "
        f"on rank 2, {len(loader)} with {loader.fingerprint[:12]} on rank 0; give all ranks the "
        "same shards, index and selection (is an index on a machine's own disk out of date?)"
    )


# On a GPU


@pytest.mark.gpu
def test_the_device_has_what_the_host_prepared_while_it_computes(data: DataConfig) -> None:
    device = torch.device("cuda", 0)
    busy = torch.randn(4096, 4096, device=device)
    with (
        Feed(make_loader(data), RECIPE, CPU) as host,
        Feed(make_loader(data), RECIPE, device, steps_ahead=3) as feed,
    ):
        seen = []
        for _ in range(20):  # memory of earlier steps is used again while the device is behind
            for _ in range(10):
                busy = busy @ busy / 64
            (micro,) = next(feed)
            seen.append({name: value.clone() for name, value in fields_of(micro).items()})
            assert micro.noise.device == micro.numbers.weight.device == device
            assert micro.t.device == CPU
        for there in seen:
            (here,) = next(host)
            for name, value in fields_of(here).items():
                assert torch.equal(there[name].cpu(), value), name
