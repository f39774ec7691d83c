"""Which samples were not delivered, and why? Counted by reason; too many stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class Account:
    """What was delivered and what was not, up to some step, by one rank or by several.

    Attributes:
        num_delivered: samples; of one rank in a resumed run, what falls to it (see `Ledger`).
        counts: samples that were not, by reason.
        examples: the first of each reason.
    """

    num_delivered: int
    counts: Mapping[str, int]
    examples: Mapping[str, Skip]

    @property
    def num_skipped(self) -> int:
        """Samples that were not delivered."""
        return sum(self.counts.values())

    @property
    def num_bad(self) -> int:
        """Those of them that something is wrong with."""
        return self.num_skipped - sum(self.counts.get(reason, 0) for reason in LEFT_OUT)

    @staticmethod
    def sum(accounts: Iterable[Account]) -> Account:
        """That of several ranks together; of their examples, the one with the first position."""
        num_delivered, counts = 0, Counter[str]()
        examples: dict[str, Skip] = {}
        for account in accounts:
            num_delivered += account.num_delivered
            counts.update(account.counts)
            for reason, skip in account.examples.items():
                if reason not in examples or skip.position < examples[reason].position:
                    examples[reason] = skip
        return Account(num_delivered, dict(counts), examples)

    def check(self, max_bad_rate: float, num_ranks: int = 1) -> None:
        """Refuse to go on with too many bad samples.

        Args:
            max_bad_rate: share of bad draws that is allowed, of a thousand draws at least, so that
                one bad picture of the first three stops nothing.
            num_ranks: ranks of which this is the account of one. All of them together make the
                rate, so one rank alone refuses no more than what is too much for all, even if the
                others had no bad sample.

        Raises:
            TooManyBadSamples: there are more.
        """
        draws = (self.num_delivered + self.num_bad) * num_ranks
        if self.num_bad > max_bad_rate * max(draws, _FEW):
            bad = {r: count for r, count in self.counts.items() if r not in LEFT_OUT}
            raise TooManyBadSamples(
                f"{self.num_bad} of {draws} samples cannot be used, more than max_bad_rate "
                f"{max_bad_rate:g} allows: {self._top(bad)}; mend the shards (latentdiff data "
                "verify names each fault) or raise data.max_bad_rate"
            )

    def summary(self) -> str:
        """The top reasons with their counts and an example of each."""
        return self._top(self.counts)

    def _top(self, counts: Mapping[str, int]) -> str:
        return "; ".join(
            f"{count} {reason} (such as {self.examples[reason].detail})"
            for reason, count in Counter(dict(counts)).most_common(5)
        )


class Ledger:
    """Counts what was delivered and what was not.

    In a run of several ranks each has its ledger and its file. When it goes on with fewer, the
    files of the ranks that are no more are taken over by the first; with more, new ones begin.

    Args:
        max_bad_rate: share of bad draws above which `record` raises; what the config leaves out
            (`LEFT_OUT`) is not bad. See `Account.check`.
        path: a JSON-lines file that gets every skip; null: none. What an earlier run wrote there
            is taken over, as far as `cursor`.
        cursor: places of the run that are done already, on all ranks.
        num_ranks: that share them.
        num_empty: of those places, the ones that the plan left empty; besides them are those of
            samples without a bucket before...
        chapter: ...this place, where the plan's chapter begins.
        rank: whose ledger it is. Of the places that are done already it takes an even share, less
            what its file says was skipped: what each rank really had is of no use once they are
            others, and the sum over the ranks is exact.
        orphans: files of ranks that are no more; they are merged into `path` and removed.
    """

    def __init__(
        self,
        max_bad_rate: float,
        path: Path | None = None,
        cursor: int = 0,
        num_ranks: int = 1,
        num_empty: int = 0,
        chapter: int = 0,
        *,
        rank: int = 0,
        orphans: Sequence[Path] = (),
    ) -> None:
        self.max_bad_rate = max_bad_rate
        self.path = path
        self.num_ranks = num_ranks
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, Skip] = {}
        num_lost = 0
        if path is not None:
            for skip in _take_over(path, orphans, cursor):
                self._count(skip)
                num_lost += skip.reason != "aspect ratio" or skip.position < chapter
        places = cursor - num_empty
        share = places * (rank + 1) // num_ranks - places * rank // num_ranks
        self.num_delivered = share - num_lost

    @property
    def num_skipped(self) -> int:
        """Samples that were not delivered."""
        return self.counts.total()

    @property
    def num_bad(self) -> int:
        """Those of them that something is wrong with."""
        return self.account().num_bad

    def account(self) -> Account:
        """What it says now; later records do not change that."""
        return Account(self.num_delivered, dict(self.counts), dict(self.examples))

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
        self.account().check(self.max_bad_rate, self.num_ranks)

    def summary(self) -> str:
        """The top reasons with their counts and an example of each."""
        return self.account().summary()

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


def _take_over(path: Path, orphans: Sequence[Path], cursor: int) -> list[Skip]:
    """The skips before `cursor` in some files, which `path` holds from then on, and it alone.

    A run that is killed here may leave an orphan whose skips are in `path` already; no skip is in
    two files otherwise.
    """
    kept = [skip for skip in _read(path) if skip.position < cursor]
    if orphans:
        found = Counter(kept)
        for orphan in orphans:
            found |= Counter(skip for skip in _read(orphan) if skip.position < cursor)
        kept = sorted(found.elements(), key=lambda skip: (skip.position, skip.shard, skip.key))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    with _open(partial, "w") as file:
        file.writelines(map(_line, kept))
        file.flush()
        os.fsync(file.fileno())  # or a crash of the machine could leave neither
    os.replace(partial, path)
    for orphan in orphans:
        orphan.unlink(missing_ok=True)
    return kept


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
