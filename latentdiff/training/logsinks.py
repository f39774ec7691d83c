"""Where do a run's scalars and pictures go? TensorBoard, CSV, Weights & Biases, MLflow."""

from __future__ import annotations

import csv
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from latentdiff.configtraining import LoggingConfig

_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # extra -> imports
_IDS = "run-ids.json"


class Sink(Protocol):
    """One place. `is_local`: its failures are the run's; a service's are not."""

    is_local: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the scalars of optimiser step `step`."""
        ...

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        """Take a picture, which is at `path` too."""
        ...

    def close(self, failed: bool) -> None:
        """Flush, and say how the run ended."""
        ...


def check_sinks(logging: LoggingConfig) -> None:
    """Refuse what cannot be imported, at the start of the run and on every rank.

    Raises:
        ValueError: a package is missing.
    """
    for kind in logging.to:
        missing = [name for name in _PACKAGES.get(kind, ()) if find_spec(name) is None]
        if missing:
            raise ValueError(
                f"logging.to has {kind}, but {' and '.join(missing)} cannot be imported; "
                f"pip install 'latentdiff[{kind}]', or take {kind} out of logging.to"
            )


def open_sinks(logging: LoggingConfig, out: Path, config: Any, first_step: int) -> dict[str, Sink]:
    """The sinks of `logging.to`, by name.

    Args:
        logging: which, and under what names.
        out: run directory.
        config: the run's config, shown there.
        first_step: steps done; what a sink holds of later ones is dropped where that is possible.
            Above 0 a service's run goes on under the id in `run-ids.json`; at 0 it is a new one.

    Raises:
        ValueError: a service cannot be used as it is set up.
    """
    check_sinks(logging)
    name = logging.run_name or out.resolve().name
    sinks: dict[str, Sink] = {}
    for kind in dict.fromkeys(logging.to):
        match kind:
            case "tensorboard":
                sinks[kind] = _TensorBoard(out, first_step)
            case "csv":
                sinks[kind] = _Csv(out, first_step)
            case "wandb":
                sinks[kind] = _Wandb(out, logging.project, name, config, first_step)
            case "mlflow":
                sinks[kind] = _Mlflow(out, logging.project, name, first_step)
    return sinks


def cut_lines(path: Path, step_of: Callable[[str], int], last_step: int) -> None:
    """Drop the lines of later steps, half a line, and what is no line of ours.

    A run that goes on from an earlier step writes them again.

    Args:
        path: file; none is fine.
        step_of: line -> its step; ValueError, KeyError or TypeError for no line of ours.
        last_step: that stays.
    """
    if not path.is_file():
        return

    def stays(line: str) -> bool:
        try:
            return line.endswith("\n") and step_of(line) <= last_step
        except (ValueError, KeyError, TypeError):
            return False

    kept = path.with_name(f".tmp-{path.name}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
    kept.write_text("".join(filter(stays, lines)), encoding="utf-8")
    kept.replace(path)


class _TensorBoard:
    """`tensorboard/`; later steps of an interrupted run are purged by the reader."""

    is_local = True

    def __init__(self, out: Path, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = out / "tensorboard"
        if first_step == 0:  # of a run that starts over
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        # the reader drops what it has of steps from this one on
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # kill -9 loses nothing that a checkpoint is ahead of

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        import numpy as np

        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Csv:
    """`metrics.csv`, a line a scalar (step,name,value): no column can be missing or too many."""

    is_local = True

    def __init__(self, out: Path, first_step: int) -> None:
        path = out / "metrics.csv"
        cut_lines(path, lambda line: int(line[: line.index(",")]), first_step)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        path.write_text(f"step,name,value\n{text}", encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", newline="")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        rows = ((step, name, repr(float(value))) for name, value in values.items())
        csv.writer(self._file, lineterminator="\n").writerows(rows)
        self._file.flush()

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        """Pictures are in `samples/`."""

    def close(self, failed: bool) -> None:
        self._file.close()


class _Wandb:
    """Weights & Biases; with WANDB_MODE=offline no account is needed, and the data is in `wandb/`.

    `step` is a metric like the others, and the x axis of all: the service refuses steps before the
    last one, which a run that goes on from an earlier checkpoint takes again.
    """

    is_local = False

    def __init__(self, out: Path, project: str, name: str, config: Any, first_step: int) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # tell no third party of crashes
        self._wandb = wandb = import_module("wandb")
        run_id = _known_id(out, "wandb", first_step) or uuid.uuid4().hex
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                dir=str(out),
                id=run_id,
                resume="allow",
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"logging.to has wandb, which cannot start: {error} Run `wandb login`, or set "
                f"WANDB_MODE=offline to keep its data in {out / 'wandb'} for `wandb sync`"
            ) from error
        _keep_id(out, "wandb", run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        self._run.log({name: self._wandb.Image(image), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Mlflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or else `mlflow/` with a database and files."""

    def __init__(self, out: Path, project: str, name: str, first_step: int) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report each use
        # its own 7 tries of 120 s would hold up the training; RunLog tries again later
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        mlflow = import_module("mlflow")
        self._metric = import_module("mlflow.entities").Metric
        uri, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        self.is_local = uri is None
        if uri is None:
            folder = (out / "mlflow").resolve()
            folder.mkdir(exist_ok=True)
            uri, files = f"sqlite:///{folder / 'mlflow.db'}", (folder / "files").as_uri()
        known = _known_id(out, "mlflow", first_step)
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            if known is not None:
                self._client.update_run(known, status="RUNNING")
                self._id = known
            else:
                found = self._client.get_experiment_by_name(project)
                experiment = (
                    self._client.create_experiment(project, artifact_location=files)
                    if found is None
                    else found.experiment_id
                )
                self._id = self._client.create_run(experiment, run_name=name).info.run_id
                self._client.log_artifact(self._id, str(out / "config.yaml"))
        except mlflow.MlflowException as error:
            fix = f" or take the id {known} out of {out / _IDS}" if known else ""
            raise ValueError(
                f"logging.to has mlflow, which cannot start at {uri}: {error}; set "
                f"MLFLOW_TRACKING_URI to a server that answers{fix}"
            ) from error
        _keep_id(out, "mlflow", self._id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now_ms, step)
            for name, value in values.items()
            if math.isfinite(value)  # a database has no place for others
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        self._client.log_artifact(self._id, str(path), "samples")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def _known_id(out: Path, kind: str, first_step: int) -> str | None:
    return _read_ids(out).get(kind) if first_step else None


def _keep_id(out: Path, kind: str, run_id: str) -> None:
    written = out / f".tmp-{_IDS}"
    written.write_text(json.dumps({**_read_ids(out), kind: run_id}, indent=2), encoding="utf-8")
    written.replace(out / _IDS)


def _read_ids(out: Path) -> dict[str, str]:
    path = out / _IDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
