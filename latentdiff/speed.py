"""How is a picture drawn fast, or in little memory? What may be asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from latentdiff.choices import ATTENTIONS, BACKENDS, QUANTISATIONS, check_choice

_MOST_MERGED = 0.75  # of each square of 2 x 2 tokens one stays
_OF_TORCH = ("attention", "compile", "low_memory", "reuse", "merge_tokens", "quantise")
_NOT_COMPILED = {
    "low_memory": "compiled networks stay where they are",
    "reuse": "it takes the U-Net apart",
}


@dataclass(frozen=True)
class Speed:
    """What `Pipeline.speed` may be; the last four fields buy speed or memory with quality.

    Attributes:
        attention: name of a kernel, or auto: what is measured to be the fastest.
        backend: what runs the U-Net: torch, openvino, or auto.
        compile: compile the U-Net with torch.compile.
        low_memory: keep only the network that runs on the device.
        tiled: encode and decode large pictures in overlapping tiles.
        sliced: encode and decode picture by picture.
        reuse: compute the U-Net's deep part in every so manyth step alone (DeepCache); 1 is off.
        merge_tokens: share of similar tokens that are merged before self-attention, up to 0.75
            (ToMe); 0 is off.
        quantise: weights in int8 or fp8.
        tiny_decoder: directory or hub id of an AutoencoderTiny that decodes.

    Raises:
        ValueError: an unknown name, a number out of range, or two that exclude each other.
    """

    attention: str = "auto"
    backend: str = "auto"
    compile: bool = False
    low_memory: bool = False
    tiled: bool = False
    sliced: bool = False
    reuse: int = 1
    merge_tokens: float = 0.0
    quantise: str | None = None
    tiny_decoder: str | None = None

    def __post_init__(self) -> None:
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("backend", self.backend, BACKENDS)
        if self.quantise is not None:
            check_choice("quantisation", self.quantise, QUANTISATIONS)
        if not isinstance(self.reuse, int) or self.reuse < 1:
            raise ValueError(
                f"--reuse must be a whole number from 1 on; got {self.reuse}; 1 is off, 3 is usual"
            )
        if not 0 <= self.merge_tokens <= _MOST_MERGED:
            raise ValueError(
                f"--merge-tokens must be in [0, {_MOST_MERGED}]; got {self.merge_tokens:g}; "
                "0 is off, 0.5 is usual"
            )
        asked = [name for name in _OF_TORCH if getattr(self, name) != getattr(Speed, name)]
        if self.backend == "openvino" and asked:
            option = asked[0].replace("_", "-")
            raise ValueError(
                f"--{option} is of --backend torch, but openvino is asked for; leave one of them "
                "out"
            )
        for name, reason in _NOT_COMPILED.items():
            if self.compile and getattr(self, name) != getattr(Speed, name):
                option = name.replace("_", "-")
                raise ValueError(
                    f"--compile and --{option} exclude each other: {reason}; leave one of them out"
                )
