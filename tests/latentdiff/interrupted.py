"""How is a run stopped in the middle, for tests of what it does when it goes on?"""

from __future__ import annotations

from typing import Any

import pytest

from latentdiff.config import DiffusionRun
from latentdiff.training import diffusion


def interrupt_in_the_fourth_step(run: DiffusionRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train three steps of a run; Ctrl-C comes in the next one, after its gradients."""
    lr_at = diffusion.lr_at

    def fail(step: int, *rest: Any) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return lr_at(step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(diffusion, "lr_at", fail)
        diffusion.train_diffusion(run)
