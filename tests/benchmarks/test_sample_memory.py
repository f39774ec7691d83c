"""Does the table of sampling's memory have a row for each way, with the phases' bytes?"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from latentdiff.sampling_memory import Phase, SamplingMemory


@pytest.fixture(scope="module")
def command(repository: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        return import_module("sample_memory")


def test_a_row_tells_what_is_held_in_each_phase(command: Any) -> None:
    phases = (
        Phase("text tower", "text", 1_000_000, 2_000_000),
        Phase("step", "unet", 5_000_000, 1_000_000_000),
        Phase("decoder", "vae", 3_000_000, 4_000_000),
    )
    rows = [("all", SamplingMemory(phases, False)), ("few", SamplingMemory(phases, True))]
    assert command.table(rows) == [
        "| way | text tower | step | decoder | decoder again | peak |",
        "|---|---|---|---|---|---|",
        "| all | 11 | 1,009 | 13 | - | 1,009 |",
        "| few | 3 | 1,005 | 7 | - | 1,005 |",
    ]


def test_the_command_prints_a_row_for_each_way(
    command: Any, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--model", str(repository / "latentdiff" / "pretrained"), "--size", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert "64x64 px, float16" in lines[0]
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[6:]]
    assert names == list(command.ways(64))
