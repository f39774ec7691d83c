"""How does a network run on a CPU in OpenVINO? Exported once, compiled for each shape, checked.

An export serves all shapes (`openvino_export`). Beside it lies what OpenVINO made of it for each
shape, precision and CPU: that is read in a third of the time, and a few percent as large.
"""

from __future__ import annotations

import io
import json
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.backends.openvino_export import (
    Axes,
    Input,
    Shape,
    digest,
    export,
    find_home,
    first_line,
    probe,
    write_whole,
)
from latentdiff.backends.precision import relative_error

if TYPE_CHECKING:
    from latentdiff.lean.unet import LeanUNet

# relative error of one evaluation against float32 in PyTorch, above which it is refused
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MODEL = "model.xml"
_KEPT_BYTES = 2 << 30  # compiled shapes in memory, by the size of their weights; always at least 2


class OpenVINO:
    """A network compiled by OpenVINO: called like the network, without gradients, on CPU tensors.

    Each new shape is compiled when it is first met, or by `prepare`. For one thread at a time.

    Args:
        network: float32, on the CPU; takes and returns tensors.
        inputs: what it takes.
        directory: where exports are kept, `MODEL/openvino`; None, or one that cannot be written:
            the user's cache.
        dtype: float32 or bfloat16, what is computed in; the results are float32.
        options: what else than its weights makes the network compute something else.
        identity: stands for the weights, which are hashed without it (`find_home`).

    Raises:
        ValueError: OpenVINO is not installed, or has no such precision.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[Input],
        directory: Path | None = None,
        dtype: torch.dtype = torch.float32,
        options: str = "",
        identity: str | None = None,
    ) -> None:
        _check(network, dtype)
        import openvino

        self._network, self._inputs, self._dtype = network, tuple(inputs), dtype
        self._core = openvino.Core()
        self._home = find_home(directory, network, inputs, options, identity)
        self._num_bytes = sum(weight.nbytes for weight in network.parameters())
        self._requests: OrderedDict[tuple[Shape, ...], Any] = OrderedDict()  # last used last

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The network's result, float32.

        Raises:
            ValueError: OpenVINO's numbers for this shape are not the network's.
        """
        arrays = [x.detach().to("cpu", torch.float32).contiguous().numpy() for x in inputs]
        request = self._request(tuple(array.shape for array in arrays))
        (result,) = request.infer(arrays, share_inputs=True, share_outputs=True).values()
        return torch.from_numpy(result).clone()  # the request writes its next result there

    @property
    def is_exported(self) -> bool:
        """Whether the network is on disk for OpenVINO; where it is not, the first call exports."""
        return (self._home / _MODEL).exists()

    def prepare(self, *shapes: Sequence[int]) -> None:
        """Compile now for these shapes of the inputs, or take from disk what is there.

        Raises:
            ValueError: OpenVINO's numbers for this shape are not the network's.
        """
        self._request(tuple(tuple(shape) for shape in shapes))

    def _request(self, shapes: tuple[Shape, ...]) -> Any:
        if shapes not in self._requests:
            most = max(2, _KEPT_BYTES // max(self._num_bytes, 1))
            while len(self._requests) >= most:
                self._requests.popitem(last=False)
            self._requests[shapes] = self._kept(shapes) or self._compiled(shapes)
        self._requests.move_to_end(shapes)
        return self._requests[shapes]

    def _config(self) -> dict[str, Any]:
        return {
            "INFERENCE_PRECISION_HINT": _HINTS[self._dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "CACHE_MODE": "OPTIMIZE_SIZE",  # no copy of the weights for each shape
        }

    def _compiled_path(self, shapes: tuple[Shape, ...]) -> Path:
        processor = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        what = [shapes, _HINTS[self._dtype], processor]
        return self._home / f"{digest(json.dumps(what).encode())}.compiled"

    def _kept(self, shapes: tuple[Shape, ...]) -> Any:
        """What an earlier process compiled, if it is there and still gives the same numbers."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._compiled_path(shapes)
        if not path.exists():
            return None
        config = self._config() | {"WEIGHTS_PATH": str(self._home / "model.bin")}
        try:
            kept = load_file(path)
            blob = io.BytesIO(kept["blob"].numpy().tobytes())
            request = self._core.import_model(blob, "CPU", config).create_infer_request()
            error = relative_error(self._evaluate(request, shapes), kept["expected"])
            if error <= TOLERANCES[self._dtype]:
                return request
            reason = f"its relative error is {error:.1g}"
        except (SafetensorError, KeyError, RuntimeError, OSError) as damage:
            reason = first_line(damage)
        warnings.warn(f"{path} is damaged ({reason}); compiled again", stacklevel=2)
        return None

    def _compiled(self, shapes: tuple[Shape, ...]) -> Any:
        """A request for these shapes, its numbers checked, and kept for the next process."""
        from safetensors.torch import save

        config = self._config()
        model = self._exported()
        try:
            model.reshape(dict(enumerate(map(list, shapes))))
            compiled = self._core.compile_model(model, "CPU", config)
            request = compiled.create_infer_request()
            result = self._evaluate(request, shapes)
        except RuntimeError as error:
            raise ValueError(
                f"OpenVINO cannot run inputs of shapes {_said(shapes)}: {first_line(error)}; "
                "leave OpenVINO off"
            ) from error
        with torch.inference_mode():
            expected = self._network(*probe(shapes))
        error, limit = relative_error(result, expected), TOLERANCES[self._dtype]
        if not error <= limit:
            raise ValueError(
                f"OpenVINO in {_HINTS[self._dtype]} differs from PyTorch by {error:.1g} of the "
                f"result for inputs of shapes {_said(shapes)}; expected at most {limit:g}; use "
                f"float32, leave OpenVINO off, or delete {self._home} if that may be damaged"
            )
        blob = torch.frombuffer(bytearray(compiled.export_model().getvalue()), dtype=torch.uint8)
        kept = save({"blob": blob, "expected": expected.float().contiguous()})
        write_whole(self._compiled_path(shapes), kept)
        return request

    def _evaluate(self, request: Any, shapes: tuple[Shape, ...]) -> Tensor:
        arrays = [x.numpy() for x in probe(shapes)]
        (result,) = request.infer(arrays, share_inputs=True).values()
        return torch.from_numpy(result)

    def _exported(self) -> Any:
        """The model of all shapes, read from disk; exported before where it is not there."""
        path = self._home / _MODEL
        if path.exists():
            try:
                return self._core.read_model(path)
            except RuntimeError as error:
                reason = first_line(error)
                warnings.warn(f"{path} is damaged ({reason}); exported again", stacklevel=2)
        shutil.rmtree(self._home, ignore_errors=True)
        export(self._network, self._inputs, self._home)
        return self._core.read_model(path)


def unet(
    network: LeanUNet,
    directory: Path | None = None,
    dtype: torch.dtype = torch.float32,
    options: str = "",
    identity: str | None = None,
) -> OpenVINO:
    """LeanUNet.forward by OpenVINO, a `backends.Run`.

    Args:
        network: float32, on the CPU.
        directory: as for `OpenVINO`.
        dtype: float32 or bfloat16.
        options: as for `OpenVINO`: of merged tokens, their ratio.
        identity: as for `OpenVINO`.

    Raises:
        ValueError: OpenVINO is not installed, or has no such precision.
    """
    inputs, what = _inputs(network), _what(network, options)
    return OpenVINO(network, inputs, directory, dtype, what, identity)


def is_exported(
    network: LeanUNet, directory: Path | None, identity: str, options: str = ""
) -> bool:
    """Whether `unet` with these arguments would find its export; no weight is looked at.

    Args:
        network: on any device, the meta device too.
        directory: as for `OpenVINO`.
        identity: as for `OpenVINO`.
        options: as for `unet`.
    """
    if find_spec("openvino") is None:
        return False
    home = find_home(directory, network, _inputs(network), _what(network, options), identity)
    return (home / _MODEL).exists()


def _what(network: LeanUNet, options: str) -> str:
    """What a U-Net computes, but for its weights: not all of a config shows in their shapes."""
    return f"{network.shape} {options}"


def _inputs(network: LeanUNet) -> tuple[Input, ...]:
    """What `LeanUNet.forward` takes."""
    shape = network.shape
    side = 2 ** (len(network.config["block_out_channels"]) - 1)
    image: Axes = {0: ("b", 1), 2: ("h", side), 3: ("w", side)}
    return (
        Input("noisy", (2, shape.in_channels, 3 * side, 2 * side), image),
        Input("time", (1, network.time_all.out_features), {}),
        Input("text", (6, 3, network.text_all.out_features), {0: ("rows", 1), 1: ("n", 1)}),
    )


def _check(network: nn.Module, dtype: torch.dtype) -> None:
    if find_spec("openvino") is None:
        raise ValueError("OpenVINO is not installed; pip install 'latentdiff[openvino]'")
    if dtype not in _HINTS:
        raise ValueError(f"OpenVINO runs in float32 or bfloat16; got {dtype}; name one of them")
    weight = next(network.parameters())
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"OpenVINO takes weights in float32 on the CPU; got {weight.dtype} on {weight.device}; "
            "load the model in float32: bfloat16 is what it then computes in"
        )


def _said(shapes: Sequence[Shape]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
