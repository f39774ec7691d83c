"""A whole model in miniature, trained on the real pairs of tests/assets; and one that is a fake."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentdiff.cli import run
from latentdiff.config import DiffusionRun
from latentdiff.drawing import costs
from latentdiff.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parent))  # for tinyruns, in test modules too

from fakepipeline import FakePipeline
from tinyruns import tiny_autoencoder_run, tiny_diffusion_run


@pytest.fixture(scope="session")
def tiny_autoencoder(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from latentdiff.training.autoencoder import train_autoencoder

    return train_autoencoder(tiny_autoencoder_run(assets, tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="session")
def tiny_run(
    assets: Path, tiny_autoencoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> DiffusionRun:
    """The config of a finished run; its directory is `out`, its model `out/model`."""
    from latentdiff.training.diffusion import train_diffusion

    run = tiny_diffusion_run(assets, tmp_path_factory.mktemp("ldm") / "run", tiny_autoencoder)
    train_diffusion(run)
    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_run: DiffusionRun) -> Path:
    return Path(tiny_run.out) / "model"


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_model: Path) -> Pipeline:
    return Pipeline.load(tiny_model)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    pipeline = FakePipeline()
    monkeypatch.setattr(Pipeline, "load", pipeline.load)
    # test_costs.py has it, with a model that can be measured
    monkeypatch.setattr(costs, "tell_approximation_cost", lambda *_: None)
    return pipeline


@pytest.fixture
def sample(fake: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `latentdiff sample` with the fake into tmp_path/out: (code, printed lines, stderr)."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        out = ["--out", str(tmp_path / "out")]
        code = run(["sample", *out, "--steps", "2", *(str(a) for a in arguments)])
        said, err = capsys.readouterr()
        return code, said.splitlines(), err

    return call


@pytest.fixture(autouse=True)
def plain_signal_stack() -> Iterator[None]:
    """Undoes what LLVM, which torch.export loads with triton, leaves behind for signals.

    Its alternative stack and pytest's faulthandler do not go together: the next signal that Python
    handles would be a segmentation fault of the tests' process.
    """
    yield
    if "triton" in sys.modules and sys.platform == "linux":
        disabled = _SignalStack(None, 2, 0)  # SS_DISABLE
        ctypes.CDLL(None).sigaltstack(ctypes.byref(disabled), None)


class _SignalStack(ctypes.Structure):
    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))
