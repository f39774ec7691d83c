"""What may run the U-Net instead of plain PyTorch? `Run` is what each of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# the signature of LeanUNet.forward: (noisy, time, text) -> prediction
Run = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
