"""Do checkpoints survive damage, full disks and kills? A sample of the fault campaign's C1 to C3.

All of it, with `-m slow`.
"""

from __future__ import annotations

import errno
from pathlib import Path

import checkpoint_faults as faults
import pytest
from checkpoint_rig import contents, find, groups, save

CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    for step in (1, 2):
        save(root, step)
    return root


def first(problems: dict[str, str | None]) -> dict[str, str]:
    """Those that are problems; there must have been something to try."""
    assert problems
    return {name: problem for name, problem in problems.items() if problem is not None}


# C1


def try_damages(whole: Path, scratch: Path, num_cuts: int, num_flips: int) -> dict[str, str]:
    return first(
        {
            damage.name: faults.judge_damage(damage, whole, scratch)
            for damage in faults.damages(num_cuts, num_flips)
        }
    )


def test_damage_is_detected_before_use(whole: Path, tmp_path: Path) -> None:
    assert try_damages(whole, tmp_path / "copy", num_cuts=3, num_flips=4) == {}


@pytest.mark.slow
def test_all_damage_is_detected_before_use(whole: Path, tmp_path: Path) -> None:
    assert try_damages(whole, tmp_path / "copy", num_cuts=20, num_flips=200) == {}


def test_damage_that_is_there_is_seen(whole: Path, tmp_path: Path) -> None:
    """The judge itself: without damage it finds that step 2 is not refused."""
    nothing = faults.Damage("nothing", lambda root: None)
    problem = faults.judge_damage(nothing, whole, tmp_path / "copy")
    assert problem is not None and problem.startswith("step 1 was expected; got 2")


# C2


def try_storage(tmp_path: Path, every: int) -> dict[str, str]:
    problems: dict[str, str | None] = {}
    for step in (3, 2):  # a new one; one that is there already
        points = faults.save_points(tmp_path / f"points-{step}", step)
        assert len(points) >= 20
        for i, code in enumerate(CODES):
            for number, point in list(enumerate(points))[i::every]:
                root = tmp_path / f"{step}-{code}-{number}"
                name = f"{errno.errorcode[code]} at {number} {point}, saving {step}"
                problems[name] = faults.judge_storage(number, code, step, root)
    return first(problems)


def test_storage_that_fails_at_a_point(tmp_path: Path) -> None:
    assert try_storage(tmp_path, every=7) == {}


@pytest.mark.slow
def test_storage_that_fails_at_any_point(tmp_path: Path) -> None:
    assert try_storage(tmp_path, every=1) == {}


def test_no_space_at_many_offsets(tmp_path: Path) -> None:
    shares = [i / 20 for i in range(20)]
    problems = {
        f"at {share:.0%}": faults.judge_no_space(share, tmp_path / f"{share}") for share in shares
    }
    assert first(problems) == {}


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    """A disk of 256 KiB, on which one checkpoint of 120 KiB has room and two have not."""
    disk = tmp_path / "disk"
    try:
        with faults.small_disk(disk, 256 * 1024) as remount:
            root = disk / "checkpoints"
            save(root, 1, tensors=groups(1, side=120))
            before = contents(root)
            with pytest.raises(OSError, match=r"step-2 cannot be written: .*No space left on dev"):
                save(root, 2, keep=1, tensors=groups(2, side=150))
            assert contents(root) == before
            assert {path.name for path in root.iterdir()} == {"step-1", "latest"}
            remount("ro")
            with pytest.raises(OSError, match=r"step-2 cannot be written: .*Read-only file system"):
                save(root, 2, keep=1)
            assert contents(root) == before
            found, _ = find(root)
            assert found is not None and found.step == 1
    except PermissionError:
        pytest.skip("mounting a disk needs root; the tests above fill none")


# C3


def test_what_changes_after_the_call_is_not_saved(tmp_path: Path) -> None:
    problems = {str(i): faults.judge_snapshot(i, tmp_path / str(i)) for i in range(1, 51)}
    assert first(problems) == {}


# Kills


def try_kills(tmp_path: Path, every: int) -> dict[str, str]:
    problems: dict[str, str | None] = {}
    for step in (3, 2):  # a new one; one that is there already
        points = faults.save_points(tmp_path / f"points-{step}", step)
        assert len(points) >= 20
        for number, point in list(enumerate(points))[step - 2 :: every]:
            name = f"{step}: {number} {point}"
            problems[name] = faults.judge_kill(number, step, tmp_path / f"{step}-{number}")
    return first(problems)


def test_a_kill_at_a_point_of_a_save(tmp_path: Path) -> None:
    assert try_kills(tmp_path, every=5) == {}


@pytest.mark.slow
def test_a_kill_at_any_point_of_a_save(tmp_path: Path) -> None:
    assert try_kills(tmp_path, every=1) == {}


@pytest.mark.parametrize("offset", [0, 1, 300])
def test_a_kill_while_a_file_is_written(tmp_path: Path, offset: int) -> None:
    assert faults.judge_kill(0, 3, tmp_path, offset) is None
