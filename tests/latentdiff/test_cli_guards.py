"""Do the data commands refuse what would lose data or time, in one line?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import latentdiff.cli as cli
from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from data_pipelines.sidecar import sidecar_name


@pytest.fixture
def tars(assets: Path, tmp_path: Path) -> list[Path]:
    copies = [Path(shutil.copy(tar, tmp_path)) for tar in sorted(assets.glob("train-*.tar"))]
    index_shards([str(copy) for copy in copies], workers=1)
    return copies


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", ["select", "show"])
def test_no_tar_is_written_over(
    tars: list[Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    before = tars[1].read_bytes()
    code, _, err = run(capsys, "data", command, tars[0], "--out", tars[1])
    assert code == 2 and err.startswith("error: ") and str(tars[1]) in err
    assert tars[1].read_bytes() == before


def test_a_selection_is_found_from_any_folder(
    tars: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    where = ("--where", "style = 'fluent-3d'")
    code, *_ = run(capsys, "data", "select", "train-*.tar", *where, "--out", "sel.parquet")
    assert code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = DataConfig(select="../sel.parquet", size_px=16)
    assert next(iter(Loader(config, 0, 8))).valid.all()


def test_figures_of_a_stale_selection_are_not_shown(
    tars: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sel = tmp_path / "sel.parquet"
    assert run(capsys, "data", "select", tars[0], "--where", "width > 1", "--out", sel)[0] == 0
    assert run(capsys, "data", "stats", sel)[0] == 0
    shutil.copy(tars[1], tars[0])
    index_shards([str(tars[0])], workers=1)
    code, _, err = run(capsys, "data", "stats", sel)
    assert code == 2 and "has changed since the selection was made" in err


def test_a_tar_without_samples_is_told_every_time(
    tars: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tars[0].write_bytes(b"<html>no tar</html>" * 40)
    for _ in range(2):
        code, out, err = run(capsys, "data", "index", *tars)
        assert code == 1
        assert f"{tars[0]}: no sample in it; see `latentdiff data verify`" in err
        assert "107 usable samples in 3 tars" in out


def test_a_cut_sidecar_is_made_again(tars: list[Path], capsys: Any) -> None:
    sidecar = tars[0].with_name(sidecar_name(tars[0].name))
    whole = sidecar.read_bytes()
    sidecar.write_bytes(whole[: len(whole) // 2])
    assert run(capsys, "data", "index", *tars)[0] == 0
    code, out, _ = run(capsys, "data", "verify", *tars)
    assert code == 0 and "(3 compared with their index): 0 faults" in out


def test_an_index_folder_that_cannot_be_made_is_told_before_reading(
    tars: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    code, out, err = run(capsys, "data", "index", *tars, "--out", tmp_path / "file" / "index")
    assert code == 2 and out == "" and "error: " in err
    assert "usable samples" not in err and str(tmp_path / "file") in err


def test_what_works_slowly_is_said(tars: list[Path]) -> None:
    config = DataConfig(shards=(str(tars[0]),), where="width > 1", size_px=16)
    with pytest.warns(UserWarning, match="each of 2 ranks runs data.where over the whole index"):
        Loader(config, 0, 8, num_ranks=2)


def test_a_step_before_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("data", "read", "--config", "ldm_emoji", "--from-step", "-1")
    code, _, err = run(capsys, *command)
    assert code == 2 and err.startswith("error: ") and "-1" in err
