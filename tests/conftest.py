"""What do all tests share? No network, the repository's folders, and the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REPOSITORY = Path(__file__).parent.parent
RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tests/assets, small real data: an index may be written beside its tars."""
    copy = tmp_path_factory.mktemp("data") / "assets"
    shutil.copytree(REPOSITORY / "tests" / "assets", copy)
    return copy


@pytest.fixture
def run_python(tmp_path: Path) -> RunCommand:
    """Runs `python ARGUMENTS...` in a fresh process and an empty directory."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def run_latentdiff(run_python: RunCommand) -> RunCommand:
    """Runs `latentdiff ARGUMENTS...` as a user's shell would."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "latentdiff", *arguments, **environment)

    return run
