"""How does a GPU run the U-Net without Python between the kernels? One CUDA graph a shape."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.backends import Run

_WARM_UPS = 3  # libraries choose kernels and take their memory in the first calls
_SHARE = 0.25  # of the GPU's memory that graphs may hold before the oldest is dropped


@dataclass(frozen=True)
class _Recorded:
    """A graph with the tensors it reads and writes.

    Attributes:
        graph: of one call.
        inputs: what it reads, at fixed addresses.
        output: what it writes.
        num_bytes: what recording it took.
    """

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor
    num_bytes: int


class Graphs:
    """A Run that records a CUDA graph for each shape and precision and then replays it.

    The first call of a shape waits for the device; a replay does not. The result is a copy: it is
    the caller's. For one thread at a time, while no other records.

    Args:
        run: without host-device synchronisation: the U-Net, or `compiled`.
        max_bytes: of all graphs together; the least recently used go first, the last one stays.
            Default: a quarter of the device's memory.
    """

    def __init__(self, run: Run, max_bytes: int | None = None) -> None:
        self._run, self._max_bytes = run, max_bytes
        self._recorded: OrderedDict[tuple[object, ...], _Recorded] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """The prediction of `run`.

        Raises:
            ValueError: the inputs are not on one CUDA device.
        """
        inputs = (noisy, time, text)
        if {x.device.type for x in inputs} != {"cuda"} or len({x.device for x in inputs}) > 1:
            raise ValueError(
                "CUDA graphs need all inputs on one CUDA device; got "
                f"{', '.join(str(x.device) for x in inputs)}; leave them off elsewhere"
            )
        key = (noisy.device, *((x.shape, x.stride(), x.dtype) for x in inputs))
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._recorded[key] = self._record(inputs)
            self._forget_old(noisy.device)
        self._recorded.move_to_end(key)
        for static, given in zip(recorded.inputs, inputs, strict=True):
            static.copy_(given)
        recorded.graph.replay()
        return recorded.output.clone()

    def _record(self, inputs: tuple[Tensor, ...]) -> _Recorded:
        device = inputs[0].device
        with torch.cuda.device(device):
            static = tuple(x.clone(memory_format=torch.preserve_format) for x in inputs)
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._run(*static)
            torch.cuda.current_stream(device).wait_stream(side)
            before = torch.cuda.memory_reserved(device)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread, which decodes meanwhile, may take memory
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._run(*static)
        taken = torch.cuda.memory_reserved(device) - before
        return _Recorded(graph, static, output, max(taken, output.nbytes))

    def _forget_old(self, device: torch.device) -> None:
        most = self._max_bytes
        if most is None:
            most = int(_SHARE * torch.cuda.get_device_properties(device).total_memory)
        held = sum(recorded.num_bytes for recorded in self._recorded.values())
        while held > most and len(self._recorded) > 1:
            held -= self._recorded.popitem(last=False)[1].num_bytes
