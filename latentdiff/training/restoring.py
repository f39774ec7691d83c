"""Does a checkpoint go on with the data that it was saved with?"""

from __future__ import annotations

from data_pipelines.loader import Loader
from latentdiff.training.checkpoint import Checkpoint


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
