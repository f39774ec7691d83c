"""Do `data select` and `data stats` choose and tell what the library does, in one clear line?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import latentdiff.cli as cli
from data_pipelines import stats_plots
from data_pipelines.selection import load_selection


def test_select(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar, out = str(assets / "train-000000.tar"), tmp_path / "sel.parquet"
    where = "width >= 1 and \"group\" = 'objects'"
    assert cli.run(["data", "select", tar, "--where", where, "--out", str(out)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["0 left out by usable", "0 left out by width >= 1"]
    left = load_selection(out).num_selected.sum()
    assert lines[3] == f"{left} selected of 64 in 1 shards: {out}"
    out.unlink()
    assert cli.run(["data", "select", tar, "--where", "wid > 1", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "no column 'wid'; did you mean width?" in said.err
    assert not out.exists()


def test_stats(
    assets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats_plots, "_save", lambda figure, path: path.touch())  # takes seconds
    tar, chosen = str(assets / "train-000000.tar"), str(tmp_path / "chosen.parquet")
    assert cli.run(["data", "stats", tar]) == 0
    assert "64 usable samples in 1 shards" in capsys.readouterr().out
    where = "\"group\" = 'objects'"
    assert cli.run(["data", "select", tar, "--where", where, "--out", chosen]) == 0
    capsys.readouterr()
    assert cli.run(["data", "stats", chosen, "--json", "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    top = [["objects", found["samples"]]]
    assert found["is_selection"] and found["words"]["group"]["top"] == top
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == found


def test_mistakes_end_in_one_line(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, out = str(assets / "train-000000.tar"), str(tmp_path / "sel.parquet")
    for options, said in (
        (["--where", "width >"], "is not a condition: syntax error"),
        (["--where", "width > 1; copy samples to 'x'"], "is not a condition: syntax error"),
        (["--where", "width > 9999"], "nothing is left: 'width > 9999' removed the last 64"),
        (["--dedup", "md5"], "--dedup must be sha256 or phash; got 'md5'"),
        (["--dedup", "phash", "--max-distance", "40"], "max_distance must be 0 to 16 bits"),
    ):
        assert cli.run(["data", "select", tar, *options, "--out", out]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and said in error
    assert not Path(out).exists()
