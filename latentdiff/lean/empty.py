"""Which modules leave their weights unfilled, for they come from a file?

Filling them with random numbers first costs more than all else in building a network, even on
the meta device.
"""

from __future__ import annotations

from torch import nn


class _Empty(nn.Module):
    def reset_parameters(self) -> None:
        """Fill nothing."""


class Linear(_Empty, nn.Linear):
    """nn.Linear without first weights."""


class Conv2d(_Empty, nn.Conv2d):
    """nn.Conv2d without first weights."""


class GroupNorm(_Empty, nn.GroupNorm):
    """nn.GroupNorm without first weights."""


class LayerNorm(_Empty, nn.LayerNorm):
    """nn.LayerNorm without first weights."""
