"""How much GPU memory does drawing need? A table by phase and way, computed on any machine.

python benchmarks/sample_memory.py                          Stable Diffusion 1.x at 512 px, float16
python benchmarks/sample_memory.py --model DIR --size 768   another model, another size
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from latentdiff.sampling_memory import (
    LOW_MEMORY,
    STABLE_DIFFUSION_1,
    Configs,
    SamplingMemory,
    Way,
    sampling_memory,
)

MB = 10**6
_PHASES = ("text tower", "step", "decoder", "decoder again")  # in float32, after an overflow


def ways(size_px: int) -> dict[str, Way]:
    """What is compared, by name."""
    usual = Way(height=size_px, width=size_px)
    low = replace(LOW_MEMORY, height=size_px, width=size_px)
    return {
        "all networks on the GPU": usual,
        "the same, attention math": replace(usual, attention="math"),
        "the same, attention sliced": replace(usual, attention="sliced"),
        "the same, float32": replace(usual, dtype=torch.float32),
        "the same, 8 pictures": replace(usual, batch_size=8),
        "--low-memory": low,
        "--low-memory, attention sliced": replace(low, attention="sliced"),
        "--low-memory, attention math": replace(low, attention="math"),
        "--low-memory, decoder without tiles": replace(low, is_tiled=False),
    }


def table(rows: Iterable[tuple[str, SamplingMemory]]) -> list[str]:
    """Markdown: what is on the GPU at most, phase by phase, in MB of 10^6 bytes."""
    columns = ("way", *_PHASES, "peak")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, memory in rows:
        phases = {phase.name: phase for phase in memory.phases}
        cells = [
            f"{memory.held(phases[phase]) / MB:,.0f}" if phase in phases else "-"
            for phase in _PHASES
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {memory.peak / MB:,.0f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the weights and the table."""
    parser = argparse.ArgumentParser(description="GPU memory of drawing, computed.")
    parser.add_argument("--model", type=Path, help="model directory; default: Stable Diffusion 1.x")
    parser.add_argument("--size", type=int, default=512, help="side of a picture in pixels")
    options = parser.parse_args(arguments)
    configs = STABLE_DIFFUSION_1 if options.model is None else Configs.read(options.model)
    found = {name: sampling_memory(configs, way) for name, way in ways(options.size).items()}
    weights = {p.name: p.weights for p in next(iter(found.values())).phases}
    print(
        f"{options.model or 'Stable Diffusion 1.x'}, {options.size}x{options.size} px, float16, "
        "guided, MB of 10^6 bytes; decoder again: in float32, after an overflow.\n"
        f"Weights: text tower {weights['text tower'] / MB:,.0f}, "
        f"U-Net {weights['step'] / MB:,.0f}, autoencoder {weights['decoder'] / MB:,.0f}.\n"
        "CUDA's context and the workspaces of cuDNN come on top. "
        f"torch {torch.__version__}.\n"
    )
    print("\n".join(table(found.items())))


if __name__ == "__main__":
    main()
