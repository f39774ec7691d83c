"""How does a checkpoint become a model, beside the run that saved it, on the CPU?

Averages of lengths that the run does not keep are put together from those of its checkpoints
(post-hoc EMA: `latentdiff.posthoc`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from latentdiff.config import DiffusionRun
from latentdiff.configerrors import explain
from latentdiff.pairing import tokenizer_hash
from latentdiff.parallel import World
from latentdiff.pipeline import Pipeline
from latentdiff.posthoc import combine, posthoc_shares
from latentdiff.training.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from latentdiff.training.commit import Keep
from latentdiff.training.inspecting import find_checkpoints
from latentdiff.training.manifest import Record, newest_first, read_record
from latentdiff.training.trainee import (
    EXPORT_DTYPES,
    VOCABULARY,
    fill,
    first_model,
    learns_vocabulary,
    with_vocabulary,
)

_FAR = 0.1  # a fit that is farther off is another average: see posthoc_shares

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Exported:
    """A model that was written.

    Attributes:
        directory: in diffusers' layout.
        step: optimiser steps that it was trained for.
        told: which weights it has, in words.
        error: of a post-hoc average, as `posthoc_shares` has it; 0 for weights that were kept.
    """

    directory: Path
    step: int
    told: str
    error: float = 0.0


def export_checkpoint(
    place: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    length: float | None = None,
    sigma_rel: float | None = None,
    dtype: Literal["fp32", "fp16"] | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write the model of a diffusion run's checkpoint, however it was sharded; the run may go on.

    Args:
        place: a run's directory (its newest valid checkpoint is taken), or one checkpoint's.
        out: the model's directory.
        step: of the checkpoint, where `place` is a run.
        weights: averaged, or as the last step left them.
        length: of the average: one that the run keeps; None for its first.
        sigma_rel: post-hoc average of any length, of all checkpoints of the run up to this one.
        dtype: of the weights; None for the run's `export_dtype`.
        progress: hears of (stage, done, total).

    Raises:
        ValueError: no such checkpoint, average or vocabulary, a damaged checkpoint, one of another
            kind of run, or averages that do not add up to the one that is wanted.
        OSError: something cannot be read or written.
    """
    _check_choices(weights, length, sigma_rel)
    report = progress or (lambda *_: None)
    checkpoint = _choose(place, step)
    config = _config_of(checkpoint.record)
    _check_out(out, checkpoint)
    if sigma_rel is not None and str(sigma_rel) not in _lengths(config):
        fitted, told, error = _posthoc(checkpoint, config, sigma_rel, report)
    else:
        group, told = _kept(config, weights, sigma_rel if length is None else length)
        tensors = _Tensors(checkpoint, group)
        fitted, error = iter(tensors.items()), 0.0
    model = _model(config, checkpoint)
    total = len(checkpoint.shards.group("model"))
    fill(model, config, _counted(fitted, total, report))
    model.save(out, EXPORT_DTYPES[dtype or config.export_dtype])
    return Exported(out, checkpoint.step, f"step {checkpoint.step}: {told}", error)


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint whose names begin alike; each is read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, start: str) -> None:
        self._shards = checkpoint.shards
        self._names = self._shards.group(start)

    def __getitem__(self, name: str) -> Tensor:
        return self._shards.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_choices(weights: str, length: float | None, sigma_rel: float | None) -> None:
    if length is not None and sigma_rel is not None:
        raise ValueError(
            "length names an average that the run keeps, sigma_rel one that is put together; give "
            "one of the two"
        )
    if weights == "raw" and (length is not None or sigma_rel is not None):
        raise ValueError("length and sigma_rel are of averages; leave them out, or weights raw")


def _choose(place: Path, step: int | None) -> Checkpoint:
    """The checkpoint that is meant, after all of its files have been looked at."""
    found = find_checkpoints(place)
    is_one = [path.resolve() for path in found] == [place.resolve()]
    if is_one and step is not None:
        raise ValueError(f"{place} is one checkpoint; leave out the step, or give the run")
    if step is not None:
        named = [path for path in found if path.name.endswith(f"step-{step}")]
        if not named:
            steps = sorted({int(path.name.rpartition("-")[2]) for path in found})
            raise ValueError(
                f"{place} has no checkpoint of step {step}; there are {_listed(steps)}; loop."
                "checkpoint_every says when one is saved, loop.keep_every which stay"
            )
        checkpoint = read_checkpoint(named[0])
    elif is_one:
        checkpoint = read_checkpoint(place)
    else:
        world = World(torch.device("cpu"))
        newest = Checkpoints(found[0].parent, world, Keep(1)).find("auto")
        if newest is None:
            raise ValueError(f"{place} has no checkpoint any more; another process removed it")
        checkpoint = newest
    if not checkpoint.record.finite:
        raise ValueError(
            f"{checkpoint.directory} has values that are not finite; choose another step"
        )
    return checkpoint


def _config_of(record: Record) -> DiffusionRun:
    values = record.state.get("config")
    if not isinstance(values, dict):
        raise ValueError(
            f"{record.directory} does not say what config it was trained with; resume the run with "
            "this version of latentdiff, which writes it into the next checkpoint"
        )
    if values.get("kind") != "diffusion":
        raise ValueError(
            f"{record.directory} is of a run of kind {values.get('kind')}; only those of kind "
            "diffusion become models; other runs export theirs at their end"
        )
    try:
        return DiffusionRun.model_validate(values)
    except ValidationError as error:
        raise ValueError(
            "\n".join(
                [
                    f"{record.directory} was saved by another version of latentdiff, whose config "
                    "this one does not read; use that version",
                    *explain(error, DiffusionRun),
                ]
            )
        ) from error


def _lengths(config: DiffusionRun) -> tuple[str, ...]:
    """Names of the averages of other lengths; none for the constant one."""
    return tuple(map(str, config.ema.sigma_rel)) if config.ema.kind == "power" else ()


def _kept(config: DiffusionRun, weights: str, length: float | None) -> tuple[str, str]:
    """Where in a checkpoint the weights are that it has as they are wanted, and what they are."""
    lengths = _lengths(config)
    if weights == "raw":
        return "model", "weights of the last step"
    if length is None:
        name = lengths[0] if lengths else "constant"
        return f"ema/{name}", f"average of length {name}" if lengths else "average"
    if not lengths:
        raise ValueError(
            f"the run keeps no average of length {length:g}: its EMA is of kind constant, which "
            "has none to choose from; leave out the length"
        )
    if str(length) not in lengths:
        raise ValueError(
            f"the run keeps no average of length {length:g}; there are {', '.join(lengths)}; "
            f"choose one, or give sigma_rel {length:g} to put it together from the checkpoints"
        )
    return f"ema/{length}", f"average of length {length}"


def _posthoc(
    checkpoint: Checkpoint, config: DiffusionRun, sigma_rel: float, report: Progress
) -> tuple[Iterator[tuple[str, Tensor]], str, float]:
    """An average of another length: its tensors, what it is made of, and how far off it is."""
    if config.ema.kind != "power":
        raise ValueError(
            f"averages of kind {config.ema.kind} cannot be put together to one of length "
            f"{sigma_rel:g}; set ema.kind=power and loop.keep_every in a run of its own, or leave "
            "out sigma_rel"
        )
    records = _snapshots(checkpoint, config)
    _fit(records, checkpoint.step, config, sigma_rel)  # before gigabytes are read
    whole: list[Checkpoint] = []
    for number, record in enumerate(records, 1):
        if record.directory == checkpoint.directory:
            whole.append(checkpoint)
        elif (snapshot := _whole(record.directory)) is not None:
            whole.append(snapshot)
        report("checkpoints", number, len(records))
    records = [snapshot.record for snapshot in whole]
    shares, error = _fit(records, checkpoint.step, config, sigma_rel)
    averages = [
        _Tensors(snapshot, f"ema/{name}") for snapshot in whole for name in _lengths(config)
    ]
    told = (
        f"average of length {sigma_rel:g} from the {len(averages)} of lengths "
        f"{', '.join(_lengths(config))} at steps {_listed([r.step for r in records])}; "
        f"{100 * error:.2g} % off"
    )
    return combine(averages, shares), told, error


def _snapshots(checkpoint: Checkpoint, config: DiffusionRun) -> list[Record]:
    """Checkpoints with averages that add up, by their step, up to this one, which is the last.

    What another start of the run left behind is of other weights, though it has the same names: it
    has another seed or other averages, or was saved after a checkpoint of a later step.
    """
    at, every = config.ema.start_step, config.ema.every
    if checkpoint.step < at + every:
        raise ValueError(
            f"at step {checkpoint.step} all averages are still the weights: the first update is "
            f"at {at + every}; choose a later step, or weights raw"
        )
    chain = [checkpoint.record]
    root = checkpoint.directory.resolve().parent
    for directory in newest_first(root):
        try:
            record = read_record(directory)
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; it is left out", stacklevel=2)
            continue
        if record.sequence >= chain[-1].sequence:
            continue
        if _time(record.step, config) >= _time(chain[-1].step, config):
            continue
        if not record.finite or record.step < (at or every) or not _is_alike(record, config):
            continue
        chain.append(record)
    return chain[::-1]


def _is_alike(record: Record, config: DiffusionRun) -> bool:
    """Whether it may be of the same run: a run that was resumed may have changed all else."""
    values = record.state.get("config")
    if not isinstance(values, dict):
        return False
    return values.get("seed") == config.seed and values.get("ema") == config.ema.model_dump(
        mode="json"
    )


def _time(step: int, config: DiffusionRun) -> int:
    """The last step up to `step` whose weights are in the averages.

    Those before `start_step` count in as the weights of `start_step` itself, in all averages alike.
    """
    start, every = config.ema.start_step, config.ema.every
    return start + (step - start) // every * every


def _fit(
    records: list[Record], step: int, config: DiffusionRun, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Shares of all lengths of all snapshots, in this order, and their error."""
    lengths = config.ema.sigma_rel
    kept = [(_time(record.step, config), length) for record in records for length in lengths]
    shares, error = posthoc_shares(kept, _time(step, config), sigma_rel)
    if error > _FAR:
        raise ValueError(
            f"the average of length {sigma_rel:g} at step {step} is out of reach: the nearest sum "
            f"of the {len(kept)} averages that were kept (lengths {', '.join(map(str, lengths))}, "
            f"steps {_listed([record.step for record in records])}) is {100 * error:.2g} % off, "
            f"more than {100 * _FAR:g} %; keep more checkpoints with loop.keep_every (it is "
            f"{config.loop.keep_every or 'null'}), or choose a length nearer to those"
        )
    return shares, error


def _whole(directory: Path) -> Checkpoint | None:
    try:
        return read_checkpoint(directory)
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}; it is left out", stacklevel=2)
        return None


def _model(config: DiffusionRun, checkpoint: Checkpoint) -> Pipeline:
    """The run's model before its first step, with the vocabulary that it learned."""
    if learns_vocabulary(config):
        run = checkpoint.directory.resolve().parent.parent
        places = [run / VOCABULARY, Path(config.out) / VOCABULARY]
        place = next((path for path in places if path.is_dir()), None)
        if place is None:
            raise ValueError(
                f"neither {places[0]} nor {places[1]} is there: the vocabulary that the run "
                "learned; export beside the run, or copy it there"
            )
        config = with_vocabulary(config, place)
    model = first_model(config)
    expected = checkpoint.state.get("tokenizer")
    if model.text is not None and expected not in (None, tokenizer_hash(model.text)):
        raise ValueError(
            f"the weights of step {checkpoint.step} stand for another vocabulary than that of "
            f"{model.text.tokenizer.name_or_path or 'the model'}; restore the one of the run"
        )
    return model


def _check_out(out: Path, checkpoint: Checkpoint) -> None:
    """Refuse to write a model over a run: its vocabulary has the name of the model's."""
    own = checkpoint.directory.resolve()
    if out.resolve() in (own, own.parent, own.parent.parent):
        raise ValueError(
            f"{out} is the run's own directory; give another one for the model, such as "
            f"{out / 'model'}-{checkpoint.step}"
        )


def _counted(
    weights: Iterator[tuple[str, Tensor]], total: int, report: Progress
) -> Iterator[tuple[str, Tensor]]:
    for done, pair in enumerate(weights, 1):
        yield pair
        report("tensors", done, total)


def _listed(steps: list[int]) -> str:
    """Some numbers, or the first and last of many."""
    if len(steps) > 8:
        return f"{steps[0]} to {steps[-1]} ({len(steps)} of them)"
    return ", ".join(map(str, steps))
