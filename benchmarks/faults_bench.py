"""What does a trial of the campaign need? Runs of the rig in some mode, and what came of it."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from faults_compare import committed, last_step
from faults_inject import Prelude
from faults_rig import Rig
from faults_start import Ranks, fork_ranks, in_child, torchrun

PATIENCE_S = 120.0  # for a whole run on a busy machine
_HEAVY = (  # what takes longest; a run itself tells the rest
    "latentdiff.training.diffusion",
    "latentdiff.cli.checkpoint",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)


class Setting(NamedTuple):
    """How ranks share a run.

    Attributes:
        mode: of `parallel.mode`.
        num_ranks: 0: a process alone, without a launcher.
    """

    mode: str
    num_ranks: int

    def __str__(self) -> str:
        return "one process" if self.num_ranks == 0 else f"{self.mode} x {self.num_ranks}"


class Outcome(NamedTuple):
    """What came of a trial.

    Attributes:
        problems: why it failed; empty where it survived.
        recovery_s: from the start after the fault to the first new step, or from the fault to the
            end of the processes, whichever the fault is about.
        lost_steps: steps done before the fault that were done again.
    """

    problems: list[str]
    recovery_s: float = 0.0
    lost_steps: int = 0


@dataclass(frozen=True)
class Case:
    """One trial: its fault, the row of the table that it counts in, its name, and what it does."""

    fault: str
    group: str
    name: str
    run: Callable[[Path], Outcome]

    @property
    def key(self) -> str:
        """Names it among all."""
        return f"{self.fault} / {self.group} / {self.name}"


@dataclass(frozen=True)
class Bench:
    """Where trials run.

    Attributes:
        rig: what they train.
        work: folder for runs that nothing happens to, which others are compared with.
    """

    rig: Rig
    work: Path

    def start(
        self,
        out: Path,
        setting: Setting,
        overrides: Sequence[str] = (),
        prelude: Prelude | None = None,
        real: bool = False,
    ) -> Ranks:
        """Start (or go on with) a run in `out`.

        Args:
            out: run directory.
            setting: how many ranks, and how they share.
            overrides: of the rig's config.
            prelude: what each rank does to itself first.
            real: by torchrun, in fresh interpreters.
        """
        out.mkdir(parents=True, exist_ok=True)
        arguments = ["train", "--config", str(self.rig.config), f"out={out}"]
        arguments += [f"parallel.mode={setting.mode}", *overrides]
        if real:
            assert prelude is None, "a rank that torchrun starts is left as it is"
            return torchrun(arguments, setting.num_ranks, out / "log.txt")
        return fork_ranks(arguments, setting.num_ranks, out / "log.txt", prelude)

    def whole(self, setting: Setting, overrides: Sequence[str] = ()) -> Path:
        """The directory of the run that nothing happens to; made once.

        Raises:
            RuntimeError: it does not end well by itself.
        """
        parts = ["whole", setting.mode, str(setting.num_ranks), *overrides]
        return self.complete(self.work / "-".join(parts), setting, overrides)

    def complete(
        self,
        out: Path,
        setting: Setting,
        overrides: Sequence[str] = (),
        prelude: Prelude | None = None,
    ) -> Path:
        """Let a run go from its beginning to its end, unless it has; returns `out`.

        Raises:
            RuntimeError: it does not end well.
        """
        done = out / "complete"
        if not done.is_file():
            shutil.rmtree(out, ignore_errors=True)
            ranks = self.start(out, setting, overrides, prelude)
            ended = ranks.wait(4 * PATIENCE_S)
            codes = ranks.codes()
            ranks.kill()
            if not ended or set(codes) != {0}:
                raise RuntimeError(f"a run without any fault ended with {codes}: {tail(out)}")
            done.touch()
        return out

    def finish(
        self,
        out: Path,
        setting: Setting,
        overrides: Sequence[str] = (),
        real: bool = False,
        recovered: Callable[[], bool] | None = None,
    ) -> tuple[list[str], float]:
        """Start again and let it run to its end.

        Args:
            out: run directory.
            setting: of this start.
            overrides: of the rig's config.
            real: by torchrun.
            recovered: whether work goes on; default: a step is logged that was not before.

        Returns:
            What went wrong, and the seconds until work went on.
        """
        before, step = _stamp(out), committed(out)
        ranks = self.start(out, setting, overrides, real=real)
        ranks.wait(PATIENCE_S, recovered or (lambda: _went_on(out, before, step)))
        seconds = ranks.seconds()
        ended = ranks.wait(2 * PATIENCE_S)
        codes = ranks.codes()
        left = ranks.alive() if ended else []
        ranks.kill()
        if not ended:
            return ["resumed, it did not end"], seconds
        problems = [f"{len(left)} processes were left"] if left else []
        if set(codes) != {0}:
            problems.append(f"resumed, it ended with {codes}: {tail(out)}")
        return problems, seconds


def warm_up(rig: Rig, scratch: Path) -> None:
    """Import here what a run imports, so that forks need not.

    Raises:
        RuntimeError: a short run fails.
    """
    for name in _HEAVY:
        importlib.import_module(name)
    for name in in_child(lambda: _modules_of_a_run(rig, scratch)):
        if name not in sys.modules and not name.startswith("__"):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or a collection in a child would copy all that it shares with this process


def _modules_of_a_run(rig: Rig, scratch: Path) -> list[str]:
    from latentdiff.cli import quiet_libraries, run

    log = os.open(scratch / "warm-up.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    quiet_libraries()
    shutil.rmtree(scratch / "warm-up", ignore_errors=True)
    overrides = [f"out={scratch / 'warm-up'}", "loop.num_steps=2"]
    if code := run(["train", "--config", str(rig.config), *overrides]):
        raise RuntimeError(f"exit code {code}: {(scratch / 'warm-up.txt').read_text()[-2000:]}")
    return list(sys.modules)


def tail(out: Path) -> str:
    """The end of what a run printed, on one line."""
    log = out / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return " | ".join(line for line in lines[-12:] if not line.startswith("step "))[-800:]


def _stamp(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_mtime_ns if metrics.exists() else 0


def _went_on(out: Path, before: int, step: int) -> bool:
    """Whether the metrics were written to since, and hold a step after the checkpoint's."""
    return _stamp(out) != before and last_step(out) > step
