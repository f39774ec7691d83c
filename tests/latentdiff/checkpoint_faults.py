"""What can befall a checkpoint, and does it survive? C1 to C3 and kills in a save, one process.

`damages` and `save_points` list faults; `judge_damage`, `judge_storage`,
`judge_kill` and `judge_snapshot` try one of them in an empty directory and return what is wrong
with the outcome, or None. Tests run a sample of them, the fault campaign all.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoint_rig import ALONE, contents, find, groups, holds, save, watching

from latentdiff.training.checkpoint import Checkpoints, group_hash
from latentdiff.training.commit import Keep
from latentdiff.training.shards import tensors_hash

# C1: a bad checkpoint


@dataclass(frozen=True)
class Damage:
    """Something that is done to a directory with checkpoints of steps 1 and 2.

    Attributes:
        name: what it is.
        strike: does it.
        is_harmless: step 2 is still whole.
    """

    name: str
    strike: Callable[[Path], None]
    is_harmless: bool = False


def damages(num_cuts: int = 20, num_flips: int = 200, seed: int = 0) -> Iterator[Damage]:
    """Every file of step 2 deleted, emptied, longer, cut and with a bit flipped, and leftovers."""
    chance = random.Random(seed)
    for kind in ("shard", "state.json", "manifest.json"):
        yield Damage(f"{kind} deleted", lambda root, kind=kind: file(root, kind).unlink())
        yield Damage(f"{kind} emptied", changed(kind, lambda data: b""))
        yield Damage(f"{kind} longer", changed(kind, lambda data: data + b"\0"))
        yield Damage(f"{kind} a link", lambda root, kind=kind: make_link(file(root, kind)))
        for i in range(num_cuts):
            cut = changed(kind, lambda data, i=i: data[: len(data) * i // num_cuts])
            yield Damage(f"{kind} cut at {i}/{num_cuts}", cut)
        for _ in range(num_flips):
            place, bit = chance.random(), chance.randrange(8)
            yield Damage(
                f"{kind} bit {bit} flipped at {place:.4f}", changed(kind, flip(place, bit))
            )
    yield Damage("a shard too many", stray_shard)
    yield Damage("stale temporary", stale_temporary, is_harmless=True)
    yield Damage("temporary with another manifest", half_temporary, is_harmless=True)
    for name, text in {
        "stale": "step-1",
        "gone": "step-99",
        "garbage": "\0\xff../..",
        "": "",
    }.items():
        yield Damage(f"pointer {name or 'empty'}", pointing(text), is_harmless=True)
    yield Damage("no pointer", lambda root: (root / "latest").unlink(), is_harmless=True)


def judge_damage(damage: Damage, whole: Path, scratch: Path) -> str | None:
    """Does a run fall back to step 1, and is step 2 refused by name, and nothing touched?

    Args:
        damage: what is done.
        whole: a directory with checkpoints of steps 1 and 2, saved by `save`.
        scratch: where a copy of it is made.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    damage.strike(scratch)
    before = contents(scratch)
    found, said = find(scratch)
    expected = 2 if damage.is_harmless else 1
    if not holds(found, expected):
        return f"step {expected} was expected; got {found and found.step}"
    if bool(said) == damage.is_harmless:
        return f"warned of: {said}"
    try:
        find(scratch, str(scratch / "step-2"))
        refused = ""
    except ValueError as error:
        refused = str(error)
    if damage.is_harmless == bool(refused) or (refused and "step-2" not in refused):
        return f"by name: {refused or 'not refused'}"
    if contents(scratch) != before:
        return "a file was touched"
    save(scratch, 3)
    if left := [path.name for path in scratch.glob(".*")]:
        return f"left over after the next save: {left}"
    return None if holds(find(scratch)[0], 3) else "the next save is not found"


def file(root: Path, kind: str) -> Path:
    """A file of step 2."""
    return next((root / "step-2").glob("*.safetensors" if kind == "shard" else kind))


def changed(kind: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def strike(root: Path) -> None:
        path = file(root, kind)
        path.write_bytes(change(path.read_bytes()))

    return strike


def flip(place: float, bit: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        flipped = bytearray(data)
        flipped[int(place * len(data))] ^= 1 << bit
        return bytes(flipped)

    return change


def make_link(path: Path) -> None:
    outside = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(outside)
    path.symlink_to(outside)


def stray_shard(root: Path) -> None:
    shutil.copyfile(file(root, "shard"), root / "step-2" / "shard-99999.safetensors")


def stale_temporary(root: Path) -> None:
    shutil.copytree(root / "step-2", root / ".tmp-step-3")
    (root / ".tmp-step-3" / "manifest.json").unlink()
    (root / ".tmp-latest").write_text("step-3")


def half_temporary(root: Path) -> None:
    shutil.copytree(root / "step-1", root / ".tmp-step-2")
    (root / ".tmp-gone-step-0").mkdir()


def pointing(text: str) -> Callable[[Path], None]:
    def strike(root: Path) -> None:
        (root / "latest").write_text(text, encoding="latin-1")

    return strike


# C2: storage that fails


def save_points(root: Path, step: int) -> list[str]:
    """Every change to the disk that a save of `step` makes in a directory with steps 1 and 2.

    Args:
        root: an empty directory.
        step: 3: a new one, which ends 1 and 2; 2: one that is there already.
    """
    points: list[str] = []
    save_two(root)
    with watching(root, points.append):
        save(root, step, seed=step + 10, keep=1)
    return points


def save_two(root: Path) -> None:
    for step in (1, 2):
        save(root, step)


def judge_storage(number: int, code: int, step: int, root: Path) -> str | None:
    """A save in which change `number` to the disk fails: is all as it was, and nothing left?

    Args:
        number: from 0, of `save_points`; failing goes on from there, as on a full disk, but what
            exists can be renamed and removed.
        code: ENOSPC, EIO or EROFS (with which nothing can be renamed or removed either).
        step: of `save_points`.
        root: an empty directory.
    """
    save_two(root)
    before = contents(root)
    seen: list[str] = []
    failed: list[str] = []

    def see(point: str) -> None:
        undoes = point.startswith(("remove", "rmdir", f"rename .old-step-{step} -> step-{step}"))
        if number <= len(seen) + len(failed) and (
            code == errno.EROFS or not ((failed and undoes) or "gone-" in point)
        ):
            failed.append(point)
            raise OSError(code, os.strerror(code))
        seen.append(point)

    raised = ""
    try:
        with watching(root, see), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save(root, step, seed=step + 10, keep=1)
    except OSError as error:
        raised = str(error)
    is_committed = f"rename .tmp-step-{step} -> step-{step}" in seen
    if not raised and "rename .tmp-latest -> latest" not in seen:
        return "the last save failed, and was not told of"
    if raised and (f"step-{step} cannot" not in raised or os.strerror(code) not in raised):
        return f"told of as: {raised}"
    if code != errno.EROFS and (left := [path.name for path in root.glob(".*")]):
        return f"left over: {left}"
    after = {name.removeprefix(".old-"): data for name, data in contents(root).items()}
    changed = {name for name, data in before.items() if after.get(name) != data}
    may_change = ("latest", f"step-{step}/") if is_committed else ()
    if raised and not all(name.startswith(may_change) for name in changed):
        return f"an earlier checkpoint has changed: {changed}"
    if not holds(find(root)[0], step + 10 if is_committed else 2):
        return "neither the old nor the new one is found"
    save(root, 4)
    if left := [path.name for path in root.glob(".*")]:
        return f"left over after the next save: {left}"
    return None if holds(find(root)[0], 4) else "the next save is not found"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file can be written past it, whoever writes; the error is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def judge_no_space(share: float, root: Path, side: int = 64) -> str | None:
    """No space at an offset of the shard, told by the system itself: is all as it was?"""
    save(root, 1, tensors=groups(1, side))
    before = contents(root)
    size = next((root / "step-1").glob("*.safetensors")).stat().st_size
    try:
        with file_size_limit(int(share * size)):
            save(root, 2, keep=1, tensors=groups(2, side))
        return "the save did not fail"
    except OSError as error:
        if "step-2 cannot be written" not in str(error):
            return f"told of as: {error}"
    return None if contents(root) == before else "the directory has changed"


@contextmanager
def small_disk(place: Path, num_bytes: int) -> Iterator[Callable[[str], object]]:
    """A disk of so many bytes; yields what mounts it again with other options.

    Raises:
        PermissionError: this process may not mount.
    """
    place.mkdir()
    options = f"size={num_bytes}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise PermissionError(f"{place}: no disk can be mounted here")
    try:
        yield lambda other: subprocess.run(
            ["mount", "-o", f"remount,{other}", str(place)], check=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # files may still be mapped


# K1: killed in a save


def judge_kill(number: int, step: int, root: Path, offset: int | None = None) -> str | None:
    """Kill a process before it makes change `number`: is the old checkpoint there, or the new?

    Args:
        number: from 0, of `save_points`.
        step: of `save_points`.
        root: an empty directory.
        offset: instead, the process ends when a file reaches so many bytes.
    """
    save_two(root)
    child = os.fork()
    if not child:
        _die_in_a_save(number, step, root, offset)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return f"the point was not come to: exit code {os.waitstatus_to_exitcode(status)}"
    found, said = find(root)
    if not (holds(found, 2) or holds(found, step + 10)) or said:
        return f"neither the old nor the new one is found: {found and found.step} {said}"
    assert found is not None
    was_new = found.step == step and holds(found, step + 10)
    save(root, 4, keep=2)
    if left := [path.name for path in root.glob(".*")]:
        return f"left over after the next save: {left}"
    again = find(root, str(root / f"step-{found.step}"))[0]
    if not holds(again, step + 10 if was_new else 2):
        return "what was found is no longer there after the next save"
    return None


def _die_in_a_save(number: int, step: int, root: Path, offset: int | None) -> None:
    code = 1
    with suppress(BaseException):
        seen: list[str] = []

        def see(point: str) -> None:
            if offset is None and len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(point)

        if offset is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
        with watching(root, see):
            save(root, step, seed=step + 10, keep=1)
        code = 0
    os._exit(code)


# C3: weights that change while they are saved


def judge_snapshot(seed: int, root: Path) -> str | None:
    """Change every tensor as soon as the call is back; is what was saved what there was then?"""
    tensors = groups(seed, side=256)
    expected = {group: tensors_hash(members) for group, members in tensors.items()}
    checkpoints = Checkpoints(root, ALONE, Keep(2), background=True)
    checkpoints.save(seed, tensors, {})
    for members in tensors.values():
        for tensor in members.values():
            tensor.add_(1)
    checkpoints.close()
    found, _ = find(root)
    assert found is not None
    saved = {group: group_hash(found, group) for group in expected}
    return None if (found.step, saved) == (seed, expected) else f"step {found.step} has other bytes"
