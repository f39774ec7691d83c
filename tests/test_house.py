"""Does the house keep its rules: light imports, what travels in a wheel, who may import what?"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("latentdiff", "vae", "data_pipelines")
CORE = {f"latentdiff.{name}" for name in ("schedule", "grids", "denoiser", "loss", "likelihood",
        "guidance", "thresholds", "samplers", "multistep", "solver")}  # fmt: skip
HEAVY = {"torch", "torchvision", "xformers", "open_clip", "diffusers", "transformers", "duckdb",
         "numpy", "pyarrow", "webdataset", "resvg_py", "PIL"}  # fmt: skip
OPTIONAL = {"lpips", "openvino", "torchao", "xformers"}  # imported where present
NOT_IMPORTED = {"accelerate", "tensorboard"}  # used by diffusers.from_pretrained, torch.utils


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def modules(repository: Path) -> Iterator[tuple[str, ast.Module]]:
    """Our modules, by dotted name, parsed."""
    for package in PACKAGES:
        for path in sorted((repository / package).rglob("*.py")):
            name = ".".join(path.relative_to(repository).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module imports, and what it reaches through `torch.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch":
            yield f"torch.{node.attr}"


# Light imports


@pytest.mark.parametrize("module", ["latentdiff", "latentdiff.cli", "latentdiff.config"])
def test_import_is_light(run_python: Any, module: str) -> None:
    done = run_python("-c", f"import sys, {module}; print(*sys.modules, sep='\\n')")
    assert done.returncode == 0, done.stderr
    assert HEAVY.isdisjoint(done.stdout.split())


def test_help_is_quick_and_says_nothing_else(run_latentdiff: Any) -> None:
    run_latentdiff("--help")  # compiles
    start = time.monotonic()
    done = run_latentdiff("--help")
    assert time.monotonic() - start < 3  # under 1 on a quiet machine
    assert (done.returncode, done.stderr) == (0, "")


# Who may import what (the layers are import-linter's, see pyproject.toml)


def test_torch_distributed_has_one_importer(repository: Path) -> None:
    importers = {
        name
        for name, tree in modules(repository)
        if any(re.match(r"torch\.distributed\b", imported) for imported in imports(tree))
    }
    assert importers <= {"latentdiff.parallel"}


def test_core_imports_torch_alone(repository: Path) -> None:
    core = {name: tree for name, tree in modules(repository) if name in CORE}
    assert core
    for name, tree in core.items():
        for imported in imports(tree):
            top = imported.partition(".")[0]
            inside = any(f"{imported}.".startswith(f"{module}.") for module in CORE)
            assert top == "torch" or top in sys.stdlib_module_names or inside, f"{name}: {imported}"


def test_what_is_imported_is_declared_and_nothing_else(
    repository: Path, project: dict[str, Any]
) -> None:
    top = {name.partition(".")[0] for _, tree in modules(repository) for name in imports(tree)}
    third_party = top - set(sys.stdlib_module_names) - set(PACKAGES) - OPTIONAL
    distributions = packages_distributions()
    needed = {_normal(distributions[module][0]) for module in third_party}
    declared = {
        _normal(re.split(r"[^\w.-]", line)[0]) for line in project["project"]["dependencies"]
    }
    assert declared - NOT_IMPORTED == needed


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


# What travels in a wheel


def test_every_package_is_declared(repository: Path, project: dict[str, Any]) -> None:
    found = {
        ".".join(path.parent.relative_to(repository).parts)
        for package in PACKAGES
        for path in (repository / package).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == found | {"latentdiff.configs"}


def test_every_data_file_is_declared(repository: Path, project: dict[str, Any]) -> None:
    settings = project["tool"]["setuptools"]
    for package, patterns in settings["package-data"].items():
        folder = repository / settings["package-dir"].get(package, package)
        declared = {path for pattern in patterns for path in folder.glob(pattern)}
        present = {
            path
            for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
        }
        assert present == declared


@pytest.mark.slow
def test_wheel_holds_code_configs_and_model(repository: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"  # pip leaves its build folder where it builds
    unwanted = shutil.ignore_patterns(".*", "build", "data", "outputs", "runs", "*.egg-info")
    shutil.copytree(repository, copy, ignore=unwanted)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path)]
    subprocess.run([*build, str(copy)], check=True, capture_output=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (repository / "configs").glob("*.yaml"):
        assert f"latentdiff/configs/{path.name}" in names
    for package in PACKAGES:
        for path in (repository / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(repository)) in names
    assert not any(name.startswith(("tests/", "configs/")) for name in names)
