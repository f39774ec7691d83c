"""Which weights are on the device when? Those of the network that is at work, and no others.

Drawing has three networks that never work at the same time: text tower, U-Net, decoder. A `Stage`
keeps the device copy of one of them for as long as it is needed. The host's copy never changes, so
nothing is ever copied back, and the numbers are those of a network that stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ALIGNMENT = 256  # bytes; where cudaMalloc's own blocks start


class Stage:
    """`with stage:` the module's weights are on the device; outside they are on the host.

    On a CPU and on Apple's MPS it does nothing, for their memory is the host's. It does not bring
    weights to MPS either: the caller moves the module there, and it stays. Elsewhere the device
    copy has other addresses each time: CUDA graphs of the module do not outlive the `with`. The
    same stage may be entered again inside of itself.

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
        """What the `with` brings to the device, without activations; 0 on a CPU and on MPS."""
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


class _Weights:
    """The host's copy of a module's weights in one piece, and where they belong.

    Attributes:
        flat: all bytes, uint8 [n]; page-locked where the device is a GPU.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Takes the module's weights into `flat`."""
        self._originals = _held(module)
        numbers = {id(tensor): number for number, tensor in enumerate(self._originals)}
        self._places = [
            (numbers[id(tensor)], slots, name) for slots, name, tensor in _places(module)
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
