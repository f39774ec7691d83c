"""When may the deep part of the U-Net be the one of an earlier step?

Between neighbouring steps the features deep in the U-Net hardly change, while the outer layers,
which see the noisy sample itself, do. DeepCache (Ma, Fang & Wang 2023, section 3) computes the
deep part at every N-th evaluation alone. It changes the picture: off unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from latentdiff.lean.unet import LeanUNet


@dataclass(frozen=True)
class Reuse:
    """Deep features from the last N-th evaluation.

    Attributes:
        interval: N; 1: nothing is reused.
        depth: number of the outermost skip connections that every evaluation computes, 1 or more:
            with 1 most is reused, with as many as there are the middle alone.

    Raises:
        ValueError: interval or depth below 1.
    """

    interval: int
    depth: int = 1

    def __post_init__(self) -> None:
        for name, value in ("interval", self.interval), ("depth", self.depth):
            if value < 1:
                raise ValueError(f"{name} of reused features must be 1 or more; got {value}")

    def predict(
        self,
        unet: LeanUNet,
        noisy: Tensor,
        time: Tensor,
        text: Tensor,
        step: int,
        deep: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation.

        Args:
            unet: the network.
            noisy: [b, c, h, w], as in `LeanUNet.forward`.
            time: likewise.
            text: likewise, [rows, n, k].
            step: number of this evaluation, from 0.
            deep: what the evaluation before this one returned; None: nothing to reuse.

        Returns:
            The prediction [rows, c_out, h, w], and what the next evaluation is to be given.
            Features of another number of rows, as where guidance sets in, are computed anew.

        Raises:
            ValueError: the U-Net has not so many skip connections.
        """
        most = len(unet.up)
        if self.depth > most:
            raise ValueError(
                f"the U-Net has {most} skip connections, but features are to be reused below the "
                f"first {self.depth}; give a depth from 1 to {most}"
            )
        if deep is None or len(deep) != len(text) or step % self.interval == 0:
            return unet.whole(noisy, time, text, self.depth)
        return unet.outer(noisy, time, text, deep, self.depth), deep
