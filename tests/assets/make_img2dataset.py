"""How were the shards in img2dataset/ made? By img2dataset itself; run it: see README.md here.

It fetches pictures of `train-000000.tar` from a server on this machine: twelve that are there, one
that is not, and one that is broken. Its table has columns such as LAION's.
"""

from __future__ import annotations

import argparse
import shutil
import tarfile
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import download  # pyright: ignore[reportAttributeAccessIssue]  # pyright takes the folder

NUM_PICTURES = 12
PORT = 18_080  # stands in the URLs that are kept
HERE = Path(__file__).parent


def make_shards(out: Path) -> None:
    """Write `00000.tar`, `00000.parquet`, `00000_stats.json` and so on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        captions = _pictures(HERE / "train-000000.tar", folder)
        (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        names = [*captions, "gone.png", "broken.png"]
        rows = range(len(names))
        table = pa.table(
            {
                "url": [f"http://127.0.0.1:{PORT}/{name}" for name in names],
                "caption": [captions.get(name, "nothing to see") for name in names],
                "similarity": [0.25 + 0.01 * row for row in rows],
                "pwatermark": [None if row == 3 else 0.05 * row for row in rows],
                "punsafe": [0.001 * row for row in rows],
                "aesthetic": [4.0 + 0.25 * row for row in rows],
                "LANGUAGE": [("en", "de", "nolang")[row % 3] for row in rows],
            }
        )
        pq.write_table(table, folder / "urls.parquet")
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", PORT), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            download(
                url_list=str(folder / "urls.parquet"),
                output_folder=str(folder / "out"),
                input_format="parquet",
                output_format="webdataset",
                url_col="url",
                caption_col="caption",
                save_additional_columns=table.column_names[2:],
                image_size=64,
                number_sample_per_shard=8,
                processes_count=1,
                thread_count=1,
            )
        finally:
            server.shutdown()
        out.mkdir(exist_ok=True)
        for path in sorted((folder / "out").glob("0000*")):
            shutil.copyfile(path, out / path.name)


def _pictures(tar: Path, folder: Path) -> dict[str, str]:
    """Put the first pictures of a tar into a folder; returns their captions by file name."""
    captions = {}
    with tarfile.open(tar) as shard:
        for member in shard:
            stem, _, extension = member.name.rpartition(".")
            data = shard.extractfile(member)
            assert data is not None
            if extension == "png":
                (folder / member.name).write_bytes(data.read())
            if extension == "txt":
                captions[f"{stem}.png"] = data.read().decode()
            if len(captions) == NUM_PICTURES:
                return captions
    raise ValueError(f"{tar} has fewer than {NUM_PICTURES} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "img2dataset")
    make_shards(parser.parse_args().out)
