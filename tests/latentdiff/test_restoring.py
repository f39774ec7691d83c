"""From where does a run go on that is started again, or from too far?"""

from __future__ import annotations

import pytest

from latentdiff.config import DiffusionRun
from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.restoring import after_restart


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_goes_on_whatever_the_first_start_was_told(
    monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    assert after_restart("none") == "none"
    monkeypatch.setenv(launcher, "0")
    assert after_restart("none") == "none"
    assert after_restart("runs/a/checkpoints/step-5") == "runs/a/checkpoints/step-5"
    monkeypatch.setenv(launcher, "1")
    assert after_restart("none") == "auto"
    assert after_restart("runs/a/checkpoints/step-5") == "auto"


def test_a_run_shorter_than_its_checkpoint_is_refused(tiny_run: DiffusionRun) -> None:
    shorter = tiny_run.loop.model_copy(update={"num_steps": 3})
    with pytest.raises(
        ValueError, match=r"checkpoint is of step 4, and loop.num_steps is 3; raise that, resume"
    ):
        train_diffusion(tiny_run.model_copy(update={"loop": shorter}))
