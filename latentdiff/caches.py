"""Where do things lie that are computed once on a machine and used again?"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LATENTDIFF_CACHE"  # a directory; it has the first word


def cache_directory() -> Path:
    """The user's directory of things that may be deleted at any time; it need not exist yet.

    It is `LATENTDIFF_CACHE` where that is set, else `latentdiff` in `XDG_CACHE_HOME`, else
    `~/.cache/latentdiff`.

    Raises:
        ValueError: neither variable is set and the user has no home directory.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if root.is_absolute():  # the XDG specification: a relative path is to be ignored
        return root / "latentdiff"
    try:
        return Path.home() / ".cache" / "latentdiff"
    except RuntimeError:
        raise ValueError(
            f"there is no home directory to keep caches in; set {VARIABLE} to a directory"
        ) from None


def size_bytes(directory: Path) -> int:
    """Bytes of all files below a directory; 0 where there is none."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except FileNotFoundError:  # another process has just deleted it, as it may
                continue
    return total
