"""Which npm packages make the practice set, and how are they fetched, checked and read?"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EMOJIBASE = "emojibase-data@17.0.0"
CLDR = "cldr-annotations-full@48.2.0"
CLDR_DERIVED = "cldr-annotations-derived-full@48.2.0"
FLAT = "@iconify-json/fluent-emoji-flat@1.2.6"
NOTO = "@iconify-json/noto@1.2.9"
TWEMOJI = "@iconify-json/twemoji@1.2.5"
_3D = "@lobehub/fluent-emoji-3d@1.1.0"
_COLOR = "@iconify-json/fluent-emoji@1.2.7"
_CONTRAST = "@iconify-json/fluent-emoji-high-contrast@1.2.6"
_BLOB = "@iconify-json/noto-v1@1.2.5"
_FX = "@iconify-json/fxemoji@1.2.2"
_ONE = "@iconify-json/emojione@1.2.3"

# SHA-256 of what `npm pack NAME@VERSION` fetches.
DIGESTS: Mapping[str, str] = {
    EMOJIBASE: "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    CLDR: "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    CLDR_DERIVED: "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    FLAT: "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    NOTO: "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    TWEMOJI: "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    _3D: "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    _COLOR: "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    _CONTRAST: "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    _BLOB: "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    _FX: "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    _ONE: "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
}


@dataclass(frozen=True)
class Style:
    """One way of drawing emoji, and the package that holds it.

    Attributes:
        name: as in sample keys.
        words: as in captions.
        package: npm name@version.
        license: SPDX identifier.
        attribution: who drew it.
        match: how code points find icons: `files` are named by code point, `chars` are listed in
            the chars.json of `charmap`, `names` are compared with the names of the emoji.
        charmap: the package whose chars.json is used.
    """

    name: str
    words: str
    package: str
    license: str
    attribution: str
    match: Literal["files", "chars", "names"]
    charmap: str = ""


_MICROSOFT = (
    "Fluent Emoji, copyright Microsoft Corporation, https://github.com/microsoft/fluentui-emoji"
)
_LOBEHUB = f"{_MICROSOFT}; packaged by LobeHub, https://github.com/lobehub/fluent-emoji"
_GOOGLE = "Noto Emoji, copyright Google, https://github.com/googlefonts/noto-emoji"
_MOZILLA = "FxEmojis, copyright Mozilla Foundation, https://github.com/mozilla/fxemoji"
_TWITTER = (
    "Twemoji, copyright Twitter, Inc and other contributors, https://github.com/jdecked/twemoji"
)
_EMOJIONE = (
    "EmojiOne 2 (EmojiTwo), copyright Emoji One and contributors, "
    "https://github.com/EmojiTwo/emojitwo"
)
_ROWS: tuple[tuple[str, str, str, str, str, Literal["files", "chars", "names"], str], ...] = (
    # name, words, package, licence, attribution, match, charmap
    ("fluent-3d", "fluent 3d", _3D, "MIT", _LOBEHUB, "files", ""),
    ("fluent-color", "fluent color", _COLOR, "MIT", _MICROSOFT, "chars", FLAT),
    ("fluent-flat", "fluent flat", FLAT, "MIT", _MICROSOFT, "chars", FLAT),
    (
        "fluent-highcontrast",
        "fluent high contrast",
        _CONTRAST,
        "MIT",
        _MICROSOFT,
        "chars",
        _CONTRAST,
    ),
    ("noto", "noto", NOTO, "Apache-2.0", _GOOGLE, "chars", NOTO),
    ("noto-blob", "noto blob", _BLOB, "Apache-2.0", f"{_GOOGLE} (version 1)", "names", ""),
    ("fxemoji", "fxemoji", _FX, "Apache-2.0", _MOZILLA, "names", ""),
    ("twemoji", "twemoji", TWEMOJI, "CC-BY-4.0", _TWITTER, "chars", TWEMOJI),
    ("emojione2", "emojione", _ONE, "CC-BY-4.0", _EMOJIONE, "names", ""),
)
STYLES: Mapping[str, Style] = {row[0]: Style(*row) for row in _ROWS}


def packages_for(styles: list[Style]) -> list[str]:
    """The packages that a build of these styles reads, in a fixed order."""
    wanted = {EMOJIBASE, CLDR, CLDR_DERIVED}
    for style in styles:
        wanted |= {style.package, style.charmap} - {""}
        if style.match == "names":
            wanted |= {FLAT, NOTO, TWEMOJI}
    return [package for package in DIGESTS if package in wanted]


def tarball_name(package: str) -> str:
    """`@scope/name@1.0` -> `scope-name-1.0.tgz`, as npm names it."""
    name, _, version = package.rpartition("@")
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def find_package(package: str, folder: Path, fetch: bool, digest: str) -> Path:
    """Return the checked tarball of a package in `folder`, fetching it with npm if asked to.

    Raises:
        ValueError: it is missing, npm is missing or failed, or its SHA-256 is another.
    """
    path = folder / tarball_name(package)
    if not path.is_file():
        if not fetch:
            raise ValueError(
                f"{path} is missing; run `npm pack {package}` in {folder}, or leave out --packages"
            )
        _npm_pack(package, path)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {digest}; delete it and fetch {package} again"
        )
    return path


def _npm_pack(package: str, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is needed to fetch {package} and was not found; install Node.js, or put the "
            f"output of `npm pack` in a folder and name it with --packages"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".npm-") as folder:
        command = [
            npm,
            "pack",
            package,
            "--pack-destination",
            folder,
            "--silent",
            "--ignore-scripts",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise ValueError(
                f"`npm pack {package}` failed: {reason[-1] if reason else 'no output'}; "
                f"check the network, or name a folder of packages with --packages"
            )
        os.replace(packed[0], path)


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name inside the package, bytes) of the wanted files; nothing is unpacked to the disk.

    Raises:
        ValueError: the file is not a gzipped tar.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]  # npm puts everything below package/
                if member.isfile() and wanted(name):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    yield name, stream.read()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an npm package ({error}); fetch it again"
        ) from error


def list_members(path: Path) -> list[str]:
    """The names of the files in a package."""
    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    list(read_members(path, note))
    return names


def read_json(path: Path, *names: str) -> dict[str, Any]:
    """Parse JSON files of a package: {name: value}; a missing one is a ValueError."""
    found = {name: json.loads(data) for name, data in read_members(path, set(names).__contains__)}
    if missing := set(names) - set(found):
        raise ValueError(
            f"{path} has no {', '.join(sorted(missing))}; expected an npm package with it"
        )
    return found


def normalize(codepoints: str) -> str:
    """Code points as they are in keys: lower case, four digits, without variation selectors.

    `0031-FE0F-20E3` and `31-fe0f-20e3` give `0031-20e3`.
    """
    parts = codepoints.lower().replace("_", "-").split("-")
    return "-".join(part.zfill(4) for part in parts if part not in ("fe0f", "fe0e"))
