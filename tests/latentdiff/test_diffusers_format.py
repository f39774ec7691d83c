"""Is a directory that is no model told apart from one?"""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.diffusers_format import check_model_directory


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model directory .*nowhere not found; give a directory"):
        check_model_directory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model runs/nowhere is no directory here, and the hub"):
        check_model_directory("runs/nowhere")  # looks like a hub id
