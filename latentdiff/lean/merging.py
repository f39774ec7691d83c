"""How can self-attention take fewer tokens? By merging those that are alike.

Token merging (Bolya et al. 2023; for Stable Diffusion: Bolya & Hoffman 2023): of each 2 x 2 pixels
one is a target; the r other tokens that are most like a target are averaged into it, self-attention
sees n - r tokens, and each merged token gets its target's result. It changes the picture: off
unless asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.lean.blocks import Reduce, Spread, Transformer, TransformerLayer
from latentdiff.lean.unet import LeanUNet

MOST = 0.75  # the targets, a quarter of the tokens, remain


def merge_tokens(unet: LeanUNet, ratio: float, num_levels: int = 1) -> None:
    """Let the self-attention of the largest images take fewer tokens.

    Args:
        unet: which is changed; `ratio` 0 undoes it.
        ratio: part of the tokens that is merged away, 0 to 0.75.
        num_levels: of how many sizes of image, of those with transformers, from the largest on.

    Raises:
        ValueError: a ratio or number of levels outside that.
    """
    if not 0 <= ratio <= MOST:
        raise ValueError(
            f"the ratio of merged tokens must be from 0 to {MOST}, for one of each 2 x 2 remains; "
            f"got {ratio}"
        )
    levels = sorted({layer.level for layer in unet.shape.layers if layer.transformer})
    if not 1 <= num_levels <= len(levels):
        raise ValueError(
            f"tokens can be merged at 1 to {len(levels)} sizes of this U-Net; got {num_levels}"
        )
    position = 0
    layers = [*unet.down, *unet.middle, *unet.up]
    for shape, layer in zip(unet.shape.layers, layers, strict=True):
        is_merged = shape.level in levels[:num_levels] and ratio > 0
        if isinstance(layer.transformer, Transformer):
            for part in layer.transformer.layers:
                assert isinstance(part, TransformerLayer)
                part.reduce = _reducing(ratio, position) if is_merged else None
                position += 1


def _reducing(ratio: float, position: int) -> Reduce:
    """`merged` with its choices made.

    The paper draws each target's place in its 2 x 2 pixels at random; here it changes from layer
    to layer, so that a picture is the same whenever it is drawn.
    """
    row, column = divmod(position % 4, 2)

    def reduce(x: Tensor, y: Tensor, size: tuple[int, int]) -> tuple[Tensor, Spread]:
        sources, targets = _split(size, row, column, x.device)
        return merged(x, y, sources, targets, int(ratio * x.shape[1]))

    return reduce


def _split(
    size: tuple[int, int], row: int, column: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Indices of the tokens that may be merged and of those that they are merged into."""
    h, w = size
    row, column = min(row, h - 1), min(column, w - 1)  # an image may be one pixel high
    grid = torch.arange(h * w, device=device).view(h, w)
    others = [(1 - row, column), (row, 1 - column), (1 - row, 1 - column)]
    sources = torch.cat([grid[i::2, j::2].flatten() for i, j in others])
    return sources, grid[row::2, column::2].flatten()


def merged(
    x: Tensor, y: Tensor, sources: Tensor, targets: Tensor, num_merged: int
) -> tuple[Tensor, Spread]:
    """The tokens y with the most alike merged.

    Args:
        x: [b, n, c], by which likeness is judged.
        y: [b, n, c], which are merged.
        sources: indices of the tokens that may be merged.
        targets: indices of those that they are merged into; with sources, each of n once.
        num_merged: r; at most the number of sources are merged.

    Returns:
        [b, n - r, c], and what brings a result for these tokens back to all [b, n, c].
    """
    num_merged = min(num_merged, len(sources))
    num_kept = len(sources) - num_merged
    unit = F.normalize(x, dim=-1)
    likeness, target = (unit[:, sources] @ unit[:, targets].mT).max(-1)  # [b, sources]
    order = likeness.argsort(descending=True, stable=True)
    gone, kept = order[:, :num_merged], order[:, num_merged:]

    # a product with zeros and ones adds in the same order always; a scatter on a GPU does not
    slots = torch.arange(len(targets), device=x.device)
    goes_to = (target.gather(1, gone)[:, None] == slots[:, None]).to(y.dtype)  # [b, targets, r]
    from_sources = y[:, sources]
    added = goes_to @ _rows(from_sources, gone)
    mean = (y[:, targets] + added) / (1 + goes_to.sum(-1, keepdim=True))
    few = torch.cat([_rows(from_sources, kept), mean], 1)

    rank = order.argsort()  # of each source in the order of likeness
    place = torch.where(rank < num_merged, num_kept + target, rank - num_merged)
    place = torch.cat([place, (num_kept + slots).expand(len(x), -1)], 1)
    place = place[:, torch.cat([sources, targets]).argsort()]  # [b, n]
    return few, lambda result: _rows(result, place)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Of tokens [b, n, c], index [b, m] -> [b, m, c]."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
