"""What does a run say? Scalars as JSON lines and in the sinks, pictures, a live progress line."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentdiff.configfile import dump_config
from latentdiff.configtraining import LoggingConfig
from latentdiff.training.logsinks import Sink, check_sinks, cut_lines, open_sinks

if TYPE_CHECKING:
    from latentdiff.parallel import World

_RETRY_S = 600.0  # that a service which failed is left alone


def open_log(
    out: Path, config: Any, num_steps: int, first_step: int, world: World, logging: LoggingConfig
) -> RunLog:
    """The run's log on the first rank; on the others one that says nothing.

    Raises:
        ValueError: a sink's package is missing (on every rank), or its service cannot be used.
    """
    check_sinks(logging)
    if not world.is_first:
        return _Silent(out)
    return RunLog(out, config, num_steps, first_step, logging)


class RunLog:
    """The run directory's `config.yaml`, `metrics.jsonl`, `samples/`, and the sinks.

    Args:
        out: run directory, made if missing.
        config: the resolved config, saved.
        num_steps: for the ETA.
        first_step: steps done; what files hold of later ones is dropped.
        logging: the sinks.

    Raises:
        ValueError: a sink's package is missing, or its service cannot be used.
    """

    def __init__(
        self,
        out: Path,
        config: Any,
        num_steps: int,
        first_step: int,
        logging: LoggingConfig | None = None,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        self.out = out
        self.num_steps = num_steps
        self._sinks = open_sinks(logging or LoggingConfig(), out, config, first_step)
        self._retry_at = dict.fromkeys(self._sinks, 0.0)
        cut_lines(out / "metrics.jsonl", lambda line: json.loads(line)["step"], first_step)
        self._lines = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._start, self._first = time.monotonic(), first_step
        self._last, self._last_step = self._start, first_step

    def scalars(
        self, step: int, values: Mapping[str, float], samples_per_step: int | None = None
    ) -> None:
        """Write scalars and redraw the progress line.

        Args:
            step: optimiser steps done.
            values: name -> value; a name with a slash is in no progress line. What is not finite is
                null in `metrics.jsonl`, for JSON has no word for it.
            samples_per_step: adds `img_per_s` by this log's own clock.
        """
        now = time.monotonic()
        row = dict(values)
        if samples_per_step is not None:
            done = (step - self._last_step) * samples_per_step
            row["img_per_s"] = done / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        remaining = (self.num_steps - step) * (now - self._start) / max(step - self._first, 1)
        record = {"step": step, "seconds": round(now - self._start, 2)}
        record |= {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._lines.write(json.dumps(record, allow_nan=False) + "\n")
        self._lines.flush()
        self._tell(lambda sink: sink.scalars(step, row))
        shown = "  ".join(_shown(name, value) for name, value in row.items() if "/" not in name)
        last = step == self.num_steps
        self.line(f"step {step}/{self.num_steps}  ETA {_duration(remaining)}  {shown}", last)

    def line(self, text: str, final: bool = False) -> None:
        """One progress line: redrawn in a terminal, one after the other elsewhere."""
        if not sys.stderr.isatty():
            sys.stderr.write(f"{text}\n")
        else:  # a line that wraps could not be redrawn
            shown = text if final else text[: shutil.get_terminal_size().columns - 1]
            end = "\n" if final else ""
            sys.stderr.write(f"\r\x1b[2K{shown}{end}")
        sys.stderr.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Write `samples/NAME-STEP.png` and show it in the sinks."""
        path = _picture_path(self.out, step, name)
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self._tell(lambda sink: sink.picture(step, name, image, path))
        return path

    def close(self, failed: bool = False) -> None:
        """Flush and close the files; services are told whether the run failed."""
        self._lines.close()
        self._retry_at = dict.fromkeys(self._sinks, 0.0)
        self._tell(lambda sink: sink.close(failed))

    def __enter__(self) -> RunLog:
        """The log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, whatever happened."""
        self.close(failed=kind is not None)

    def _tell(self, say: Callable[[Sink], None]) -> None:
        """Say it to all sinks; a service that is away for a while ends no run."""
        for name, sink in self._sinks.items():
            if time.monotonic() < self._retry_at[name]:
                continue
            try:
                say(sink)
            except Exception as error:
                if sink.is_local:
                    raise
                self._retry_at[name] = time.monotonic() + _RETRY_S
                self.line(
                    f"warning: {name} failed ({type(error).__name__}: {error}); it is left alone "
                    f"for {_RETRY_S:.0f} s; metrics.jsonl and samples/ have everything",
                    final=True,
                )


class _Silent(RunLog):
    """The log of the other ranks."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def scalars(
        self, step: int, values: Mapping[str, float], samples_per_step: int | None = None
    ) -> None:
        """Nothing."""

    def line(self, text: str, final: bool = False) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Nothing; where the first rank writes it."""
        return _picture_path(self.out, step, name)

    def close(self, failed: bool = False) -> None:
        """Nothing."""


def _picture_path(out: Path, step: int, name: str) -> Path:
    return out / "samples" / f"{name}-{step:07d}.png"


def _shown(name: str, value: float) -> str:
    return f"{value:.1f} img/s" if name == "img_per_s" else f"{name} {value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
