"""Which samples were not delivered, and why? Counted by reason; too many stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO, get_args

Reason = Literal[
    "missing shard",  # the tar is not there
    "network",  # it could not be read in time
    "cut",  # it ends inside the sample
    "broken header",  # a member's header is damaged
    "crc mismatch",  # a payload differs from what was indexed
    "duplicate key",
    "no image",
    "no caption",
    "bad image",
    "format not allowed",
    "too large",
    "bad caption",
    "bad json",
    "empty caption",
    "bad latents",
    "aspect ratio",  # no bucket fits within max_crop
]
REASONS: tuple[str, ...] = get_args(Reason)
LEFT_OUT = ("aspect ratio", "empty caption")  # as the config asks; nothing is wrong with them
_FEW = 1_000  # below this many draws the share of bad ones says little


class BadSample(ValueError):
    """A sample that cannot be used: says what, names shard and key, and carries the reason.

    Attributes:
        reason: the ledger's account that it is counted in.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[Reason, str]]:
        return type(self), (self.reason, str(self))


class TooManyBadSamples(ValueError):
    """More samples are bad than the run allows."""


@dataclass(frozen=True, slots=True)
class Skip:
    """One sample that was not delivered.

    Attributes:
        shard: path or URL of its tar.
        key: of the sample.
        reason: the account.
        detail: what was wrong, in words.
        position: of the draw since the start of the run; of a picture that no bucket fits, the
            place where its chapter begins.
    """

    shard: str
    key: str
    reason: Reason
    detail: str
    position: int


class Ledger:
    """Counts what was delivered and what was not.

    Args:
        max_bad_rate: share of bad draws above which `record` raises; what the config leaves out
            (`LEFT_OUT`) is not bad. It is taken of a thousand draws at least, so that one bad
            picture of the first three stops nothing.
        path: a JSON-lines file that gets every skip; null: none. What an earlier run wrote there
            is taken over, as far as `cursor`.
        cursor: places of the run that are done already, on all ranks.
        num_ranks: that share them.
        num_empty: of those places, the ones that the plan left empty; besides them are those of
            samples without a bucket before...
        chapter: ...this place, where the plan's chapter begins.
    """

    def __init__(
        self,
        max_bad_rate: float,
        path: Path | None = None,
        cursor: int = 0,
        num_ranks: int = 1,
        num_empty: int = 0,
        chapter: int = 0,
    ) -> None:
        self.max_bad_rate = max_bad_rate
        self.path = path
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, Skip] = {}
        num_lost = 0
        if path is not None:
            kept = [skip for skip in _read(path) if skip.position < cursor]
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.part")
            with _open(partial, "w") as file:
                file.writelines(map(_line, kept))
            os.replace(partial, path)
            for skip in kept:
                self._count(skip)
                num_lost += skip.reason != "aspect ratio" or skip.position < chapter
        self.num_delivered = max((cursor - num_empty) // num_ranks - num_lost, 0)

    @property
    def num_skipped(self) -> int:
        """Samples that were not delivered."""
        return self.counts.total()

    @property
    def num_bad(self) -> int:
        """Those of them that something is wrong with."""
        return self.num_skipped - sum(self.counts[reason] for reason in LEFT_OUT)

    def record(self, num_delivered: int, skips: Iterable[Skip] = ()) -> None:
        """Count a batch.

        Raises:
            TooManyBadSamples: the share of bad draws is above the limit.
        """
        self.num_delivered += num_delivered
        skips = list(skips)
        if not skips:
            return
        for skip in skips:
            self._count(skip)
        if self.path is not None:
            with _open(self.path, "a") as file:
                file.write("".join(map(_line, skips)))
        draws = self.num_delivered + self.num_bad
        if self.num_bad > self.max_bad_rate * max(draws, _FEW):
            bad = Counter({r: count for r, count in self.counts.items() if r not in LEFT_OUT})
            raise TooManyBadSamples(
                f"{self.num_bad} of {draws} samples cannot be used, more than max_bad_rate "
                f"{self.max_bad_rate:g} allows: {self._top(bad)}; mend the shards (latentdiff data "
                "verify names each fault) or raise data.max_bad_rate"
            )

    def summary(self) -> str:
        """The top reasons with their counts and an example of each."""
        return self._top(self.counts)

    def _top(self, counts: Counter[str]) -> str:
        return "; ".join(
            f"{count} {reason} (such as {self.examples[reason].detail})"
            for reason, count in counts.most_common(5)
        )

    def _count(self, skip: Skip) -> None:
        self.counts[skip.reason] += 1
        self.examples.setdefault(skip.reason, skip)


def check_index(bad: Mapping[str, int], num_usable: int, max_bad_rate: float) -> None:
    """Refuse data of which the index says that too much cannot be used.

    Args:
        bad: samples by reason.
        num_usable: the others.
        max_bad_rate: share of bad ones that is allowed.

    Raises:
        TooManyBadSamples: there are more.
    """
    num_bad = sum(bad.values())
    if num_bad > max_bad_rate * max(num_bad + num_usable, _FEW):
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in Counter(dict(bad)).most_common(5)
        )
        raise TooManyBadSamples(
            f"{num_bad} of {num_bad + num_usable} samples in the index cannot be used, more than "
            f"max_bad_rate {max_bad_rate:g} allows: {reasons}; mend the shards (latentdiff data "
            "verify names each fault), leave them out, or raise data.max_bad_rate"
        )


def _line(skip: Skip) -> str:
    return json.dumps(asdict(skip), ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Skip]:
    """The skips in a file; its last line may have been cut by the end of the run."""
    skips: list[Skip] = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:  # splitlines would cut at U+2028 and the like, which names may hold
                try:
                    skips.append(Skip(**json.loads(line)))
                except (ValueError, TypeError):
                    continue
    return skips


def _open(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """For writing; names of files that are no Unicode are written all the same."""
    return open(path, mode, encoding="utf-8", errors="surrogatepass", newline="\n")
