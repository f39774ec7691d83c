"""How does a network become OpenVINO's files, and where are they kept under which name?

One export serves all sizes and batches, guided and not: `model.xml` and `model.bin`. It is kept
beside the model, under a name that any change of weights or versions changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff import __version__
from latentdiff.caches import cache_directory

_KEPT_EXPORTS = 4  # beside one model: its own, and with the last LoRAs
_FORMAT = 1  # raise it when what is kept on disk changes its meaning

Shape = tuple[int, ...]
Axes = dict[int, tuple[str, int]]  # which axes vary: axis -> (name, what it is a multiple of)


@dataclass(frozen=True)
class Input:
    """What is known of an input before its first tensor.

    Attributes:
        name: in the exported model.
        example: its shape at the export; nothing is 1 there that is not always 1.
        axes: which of its axes vary.
    """

    name: str
    example: Shape
    axes: Axes


def export(network: nn.Module, inputs: Sequence[Input], directory: Path) -> None:
    """Write `model.xml` and `model.bin` of a network, for all shapes that `inputs` allows.

    The weights are float32: OpenVINO's float16 files were not exact for weights that are float16.

    Raises:
        ValueError: the network cannot be exported.
        OSError: the directory cannot be written.
    """
    import openvino

    names = {name for each in inputs for name, _ in each.axes.values()}
    sizes = {name: torch.export.Dim(name, min=1, max=1 << 16) for name in sorted(names)}
    axes = tuple(
        {axis: sizes[name] if of == 1 else of * sizes[name] for axis, (name, of) in i.axes.items()}
        for i in inputs
    )
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            program = torch.export.export(
                network,
                probe([each.example for each in inputs]),
                dynamic_shapes=axes,
                # b and rows are free of each other, so that one export serves guidance and none
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            model = _converted(program)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot be exported to OpenVINO: {first_line(error)}; leave "
            "OpenVINO off"
        ) from error
    for port, each in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({each.name})
    partial = _partial(directory)
    partial.mkdir(parents=True)
    try:
        openvino.save_model(model, partial / "model.xml", compress_to_fp16=False)
        if not directory.exists():  # another process may have been faster
            os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _forget_old(directory)


def _converted(program: torch.export.ExportedProgram) -> Any:
    """The openvino.Model of a program.

    This is openvino.convert_model less its report of each conversion to a server.
    """
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    graph = TorchFXPythonDecoder.from_exported_program(program)  # must outlive the conversion
    return frontend.convert(frontend.load(graph))


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and warnings of torch.export and OpenVINO about one another."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _key(network: nn.Module, inputs: Sequence[Input], options: str, identity: str | None) -> str:
    """What an export depends on, as a name: weights, code and versions."""
    import openvino

    weights = ["hash", _hash_of_weights(network)] if identity is None else ["identity", identity]
    versions = (_FORMAT, __version__, torch.__version__, openvino.__version__)
    shapes = [(each.name, each.example) for each in inputs]
    what = [versions, type(network).__name__, shapes, options, weights]
    return digest(json.dumps(what).encode())


def _hash_of_weights(network: nn.Module) -> str:
    """Takes about a second for each GB."""
    sha = hashlib.sha256()
    for name, weight in network.state_dict().items():
        sha.update(f"{name} {tuple(weight.shape)}".encode())
        sha.update(_flat(weight).numpy().data)
    return sha.hexdigest()


def _flat(weight: Tensor) -> Tensor:
    """A weight in the order of its memory, which is not copied if it is dense."""
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    return weight.detach().permute(order).reshape(-1)


def find_home(
    directory: Path | None,
    network: nn.Module,
    inputs: Sequence[Input],
    options: str,
    identity: str | None = None,
) -> Path:
    """Where the export of this network is, or is to be.

    Args:
        directory: of the model's exports; None, or one that cannot be written: the user's cache.
        network: whose weights decide; on the CPU, if they are to be hashed.
        inputs: of it.
        options: whatever else decides.
        identity: stands for the weights, such as a digest of their files' paths, sizes and times:
            it must change whenever a weight does. None: all weights are hashed.
    """
    key = _key(network, inputs, options, identity)
    if directory is not None and (directory / key).is_dir():
        return directory / key
    if directory is None or not _is_writable(directory):
        directory = cache_directory() / "openvino"
    return directory / key


def _is_writable(directory: Path) -> bool:
    existing = directory if directory.exists() else directory.parent
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _forget_old(newest: Path) -> None:
    """Delete all but the last few exports beside this one."""
    exports = [path for path in newest.parent.iterdir() if (path / "model.xml").is_file()]
    exports.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in exports[_KEPT_EXPORTS:]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """A file that is whole or not there."""
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:  # a full disk, or another's directory: compiled again next time
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """Beside it, a name that no other process takes."""
    return path.with_name(f".{path.name}-{os.getpid()}")


def probe(shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
    """Standard-normal inputs of these shapes for a trial, always the same."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def digest(content: bytes) -> str:
    """A name for this content, 16 hex digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def first_line(error: Exception) -> str:
    """What went wrong, of a message that goes on about where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith("Exception from")]
    return (kept or lines or [type(error).__name__])[0][:200]
