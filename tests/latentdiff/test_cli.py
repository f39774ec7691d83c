"""Does `latentdiff` load only what it runs, and tell a user's mistake in one line?"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml

from latentdiff import __version__, cli


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a function, or a Typer, the command `try`."""

    def install(target: Any) -> None:
        module = ModuleType("latentdiff_command_under_test")
        module.__dict__["target"] = target
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entry = cli._Entry(f"{module.__name__}:target", "Try something.")
        monkeypatch.setitem(cli.COMMANDS, "try", entry)

    return install


def test_help_lists_every_command_and_imports_none(run_python: Any) -> None:
    done = run_python(
        "-c",
        "import sys, latentdiff.cli as cli; code = cli.run(['--help']);"
        "print([name for name in sys.modules if name.startswith('latentdiff.')]); sys.exit(code)",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "['latentdiff.exitcodes', 'latentdiff.cli']"
    for name, entry in cli.COMMANDS.items():
        assert name in done.stdout
        assert entry.summary in done.stdout


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    alone = capsys.readouterr().out
    assert cli.run(["--help"]) == 0
    assert capsys.readouterr().out == alone


def test_version(run_latentdiff: Any) -> None:
    done = run_latentdiff("--version")
    assert (done.returncode, done.stdout) == (0, f"latentdiff {__version__}\n")


COMMAND_LINES = [
    *("sample", "train", "explain", "config", "vae train", "vae reconstruct"),
    *("data emoji", "data make", "data show", "data index", "data verify", "data select"),
    *("data stats", "data precompute", "data read"),
    *("checkpoint inspect", "checkpoint export", "doctor"),
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_help_of_a_command_has_an_example_and_imports_no_torch(run_python: Any, line: str) -> None:
    done = run_python(
        "-c",
        f"import sys, latentdiff.cli as cli; code = cli.run([*{line.split()}, '--help']);"
        "print('torch' in sys.modules); sys.exit(code)",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Example: latentdiff {line}" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_every_command_is_among_those_lines() -> None:
    assert {line.split()[0] for line in COMMAND_LINES} == set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tyr"], r"No such command 'tyr'. Did you mean 'try'\? \(see latentdiff --help\)"),
        (["--nope"], r"No such option.*--nope.* \(see latentdiff --help\)"),
        (["try", "--siz", "3"], r"No such option.*--siz.*--size.* \(see latentdiff try --help\)"),
        (["try", "--size", "x"], r"Invalid value for '--size': .* \(see latentdiff try --help\)"),
        (["try", "extra"], r"Got unexpected extra argument.*extra.* \(see latentdiff try --help\)"),
    ],
)
def test_wrong_usage_is_one_line(
    command: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    def sized(size: int = 1) -> None:
        raise AssertionError("never reached")

    command(sized)
    assert cli.run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"error: {line}\n", err)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("steps must be > 0; got -1; try 20"), "steps must be > 0; got -1; try 20"),
        (ValueError(), "ValueError"),
        (ValueError("a: missing\nb: missing"), "a: missing\n       b: missing"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.png"),
         "x.png: No such file or directory"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), "/root: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("x is not a model"), "x is not a model"),
    ],
)  # fmt: skip
def test_mistake_is_told_without_a_traceback(
    command: Any, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    def failing() -> None:
        raise error

    command(failing)
    assert cli.run(["try"]) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")


def test_our_own_mistake_keeps_its_traceback(command: Any) -> None:
    def failing() -> None:
        raise AssertionError("ours")

    command(failing)
    with pytest.raises(AssertionError, match="ours"):
        cli.run(["try"])


def test_debug_shows_the_traceback(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise ValueError("where from?")

    command(failing)
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    with pytest.raises(ValueError, match="where from"):
        cli.run(["try"])


def test_interrupt_exits_with_130(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    command(interrupted)
    assert cli.run(["try"]) == 130
    assert capsys.readouterr() == ("", "\nstopped\n")


def test_exit_code_of_a_command_is_kept(command: Any) -> None:
    def leaving(code: int) -> None:
        raise typer.Exit(code)

    command(leaving)
    assert cli.run(["try", "7"]) == 7
    assert cli.run(["try", "0"]) == 0


def test_command_with_commands_of_its_own(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def only(size: int = 1) -> None:
        print("size", size)

    command(app)
    assert cli.run(["try"]) == 2
    assert capsys.readouterr().err == "error: Missing command. (see latentdiff try --help)\n"
    assert cli.run(["try", "only", "--size", "3"]) == 0
    assert cli.run(["try", "other"]) == 2
    out, err = capsys.readouterr()
    assert out == "size 3\n"
    assert err == "error: No such command 'other'. (see latentdiff try --help)\n"


def test_other_libraries_are_quiet_and_our_warnings_are_one_line(run_python: Any) -> None:
    program = """
import logging, os, warnings
from latentdiff.cli import quiet_libraries
quiet_libraries()
for package in ("somelibrary.part", "latentdiff.part", "vaex"):
    exec("import warnings; warnings.warn('from ' + __name__)", {"__name__": package})
    logging.getLogger(package).warning("logged by %s", package)
print(os.environ["TRANSFORMERS_VERBOSITY"], os.environ["DIFFUSERS_VERBOSITY"])
"""
    done = run_python("-c", program, DIFFUSERS_VERBOSITY="info")
    assert done.stderr == ("warning: from latentdiff.part\nWARNING: logged by latentdiff.part\n")
    assert done.stdout == "error info\n"


def test_config_prints_the_resolved_yaml(run_latentdiff: Any) -> None:
    done = run_latentdiff("config", "vae_emoji", "optimizer.lr=1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    values = yaml.safe_load(done.stdout)
    assert values["optimizer"]["lr"] == 1e-3
    assert values["optimizer"]["betas"] == [0.9, 0.999]  # a default


def test_config_with_a_typo_names_the_key(run_latentdiff: Any) -> None:
    done = run_latentdiff("config", "vae_emoji", "optimizer.lrr=1e-3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: optimizer.lrr: unknown key; did you mean optimizer.lr? known keys: kind, lr, "
    )
    assert done.stderr.count("\n") == 1
