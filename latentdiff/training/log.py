"""What does a run say? TensorBoard and JSON-lines scalars, pictures, a live progress line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from latentdiff.configfile import dump_config


class RunLog:
    """The run directory's `config.yaml`, `metrics.jsonl`, `tensorboard/` and `samples/`.

    Args:
        out: run directory, made if missing.
        config: the resolved config, saved.
        num_steps: for the ETA.
        first_step: where this process starts.
    """

    def __init__(self, out: Path, config: Any, num_steps: int, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        self.out = out
        self.num_steps = num_steps
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        _cut_after(out / "metrics.jsonl", first_step)
        self._lines = (out / "metrics.jsonl").open("a")
        self._start, self._first = time.monotonic(), first_step
        self._last, self._last_step = self._start, first_step

    def scalars(self, step: int, values: Mapping[str, float], samples_per_step: int) -> None:
        """Write scalars of optimiser step `step` (from 1) and redraw the progress line."""
        now = time.monotonic()
        rate = (step - self._last_step) * samples_per_step / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        remaining = (self.num_steps - step) * (now - self._start) / max(step - self._first, 1)
        row = {**values, "img_per_s": rate}
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        record = {"step": step, "seconds": round(now - self._start, 2), **row}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.line(
            f"step {step}/{self.num_steps}  {shown}  {rate:.1f} img/s  ETA {_duration(remaining)}",
            final=step == self.num_steps,
        )

    def line(self, text: str, final: bool = False) -> None:
        """One progress line: redrawn in a terminal, one after the other elsewhere."""
        live = sys.stderr.isatty()
        end = "\n" if final or not live else ""
        sys.stderr.write(f"\r\x1b[2K{text}{end}" if live else f"{text}\n")
        sys.stderr.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> Path:
        """Write `samples/NAME-STEP.png` and show it in TensorBoard."""
        import numpy as np

        path = self.out / "samples" / f"{name}-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush and close the files."""
        self._board.close()
        self._lines.close()

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
        self.close()


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of later steps, and half a line: the run that goes on writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = path.with_name(f".tmp-{path.name}")
        kept.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        kept.replace(path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
