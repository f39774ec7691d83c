"""Does `latentdiff checkpoint inspect` say what is there, whether it is whole, and which bits?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_rig import ALONE, groups, save

from latentdiff.cli import run
from latentdiff.training.checkpoint import Checkpoints
from latentdiff.training.commit import Keep
from latentdiff.training.shards import tensors_hash


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run directory with checkpoints of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE, Keep(5))
    for step in (10, 20):
        state = {"loader": {"cursor": 8 * step, "seed": 3}, "skips": 1, "config": {"lr": 0.1}}
        checkpoints.save(step, groups(step), state, metric=1 / step, is_last=True)
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(["checkpoint", "inspect", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_directory(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, errors = inspect(capsys, out)
    assert (code, errors) == (0, "")
    newest, older = said.split("\n\n")
    lines = [line.split(maxsplit=1) for line in newest.splitlines()]
    assert lines[0] == [str(out / "checkpoints" / "step-20"), "valid"]
    rows = dict(lines[1:])
    assert rows["step"] == "20, validation loss 0.05, all values finite"
    assert rows["saved"].endswith("+00:00, save 2 of the run")
    assert rows["files"].startswith("1 by 1 ranks, 0 of 4 tensors in parts, 0.0 MiB")
    assert (rows["loader.cursor"], rows["loader.seed"], rows["skips"]) == ("160", "3", "1")
    assert "config.lr" not in rows
    names = {"weights": "model", "EMA": "ema", "optimiser": "optimizer"}
    for name, group in names.items():
        assert rows[name] == tensors_hash(groups(20)[group])
    assert older.startswith(f"{out / 'checkpoints' / 'step-10'}  valid")


def test_each_place_can_be_named(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, out) == inspect(capsys, out / "checkpoints")
    code, said, _ = inspect(capsys, out / "checkpoints" / "step-10")
    assert code == 0 and said.startswith(f"{out / 'checkpoints' / 'step-10'}  valid")
    assert "step-20" not in said


def test_json(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = inspect(capsys, out, "--json")
    newest, older = json.loads(said)
    assert code == 0 and (newest["step"], older["step"]) == (20, 10)
    assert newest["valid"] is True and newest["problem"] is None
    assert newest["state"]["config"] == {"lr": 0.1}
    assert newest["hashes"] == {g: tensors_hash(t) for g, t in groups(20).items()}
    files = (out / "checkpoints" / "step-20").iterdir()
    sizes = sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert newest["num_bytes"] == sizes


@pytest.mark.parametrize("file", ["shard", "state.json", "manifest.json"])
def test_a_broken_one(out: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    broken = out / "checkpoints" / "step-20"
    path = next(broken.glob("*.safetensors")) if file == "shard" else broken / file
    path.write_bytes(path.read_bytes()[:-1])
    code, said, errors = inspect(capsys, out)
    assert (code, errors) == (0, "")
    assert f"{broken}  INVALID: {broken}" in said
    assert f"{out / 'checkpoints' / 'step-10'}  valid" in said
    code, said, errors = inspect(capsys, broken)
    assert code == 2 and said.startswith(f"{broken}  INVALID: ")
    assert errors.startswith(f"error: {broken}")
    code, said, _ = inspect(capsys, broken, "--json")
    assert code == 2 and json.loads(said)[0]["valid"] is False


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("nowhere", "is no directory; give a run's directory, or a checkpoint's"),
        ("empty", "holds no checkpoint; give a run's directory, its `checkpoints`, or a step-N"),
    ],
)
def test_nothing_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, why: str
) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    code, said, errors = inspect(capsys, tmp_path / place)
    assert (code, said) == (2, "")
    assert errors.startswith(f"error: {tmp_path / place} {why}")


def test_what_a_crash_moved_aside_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 5).rename(tmp_path / ".old-step-5")
    code, said, _ = inspect(capsys, tmp_path)
    assert code == 0 and said.startswith(f"{tmp_path / '.old-step-5'}  valid\n  step ")
