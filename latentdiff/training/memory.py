"""How much memory does a rank of a run need, and for what?

Weights, gradients, optimiser and averages are counted. Activations are measured: the step runs on
fake tensors, which have shapes but no storage, while everything that comes alive is added up and
everything that dies is taken off again. What the model does not know: the device's own use (CUDA's
context, libraries' workspaces, gaps between blocks), which is 1 to 2 GB as a rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentdiff.configtraining import ParallelConfig

Mode = Literal["none", "ddp", "fsdp"]

_FP32, _BF16 = 4, 2  # bytes of a number
_QUANTIZED_FROM = 4096  # torchao keeps the state of smaller tensors in float32
_QUANTIZED_BLOCK = 256  # numbers that share a scale there


@dataclass(frozen=True)
class Alive:
    """The most bytes that were alive at a time during some work, beside what was held before.

    Attributes:
        everything: activations, copies of weights, gradients.
        but_gradients: without the gradients of leaves, but for the newest one.
        activations: without the copies of weights in another precision either.
    """

    everything: int
    but_gradients: int
    activations: int


@dataclass(frozen=True)
class Line:
    """What is alive at most by the number of samples at a time, from one measurement.

    It is the largest of many sums, one an instant, each of which grows with the samples, none
    faster than the activations' peak. So it lies below the chord to no samples at all, and beyond
    the measurement below the line that rises as the activations do.

    Attributes:
        batch: samples of the measurement.
        measured: what was alive.
        empty: what would be without samples, at most: gradients and copies of weights.
    """

    batch: int
    measured: Alive
    empty: Alive

    def at(self, batch: int) -> Alive:
        """For `batch` samples, at most."""
        rise = self.measured.activations / self.batch
        values = []
        for empty, found in zip(astuple(self.empty), astuple(self.measured), strict=True):
            chord = (found - min(empty, found)) / self.batch
            slope = chord if batch < self.batch else rise
            values.append(round(found + slope * (batch - self.batch)))
        return Alive(*values)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device while it trains.

    Attributes:
        weights: that are trained, in float32.
        gradients: float32.
        optimizer: its state.
        ema: averages, one copy for each length.
        frozen: networks that are not trained.
        gathered: fsdp: blocks that are put together, and their gradients until they are shared.
        activations: the most that is alive in a step beside the rest.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(astuple(self))


def held_memory(
    trained: Sequence[Tensor],
    blocks: Sequence[int],
    frozen_bytes: int,
    *,
    mode: Mode,
    shard_ranks: int,
    parallel: ParallelConfig,
    optimizer: str,
    num_averages: int,
    precision: str,
    accumulation: int,
) -> RankMemory:
    """What a rank holds, but for activations.

    Args:
        trained: the parameters that are trained.
        blocks: how many of their numbers stand in each block that fsdp gathers.
        frozen_bytes: of networks that are not trained.
        mode: how the ranks share the weights.
        shard_ranks: ranks that share one copy of them (fsdp).
        parallel: precision of sums, and where shards are kept.
        optimizer: its kind.
        num_averages: copies of the weights.
        precision: of the run.
        accumulation: micro-batches a step.
    """
    numbers = sum(p.numel() for p in trained)
    weights = _FP32 * numbers
    state = sum(optimizer_bytes(p, optimizer) for p in trained)
    if mode != "fsdp":
        return RankMemory(weights, weights, state, num_averages * weights, frozen_bytes, 0, 0)
    gathered = gathered_bytes(numbers, blocks, parallel, precision, accumulation)
    if parallel.cpu_offload:
        return RankMemory(0, 0, 0, 0, frozen_bytes, gathered, 0)
    weights, state = -(-weights // shard_ranks), -(-state // shard_ranks)
    return RankMemory(weights, weights, state, num_averages * weights, frozen_bytes, gathered, 0)


def with_activations(held: RankMemory, alive: Alive, mode: Mode, accumulation: int) -> RankMemory:
    """What a rank holds, and what comes alive in a step.

    DDP keeps room for all gradients all the time. A process alone, without accumulation, does not:
    they come as activations go. Under fsdp copies of weights are what is gathered.
    """
    if mode == "fsdp":
        return replace(held, activations=alive.activations)
    if mode == "none" and accumulation == 1:
        return replace(held, activations=max(0, alive.everything - held.gradients))
    return replace(held, activations=alive.but_gradients)


def optimizer_bytes(parameter: Tensor, kind: str) -> int:
    """The state that an optimiser keeps for a parameter.

    adamw: two moments. adamw8bit: the same in 8 bits, with a scale for 256 numbers and a table of
    256 values each (Dettmers et al. 2022; torchao). adafactor: the second moment's row and column
    means (Shazeer & Stern 2018). muon: one momentum of a matrix; the rest has AdamW's.
    """
    n, shape = parameter.numel(), parameter.shape
    step = _FP32
    match kind:
        case "adamw8bit" if n >= _QUANTIZED_FROM and n % _QUANTIZED_BLOCK == 0:
            return step + 2 * (n + _FP32 * (n // _QUANTIZED_BLOCK) + _FP32 * 256)
        case "adafactor" if parameter.ndim > 1:
            return step + _FP32 * (n // shape[-1] + n // shape[-2])
        case "adafactor":
            return step + _FP32 * n
        case "muon" if parameter.ndim == 2:
            return _FP32 * n
        case _:
            return step + 2 * _FP32 * n


def gathered_bytes(
    numbers: int,
    blocks: Sequence[int],
    parallel: ParallelConfig,
    precision: str,
    accumulation: int,
) -> int:
    """What fsdp puts together on every rank beside its own part.

    What belongs to no block stays whole; of the blocks two are whole, this and the next, and one
    has its gradients in both precisions. With accumulation, whole gradients wait for the last
    micro-batch.
    """
    one = _BF16 if precision == "bf16" else _FP32
    reduced = _BF16 if parallel.reduce_dtype == "bf16" else _FP32
    largest = max(blocks, default=0)
    whole = numbers - sum(blocks) + 2 * largest if parallel.reshard_after_forward else numbers
    waiting = reduced * numbers if accumulation > 1 else 0
    return one * min(whole, numbers) + (one + reduced) * largest + waiting


def alive_during(work: Callable[[], object], held: Iterable[Tensor]) -> Alive:
    """Run some work and see what is alive at most; on real tensors or on fake ones.

    Args:
        work: what is done; gradients that it leaves in `held` parameters count as gradients.
        held: what is there before and after: it does not count.
    """
    held = list(held)
    ledger = _Ledger(held)
    handles = [
        tensor.register_post_accumulate_grad_hook(ledger.take_gradient)
        for tensor in held
        if tensor.requires_grad and tensor.is_leaf
    ]
    try:
        with ledger:
            work()
    finally:
        for handle in handles:
            handle.remove()
    return Alive(*ledger.peaks)


class _Ledger(TorchDispatchMode):
    """Adds up the storages that operations make, by kind, until they die."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self._held = {_key(tensor) for tensor in held}
        self._alive: dict[int, tuple[str, int, object]] = {}
        self._now = {"gradient": 0, "copy": 0, "activation": 0}
        self.peaks = [0, 0, 0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and _key(args[0]) in self._held
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, "copy" if is_copy else "activation")
        return out

    def take_gradient(self, parameter: Tensor) -> None:
        """A parameter has its gradient now."""
        assert parameter.grad is not None
        key = _key(parameter.grad)
        if key in self._alive:
            kind, size, reference = self._alive[key]
            self._now[kind] -= size
            self._now["gradient"] += size
            self._alive[key] = ("gradient", size, reference)

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._alive:
            return

        def gone(_: object) -> None:
            kind, size, _ = self._alive.pop(key)
            self._now[kind] -= size

        self._alive[key] = (kind, storage.nbytes(), weakref.ref(storage, gone))
        self._now[kind] += storage.nbytes()
        now = self._now
        activations, copies = now["activation"], now["activation"] + now["copy"]
        for i, value in enumerate((copies + now["gradient"], copies, activations)):
            self.peaks[i] = max(self.peaks[i], value)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def norms_in_float32(module: nn.Module) -> None:
    """Let group and layer norms work in float32, as CUDA's autocast does and the CPU's does not."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm | nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def num_bytes(module: nn.Module | None) -> int:
    """Of its parameters and buffers."""
    if module is None:
        return 0
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
