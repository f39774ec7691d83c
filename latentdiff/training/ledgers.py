"""What did all ranks leave out, and is it too much? `ledger-RANK.jsonl` and `ledger.json`.

Each rank writes every sample that it skipped to a file of its own. `ledger.json` says it all in
short, up to the last checkpoint:

    {"step": 2000, "delivered": 63994, "skipped": {"crc mismatch": {"count": 6, "example":
     {"shard": "...", "key": "...", "reason": "...", "detail": "...", "position": 5}}}}

`data.max_bad_rate` is judged on the sum over the ranks, so that the same data ends a run, or does
not, on any number of them. Between two such looks a rank ends the run by itself as soon as its own
bad samples are too many for all.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

from data_pipelines.ledger import Account
from data_pipelines.storage import finish
from latentdiff.parallel import World


def ledger_path(out: Path, world: World) -> Path:
    """This rank's ledger in a run directory."""
    return out / f"ledger-{world.rank}.jsonl"


def orphaned_ledgers(out: Path, world: World) -> list[Path]:
    """Ledgers of ranks that an earlier part of the run had, for the first rank to take over."""
    if not world.is_first:
        return []
    found = ((re.fullmatch(r"ledger-(\d+)\.jsonl", path.name), path) for path in out.glob("led*"))
    return sorted(path for match, path in found if match and int(match[1]) >= world.num_ranks)


def sum_accounts(account: Account, world: World, max_bad_rate: float) -> Account:
    """The account of all ranks together; all must call it, with that of the same step.

    Raises:
        TooManyBadSamples: on all ranks.
    """
    total = Account.sum(world.gather(account))
    total.check(max_bad_rate)
    return total


def write_ledger(out: Path, account: Account, step: int) -> None:
    """Write `ledger.json`.

    Args:
        out: run directory.
        account: of all ranks, up to...
        step: ...this optimiser step.
    """
    skipped = {
        reason: {"count": count, "example": asdict(account.examples[reason])}
        for reason, count in sorted(account.counts.items(), key=lambda item: (-item[1], item[0]))
    }
    summary = {"step": step, "delivered": account.num_delivered, "skipped": skipped}
    text = json.dumps(summary, indent=2)  # ASCII: names need not be Unicode
    with open(out / ".ledger.json.part", "wb") as file:
        file.write(text.encode() + b"\n")
        finish(file, out / "ledger.json")
