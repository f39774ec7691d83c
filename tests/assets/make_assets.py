"""How are the small real shards beside this file made? Run it: see README.md here."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
from collections import defaultdict
from pathlib import Path

from data_pipelines.emoji import build_emoji
from data_pipelines.shards import Sample, ShardInfo, read_shard, write_shards

STYLES = ("fluent-3d", "fluent-flat", "fluent-highcontrast")  # all MIT
LANGUAGES = ("de", "es", "fr", "hi", "ja", "ru", "zh")  # and English
FIRST = ("1f34e", "1f431", "1f697", "1f600")  # red apple, cat face, automobile, grinning face
NUM_CONCEPTS = 67
NUM_VAL = 30
SHARD_SIZE = 64


def make_assets(out: Path, packages: Path | None = None) -> list[ShardInfo]:
    """Write `train-*.tar` and `val-*.tar` with 67 concepts in three styles at 64 px.

    Args:
        out: the folder for the shards.
        packages: folder of `npm pack` tarballs; fetched with npm by default.

    Returns:
        The shards.
    """
    by_concept: dict[str, list[Sample]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_emoji(Path(folder), 64, STYLES, packages, languages=LANGUAGES)
        for shard in manifest["shards"]:
            for entry in read_shard(Path(folder) / shard["name"]):
                metadata = json.loads(entry["json"])
                key, caption = entry["__key__"], entry["txt"].decode()
                sample = Sample(key, entry["png"], "png", caption, metadata)
                by_concept[metadata["codepoints"]].append(sample)

    whole = [concept for concept, samples in by_concept.items() if _is_usable(samples)]
    whole.sort(key=lambda concept: (concept not in FIRST, _digest(concept)))
    samples = [sample for concept in whole[:NUM_CONCEPTS] for sample in by_concept[concept]]
    samples.sort(key=lambda sample: _digest(sample.key))
    val, train = samples[:NUM_VAL], samples[NUM_VAL:]
    val = [dataclasses.replace(s, metadata={**s.metadata, "split": "val"}) for s in val]
    return [
        *write_shards(train, out, "train", SHARD_SIZE),
        *write_shards(val, out, "val", SHARD_SIZE),
    ]


def _is_usable(samples: list[Sample]) -> bool:
    """Whether a concept is there in all styles, for training, and neither a person nor a sign."""
    first = samples[0].metadata
    return (
        len(samples) == len(STYLES)
        and all(sample.metadata["split"] == "train" for sample in samples)
        and not first["skin_tone"]
        and first["group"] not in ("people-body", "symbols", "flags", "component")
    )


def _digest(name: str) -> bytes:
    return hashlib.md5(f"assets:{name}".encode()).digest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, help="folder of `npm pack` tarballs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    for info in make_assets(arguments.out, arguments.packages):
        print(f"{info.path.name}: {info.num_samples} pairs, {info.num_bytes} bytes")
