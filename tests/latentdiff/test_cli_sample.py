"""Does `latentdiff sample` write what it says, the same twice, and name a user's mistakes?"""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff.cli import run


@pytest.fixture
def sample(tiny_model: Path, tmp_path: Path) -> Any:
    """Runs `latentdiff sample` on the tiny model with two steps into tmp_path/out."""

    def call(*arguments: str) -> int:
        fixed = ["--model", str(tiny_model), "--steps", "2", "--out", str(tmp_path / "out")]
        return run(["sample", *fixed, *arguments])

    return call


def test_picture_tells_its_story(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--prompt", "a red apple", "--seed", "7", "--sampler", "euler") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path / "out"
    image = Image.open(path)
    assert image.size == (32, 32)
    story: Any = image.info
    assert story["prompt"] == "a red apple"
    assert (story["seed"], story["steps"], story["sampler"]) == ("7", "2", "euler")
    assert story["guidance_scale"] == "5.0"
    assert len(story["model"]) == 16


def test_same_command_same_bytes(sample: Any, tmp_path: Path) -> None:
    arguments = ["--prompt", "ein Löwe", "--prompt", "りんご", "--num-images", "2", "--grid"]
    assert sample(*arguments) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(first) == 5
    assert sample(*arguments, "--batch-size", "4", "--no-resume") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_a_picture_is_drawn_again_to_the_bit(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of a batch, whose rows round otherwise than a picture alone."""
    assert sample("--prompt", "a cat", "--prompt", "a dog", "--num-images", "3", "--json") == 0
    told = json.loads(capsys.readouterr().out)["images"]
    for number in (0, 4):
        path = Path(told[number]["path"])
        assert run(["sample", "--from", str(path), "--out", str(tmp_path / "again")]) == 0
        again = Path(capsys.readouterr().out.strip())
        assert again.name == f"{path.stem}-again.png"
        assert again.read_bytes() == path.read_bytes()


def test_json_and_prompts_file(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    assert sample("--prompts-file", str(prompts), "--style", "fluent-3d", "--json") == 0
    drawn = json.loads(capsys.readouterr().out)
    assert [i["prompt"] for i in drawn["images"]] == ["a cat, fluent 3d", "a dog, fluent 3d"]
    assert all(Path(i["path"]).is_file() for i in drawn["images"])
    assert (drawn["width"], drawn["height"], drawn["grid"]) == (32, 32, None)
    assert drawn["settings"]["steps"] == drawn["steps"] == 2
    assert drawn["timings"]["num_drawn"] == 2 and drawn["timings"]["draw_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "eulr"], "unknown sampler 'eulr'; did you mean euler? known: ddpm, ddim,"),
        (["--spacing", "kerras"], "unknown spacing 'kerras'; did you mean karras? known: trailing"),
        (["--style", "cubist"], "unknown style 'cubist'; known: fluent 3d, fluent flat"),
        (["--height", "30"], "height must be a positive multiple of 8 px; got 30"),
        (["--dtype", "int8"], "unknown dtype 'int8'; known: auto, float32"),
        (["--device", "abacus"], "device 'abacus' is unknown; use auto, cpu"),
        (["--device", "cuda:77"], "CUDA device(s) are here; use --device cpu or auto"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--num-images", "0"], "--num-images must be at least 1; got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--from", "nowhere.png"], "nowhere.png: No such file"),
        (["--guidance-interval", "2", "1"], "0 <= LOW < HIGH, in units of sigma; got 2 1;"),
        (["--guidance-rescale", "2"], "--guidance-rescale must be from 0 to 1; got 2"),
        (["--guidance", "nan"], "--guidance must be finite; got nan"),
        (["--seed", "-1"], "--seed must be from 0 to 2^64 - 1; got -1"),
        (["--clip-skip", "-1"], "--clip-skip must be at least 0; got -1"),
        (["--mask", "x.png"], "--mask is given without --init-image"),
        (["--strength", "0.5"], "--strength is given without --init-image"),
        (["--variation-seed", "2"], "--variation-seed is given without --variation-strength"),
        (["--variation-strength", "1"], "--variation-strength is given without --variation-seed"),
        (
            ["--variation-seed", "2", "--variation-strength", "1.5"],
            "--variation-strength must be from 0 to 1; got 1.5",
        ),
        (["--upscale", "0.5"], "--upscale must be above 1 and at most 8; got 0.5"),
        (["--upscale", "1.1"], "--upscale 1.1: height must be a positive multiple of 8 px; got 35"),
        (["--upscale-strength", "0.5"], "--upscale-strength is given without --upscale"),
        (["--init-image", "gone.png"], "--init-image gone.png not found"),
        (["--lora", "gone.safetensors:0.5"], "--lora gone.safetensors not found"),
        (["--attention", "slice"], "unknown attention 'slice'; did you mean sliced?"),
        (["--backend", "onnx"], "unknown backend 'onnx'; known: auto, torch, openvino"),
        (["--backend", "openvino", "--reuse", "2"], "--reuse is of --backend torch"),
        (["--reuse", "0"], "--reuse must be a whole number from 1 on; got 0"),
        (["--merge-tokens", "0.9"], "--merge-tokens must be in [0, 0.75]; got 0.9"),
        (["--quantise", "int4"], "unknown quantisation 'int4'; did you mean int8?"),
    ],
)
def test_mistakes(
    sample: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert sample("--prompt", "x", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_a_broken_weight_is_shown(sample: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--prompt", "a (b:x)") == 2
    assert "a (b:x)\n" in capsys.readouterr().err
    assert sample("--prompt", "x", "--negative-prompt", "a (b") == 2
    told = 'error: --negative-prompt: prompt, character 3: "(" is never closed; close it'
    assert told in capsys.readouterr().err


def test_nothing_to_draw(sample: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample() == 2
    told = 'error: nothing to draw; give --prompt "a red apple" or --prompts-file F'
    assert told in capsys.readouterr().err


def test_mistakes_are_told_before_torch_is_imported(run_python: Any) -> None:
    done = run_python(
        "-c",
        "import sys, latentdiff.cli as cli\n"
        "for extra in (['--sampler', 'eulr'], ['--height', '63'], ['--style', 'x'],\n"
        "              ['--upscale', '9'], ['--prompts-file', 'gone.txt']):\n"
        "    assert cli.run(['sample', '--prompt', 'x', *extra]) == 2\n"
        "print('torch' in sys.modules)",
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_model_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for model, message in (("missing", "not found"), ("empty", "is not a model directory")):
        assert run(["sample", "--prompt", "x", "--model", str(tmp_path / model)]) == 2
        assert message in capsys.readouterr().err


def test_no_space_leaves_nothing_half_written(
    sample: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: Image.Image, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"\x89PNG, cut")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Image.Image, "save", full)
    assert sample("--prompt", "a cat") == 2
    assert "a-cat-seed0.png: No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_out_is_a_file(sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    assert sample("--prompt", "a cat") == 2
    assert "File exists" in capsys.readouterr().err


# Ctrl-C, the whole process: not -2, which is "killed by SIGINT"

STOPPED = """
import atexit, os, signal, sys, threading, time
import latentdiff.cli as cli

def again():
    os.kill(os.getpid(), signal.SIGINT)

def run(arguments):
    print("stopped", file=sys.stderr)
    print("on stdout")
    {then}
    return 130

cli.run = run
cli.main()
"""


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("pass", "on stdout\n"),
        ("again()", "on stdout\n"),  # while the first is told
        ("atexit.register(again)", "on stdout\n"),
        ("atexit.register(print, 'tidied up')", "on stdout\ntidied up\n"),
        (
            "threading.Timer(0.1, again).start(); threading.Timer(60, print).start()",
            "on stdout\n",  # without waiting for the other thread
        ),
        ("threading.Timer(0.1, print, ['waited for']).start()", "on stdout\nwaited for\n"),
        # as late as Python code runs, when SIGINT has its default action again
        (
            "class Last:\n"
            "        def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2)\n"
            "    sys.last = Last()",
            "on stdout\n",
        ),
    ],
)
def test_ctrl_c_is_130(run_python: Any, then: str, said: str) -> None:
    done = run_python("-c", STOPPED.format(then=then))
    assert (done.returncode, done.stdout, done.stderr) == (130, said, "stopped\n")


def test_other_ends_are_as_ever(run_python: Any) -> None:
    program = "import latentdiff.cli as cli\ncli.run = lambda arguments: {}\ncli.main()"
    assert run_python("-c", program.format(75)).returncode == 75
    done = run_python("-c", program.format("1 / 0"))
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("pause_s", [0.0, 0.001, 0.003, 0.01])
def test_many_ctrl_c_are_130(repository: Path, pause_s: float) -> None:
    program = (
        "import time\n"
        "import latentdiff.cli as cli\n"
        "def wait():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "cli._import_command = lambda name: cli.typer.main.get_command(app)\n"
        "app = cli.typer.Typer(add_completion=False)\n"
        "app.command('sample')(wait)\n"
        "import sys; sys.argv = ['latentdiff', 'sample']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
    process.communicate()
    assert process.returncode == 130
