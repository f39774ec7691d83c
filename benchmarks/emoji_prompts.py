"""Which 64 prompts show what the model in the box can do? 32 seen, 32 never seen together.

    python benchmarks/emoji_prompts.py data/emoji docs/prompts/emoji_64.txt

The first 32 lines are captions of training pictures, the last 32 of `test_pair` cells: the thing
was seen in other styles, the style with other things, never the two together. Both are drawn by a
fixed seed from what the config `ldm_emoji` lets in.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data_pipelines.config import CaptionConfig, DataConfig
from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun, load

SEED = 0


def captions(data: Path, split: str, trained: DataConfig, count: int) -> list[str]:
    """`count` captions of a split, no thing twice."""
    both = CaptionConfig(templates={"{family}\t{text}": 1.0})
    config = DataConfig(shards=(str(data / f"{split}-*.tar"),), where=trained.where, captions=both)
    loader = Loader(config, SEED, 1, with_images=False)
    chosen: dict[str, str] = {}
    for i in np.random.default_rng(SEED).permutation(len(loader)):
        (caption,) = loader.captions(i, [0])
        chosen.setdefault(*caption.split("\t"))
        if len(chosen) == count:
            break
    return list(chosen.values())


def main() -> None:
    """Parse the two paths and write the file."""
    parser = argparse.ArgumentParser(description="Choose the 64 prompts.")
    parser.add_argument("data", type=Path, help="what `latentdiff data emoji` made")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = load("ldm_emoji")
    assert isinstance(config, DiffusionRun)
    lines = [
        caption
        for split in ("train", "test_pair")
        for caption in captions(arguments.data, split, config.data, 32)
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
