"""Are packages fetched with npm, checked, and read as data, or refused in one line?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipelines.emoji_packages import (
    DIGESTS,
    NOTO,
    STYLES,
    TWEMOJI,
    find_package,
    packages_for,
    read_json,
    tarball_name,
)


def fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_packages_are_fetched_with_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source.tgz"
    source.write_bytes(b"as the registry has it")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    fake_npm(tmp_path / "good", f'[ "$2" = "{NOTO}" ] && cp "{source}" "$4/"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'good'}:/usr/bin:/bin")
    path = find_package(NOTO, tmp_path / "packages", fetch=True, digest=digest)
    assert path.read_bytes() == source.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [tarball_name(NOTO)]

    fake_npm(tmp_path / "bad", "echo 'npm error network down' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bad'}:/usr/bin:/bin")
    with pytest.raises(ValueError, match=r"`npm pack @iconify.*` failed: npm error network down"):
        find_package(TWEMOJI, tmp_path / "packages", fetch=True, digest="")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"npm is needed to fetch .* install Node"):
        find_package(TWEMOJI, tmp_path / "packages", fetch=True, digest="")


def test_a_missing_package_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is missing; run `npm pack .*/twemoji@1\.2\.5`"):
        find_package(TWEMOJI, tmp_path, fetch=False, digest="")


def test_another_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / tarball_name(NOTO)
    path.write_bytes(b"another")
    found = hashlib.sha256(b"another").hexdigest()
    message = rf"noto-1\.2\.9\.tgz has SHA-256 {found}, expected {DIGESTS[NOTO]}; delete it"
    with pytest.raises(ValueError, match=message):
        find_package(NOTO, tmp_path, fetch=True, digest=DIGESTS[NOTO])


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tgz"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"x\.tgz cannot be read as an npm package"):
        read_json(path, "icons.json")


def test_every_package_is_pinned() -> None:
    assert packages_for(list(STYLES.values())) == list(DIGESTS)
    assert all(len(digest) == 64 for digest in DIGESTS.values())
