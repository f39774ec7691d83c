"""Is the model of `latentdiff checkpoint export` the one that the run would have exported?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_rig import ALONE, contents, save
from export_rig import average, distance, loop, pixel_run, step_of, weights
from safetensors.torch import load_file
from tinyruns import tiny_diffusion_run
from torchrun import torchrun

from latentdiff.cli import run as command
from latentdiff.config import DiffusionRun
from latentdiff.configfile import dump_config
from latentdiff.pipeline import Pipeline
from latentdiff.training.checkpoint import Checkpoint, Checkpoints, read_checkpoint
from latentdiff.training.commit import Keep
from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.exporting import export_checkpoint

LENGTHS = (0.1, 0.05, 0.12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def export(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `latentdiff checkpoint export`: exit code, what it says, and what it says of faults."""

    def export(*arguments: object) -> tuple[int, str, str]:
        code = command(["checkpoint", "export", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return export


@pytest.fixture
def refused(export) -> Callable[..., str]:
    """Runs it on what it must refuse: what it says."""

    def refused(*arguments: object) -> str:
        code, said, told = export(*arguments)
        assert (code, said) == (2, "")
        return told

    return refused


def files(model: Path) -> dict[str, object]:
    """All of a model's files; of the tokenizer what a tokenizer that was used says like others."""
    found: dict[str, object] = dict(contents(model))
    words = json.loads((model / "tokenizer" / "tokenizer.json").read_bytes())
    found["tokenizer/tokenizer.json"] = words | {"truncation": None, "padding": None}
    return found


# One process


def test_the_average_is_the_runs_own_export_to_the_byte(
    tiny_run: DiffusionRun, tmp_path: Path, export
) -> None:
    before = contents(Path(tiny_run.out))
    code, said, told = export(tiny_run.out, "--out", tmp_path / "model")
    assert (code, said) == (0, f"{tmp_path / 'model'}\n")
    assert told.splitlines()[-1] == "step 4: average"
    assert contents(tmp_path / "model") == contents(Path(tiny_run.out) / "model")
    assert contents(Path(tiny_run.out)) == before  # it may still be running


@pytest.mark.parametrize("name", ["the run", "one checkpoint"])
def test_weights_as_they_are_of_an_earlier_step(
    tiny_run: DiffusionRun, tmp_path: Path, export, name: str
) -> None:
    step = Path(tiny_run.out) / "checkpoints" / "step-2"
    place = (tiny_run.out, "--step", "2") if name == "the run" else (step,)
    code, _, told = export(*place, "--out", tmp_path, "--weights", "raw", "--dtype", "fp16")
    assert code == 0 and told.splitlines()[-1] == "step 2: weights of the last step"
    saved = read_checkpoint(step)
    found, raw = weights(tmp_path), saved.group("model")
    assert found.keys() == raw.keys()
    assert all(torch.equal(found[name], raw[name].half().float()) for name in raw)
    average = {n.removeprefix("constant/"): t for n, t in saved.group("ema").items()}
    assert not all(torch.equal(average[name].half().float(), found[name]) for name in raw)
    file = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {torch.float16}


def test_a_broken_newest_one_is_passed_over(tiny_run: DiffusionRun, tmp_path: Path, export) -> None:
    shutil.copytree(tiny_run.out, tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step-4"
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"does not match its hash.*; step 2 is used instead"):
        done = export_checkpoint(tmp_path / "run", tmp_path / "model")
    assert done.step == 2
    for named in (broken,), (tmp_path / "run", "--step", "4"):
        code, said, told = export(*named, "--out", tmp_path / "other")
        assert (code, said) == (2, "") and "does not match its hash in manifest.json" in told
    assert not (tmp_path / "other").exists()


def test_parts_that_were_not_trained_are_the_runs_own(
    assets: Path, tiny_autoencoder: Path, tmp_path: Path, export
) -> None:
    """A tower of random weights that stays as it is, in a run whose weights are sharded."""
    changes = {"train_text": False, "parallel": {"mode": "fsdp"}, "export_dtype": "fp16"}
    out = tmp_path / "run"
    run = tiny_diffusion_run(assets, out, tiny_autoencoder, loop=loop(1), seed=5, **changes)
    exported = train_diffusion(run)
    assert export(run.out, "--out", tmp_path / "model")[0] == 0
    assert files(tmp_path / "model") == files(exported)
    torch.manual_seed(run.seed)
    tokenizer = {"pretrained": str(out / "tokenizer")}
    again = tiny_diffusion_run(assets, out, tiny_autoencoder, seed=5).model_dump()
    again["text"] |= {"tokenizer": tokenizer}
    first = Pipeline.new(DiffusionRun.model_validate(again)).text
    last = Pipeline.load(exported).text
    assert first is not None and last is not None
    for one, other in zip(first.parameters(), last.parameters(), strict=True):
        assert torch.equal(one.half().float(), other)


# Several


def test_a_sharded_run_exports_what_it_exported_itself(
    assets: Path, tmp_path: Path, export
) -> None:
    ema = {"kind": "power", "sigma_rel": [0.2, 0.1]}
    run = pixel_run(assets, tmp_path / "run", 2, parallel={"mode": "fsdp"}, ema=ema)
    (tmp_path / "run.yaml").write_text(dump_config(run))
    done = torchrun(2, ["-m", "latentdiff", "train", "--config", str(tmp_path / "run.yaml")])
    assert done.returncode == 0, done.stderr
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-2")
    assert saved.record.num_ranks == 2 and saved.shards.num_sharded() > 50
    code, _, told = export(run.out, "--out", tmp_path / "model")
    assert code == 0 and told.splitlines()[-1] == "step 2: average of length 0.2"
    assert contents(tmp_path / "model") == contents(tmp_path / "run" / "model")
    code, _, told = export(run.out, "--out", tmp_path / "other", "--length", "0.10")
    assert code == 0 and told.splitlines()[-1] == "step 2: average of length 0.1"
    found, expected = weights(tmp_path / "other"), average(saved, 0.1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert weights(tmp_path / "model").keys() == found.keys()
    assert contents(tmp_path / "other") != contents(tmp_path / "model")


# Post-hoc averages


def rewrite(saved: Checkpoint, place: Path, step: int, poison: float = 0.0, **config: Any) -> None:
    """Save a checkpoint's weights and averages in another run directory, as of another step."""
    state = {**saved.state, "config": {**saved.state["config"], **config}}
    lengths = state["config"]["ema"]["sigma_rel"]
    kept = {f"{length}/{n}": t for length in lengths for n, t in average(saved, length).items()}
    groups = {"model": saved.group("model"), "ema": {n: t + poison for n, t in kept.items()}}
    Checkpoints(place / "checkpoints", ALONE, Keep(100)).save(step, groups, state, is_last=True)


@pytest.fixture(scope="module", params=[{}, {"every": 5, "start_step": 6}], ids=["plain", "late"])
def tracked(
    request: pytest.FixtureRequest, assets: Path, tmp_path_factory: pytest.TempPathFactory
) -> DiffusionRun:
    """A run that kept the averages of three lengths at every eighth step."""
    run = pixel_run(
        assets,
        tmp_path_factory.mktemp("tracked") / "run",
        40,
        loop=loop(40, checkpoint_every=8, keep_every=8),
        optimizer={"lr": 1e-2, "warmup_steps": 1, "decay": "constant"},
        ema={"kind": "power", "sigma_rel": LENGTHS, **request.param},
    )
    train_diffusion(run)
    return run


def two_lengths(run: DiffusionRun) -> dict[str, Any]:
    return {**run.ema.model_dump(mode="json"), "sigma_rel": list(LENGTHS[:2])}


@pytest.fixture(scope="module")
def snapshots(tracked: DiffusionRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as if it had not kept the third length; beside what does not belong there."""
    place = tmp_path_factory.mktemp("snapshots") / "run"
    ema, saved = two_lengths(tracked), step_of(tracked, 40)
    rewrite(saved, place, 17, poison=9.0, ema=ema)  # saved before step 8: by an earlier start
    if tracked.ema.start_step:
        rewrite(saved, place, 5, poison=9.0, ema=ema)  # there are no averages yet
    for step in range(8, 41, 8):
        if step == 32:
            rewrite(saved, place, 27, poison=9.0, ema=ema, seed=1)
            rewrite(saved, place, 28, poison=9.0, ema={**ema, "every": 4})
            rewrite(saved, place, 29, poison=float("nan"), ema=ema)
        rewrite(step_of(tracked, step), place, step, ema=ema)
    return place


def miss(model: Path, run: DiffusionRun, step: int) -> float:
    """Distance from the third length's own average, relative to the nearest one's that is kept."""
    expected, nearest = average(step_of(run, step), 0.12), average(step_of(run, step), 0.1)
    return distance(weights(model), expected) / distance(nearest, expected)


def test_a_length_that_was_left_out_is_found_again(
    tracked: DiffusionRun, snapshots: Path, tmp_path: Path, export
) -> None:
    code, said, told = export(snapshots, "--out", tmp_path / "model", "--sigma-rel", "0.12")
    assert (code, said) == (0, f"{tmp_path / 'model'}\n")
    assert told.splitlines()[-1] == (
        "step 40: average of length 0.12 from the 10 of lengths 0.1, 0.05 at steps 8, 16, 24, 32, "
        f"40; {'2.6' if tracked.ema.start_step else '2.9'} % off"
    )
    assert miss(tmp_path / "model", tracked, 40) < 0.06
    code, _, told = export(tracked.out, "--out", tmp_path / "kept", "--sigma-rel", "0.12")
    assert code == 0 and told.splitlines()[-1] == "step 40: average of length 0.12"
    assert miss(tmp_path / "kept", tracked, 40) == 0


def test_an_earlier_step_takes_what_was_there_by_then(
    tracked: DiffusionRun, snapshots: Path, tmp_path: Path
) -> None:
    done = export_checkpoint(snapshots, tmp_path, step=24, sigma_rel=0.12)
    assert "at steps 8, 16, 24; " in done.told and 0.03 < done.error < 0.06
    assert miss(tmp_path, tracked, 24) < 0.1


def test_a_broken_snapshot_is_left_out(
    snapshots: Path, tmp_path: Path, tracked: DiffusionRun
) -> None:
    place = tmp_path / "run"
    shutil.copytree(snapshots, place)
    (place / "checkpoints" / "step-16" / "state.json").unlink()
    file = next((place / "checkpoints" / "step-8").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-(8|16).*; it is left out") as warned:
        done = export_checkpoint(place, tmp_path / "model", step=40, sigma_rel=0.12)
    assert len({str(w.message) for w in warned if "left out" in str(w.message)}) == 2
    assert "at steps 24, 32, 40; " in done.told
    assert miss(tmp_path / "model", tracked, 40) < 0.1


def test_too_few_snapshots(snapshots: Path, tracked: DiffusionRun, tmp_path: Path, refused) -> None:
    rewrite(step_of(tracked, 40), tmp_path / "run", 40, ema=two_lengths(tracked))
    out = ("--out", tmp_path / "model")
    assert (
        "error: the average of length 0.2 at step 40 is out of reach: the nearest sum of the 2 "
        "averages that were kept (lengths 0.1, 0.05, steps 40) is 60 % off, more than 10 %; keep "
        "more checkpoints with loop.keep_every (it is 8), or choose a length nearer to those"
    ) in refused(tmp_path / "run", *out, "--sigma-rel", "0.2")
    told = refused(snapshots, *out, "--sigma-rel", "0.3")
    assert "sigma_rel must be in (0, 0.25); got 0.3" in told
    assert not (tmp_path / "model").exists()


def test_before_the_first_update(tracked: DiffusionRun, tmp_path: Path, refused) -> None:
    ema = {**two_lengths(tracked), "start_step": 39, "every": 2}
    rewrite(step_of(tracked, 40), tmp_path / "run", 40, ema=ema)
    told = refused(tmp_path / "run", "--out", tmp_path / "model", "--sigma-rel", "0.2")
    assert (
        "at step 40 all averages are still the weights: the first update is at 41; choose a later "
        "step, or weights raw"
    ) in told


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "3"], "has no checkpoint of step 3; there are 2, 4; loop.checkpoint_every"),
        (["--length", "0.1"], "keeps no average of length 0.1: its EMA is of kind constant, which"),
        (
            ["--sigma-rel", "0.1"],
            "averages of kind constant cannot be put together to one of length 0.1; set "
            "ema.kind=power and loop.keep_every in a run of its own, or leave out sigma_rel",
        ),
        (["--sigma-rel", "0.1", "--length", "0.1"], "give one of the two"),
        (["--weights", "raw", "--length", "0.1"], "are of averages; leave them out, or weights r"),
        (["--weights", "other"], "'other' is not one of 'ema', 'raw'"),
        (["--dtype", "int8"], "'int8' is not one of 'fp32', 'fp16'"),
    ],
)
def test_what_a_run_cannot_give(
    tiny_run: DiffusionRun, tmp_path: Path, refused, options: list[str], message: str
) -> None:
    assert message in refused(tiny_run.out, "--out", tmp_path / "model", *options)
    assert not (tmp_path / "model").exists()


def test_an_unknown_length_names_those_there_are(
    tracked: DiffusionRun, tmp_path: Path, refused
) -> None:
    told = refused(tracked.out, "--out", tmp_path / "model", "--length", "0.2")
    assert (
        "error: the run keeps no average of length 0.2; there are 0.1, 0.05, 0.12; choose one, or "
        "give sigma_rel 0.2 to put it together from the checkpoints"
    ) in told


def test_places_that_are_no_diffusion_run(
    tiny_run: DiffusionRun, tiny_autoencoder: Path, tmp_path: Path, refused
) -> None:
    out = ("--out", tmp_path / "model")
    told = refused(tmp_path / "nowhere", *out)
    assert "nowhere is no directory; give a run's directory, or a checkpoint's" in told
    told = refused(tmp_path, *out)
    assert f"error: {tmp_path} holds no checkpoint; give a run's directory" in told
    told = refused(tiny_autoencoder.parent, *out)
    assert "step-4 is of a run of kind autoencoder; only those of kind diffusion become" in told
    save(tmp_path / "checkpoints", 1)
    told = refused(tmp_path, *out)
    assert "step-1 does not say what config it was trained with; resume the run with" in told
    told = refused(Path(tiny_run.out) / "checkpoints" / "step-2", *out, "--step", "2")
    assert "step-2 is one checkpoint; leave out the step, or give the run" in told
    assert not (tmp_path / "model").exists()


def test_a_run_is_not_written_over(tiny_run: DiffusionRun, refused) -> None:
    before = contents(Path(tiny_run.out))
    for name in ("", "checkpoints", "checkpoints/step-4"):
        told = refused(tiny_run.out, "--out", Path(tiny_run.out) / name)
        assert "is the run's own directory; give another one for the model, such as" in told
    assert contents(Path(tiny_run.out)) == before


def another(saved: Checkpoint, place: Path, scale: float = 1.0, **state: Any) -> None:
    """Save a checkpoint of the tiny run in another run directory, with another state."""
    weights = {name: scale * tensor for name, tensor in saved.group("model").items()}
    groups = {"model": weights, "ema": saved.group("ema")}
    checkpoints = Checkpoints(place / "checkpoints", ALONE, Keep(9))
    checkpoints.save(4, groups, {**saved.state, **state}, is_last=True)


def test_the_vocabulary_is_the_runs(tiny_run: DiffusionRun, tmp_path: Path, export, refused):
    place, saved, gone = tmp_path / "run", step_of(tiny_run, 4), tmp_path / "gone"
    config = {**saved.state["config"], "out": str(gone)}
    another(saved, place, config=config)
    told = refused(place, "--out", tmp_path / "model")
    assert (
        f"error: neither {place / 'tokenizer'} nor {gone / 'tokenizer'} is there: the vocabulary "
        "that the run learned; export beside the run, or copy it there"
    ) in told
    shutil.copytree(Path(tiny_run.out) / "tokenizer", place / "tokenizer")  # as a run that moved
    assert export(place, "--out", tmp_path / "model")[0] == 0
    assert contents(tmp_path / "model") == contents(Path(tiny_run.out) / "model")
    another(saved, place, config=config, tokenizer="0" * 64)
    told = refused(place, "--out", tmp_path / "other")
    assert "the weights of step 4 stand for another vocabulary than that of" in told
    assert not (tmp_path / "other").exists()


def test_values_that_are_not_finite_are_no_model(
    tiny_run: DiffusionRun, tmp_path: Path, refused
) -> None:
    another(step_of(tiny_run, 4), tmp_path, scale=float("nan"))
    told = refused(tmp_path, "--out", tmp_path / "model")
    assert "step-4 has values that are not finite; choose another step" in told
