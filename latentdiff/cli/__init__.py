"""What does the shell command `latentdiff` do: which commands, loaded when, failing how?"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from latentdiff import __version__
from latentdiff.exitcodes import INTERRUPTED, USERS_MISTAKE, RunEnded

DEBUG_VARIABLE = "LATENTDIFF_DEBUG"  # set to 1 for the traceback of an error
_OUR_PACKAGES = ("latentdiff", "vae", "data_pipelines")
_QUIET_ENVIRONMENT = {  # what the user has set stays
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "DIFFUSERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


class _Entry(NamedTuple):
    """Where a command is, and what `--help` says of it before it is imported."""

    target: str  # module:function, or module:app of a command with commands of its own
    summary: str


COMMANDS = {
    "sample": _Entry("latentdiff.cli.sample:sample", "Draw pictures from text prompts."),
    "train": _Entry("latentdiff.cli.train:train", "Train a model from a config."),
    "vae": _Entry("latentdiff.cli.vae:app", "Train and judge autoencoders: train, reconstruct."),
    "data": _Entry("latentdiff.cli.data:app", "Make, index, choose and read data: tars of images."),
    "checkpoint": _Entry(
        "latentdiff.cli.checkpoint:app", "Look into checkpoints; make models of them."
    ),
    "explain": _Entry(
        "latentdiff.cli.explain:explain", "Show how a model draws, on a page to read."
    ),
    "config": _Entry("latentdiff.cli.config:config", "Print a config with every default resolved."),
    "doctor": _Entry("latentdiff.cli.doctor:doctor", "Show what this machine can do."),
}


class _LazyGroup(TyperGroup):
    """Commands from the table above: listed without an import, imported when one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, placeholder, rest = super().resolve_command(ctx, args)
        return name, placeholder and _import_command(str(name)), rest


def _import_command(name: str) -> Any:
    """Imports a command's module and returns the command itself."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    target = getattr(import_module(module), attribute)
    if isinstance(target, typer.Typer):
        return typer.main.get_group(target)
    alone = typer.Typer(add_completion=False)
    alone.command(name)(target)
    return typer.main.get_command(alone)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"latentdiff {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train, fine-tune and sample text-to-image diffusion models.

    Example: latentdiff sample --prompt "a red apple"
    """


def _build() -> TyperGroup:
    """Builds the root command, with a placeholder for every command that is not yet imported."""
    app = typer.Typer(cls=_LazyGroup, add_completion=False)
    app.callback()(_root)
    group = typer.main.get_group(app)
    for name, entry in COMMANDS.items():
        group.add_command(TyperCommand(name, help=entry.summary))
    return group


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.

    A mistake (a wrong option, any ValueError or OSError) is told in one line on stderr. A training
    run that ends before its time says why, and has a code of its own (`latentdiff.exitcodes`).
    """
    try:
        code = _build().main(list(arguments) or ["--help"], "latentdiff", standalone_mode=False)
    except typer.TyperException as error:  # a wrong option or argument
        context, message = getattr(error, "ctx", None), error.format_message().strip()
        if not message:  # a command with commands of its own, alone: typer has printed its help
            return error.exit_code
        hint = f" (see {context.command_path} --help)" if context else ""
        return _fail(error, f"{message}{hint}", error.exit_code)
    except typer.Abort as error:
        return _fail(error, "stopped", INTERRUPTED)
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(error, f"{place}{error.strerror}" if error.strerror else str(error))
    except (ValueError, FloatingPointError) as error:
        return _fail(error, str(error))
    except RunEnded as error:
        return _fail(error, str(error), error.code)
    if code == INTERRUPTED:  # typer's word for Ctrl-C
        print("\nstopped", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(error: BaseException, message: str, code: int = USERS_MISTAKE) -> int:
    """Prints one error, and where it came from if the user asks to debug."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        raise error
    lines = message.strip().splitlines() or [type(error).__name__]
    print("\n       ".join(["error: " + lines[0], *lines[1:]]), file=sys.stderr)
    return code


def quiet_libraries() -> None:
    """Silences other libraries' advice, warnings and progress bars; our own warnings stay."""
    for variable, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    for package in _OUR_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    if not sys.warnoptions:  # python -W and PYTHONWARNINGS have the last word
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=rf"({'|'.join(_OUR_PACKAGES)})(\.|\Z)")
        warnings.showwarning = _show_warning


def _show_warning(message: Any, *_: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Runs the shell's command line; the entry point of `latentdiff`."""
    codes: list[int] = []
    # first in, so last out: after threads have been waited for, and all that others registered
    atexit.register(_leave_if_interrupted, codes)
    sys.excepthook = _tell_or_leave
    quiet_libraries()
    codes.append(run(sys.argv[1:]))
    if codes[0] == INTERRUPTED:
        signal.signal(signal.SIGINT, _leave)  # one more Ctrl-C does not wait for threads
    if "triton" not in sys.modules:  # whose own check takes what is frozen for a leak
        gc.freeze()  # or Python looks for garbage in all that torch is, 0.5 s, before it ends
    sys.exit(codes[0])


def _leave_if_interrupted(codes: Sequence[int]) -> None:
    if INTERRUPTED in codes:
        _leave()


def _tell_or_leave(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):  # the second Ctrl-C, while the first one is told
        _leave()
    sys.__excepthook__(kind, error, trace)


def _leave(*_: object) -> None:
    """Ends the process at once, with Ctrl-C's code for certain.

    Left to itself, Python kills itself by SIGINT where a second one is not caught, and lets SIGINT
    kill it while it takes itself down: a shell would see -2.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError):  # no reader; closed; flushed just now
            stream.flush()
    os._exit(INTERRUPTED)
