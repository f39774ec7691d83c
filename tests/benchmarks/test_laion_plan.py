"""Do the figures of docs/laion_scale.md and of the big configs' headers follow from the command?"""

from __future__ import annotations

import io
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.latents import LATENTS, TOKENS, npy
from latentdiff.configfile import shipped_configs


@pytest.fixture(scope="module")
def arithmetic(repository: Path) -> Any:
    """A module of the folder, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        return import_module("laion_arithmetic")


@pytest.fixture(scope="module")
def command(repository: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        return import_module("laion_plan")


@pytest.fixture(scope="module")
def plans(arithmetic: Any) -> Any:
    return arithmetic.make_plans(64)


@pytest.mark.parametrize("size_px", [256, 512])
def test_a_sample_of_stored_latents_is_as_large_as_in_a_tar(arithmetic: Any, size_px: int) -> None:
    side, buffer = size_px // 8, io.BytesIO()
    members = {
        LATENTS: npy(np.zeros((1, 2, 4, side, side), np.float16), "<f2"),
        TOKENS: npy(np.zeros((1, 77), np.int32), "<i4"),
        "txt": b"x" * 60,
        "json": b"x" * 400,
    }
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"000000001.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        assert tar.offset == arithmetic.latent_bytes(size_px)


def test_the_encoder_costs_what_the_table_of_targets_says(arithmetic: Any) -> None:
    assert arithmetic.encoder_flops(256) / 1e9 == pytest.approx(273, rel=0.01)
    assert arithmetic.encoder_flops(512) / 1e9 == pytest.approx(1_117, rel=0.01)


@pytest.mark.slow
def test_headers_of_configs_say_what_the_plan_computes(arithmetic: Any, plans: Any) -> None:
    for name in arithmetic.CONFIGS:
        line = arithmetic.training_line(plans, name)
        assert f"# Time: {line}," in shipped_configs()[name].read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_documents_hold_what_the_command_writes(
    command: Any, arithmetic: Any, plans: Any, repository: Path
) -> None:
    for (page, marker), text in (
        (command.PLAN, command.plan_text(arithmetic.Wanted(), plans)),
        (command.MEMORY, command.memory_text(plans)),
    ):
        stored = (repository / "docs" / page).read_text(encoding="utf-8")
        assert f"<!-- begin: {marker} -->\n\n{text}\n\n<!-- end: {marker} -->" in stored


@pytest.mark.slow
def test_speeds_scale_by_work_and_by_peak(arithmetic: Any, plans: Any) -> None:
    at_256, how = arithmetic.train_speed(plans, "sd15_256", "A100")
    assert (at_256, how) == (137.5, "cited: mosaicml/diffusion")
    on_h100, how = arithmetic.train_speed(plans, "sd15_256", "H100")
    assert on_h100 == pytest.approx(137.5 * 989.4 / 312) and how.endswith("by the GPU's peak")
    at_768, how = arithmetic.train_speed(plans, "sd2_v_768", "A100")
    work = plans["sd15_512"].sample_flops / plans["sd2_v_768"].sample_flops
    assert at_768 == pytest.approx(36.3 * work) and how.endswith("by operations a sample")
    stages = arithmetic.stages(arithmetic.Wanted(gpus=64), plans)
    twice = arithmetic.stages(arithmetic.Wanted(gpus=128), plans)
    for one, other in zip(stages, twice, strict=True):
        assert other.gpu_hours == pytest.approx(one.gpu_hours)  # the same work, in half the time
        assert other.hours == pytest.approx(one.hours / (2 if one.gpu_hours else 1))


def test_only_what_is_between_the_markers_is_written(command: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin: x -->\nold\n<!-- end: x -->\nafter\n")
    command.write_between(page, "x", "| new |")
    expected = "before\n<!-- begin: x -->\n\n| new |\n\n<!-- end: x -->\nafter\n"
    assert page.read_text() == expected
    with pytest.raises(ValueError, match=r"page.md has no line '<!-- begin: y -->' followed by"):
        command.write_between(page, "y", "text")
