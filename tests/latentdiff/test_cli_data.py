"""Do `latentdiff data make` and `show` work from the command line, and fail in one line?"""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from latentdiff.cli import run

ASSETS = Path(__file__).parent.parent / "assets"


def test_make_then_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "set.csv").write_text("file,text\na.png,a red square\nb.png,\n", encoding="utf-8")
    out = tmp_path / "shards"
    make = ["data", "make", str(tmp_path / "set.csv"), "--out", str(out), "--image-column", "file"]
    make += ["--caption-column", "text"]
    assert run(make) == 2
    assert "set.csv, line 3: no caption in 'text'" in capsys.readouterr().err
    assert not out.exists()
    assert run([*make, "--skip-bad"]) == 0
    told = capsys.readouterr()
    assert f"wrote 1 pairs in 1 shards to {out}, 1 skipped" in told.out
    assert "skipped: " in told.err and "line 3: no caption" in told.err

    sheet = tmp_path / "sheet.png"
    assert run(["data", "show", str(out), str(ASSETS / "val-*.tar"), "--out", str(sheet)]) == 0
    assert capsys.readouterr().out == f"{sheet}: 31 samples\n"
    assert Image.open(sheet).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere-*.tar"], "no shard matches 'nowhere-*.tar'"),
        (["make", "nowhere", "--out", "out"], "nowhere is missing; expected a folder of images"),
        (
            ["emoji", "--out", "out", "--style", "nato"],
            "unknown style nato; known styles: fluent-3d",
        ),
        (["emoji", "--out", "out", "--packages", "nowhere"], "is missing; run `npm pack "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["data", *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["emoji", "make", "show"])
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", command, "--help"]) == 0
    assert f"Example: latentdiff data {command} " in " ".join(capsys.readouterr().out.split())
