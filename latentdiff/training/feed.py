"""How does a step's data lie on the device when the loop asks for it? A thread works ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.ledger import Account
from data_pipelines.loader import Loader
from data_pipelines.transforms import to_float
from latentdiff.parallel import World
from latentdiff.training.micro import MicroBatch, Recipe, prepare
from vae.autoencoder import Autoencoder

_STEPS_AHEAD = 2
_LOOK_S = 0.2  # between two looks at whether the loop still wants to wait
_END_S = 5.0  # for a read that is under way when the feed is closed


@dataclass(frozen=True)
class _Ready:
    """A step that waits for the loop.

    Attributes:
        micros: its micro-batches.
        account: of the loader's ledger, this step included and no later one.
        copied: when its copies to the device are done; None on the CPU.
    """

    micros: list[MicroBatch]
    account: Account
    copied: torch.cuda.Event | None


class Feed:
    """This rank's micro-batches, step by step, on the device before they are asked for.

    A thread reads, prepares and copies some steps ahead. The copies run beside the training, on a
    stream of their own; the training's stream waits for them, the host does not.

    Args:
        loader: whose cursor says where to begin; it belongs to the feed from here on.
        recipe: of the micro-batches.
        device: where they go.
        steps_ahead: steps that lie ready at a time; their memory is on the device.

    Attributes:
        wait_s: seconds that the loop has waited for data so far.
        account: what the loader delivered and left out, up to the step that was given out last.
    """

    def __init__(
        self, loader: Loader, recipe: Recipe, device: torch.device, steps_ahead: int = _STEPS_AHEAD
    ) -> None:
        assert steps_ahead > 0
        self.wait_s = 0.0
        self.account = loader.ledger.account()
        self._loader, self._recipe, self._device = loader, recipe, device
        self._steps_ahead = steps_ahead
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[_Ready] = deque()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        micros = self.next_step()
        assert micros is not None
        return micros

    def next_step(self, give_up: Callable[[], bool] | None = None) -> list[MicroBatch] | None:
        """The micro-batches of the next step, `loader.splits` of them.

        Args:
            give_up: asked while the data is late.

        Returns:
            None if it said yes; the step comes at the next call.

        Raises:
            Exception: what reading or preparing this step came to.
        """
        began = time.perf_counter()
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise self._error
                assert not self._stopped, "the feed is closed"
                if give_up is not None and give_up():
                    self.wait_s += time.perf_counter() - began
                    return None
                self._changed.wait(None if give_up is None else _LOOK_S)
            ready = self._ready.popleft()
            self._changed.notify_all()
        self.wait_s += time.perf_counter() - began
        if ready.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready.copied)
            for micro in ready.micros:
                micro.record_stream(stream)
        self.account = ready.account
        return ready.micros

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps of the loader, which itself is further on."""
        return {**self._loader.state(), "cursor": step * self._loader.batch_size}

    def close(self) -> None:
        """End the thread and the loader's; requests that wait for a server are given up."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._loader.reader.stop()
            self._thread.join(_END_S)

    def __enter__(self) -> Feed:
        """The feed itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, whatever happened."""
        self.close()

    def _work(self) -> None:
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._device)  # pinned memory belongs to it
            with closing(iter(self._loader)) as batches:
                while self._has_room():
                    parts = [next(batches) for _ in range(self._loader.splits)]
                    ready = self._prepare(parts)
                    with self._changed:
                        if self._stopped:
                            return
                        self._ready.append(ready)
                        self._changed.notify_all()
        except BaseException as error:  # whatever it is, the loop must not wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _has_room(self) -> bool:
        """Wait for room; False once the feed is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._steps_ahead)
            return not self._stopped

    def _prepare(self, parts: list[Batch]) -> _Ready:
        account = self._loader.ledger.account()
        micros = [prepare(part, self._recipe) for part in parts]
        if self._stream is None:
            return _Ready(micros, account, None)
        with torch.cuda.stream(self._stream):
            micros = [micro.to(self._copy) for micro in micros]
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Ready(micros, account, copied)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True)


@torch.no_grad()
def clean_latents(autoencoder: Autoencoder, micro: MicroBatch) -> Tensor:
    """What a micro-batch's pictures are to the U-Net, float32 [b, c, h, w]: encoded now or before.

    A sample of the posterior, mean + std * noise; where samples were stored, those.
    """
    if micro.latents is not None:
        moments = micro.latents.float()
        if moments.shape[1] == 1:
            return moments[:, 0]
        mean, std = moments.unbind(1)
    else:
        assert micro.pixels is not None
        mean, std = autoencoder.moments(to_float(micro.pixels))
    if micro.posterior is None:
        return mean.float()
    return (mean + std * micro.posterior.to(mean)).float()


def check_same_data(loader: Loader, world: World) -> None:
    """Refuse to begin where a rank would read other data than the rest; all ranks must call it.

    Raises:
        ValueError: on all ranks, with those that differ from the first.
    """
    first, *others = world.gather((loader.fingerprint, len(loader)))
    different = [rank for rank, other in enumerate(others, 1) if other != first]
    if different:
        rank = different[0]
        fingerprint, count = others[rank - 1]
        raise ValueError(
            f"rank(s) {', '.join(map(str, different))} would read other data than rank 0: "
            f"{count} samples with fingerprint {fingerprint[:12]} on rank {rank}, {first[1]} with "
            f"{first[0][:12]} on rank 0; give all ranks the same shards, index and selection (is "
            "an index on a machine's own disk out of date?)"
        )
