"""Which weights are on the device when? Those of the network that is at work, and no others.

Drawing has three networks that never work at the same time: text tower, U-Net, decoder. A `Stage`
keeps the device copy of one of them for as long as it is needed. `BlockStage` does so block by
block, for a device that cannot hold one whole network: while a block computes, the weights of the
next one arrive. The host's copy never changes, so nothing is ever copied back, and the numbers are
those of a network that stays on the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ALIGNMENT = 256  # bytes; where cudaMalloc's own blocks start


class Stage:
    """`with stage:` the module's weights are on the device; outside they are on the host.

    On a CPU device it does nothing. The device copy has other addresses each time: CUDA graphs of
    the module do not outlive the `with`. The same stage may be entered again inside of itself.

    Attributes:
        module: whose weights are swapped; for inference only.
        device: where it works.
    """

    def __init__(self, module: nn.Module, device: torch.device | str) -> None:
        self.module = module
        self.device = torch.device(device)
        self._depth = 0
        has_own_memory = self.device.type not in ("cpu", "mps")
        self._weights = _Weights(module, self.device) if has_own_memory else None

    @property
    def num_bytes(self) -> int:
        """What the device holds inside of the `with`, without activations."""
        return 0 if self._weights is None else self._weights.num_bytes

    def __enter__(self) -> nn.Module:
        """The module, ready for work on `device`."""
        if self._weights is not None and self._depth == 0:
            self._weights.place(self._weights.flat.to(self.device, non_blocking=True, copy=True))
        self._depth += 1
        return self.module

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The host's weights are back, the device's memory is free."""
        self._depth -= 1
        if self._weights is not None and self._depth == 0:
            self._weights.restore()


class BlockStage:
    """`with stage:` each block's weights come to the device while the one before it computes.

    The device holds two slots of the largest block's size, and what belongs to no block. Copies go
    on a stream of their own; a slot is not written before the block that used it is done, and no
    block starts before its weights are there. The host waits for nothing.

    Attributes:
        module: whose weights are swapped; for inference only.
        device: where it works. A CPU gains nothing, but does the same.
    """

    def __init__(
        self, module: nn.Module, device: torch.device | str, blocks: Sequence[nn.Module]
    ) -> None:
        """See the class.

        Args:
            module: the network.
            device: where it works.
            blocks: two or more parts of it, in the order in which a forward pass calls them. The
                weights of each are used by its own call alone. Another order is right too, and
                slower.

        Raises:
            ValueError: fewer than two blocks, or two of them share weights.
        """
        if len(blocks) < 2:
            raise ValueError(
                f"got {len(blocks)} block(s) of {type(module).__name__} to move one after the "
                "other; expected two or more; use Stage, which moves the whole module"
            )
        shared = [id(tensor) for block in blocks for tensor in _held(block)]
        if len(set(shared)) < len(shared):
            raise ValueError(
                "two blocks hold the same weights; expected blocks that share none; leave out the "
                "inner one, or give what holds both"
            )
        self.module = module
        self.device = torch.device(device)
        self._blocks = list(blocks)
        self._rest = _Weights(module, self.device, without=set(shared))
        self._parts = [_Weights(block, self.device) for block in blocks]
        self._hooks: list[Any] = []
        self._slots: list[_Slot] = []
        self._coming = (-1, 0)  # which block is on its way, and to which slot
        self._stream: Any = None

    @property
    def num_bytes(self) -> int:
        """What the device holds inside of the `with`, without activations."""
        return self._rest.num_bytes + 2 * self._largest

    @property
    def _largest(self) -> int:
        return max(part.num_bytes for part in self._parts)

    def __enter__(self) -> nn.Module:
        """The module, ready for work on `device`."""
        assert not self._slots, "a BlockStage is not entered twice"
        self._slots = [_Slot(self._largest, self.device) for _ in range(2)]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)
            # work that used the slots' memory before may not be done yet
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._rest.place(self._rest.flat.to(self.device, non_blocking=True, copy=True))
        for number, block in enumerate(self._blocks):
            self._hooks += [
                block.register_forward_pre_hook(self._before(number)),
                block.register_forward_hook(self._after(number), always_call=True),
            ]
        self._send(0, slot=0)
        return self.module

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The host's weights are back, the device's memory is free."""
        for hook in self._hooks:
            hook.remove()
        if self._stream is not None:  # the block that would have come next is still on its way
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        for part in (*self._parts, self._rest):
            part.restore()
        self._hooks, self._slots, self._stream = [], [], None

    def _before(self, number: int) -> Any:
        def hook(*_: object) -> None:
            coming, slot = self._coming
            if coming != number:
                self._send(number, slot)
            self._slots[slot].wait_until_full(self.device)
            self._parts[number].place(self._slots[slot].room)
            self._send((number + 1) % len(self._parts), 1 - slot)

        return hook

    def _after(self, number: int) -> Any:
        def hook(*_: object) -> None:
            self._parts[number].restore()
            self._slots[1 - self._coming[1]].mark_done(self.device)

        return hook

    def _send(self, number: int, slot: int) -> None:
        self._slots[slot].fill(self._parts[number].flat, self._stream)
        self._coming = (number, slot)


class _Slot:
    """Room on the device for one block's weights, and the events that say who may touch it."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.room = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self._full: Any = None
        self._done: Any = None

    def fill(self, flat: Tensor, stream: Any) -> None:
        """Copy, on the stream, once the last user is done."""
        if stream is None:
            self.room[: len(flat)].copy_(flat)
            return
        if self._done is not None:
            stream.wait_event(self._done)
        with torch.cuda.stream(stream):
            self.room[: len(flat)].copy_(flat, non_blocking=True)
        self._full = stream.record_event()

    def wait_until_full(self, device: torch.device) -> None:
        """What is computed from now on finds the weights there."""
        if self._full is not None:
            torch.cuda.current_stream(device).wait_event(self._full)

    def mark_done(self, device: torch.device) -> None:
        """The block has been computed, as far as the host has asked for it."""
        if self._full is not None:
            self._done = torch.cuda.current_stream(device).record_event()


class _Weights:
    """The host's copy of a module's weights in one piece, and where they belong.

    Attributes:
        flat: all bytes, uint8 [n]; page-locked where the device is a GPU.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, without: Collection[int] = ()
    ) -> None:
        """Takes the module's weights, but for those whose id is in `without`, into `flat`."""
        self._originals = [t for t in _held(module) if id(t) not in without]
        numbers = {id(tensor): number for number, tensor in enumerate(self._originals)}
        self._places = [
            (numbers[id(tensor)], slots, name)
            for slots, name, tensor in _places(module)
            if id(tensor) in numbers
        ]
        leaves = [leaf for tensor in self._originals for leaf in plain_parts(tensor)]
        self._layout: list[tuple[int, Tensor]] = []
        end = 0
        for leaf in leaves:
            like = torch.empty_like(leaf, device="meta")  # its strides, without gaps
            self._layout.append((end, like))
            end += -(-like.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        self.flat = _host_bytes(end, pinned=device.type == "cuda")
        for leaf, view in zip(leaves, self._views(self.flat), strict=True):
            view.copy_(leaf)
        self._host = self._tensors(self.flat)
        self._originals = self._host  # what they were made from may go
        self.restore()

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return len(self.flat)

    def place(self, flat: Tensor) -> None:
        """Let the module work with weights that lie in `flat`, on any device."""
        self._put(self._tensors(flat))

    def restore(self) -> None:
        """Let the module have the host's weights."""
        self._put(self._host)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for number, slots, name in self._places:
            slots[name] = tensors[number]

    def _tensors(self, flat: Tensor) -> list[Tensor]:
        views = self._views(flat)
        made: list[Tensor] = []
        for original in self._originals:
            tensor = _rebuilt(original, views)
            is_parameter = isinstance(original, nn.Parameter)
            made.append(nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return made

    def _views(self, flat: Tensor) -> Iterator[Tensor]:
        for start, like in self._layout:
            numbers = flat[start : start + like.untyped_storage().nbytes()].view(like.dtype)
            yield numbers.as_strided(like.size(), like.stride(), numbers.storage_offset())


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a module and its parts keep weights: (dictionary, key, tensor), shared ones again."""
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for name, tensor in slots.items():
                if tensor is not None:
                    yield slots, name, tensor


def _held(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(tensor): tensor for _, _, tensor in _places(module)}.values())


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors in a tensor; one that is quantised has several."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor.detach()


def _rebuilt(tensor: Tensor, leaves: Iterator[Tensor]) -> Tensor:
    """The like of `tensor` with other leaves."""
    if not is_traceable_wrapper_subclass(tensor):
        return next(leaves)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _rebuilt(getattr(tensor, name), leaves) for name in names}
    kind: Any = type(tensor)
    return kind.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


def _host_bytes(count: int, pinned: bool) -> Tensor:
    """Page-locked memory is copied from without the host's help; without it all is slower."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:  # the system locks no more
        return torch.empty(count, dtype=torch.uint8)
