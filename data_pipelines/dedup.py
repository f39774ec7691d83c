"""Which pictures come more than once, equal to the byte or alike to the eye?

Both answers are lists of rows to leave out, and depend on the data and its order alone:

- exact: of pictures with the same bytes the first stays, in the order of shards and rows;
- alike: the largest stays, of equal sizes the first. Pictures are taken in that order, and one is
  left out if it is within the distance of one that stays. So each that is left out has a likeness
  that stays, and a chain of small changes does not swallow what its ends do not share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from data_pipelines.members import read_members
from data_pipelines.phash import hash_shards, read_hashes
from data_pipelines.scan import Scan
from data_pipelines.shards import IMAGE_EXTENSIONS
from data_pipelines.storage import Storage

Progress = Callable[[str, int, int | None], None]

MAX_DISTANCE = 16
_BATCH_ROWS = 1 << 18
_ID_BITS = 37  # 1.4e11 rows
_MAX_PIXELS = (1 << 26) - 1
_HASH_BITS = 64
_STAYS, _REMOVED, _OPEN = 0, 1, 2
# the picture, or the latents where there is none
MEMBER = (
    f"coalesce(list_position([e IN {IMAGE_EXTENSIONS} FOR e IN extensions], true), "
    "list_position(extensions, 'latents.npy'))"
)


def exact_duplicates(
    scan: Scan,
    kept: np.ndarray,
    *,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Find pictures that equal an earlier one to the byte.

    Where all kept rows have a column `sha256` (img2dataset's: of the picture as it was fetched),
    it decides. Otherwise pictures of one size and CRC-32 are read and hashed.

    Args:
        scan: the index.
        kept: bits over all ids, uint8, little-endian; rows that are not kept are not compared.
        storage: reads the tars.
        progress: called with (stage, done, total).

    Yields:
        Ids to leave out, int64.

    Raises:
        StorageError: a tar cannot be read.
        ValueError: a tar has changed since it was indexed.
    """
    report = progress or (lambda stage, done, total: None)
    connection = scan.connection
    connection.execute("CREATE TABLE pictures (id BIGINT, hi UBIGINT, lo UBIGINT, start BIGINT)")
    if not _insert_sha256(scan, kept, report):
        connection.execute("DELETE FROM pictures")
        values = [f"{name}[{MEMBER}]" for name in ("sizes", "crcs", "offsets")]
        for group in range(len(scan.groups)):
            for ids, batch in scan.read(group, values, "fault IS NULL"):
                _insert(scan, "pictures", _only(kept, ids), ids, *(batch.columns[2:]))
            report("sizes", scan.groups[group].stop, len(scan.shards.urls))
        _confirm(scan, storage or Storage(), report)
    same = (
        "SELECT id FROM pictures JOIN (SELECT hi, lo, min(id) AS first FROM pictures "
        "GROUP BY hi, lo HAVING count(*) > 1) USING (hi, lo) WHERE id <> first"
    )
    yield from _columns(scan, same)
    connection.execute("DROP TABLE pictures")


def near_duplicates(
    scan: Scan,
    kept: np.ndarray,
    *,
    max_distance: int = 4,
    storage: Storage | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Find pictures whose perceptual hash is within some bits of one that stays.

    No pair is missed: the 64 bits are dealt into more bands than may differ, so that two hashes
    within the distance agree on some bands, and DuckDB joins the hashes on those.

    Args:
        scan: the index.
        kept: bits over all ids, uint8, little-endian; rows that are not kept are not compared.
        max_distance: bits that may differ, 0 to 16.
        storage: reads the tars and keeps the hashes.
        workers: processes that hash pictures; default: one a core.
        progress: called with (stage, done, total).

    Yields:
        Ids to leave out, int64.

    Raises:
        StorageError: a tar cannot be read.
        ValueError: a tar has changed since it was indexed, or the distance is out of range.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(
            f"max_distance must be 0 to {MAX_DISTANCE} bits of {_HASH_BITS}; got {max_distance}"
        )
    report = progress or (lambda stage, done, total: None)
    hash_shards(scan.shards, storage=storage, workers=workers, progress=progress)
    connection = scan.connection
    # place: sorts by size, then by id
    connection.execute("CREATE TABLE pictures (phash BIGINT, place UBIGINT)")
    assert scan.starts[-1] < 1 << _ID_BITS
    for shards in scan.groups:
        found = [_places(scan, shard, kept, storage) for shard in shards]
        hashes, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
        _insert(scan, "pictures", slice(None), hashes.view(np.int64), places)
        report("hashes", shards.stop, len(scan.shards.urls))
    connection.execute(
        "CREATE TABLE hashes AS SELECT phash, place, row_number() OVER (ORDER BY place) - 1 AS rank"
        " FROM (SELECT phash, min(place) AS place FROM pictures GROUP BY phash)"
    )
    _insert_removed(scan, max_distance, report)
    out = (
        f"SELECT CAST(p.place & {(1 << _ID_BITS) - 1} AS BIGINT) FROM pictures p "
        "JOIN hashes h USING (phash) WHERE p.place <> h.place "
        "OR EXISTS (SELECT 1 FROM removed r WHERE r.rank = h.rank)"
    )
    yield from _columns(scan, out)
    connection.execute("DROP TABLE pictures; DROP TABLE hashes; DROP TABLE removed")


def band_masks(num_hashes: int, max_distance: int) -> list[int]:
    """Bits on which hashes are compared first: two within the distance agree on one mask at least.

    The bits are dealt into `n` bands, of which `n - max_distance` make a mask. More bands give more
    masks, of more bits each: more joins, with fewer pairs each. The cheapest number is taken.
    """

    def cost(num_bands: int) -> float:
        masks = comb(num_bands, max_distance)
        bits = _HASH_BITS * (num_bands - max_distance) / num_bands
        pairs = num_hashes**2 / 2 ** (0.75 * bits)  # the bits are not independent
        return masks * (30 * num_hashes + pairs)  # a row costs as much as 30 pairs

    num_bands = min(range(max_distance + 1, max_distance + 9), key=cost)
    bands = [sum(1 << bit for bit in range(i, _HASH_BITS, num_bands)) for i in range(num_bands)]
    return [sum(chosen) for chosen in combinations(bands, num_bands - max_distance)]


def first_come(earlier: np.ndarray, later: np.ndarray, removed: np.ndarray) -> None:
    """Leave out each that is paired with an earlier one that stays.

    Args:
        earlier: of each pair, int64.
        later: of each pair, ascending; all pairs of one number come in one call.
        removed: bool, what is known so far; the later ones are decided in place.
    """
    numbers, group = np.unique(later, return_inverse=True)
    place = np.minimum(np.searchsorted(numbers, earlier), len(numbers) - 1)
    is_open = numbers[place] == earlier  # is decided in this call, too
    known = np.where(removed[earlier], _REMOVED, _STAYS)
    state = np.full(len(numbers), _OPEN)
    while len(group):
        before = np.where(is_open, state[place], known)
        state[group[before == _STAYS]] = _REMOVED
        waits = np.zeros(len(numbers), dtype=bool)
        waits[group[before == _OPEN]] = True
        state[(state == _OPEN) & ~waits] = _STAYS
        left = state[group] == _OPEN
        group, place, is_open, known = group[left], place[left], is_open[left], known[left]
    removed[numbers] = state == _REMOVED


def _insert_sha256(scan: Scan, kept: np.ndarray, report: Progress) -> bool:
    """Take the metadata's hashes; False if a kept row has none."""
    name = next((name for name in scan.columns if name.lower() == "sha256"), None)
    if name is None or scan.columns[name] != "VARCHAR":
        return False
    halves = [
        f"CASE WHEN length(sha256) = 64 THEN try_cast('0x' || sha256[{part}] AS UBIGINT) END"
        for part in ("1:16", "17:32")
    ]
    for group in range(len(scan.groups)):
        for ids, batch in scan.read(group, halves, "fault IS NULL"):
            wanted = _only(kept, ids)
            columns = [column.filter(wanted) for column in batch.columns[2:]]
            if any(column.null_count for column in columns):
                return False
            _insert(
                scan, "pictures", slice(None), ids[wanted], *columns, np.zeros_like(ids[wanted])
            )
        report("sha256", scan.groups[group].stop, len(scan.shards.urls))
    return True


def _confirm(scan: Scan, storage: Storage, report: Progress) -> None:
    """Replace sizes and CRCs of the candidates by the SHA-256 of their bytes."""
    connection = scan.connection
    connection.execute(
        "CREATE TABLE candidates AS SELECT id, hi AS size, lo AS crc, start FROM pictures "
        "JOIN (SELECT hi, lo FROM pictures GROUP BY hi, lo HAVING count(*) > 1) USING (hi, lo)"
    )
    connection.execute("DELETE FROM pictures")
    total, done = scan.count("candidates"), 0

    def hashes(part: tuple[int, list[list[int]]]) -> list[bytes]:
        shard, (offsets, sizes, crcs) = part
        payloads = read_members(storage, scan.shards.urls[shard], offsets, sizes, crcs)
        return [hashlib.sha256(payload).digest()[:16] for payload in payloads]

    with ThreadPoolExecutor(8) as pool:
        for batch in scan.stream("SELECT id, start, size, crc FROM candidates ORDER BY id"):
            ids, *places = (column.to_numpy() for column in batch.columns)
            shards = np.searchsorted(scan.starts, ids, side="right") - 1
            cuts = np.flatnonzero(np.diff(shards)) + 1
            columns = [np.split(values, cuts) for values in places]
            parts = [
                (int(part[0]), [column[i].tolist() for column in columns])
                for i, part in enumerate(np.split(shards, cuts))
            ]
            digests = b"".join(b"".join(found) for found in pool.map(hashes, parts))
            halves = np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)
            _insert(scan, "pictures", slice(None), ids, *halves.T, np.zeros_like(ids))
            done += len(ids)
            report("equal pictures", done, total)
    connection.execute("DROP TABLE candidates")


def _places(
    scan: Scan, shard: int, kept: np.ndarray, storage: Storage | None
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the kept pictures of a shard, and what sorts them."""
    read = read_hashes(scan.shards.sidecars[shard], scan.shards.digests[shard], storage)
    if read is None:
        raise ValueError(
            f"the hashes of {scan.shards.urls[shard]} vanished while they were read; select again"
        )
    rows, hashes, pixels = read
    ids = scan.starts[shard] + rows
    wanted = _only(kept, ids)
    smaller = (_MAX_PIXELS - np.minimum(pixels, _MAX_PIXELS)).astype(np.uint64)
    return hashes[wanted], (smaller << np.uint64(_ID_BITS) | ids.astype(np.uint64))[wanted]


def _insert_removed(scan: Scan, max_distance: int, report: Progress) -> None:
    """Make a table of the hashes that are near one that stays."""
    connection = scan.connection
    connection.execute("CREATE TABLE removed (rank BIGINT)")
    num_hashes = scan.count("hashes")
    if max_distance == 0 or num_hashes < 2:
        return
    connection.execute("CREATE TABLE pairs (later BIGINT, earlier BIGINT)")
    masks = band_masks(num_hashes, max_distance)
    for done, mask in enumerate(masks, 1):
        signed = mask - (1 << _HASH_BITS) if mask >> (_HASH_BITS - 1) else mask
        connection.execute(
            "INSERT INTO pairs SELECT a.rank, b.rank FROM hashes a JOIN hashes b "
            f"ON (a.phash & {signed}) = (b.phash & {signed}) AND a.rank > b.rank "
            f"AND bit_count(xor(a.phash, b.phash)) <= {max_distance}"
        )
        report("near pairs", done, len(masks))
    removed = np.zeros(num_hashes, dtype=bool)
    held = np.zeros((2, 0), dtype=np.int64)  # pairs of the number that may go on
    for batch in scan.stream("SELECT DISTINCT later, earlier FROM pairs ORDER BY later"):
        new = np.stack([column.to_numpy() for column in batch.columns])
        held = np.concatenate([held, new], axis=1)
        whole = int(np.searchsorted(held[0], held[0, -1]))
        if whole:
            first_come(held[1, :whole], held[0, :whole], removed)
        held = held[:, whole:]
    if held.size:
        first_come(held[1], held[0], removed)
    ranks = np.flatnonzero(removed)
    for start in range(0, len(ranks), _BATCH_ROWS):
        _insert(scan, "removed", slice(None), ranks[start : start + _BATCH_ROWS])
    connection.execute("DROP TABLE pairs")


def _insert(scan: Scan, table: str, which: Any, *columns: Any) -> None:
    """Append rows; `which` of them is a mask or a slice."""
    import pyarrow as pa

    arrays = [pa.array(column) if isinstance(column, np.ndarray) else column for column in columns]
    batch = pa.table(arrays, names=[f"c{i}" for i in range(len(arrays))])
    if not isinstance(which, slice):
        batch = batch.filter(pa.array(which))
    scan.connection.register("batch", batch)
    scan.connection.execute(f"INSERT INTO {table} SELECT * FROM batch")
    scan.connection.unregister("batch")


def _columns(scan: Scan, sql: str) -> Iterator[np.ndarray]:
    """The values of a query's first column, in batches."""
    for batch in scan.stream(sql):
        yield batch.column(0).to_numpy()


def _only(bits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which ids have their bit set."""
    return (bits[ids >> 3] >> (ids & 7).astype(np.uint8) & 1).astype(bool)
