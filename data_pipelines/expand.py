"""Which tars do paths and URLs with braces, globs and folders stand for?"""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Sequence

from data_pipelines.storage import Storage, is_local, local_path

_MANY_NAMES = 256  # in one folder: from here on it is listed


def expand_shards(patterns: str | Sequence[str], storage: Storage | None = None) -> list[str]:
    """Turn shard names with `{000..003}` braces and `*` globs into the list of files.

    Args:
        patterns: one pattern or several, paths or URLs; a folder stands for the tars in it, a URL
            that ends in `/` too.
        storage: lists remote folders; null: one with default settings. Braces are expanded without
            a look at the store.

    Returns:
        The paths and URLs, sorted within a pattern, each once.

    Raises:
        ValueError: a pattern matches nothing or cannot be read, or there is no pattern.
        StorageError: a remote folder could not be listed.
    """
    import braceexpand

    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(
            "no shards named; give at least one path, such as data/train-{000000..000003}.tar"
        )
    found: dict[str, None] = {}
    for pattern in patterns:
        local = is_local(pattern)
        path = os.path.expanduser(local_path(pattern)) if local else pattern
        try:
            exists = local and os.path.exists(path)
            names = [path] if exists else list(braceexpand.braceexpand(path))
        except ValueError:
            raise ValueError(
                f"unbalanced braces in {pattern!r}; write them as in train-{{000000..000003}}.tar"
            ) from None
        files = _files(names) if local and len(names) > _MANY_NAMES else set()
        for name in names:
            if name in files:
                found[name] = None
                continue
            matches = _local_matches(name) if local else _remote_matches(name, storage)
            if not matches:
                raise ValueError(
                    f"no shard matches {name!r}; expected a tar, a folder of tars, or a glob that "
                    "finds some (of http:// write braces: few servers list their files)"
                )
            found.update(dict.fromkeys(matches))
    return list(found)


def _files(names: Sequence[str]) -> set[str]:
    """The files in the folders of many names: to look at each takes longer than to list them."""
    found: set[str] = set()
    for folder in {name[: name.rfind("/") + 1] for name in names}:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            found.update(folder + entry.name for entry in entries if entry.is_file())
    return found


def _local_matches(name: str) -> list[str]:
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        return sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    return sorted(path for path in glob.glob(name) if os.path.isfile(path))


def _remote_matches(name: str, storage: Storage | None) -> list[str]:
    scheme, _, rest = name.partition("://")
    path = rest.partition("/")[2]
    if scheme in ("http", "https"):
        path = path.partition("?")[0]  # the query; no glob there
    if not path or path.endswith("/"):
        return (storage or Storage()).glob(name.rstrip("/") + "/*.tar")
    if re.search(r"[*\[]" if scheme in ("http", "https") else r"[*?\[]", path):
        return (storage or Storage()).glob(name)
    return [name]
