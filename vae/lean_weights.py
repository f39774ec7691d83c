"""Do a file's weights fit a lean autoencoder? One by one, and none is left over."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def taken(weights: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """The weight of that name, taken out of `weights`.

    Raises:
        ValueError: there is none, or it has another shape.
    """
    value = weights.pop(name, None)
    if value is not None and len(shape) == 2:
        value = value.flatten(1)  # attention's layers were 1x1 convolutions once
    if value is None or value.shape != shape:
        found = "there is none" if value is None else f"it is {tuple(value.shape)}"
        raise ValueError(
            f"an autoencoder of this config.json has {name} of shape {tuple(shape)}; {found}; "
            "give the config and weights of one model"
        )
    return value


def refuse_others(weights: Mapping[str, Tensor]) -> None:
    """What is left when all weights are taken: nothing.

    Raises:
        ValueError: there are more.
    """
    if weights:
        raise ValueError(
            f"{len(weights)} weights have no place in an autoencoder of this config.json, among "
            f"them {min(weights)}; give the config and weights of one model"
        )
