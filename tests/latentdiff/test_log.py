from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from latentdiff.configbase import Frozen
from latentdiff.configtraining import LoggingConfig
from latentdiff.parallel import World
from latentdiff.training import logsinks
from latentdiff.training.log import RunLog, open_log

CPU = torch.device("cpu")
Values = dict[int, dict[str, float]]


class SomeRun(Frozen):
    lr: float = 0.5


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def logging(*to: str, **values: Any) -> LoggingConfig:
    return LoggingConfig.model_validate({"to": to, **values})


def write(out: Path, first: int, last: int, *to: str, **values: Any) -> None:
    """Steps first + 1 to last, of which each writes its own number."""
    if "tensorboard" in to and first:
        time.sleep(1.1)  # its files are read in the order of their names, which have seconds
    with RunLog(out, SomeRun(), 10, first, logging(*to, **values)) as log:
        for step in range(first + 1, last + 1):
            log.scalars(step, {"loss": step / 8, "part/a": -step / 3})


def expected(last: int) -> Values:
    return {step: {"loss": step / 8, "part/a": -step / 3} for step in range(1, last + 1)}


# Reading back


def read_jsonl(out: Path) -> Values:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return {row.pop("step"): {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def read_csv(out: Path) -> Values:
    found: Values = {}
    with (out / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = found.setdefault(int(row["step"]), {})
            assert row["name"] not in values
            values[row["name"]] = float(row["value"])
    return found


def read_tensorboard(out: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    found: Values = {}
    for name in board.Tags()["scalars"]:
        for event in board.Scalars(name):
            values = found.setdefault(event.step, {})
            assert name not in values
            values[name] = event.value
    return found


def read_mlflow(out: Path) -> Values:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow' / 'mlflow.db'}")
    run_id = json.loads((out / "run-ids.json").read_text())["mlflow"]
    found: Values = {}
    for name in client.get_run(run_id).data.metrics:
        # nothing can be taken out of it: what came last counts
        for metric in client.get_metric_history(run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return found


READERS: dict[str, Callable[[Path], Values]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_written_is_read_back(tmp_path: Path, kind: str) -> None:
    write(tmp_path, 0, 3, *([] if kind == "jsonl" else [kind]))
    found = READERS[kind](tmp_path)
    assert set(found) == {1, 2, 3}
    for step, values in expected(3).items():
        assert found[step] == pytest.approx(values, rel=1e-6 if kind == "tensorboard" else 0)


@pytest.mark.parametrize("kind", READERS)
def test_a_run_that_goes_on_leaves_no_gap_and_no_step_twice(tmp_path: Path, kind: str) -> None:
    to = [] if kind == "jsonl" else [kind]
    write(tmp_path, 0, 5, *to)
    write(tmp_path, 3, 7, *to)  # the last checkpoint was step 3's
    found = READERS[kind](tmp_path)
    assert set(found) == set(range(1, 8))
    for step, values in expected(7).items():
        assert found[step] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tensorboard"])
def test_a_run_that_starts_over_forgets_the_old_one(tmp_path: Path, kind: str) -> None:
    to = [] if kind == "jsonl" else [kind]
    write(tmp_path, 0, 5, *to)
    write(tmp_path, 0, 2, *to)
    assert set(READERS[kind](tmp_path)) == {1, 2}


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.csv"])
@pytest.mark.parametrize("garbage", ["half a li", "\x00\x00\n", "[]\n", "3\n", '{"step": null}\n'])
def test_a_broken_end_is_cut_off(tmp_path: Path, name: str, garbage: str) -> None:
    write(tmp_path, 0, 3, "csv")
    whole = (tmp_path / name).read_bytes()
    with (tmp_path / name).open("a") as file:
        file.write(garbage)
    RunLog(tmp_path, SomeRun(), 10, 3, logging("csv")).close()
    assert (tmp_path / name).read_bytes() == whole


def test_the_csv_takes_scalars_that_come_and_go(tmp_path: Path) -> None:
    with RunLog(tmp_path, SomeRun(), 3, 0, logging("csv")) as log:
        log.scalars(1, {"a": 0.1})
        log.scalars(2, {"b, c": 2.0, "a": math.inf})
    assert (tmp_path / "metrics.csv").read_text() == (
        'step,name,value\n1,a,0.1\n2,"b, c",2.0\n2,a,inf\n'
    )


def test_what_is_not_finite_breaks_no_reader(tmp_path: Path) -> None:
    to = ("tensorboard", "csv", "mlflow", "wandb")
    with RunLog(tmp_path, SomeRun(), 3, 0, logging(*to)) as log:
        log.scalars(1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (record["loss"], record["norm"], record["lr"]) == (None, None, 1.0)
    assert math.isnan(read_tensorboard(tmp_path)[1]["loss"])
    assert read_mlflow(tmp_path) == {1: {"lr": 1.0}}


def test_every_line_is_in_the_files_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, SomeRun(), 3, 0, logging("tensorboard", "csv"))
    log.scalars(1, {"loss": 2.0})
    for kind in ("jsonl", "csv", "tensorboard"):  # as after kill -9
        assert READERS[kind](tmp_path) == {1: {"loss": 2.0}}
    log.close()


# Services


def wandb_files(out: Path) -> list[Path]:
    return sorted((out / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_needs_no_account_offline(tmp_path: Path) -> None:
    with RunLog(tmp_path, SomeRun(), 3, 0, logging("wandb", run_name="named")) as log:
        log.scalars(1, {"loss": 0.123456789})
        log.picture(1, "grid", Image.new("RGB", (4, 4)))
    (file,) = wandb_files(tmp_path)
    wanted = (b"0.123456789", b"loss", b"named", b"latentdiff", b"lr")
    end = time.monotonic() + 60  # its own process writes
    while missing := [text for text in wanted if text not in file.read_bytes()]:
        assert time.monotonic() < end, missing
        time.sleep(0.2)
    assert list(file.parent.rglob("*.png"))


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_run_that_goes_on_keeps_its_id(tmp_path: Path, kind: str) -> None:
    ids: list[str] = []
    for first, last in ((0, 2), (2, 3), (0, 1)):
        write(tmp_path, first, last, kind)
        ids.append(json.loads((tmp_path / "run-ids.json").read_text())[kind])
    assert ids[0] == ids[1] != ids[2]  # starting over is another run
    if kind == "wandb":
        assert sorted(file.stem for file in wandb_files(tmp_path)) == sorted(
            f"run-{run_id}" for run_id in ids
        )


def test_wandb_without_an_account_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from wandb.errors import UsageError

    def refuse(**_: Any) -> None:
        raise UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"wandb, which cannot start: No API key.*wandb login.*"):
        RunLog(tmp_path, SomeRun(), 3, 0, logging("wandb"))


def test_mlflow_keeps_config_pictures_and_end(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    with (
        pytest.raises(KeyError),
        RunLog(tmp_path, SomeRun(), 3, 0, logging("mlflow", project="p", run_name="r")) as log,
    ):
        log.picture(2, "grid", Image.new("RGB", (4, 4)))
        raise KeyError
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    run = client.get_run(json.loads((tmp_path / "run-ids.json").read_text())["mlflow"])
    assert (run.info.run_name, run.info.status) == ("r", "FAILED")
    assert client.get_experiment(run.info.experiment_id).name == "p"
    files = tmp_path / "mlflow" / "files" / run.info.run_id / "artifacts"
    assert (files / "config.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert (files / "samples" / "grid-0000002.png").is_file()


def test_an_mlflow_run_that_is_gone_is_no_silent_new_one(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, "mlflow")
    (tmp_path / "run-ids.json").write_text('{"mlflow": "feed"}')
    with pytest.raises(ValueError, match=r"mlflow.db: .*take the id feed out of .*run-ids.json"):
        RunLog(tmp_path, SomeRun(), 3, 1, logging("mlflow"))


@pytest.mark.parametrize(
    ("kind", "package", "fix"),
    [
        ("wandb", "wandb", r"pip install 'latentdiff\[wandb\]'"),
        ("mlflow", "sqlalchemy", r"pip install 'latentdiff\[mlflow\]'"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_package_is_told_at_the_start_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, fix: str, rank: int
) -> None:
    present = logsinks.find_spec
    monkeypatch.setattr(
        logsinks, "find_spec", lambda name: None if name == package else present(name)
    )
    world = World(CPU, rank=rank, num_ranks=2)
    with pytest.raises(
        ValueError, match=rf"^logging.to has {kind}, but {package} cannot be imported; {fix}"
    ):
        open_log(tmp_path / "run", SomeRun(), 3, 0, world, logging("tensorboard", kind))
    assert not (tmp_path / "run").exists()


class Away:
    """A sink that fails for as long as it is told to."""

    def __init__(self, is_local: bool) -> None:
        self.is_local = is_local
        self.fails = True
        self.steps: list[int] = []
        self.closed: bool | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails:
            raise ConnectionError("no route")
        self.steps.append(step)

    def picture(self, step: int, name: str, image: Image.Image, path: Path) -> None:
        self.scalars(step, {})

    def close(self, failed: bool) -> None:
        self.closed = failed


def test_a_service_that_is_away_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, away = [1000.0], Away(is_local=False)
    monkeypatch.setattr("latentdiff.training.log.time.monotonic", lambda: now[0])
    monkeypatch.setattr("latentdiff.training.log.open_sinks", lambda *_: {"tracker": away})
    with RunLog(tmp_path, SomeRun(), 9, 0, logging()) as log:
        log.scalars(1, {"loss": 1.0})
        assert "warning: tracker failed (ConnectionError: no route)" in capsys.readouterr().err
        away.fails = False
        log.scalars(2, {"loss": 1.0})  # left alone
        now[0] += 601
        log.scalars(3, {"loss": 1.0})
    assert "warning" not in capsys.readouterr().err
    assert away.steps == [3] and away.closed is False
    assert set(read_jsonl(tmp_path)) == {1, 2, 3}


def test_a_full_disk_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "latentdiff.training.log.open_sinks", lambda *_: {"csv": Away(is_local=True)}
    )
    with (
        pytest.raises(ConnectionError, match="no route"),
        RunLog(tmp_path, SomeRun(), 9, 0, logging()) as log,
    ):
        log.scalars(1, {"loss": 1.0})


# The rest of the log


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    first, second = (World(CPU, rank=rank, num_ranks=2) for rank in (0, 1))
    with open_log(out, SomeRun(), 3, 0, second, logging("csv")) as log:
        log.scalars(1, {"loss": 1.0})
        log.line("words")
        path = log.picture(1, "grid", Image.new("RGB", (2, 2)))
    assert not out.exists() and capsys.readouterr() == ("", "")
    with open_log(out, SomeRun(), 3, 0, first, logging("csv")) as log:
        assert log.picture(1, "grid", Image.new("RGB", (2, 2))) == path
    assert path.is_file() and (out / "config.yaml").read_text() == "lr: 0.5\n"


def test_the_line_shows_what_has_no_slash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, SomeRun(), 4, 0, logging()) as log:
        log.scalars(4, {"loss": 0.25, "loss_t/0-1": 1.0, "img_per_s": 12.34})
    assert capsys.readouterr().err == "step 4/4  ETA 0m00s  loss 0.25  12.3 img/s\n"


def test_its_own_clock_counts_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("latentdiff.training.log.time.monotonic", lambda: now[0])
    with RunLog(tmp_path, SomeRun(), 8, 4, logging()) as log:
        now[0] += 2
        log.scalars(6, {"loss": 1.0}, samples_per_step=16)
    (row,) = read_jsonl(tmp_path).values()
    assert row == {"loss": 1.0, "img_per_s": 16.0}


def test_pictures_are_in_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, SomeRun(), 8, 0) as log:  # the default sink
        path = log.picture(2, "grid", Image.new("RGB", (6, 4), "red"))
    assert path == tmp_path / "samples" / "grid-0000002.png"
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (image,) = board.Images("grid")
    assert (image.step, image.width, image.height) == (2, 6, 4)
