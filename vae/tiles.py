"""How is a large picture encoded or decoded in little memory? Tile by tile, image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]

# A tile's side, at least. In a smaller one the group norms see too little of the picture: at 32 px,
# which some configs name, colours change by a fifth of their range.
MIN_TILE_PX = 512


def tiled(
    network: Network, x: Tensor, tile_in: int, step_in: int, tile_out: int, step_out: int
) -> Tensor:
    """A network of pictures, run over tiles that overlap, the overlaps faded into one another.

    With the steps at three quarters of the tiles these are diffusers' tiles and numbers. Memory
    is that of the network at one tile, and of one row of tiles beside the result.

    Args:
        network: [b, c, h, w] -> [b, d, h * r, w * r], r = tile_out / tile_in.
        x: [b, c, h, w].
        tile_in: side of a tile of x.
        step_in: from one tile's start to the next one's.
        tile_out: side of the network's output for a tile.
        step_out: `step_in` there.

    Returns:
        [b, d, h * r, w * r].
    """
    fade = tile_out - step_out
    above: list[Tensor] = []
    rows: list[Tensor] = []
    for top in range(0, x.shape[2], step_in):
        row: list[Tensor] = []
        for column, left in enumerate(range(0, x.shape[3], step_in)):
            tile = network(x[:, :, top : top + tile_in, left : left + tile_in])
            if above:
                _fade(above[column], tile, fade, dim=2)
            if row:
                _fade(row[-1], tile, fade, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :step_out, :step_out] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def exactly_tiled(
    network: Network, x: Tensor, tile: int, reach: int, scale_in: int, scale_out: int
) -> Tensor:
    """A network without norms, run over tiles: the same numbers as over the whole, up to rounding.

    Args:
        network: [b, c, h, w] -> [b, d, h * r, w * r], r = scale_out / scale_in; each output depends
            on its own cell and `reach` cells around it.
        x: [b, c, h, w].
        tile: side of a tile in cells.
        reach: cells by which a tile looks over its edges.
        scale_in: side of a cell in x.
        scale_out: side of a cell in the output.

    Returns:
        [b, d, h * r, w * r].
    """
    rows = []
    for top, first_row, num_rows in _spans(x.shape[2] // scale_in, tile, reach):
        row = []
        for left, first, num in _spans(x.shape[3] // scale_in, tile, reach):
            seen = (top, top + first_row + num_rows + reach, left, left + first + num + reach)
            up, down, start, end = (side * scale_in for side in seen)
            out = network(x[:, :, up:down, start:end])
            out = out.narrow(2, first_row * scale_out, num_rows * scale_out)
            row.append(out.narrow(3, first * scale_out, num * scale_out).clone())
        rows.append(torch.cat(row, dim=3))
    return torch.cat(rows, dim=2)


def _spans(size: int, tile: int, reach: int) -> list[tuple[int, int, int]]:
    """(where a tile with its surroundings starts, its own first cell in there, its cells)."""
    spans = []
    for own in range(0, size, tile):
        start = max(0, own - reach)
        spans.append((start, own - start, min(tile, size - own)))
    return spans


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """The first `extent` rows (dim 2) or columns (dim 3) of `after`, faded in over `before`'s last.

    In place, so that the corner of four tiles is faded along both sides.
    """
    extent = min(extent, before.shape[dim], after.shape[dim])
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    start = after.narrow(dim, 0, extent)
    ramp = torch.arange(extent, device=after.device, dtype=torch.float32) / max(extent, 1)
    start.copy_(torch.lerp(end.float(), start.float(), ramp.view(-1, 1) if dim == 2 else ramp))


def sliced(network: Network, x: Tensor) -> Tensor:
    """The network, run on one picture of the batch after the other."""
    return torch.cat([network(one) for one in x.split(1)])
