"""Where are caches kept, whatever the environment says?"""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.caches import cache_directory, size_bytes


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTDIFF_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")


def test_the_home_directory_is_the_last_resort() -> None:
    assert cache_directory() == Path("/home/someone/.cache/latentdiff")


def test_xdg_comes_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_directory() == Path("/var/caches/latentdiff")


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_xdg_that_is_no_absolute_path_is_ignored(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_directory() == Path("/home/someone/.cache/latentdiff")


def test_our_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    monkeypatch.setenv("LATENTDIFF_CACHE", "~/fast")
    assert cache_directory() == Path("/home/someone/fast")


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match=r"no home directory.*set LATENTDIFF_CACHE to a directory"):
        cache_directory()


def test_size_counts_files_below_and_follows_no_link(tmp_path: Path) -> None:
    assert size_bytes(tmp_path / "missing") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "one").write_bytes(bytes(1000))
    (tmp_path / "a" / "b" / "two").write_bytes(bytes(234))
    assert size_bytes(tmp_path) == 1234
    (tmp_path / "link").symlink_to("one")
    assert 1234 < size_bytes(tmp_path) < 1300, "a link is as long as its name"
