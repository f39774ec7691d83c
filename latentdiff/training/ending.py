"""How did a run end, and how do a scheduler and the other ranks learn of it?

torchrun's own exit code is 1 whatever its workers' were, so a run leaves `exit.json` in its
directory.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from latentdiff.exitcodes import INTERRUPTED, USERS_MISTAKE, RunEnded


@dataclass(frozen=True)
class Ending:
    """The end of a run, as one rank tells it.

    Attributes:
        code: exit code.
        message: why, for the user.
        rank: who says so.
        step: where that rank was.
        stopped: (place, pid) of ranks that do not move: who finds one on its own machine ends it.
    """

    code: int
    message: str
    rank: int
    step: int
    stopped: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> str:
        """For the other ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Ending:
        """What `to_json` wrote."""
        fields = json.loads(text)
        stopped = tuple((place, pid) for place, pid in fields.pop("stopped"))
        return cls(**fields, stopped=stopped)


def code_of(error: BaseException) -> int:
    """The exit code that the command line gives an error."""
    match error:
        case RunEnded():
            return error.code
        case ValueError() | OSError() | FloatingPointError():
            return USERS_MISTAKE
        case KeyboardInterrupt():
            return INTERRUPTED
        case SystemExit(code=int(code)):
            return code
        case _:
            return 1


def write_ending(path: Path, ending: Ending) -> None:
    """Leave `exit.json`; a directory that cannot be written to keeps nobody from ending."""
    values = {
        "code": ending.code,
        "message": ending.message,
        "step": ending.step,
        "rank": ending.rank,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
