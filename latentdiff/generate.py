"""How does one call become pictures? Cut into batches, drawn, decoded, one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.pixels import to_images
from latentdiff.backends.precision import finite_or_again
from latentdiff.call import Call, Preview
from latentdiff.editing import Known, larger, mask_of_cells, seeing, slerp
from latentdiff.inference import Inference
from latentdiff.randomness import normal
from latentdiff.samplers import Callback

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


@torch.inference_mode()
def stream(
    model: Pipeline,
    call: Call,
    indices: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    preview: Preview | None = None,
) -> Iterator[tuple[int, Image.Image]]:
    """Draw the pictures of a call, batch by batch.

    Args:
        model: what draws.
        call: of `plan`.
        indices: which pictures; default: all.
        progress: called with b after each step of b pictures.
        preview: called after each step.

    Raises:
        ValueError: an index is none of the call's.

    Yields:
        (number of the picture, picture), as they are done.
    """
    total = len(call.prompts)
    wanted = range(total) if indices is None else indices
    if outside := [i for i in wanted if not 0 <= i < total]:
        raise ValueError(
            f"indices must be in 0..{total - 1}, the pictures of the call; got {outside[0]}"
        )
    inference = model.inference()
    with _finisher(inference) as finish:
        pending: deque[tuple[list[int], Future[list[Image.Image]]]] = deque()
        try:
            for batch in batches(call, wanted, inference):
                z = _finite_latents(model, inference, call, batch, progress, preview)
                pending.append((batch, finish(_finished, inference, call, batch, z)))
                # a batch that is being decoded may wait: the GPU has the next one to work on
                while len(pending) > 1 or (pending and pending[0][1].done()):
                    yield from _result(pending)
        except KeyboardInterrupt:  # what is drawn is not lost
            while pending:
                yield from _result(pending)
            raise
        while pending:
            yield from _result(pending)


@torch.inference_mode()
def draw_one(model: Pipeline, call: Call, index: int) -> tuple[Tensor, Tensor]:
    """One picture of a call: clean latents [c, h, w] and pixels [3, h, w], about [-1, 1]."""
    inference = model.inference()
    z = _finite_latents(model, inference, call, [index], None, None)
    return z[0], inference.decode(z)[0]


def _finite_latents(
    model: Pipeline,
    inference: Inference,
    call: Call,
    batch: list[int],
    progress: Callable[[int], None] | None,
    preview: Preview | None,
) -> Tensor:
    """Clean latents of a batch; drawn in float32 where half precision overflows."""

    def draw(dtype: torch.dtype) -> Tensor:
        chosen = inference if dtype == inference.dtype else model.inference_in_float32()
        return _latents(chosen, call, batch, progress, preview)

    return finite_or_again(draw, inference.dtype)


def _result(
    pending: deque[tuple[list[int], Future[list[Image.Image]]]],
) -> Iterator[tuple[int, Image.Image]]:
    numbers, images = pending.popleft()
    yield from zip(numbers, images.result(), strict=True)


@contextmanager
def _finisher(inference: Inference) -> Iterator[Any]:
    """What decodes: a thread of its own beside a GPU, which has the next batch meanwhile."""
    if inference.device.type == "cuda" and not inference.places:
        with ThreadPoolExecutor(1, "decode") as pool:
            yield pool.submit
        return

    def at_once(work: Callable[..., list[Image.Image]], *given: Any) -> Future[list[Image.Image]]:
        future: Future[list[Image.Image]] = Future()
        future.set_result(work(*given))
        return future

    yield at_once


@torch.inference_mode()  # which is a thread's own
def _finished(inference: Inference, call: Call, batch: list[int], z: Tensor) -> list[Image.Image]:
    """Clean latents -> pictures; what is not masked is the given picture's own."""
    decoded = inference.decode(z)
    if call.masks is not None and call.images is not None:
        rows = [call.images[i] for i in batch], [call.masks[i] for i in batch]
        known, mask = (torch.stack(part).to(decoded) for part in rows)
        decoded = torch.lerp(known, decoded, mask)
    return to_images(decoded)


def batches(call: Call, indices: Sequence[int], inference: Inference) -> Iterator[list[int]]:
    """Pictures that are drawn together: neighbours whose texts take as many chunks.

    A text of several chunks is longer for the network, and what is drawn beside a picture must
    not change it.
    """
    batch: list[int] = []
    length = 0
    for index in indices:
        chunks = inference.num_chunks(call.prompts[index], call.negatives[index])
        if batch and (len(batch) == call.batch_size or chunks != length):
            yield batch
            batch = []
        batch.append(index)
        length = chunks
    if batch:
        yield batch


def _latents(
    inference: Inference,
    call: Call,
    batch: list[int],
    progress: Callable[[int], None] | None,
    preview: Preview | None,
) -> Tensor:
    """Clean latents of a batch, both passes."""

    def after(step: int, x: Tensor, denoised: Tensor) -> None:
        if progress is not None:
            progress(len(batch))
        if preview is not None:
            preview(step, denoised, batch)

    texts = [call.prompts[i] for i in batch]
    draw = partial(
        _draw,
        inference,
        prompts=texts,
        negatives=[call.negatives[i] for i in batch],
        batch=batch,
        call=call,
        callback=after,
    )
    begin = extra = known = mask = None
    if call.images is not None:
        pictures = torch.stack([call.images[i] for i in batch]).to(inference.device)
        begin = _encoded(inference, pictures)
        if call.masks is not None:
            pixels = torch.stack([call.masks[i] for i in batch]).to(inference.device)
            mask = mask_of_cells(pixels, inference.autoencoder.downscale)
            if inference.sees_mask:
                extra = _shown(inference, pictures, pixels, mask)
            else:
                known = begin
    if inference.sees_mask and extra is None:  # everything is drawn anew
        height, width = (side * inference.autoencoder.downscale for side in call.shape[1:])
        pictures = torch.zeros(len(batch), 3, height, width, device=inference.device)
        pixels = torch.ones_like(pictures[:, :1])
        extra = _shown(inference, pictures, pixels, torch.ones(len(batch), 1, *call.shape[1:]))
    if extra is not None and call.strength == 1:
        begin = None  # as such networks were trained: nothing of what is masked is known
    z = draw(
        start=_start(call, batch).to(inference.device),
        begin=begin,
        strength=call.strength,
        extra=extra,
        known=known,
        mask=mask,
        purpose="step",
    )
    if call.larger_shape is None:
        return z
    return draw(
        start=normal(call.larger_shape, call.seed, batch, "upscale").to(inference.device),
        begin=larger(z, *call.larger_shape[1:]),
        strength=call.upscale_strength,
        extra=None if extra is None else larger(extra, *call.larger_shape[1:]),
        purpose="upscale-step",
    )


def _draw(
    inference: Inference,
    *,
    start: Tensor,
    prompts: Sequence[str],
    negatives: Sequence[str],
    batch: Sequence[int],
    call: Call,
    begin: Tensor | None,
    strength: float,
    purpose: str,
    callback: Callback,
    extra: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    painter = inference.painter(call.clip_skip)
    if extra is not None:
        painter = replace(painter, network=seeing(painter.network, extra))
    wrap = None
    if known is not None and mask is not None:
        wrap = partial(Known, known=known, mask=mask)
    with inference.steps():
        return painter.draw(
            start,
            prompts,
            batch,
            call.choices,
            seed=call.seed,
            negative_prompt=negatives,
            begin=begin,
            strength=strength,
            wrap=wrap,
            purpose=purpose,
            callback=callback,
        )


def _start(call: Call, batch: list[int]) -> Tensor:
    """Standard-normal start [b, c, h, w]: the call's own, or the seed's, or between two seeds'."""
    if call.latents is not None:
        return call.latents[batch].float()
    start = normal(call.shape, call.seed, batch, "start")
    if call.variation_seed is None:
        return start
    other = normal(call.shape, call.variation_seed, batch, "start")
    return slerp(start, other, call.variation_strength)


def _shown(inference: Inference, pictures: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """What a nine-channel network sees besides: [b, 1 + c, h, w], the mask sharp."""
    z = _encoded(inference, pictures * (pixels < 0.5))
    return torch.cat([(mask >= 0.5).to(z), z], 1)


def _encoded(inference: Inference, pictures: Tensor) -> Tensor:
    """Clean latents of pictures; equal ones, such as one picture for all, are encoded once."""
    if (pictures == pictures[:1]).all():
        return inference.encode(pictures[:1]).expand(len(pictures), -1, -1, -1)
    return inference.encode(pictures)
