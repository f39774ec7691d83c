"""From where does a run go on, and with the data that its checkpoint was saved with?"""

from __future__ import annotations

import os

from data_pipelines.loader import Loader
from latentdiff.training.checkpoint import Checkpoint

_STARTED_AGAIN = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def after_restart(resume: str) -> str:
    """`auto` where torchrun or SLURM has started the run again by the command of its first start.

    That start began anew, or at some checkpoint, if `resume` says so; this one goes on from what it
    has done since.
    """
    return "auto" if any(int(os.environ.get(name, "0")) for name in _STARTED_AGAIN) else resume


def restore_loader(checkpoint: Checkpoint, loader: Loader) -> None:
    """Let the loader go on where the checkpoint was saved.

    Raises:
        ValueError: data, seed or batch size are others, so that the run would read some samples
            again and others never.
    """
    try:
        if "loader" not in checkpoint.state:
            raise ValueError("it was saved by an earlier version, without the loader's state")
        loader.restore(checkpoint.state["loader"])
    except ValueError as error:
        raise ValueError(
            f"the checkpoint of step {checkpoint.step} cannot go on here: {error}; or give another "
            "`out`, or --resume none"
        ) from error
