"""What did every step train on? `positions.jsonl`: the proof of the data law.

One line a step, of all ranks together, samples in the order of their positions; lists are equally
long, and have an entry for every sample that was delivered:

    {"step": 7, "positions": [...], "ids": [...], "timesteps": [...], "dropped": [...],
     "noise": [...], "data": [...]}

`step` counts from 1, as in `metrics.jsonl`; `ids` are numbers among the samples of all data sets;
`dropped` says whether the caption was replaced by the empty one; `noise` and `data` are the CRC-32
of `micro.Proof`. Whatever was killed, resumed and on however many ranks: the lines are those of the
undisturbed run.

While a run lasts each rank writes `positions-RANK.jsonl`, a line as soon as its step is done. The
first rank appends what is complete to `positions.jsonl` at checkpoints and at the end, when the
ranks' files go. A run that goes on cuts all of that behind its checkpoint.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from data_pipelines.storage import finish
from latentdiff.parallel import World
from latentdiff.training.micro import MicroBatch
from latentdiff.training.reading import merge_lines

_NAME = "positions.jsonl"
_OF_RANKS = "positions-*.jsonl"
_COLUMNS = ("ids", "timesteps", "dropped", "noise", "data")


class Place(NamedTuple):
    """One sample that was trained on.

    Attributes:
        step: optimiser step, from 1.
        position: since the start of the run.
        id: number of the sample.
        timestep: as the schedule gave it.
        dropped: whether its caption was replaced by the empty one.
        noise: CRC-32 of its noise.
        data: CRC-32 of its pixels or stored latents and its caption or stored ids.
    """

    step: int
    position: int
    id: int
    timestep: float
    dropped: bool
    noise: int
    data: int


class PositionLog:
    """Writes this rank's part of the log; all ranks must make, merge and close theirs together.

    Args:
        out: run directory, which all ranks see.
        world: the ranks.
        step: steps that are done already; what the log has of later ones is cut.
    """

    def __init__(self, out: Path, world: World, step: int) -> None:
        self._out, self._world = out, world
        if world.is_first:
            out.mkdir(parents=True, exist_ok=True)
            _take_over(out, step)
        world.barrier()  # a file that is begun before would be taken for the last run's
        self._paths = [out / f"positions-{rank}.jsonl" for rank in range(world.num_ranks)]
        self._file = self._paths[world.rank].open("wb")
        self._offsets = [0] * world.num_ranks  # how far the first rank has read the others' files
        self._waiting: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)

    def add(self, micros: Sequence[MicroBatch]) -> None:
        """Write that a step was done: its micro-batches on this rank, which have their proof."""
        line = _joined(micros[0].step + 1, map(_columns, micros))
        self._file.write(_dump(line))
        self._file.flush()

    def merge(self) -> None:
        """Append the steps that all ranks have done to the one log; to be called at checkpoints."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._world.barrier()
        if self._world.is_first:
            self._merge()

    def close(self) -> None:
        """Merge what is left and remove the ranks' files, at the end of a run."""
        self.merge()
        self._file.close()
        self._world.barrier()
        if self._world.is_first:
            assert not self._waiting, f"steps {sorted(self._waiting)} lack some rank's part"
            for path in self._paths:
                path.unlink()

    def __enter__(self) -> PositionLog:
        """The log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; after an error leave all as it is, as other ranks may not come here."""
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _merge(self) -> None:
        for rank, path in enumerate(self._paths):
            with open(path, "rb") as file:
                file.seek(self._offsets[rank])
                for text in file:
                    if not text.endswith(b"\n"):  # it is being written
                        break
                    self._offsets[rank] += len(text)
                    line = json.loads(text)
                    self._waiting[line["step"]].append(line)
        complete = [s for s, parts in self._waiting.items() if len(parts) == len(self._paths)]
        with open(self._out / _NAME, "ab") as file:
            for step in sorted(complete):
                file.write(_dump(_joined(step, self._waiting.pop(step))))
            file.flush()
            os.fsync(file.fileno())


def read_positions(out: Path) -> list[Place]:
    """What a run directory's logs say was trained on, by position; of all ranks, however it ended.

    Raises:
        ValueError: two files say different things of a position.
    """
    merged = out / _NAME
    files = [*([merged] if merged.exists() else []), *sorted(out.glob(_OF_RANKS))]
    return [Place(*entry) for entry in merge_lines(files, _COLUMNS)]


def _columns(micro: MicroBatch) -> dict[str, Any]:
    """A line's lists, of the places of a micro-batch that are not empty."""
    proof = micro.proof
    assert proof is not None, "the recipe asks for no proof"
    values = (micro.positions, micro.ids, micro.t.tolist(), proof.dropped, proof.noise, proof.data)
    return {
        name: [value for value, valid in zip(column, proof.valid, strict=True) if valid]
        for name, column in zip(("positions", *_COLUMNS), values, strict=True)
    }


def _joined(step: int, parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One line of several, by position."""
    names = ("positions", *_COLUMNS)
    rows = [row for part in parts for row in zip(*(part[name] for name in names), strict=True)]
    rows.sort()
    return {"step": step} | {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _dump(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def _take_over(out: Path, step: int) -> None:
    """Leave one log of the steps up to `step`, and no ranks' files.

    Of these, which hold all steps since their run began, those count that had not been merged.
    """
    target = out / _NAME
    partial = target.with_name(f".{_NAME}.part")
    done = 0
    with open(partial, "wb") as file:
        for text, line in _lines(target):
            if line["step"] <= step:
                done = line["step"]
                file.write(text)
        waiting: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        files = sorted(out.glob(_OF_RANKS))
        for path in files:
            for _, line in _lines(path):
                if done < line["step"] <= step:
                    waiting[line["step"]].append(line)
        for later in sorted(waiting):
            file.write(_dump(_joined(later, waiting[later])))
        finish(file, target)
    for path in files:
        path.unlink()


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a log, as they are and parsed; a kill may have cut the last one."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            yield text, json.loads(text)
