"""How does a drawing request become files? What is missing is drawn, while the last is written."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentdiff.drawing.bar import drawing_bar
from latentdiff.drawing.request import DrawRequest, Plan, decide
from latentdiff.drawing.series import Picture
from latentdiff.drawing.stopping import Stop
from latentdiff.drawing.story import CHUNK, parse_story
from latentdiff.drawing.writing import PictureWriter
from latentdiff.exitcodes import INTERRUPTED, RunEnded
from latentdiff.pictures import grid, read_texts, save_png

_GRID_TEXTS = (
    *("negative_prompt", "steps", "guidance_scale", "sampler", "spacing", "seed"),
    *("model", "latentdiff"),
)


@dataclass
class _Timings:
    load_s: float = 0.0
    draw_s: float = 0.0
    num_drawn: int = 0


def draw(request: DrawRequest) -> dict[str, Any]:
    """Draw a request into its directory; returns what was drawn and where, ready for JSON.

    Raises:
        ValueError: a mistake in the request, found before a network is loaded; or memory ran out.
        OSError: the output cannot be written.
        RunEnded: Ctrl-C or SIGTERM; what was finished is there.
    """
    planned = decide(request)
    request.out.mkdir(parents=True, exist_ok=True)  # before the work: a wrong --out costs nothing
    there = _find_there(planned, request.resume)
    missing = [picture for picture in planned.pictures if picture not in there]
    timings = _Timings()
    writer = PictureWriter()
    try:
        with Stop() as stop, writer:
            if missing:
                _draw_missing(planned, set(missing), request, writer, timings, stop)
        sheet = _write_grid(planned, request) if request.with_grid else None
    except KeyboardInterrupt:
        num_done = len(there) + writer.num_written
        goes_on = "the same command goes on" if request.resume else "with --resume it goes on"
        raise RunEnded(
            INTERRUPTED,
            f"stopped: {num_done} of {len(planned.pictures)} pictures are finished, in "
            f"{request.out}; {goes_on}",
        ) from None
    return _summary(planned, sheet, timings)


def _find_there(planned: Plan, resume: bool) -> set[Picture]:
    """Pictures that need not be drawn; says so."""
    if not resume:
        return set()
    there: set[Picture] = set()
    others: list[Path] = []
    for picture in planned.pictures:
        if picture.path.exists():
            if _is_there(picture, planned):
                there.add(picture)
            else:
                others.append(picture.path)
    if there:
        _say(f"already there: {len(there)} of {len(planned.pictures)} pictures")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        _say(f"to be drawn anew, for what is there was drawn otherwise: {others[0]}{more}")
    return there


def _is_there(picture: Picture, planned: Plan) -> bool:
    """Whether a file is whole, and the picture that is wanted."""
    try:
        text = read_texts(picture.path, check=True).get(CHUNK, "")
        found = parse_story(text, str(picture.path))
    except ValueError:
        return False
    return found.decides == planned.story_of(picture).decides


def _draw_missing(
    planned: Plan,
    missing: set[Picture],
    request: DrawRequest,
    writer: PictureWriter,
    timings: _Timings,
    stop: Stop,
) -> None:
    from latentdiff.drawing.calls import draw_series, load_model
    from latentdiff.drawing.costs import tell_approximation_cost

    start = time.monotonic()
    pipeline = load_model(planned)
    timings.load_s = time.monotonic() - start
    tell_approximation_cost(pipeline, planned, _say)
    preview = None
    if request.with_preview:
        from latentdiff.preview import PreviewWriter, projection_of

        colours = projection_of(pipeline.inference().autoencoder, key=planned.hashing.result())
        preview = PreviewWriter(request.out / "preview.png", colours)
    start = time.monotonic()
    with drawing_bar(len(missing)) as bar:

        def advance(share: float) -> None:
            stop.check()  # here, where `stream` still hands over what it has
            bar.step(share)

        for series in planned.series:
            wanted = [picture for picture in series.pictures if picture in missing]
            if not wanted:
                continue
            drawn = draw_series(pipeline, series, wanted, planned, advance, preview)
            for picture, image, batch in drawn:
                stop.hold()  # the rest of the batch is finished, too
                texts = planned.story_of(picture, batch).chunks(image.width, image.height)
                writer.put(image, picture.path, texts)
                timings.num_drawn += 1
                bar.picture()
                if batch[0] + 1 == batch[1]:
                    stop.release()
            stop.release()
            stop.check()
    timings.draw_s = time.monotonic() - start


def _write_grid(planned: Plan, request: DrawRequest) -> Path:
    from PIL import Image

    images = []
    for picture in planned.pictures:
        with Image.open(picture.path, formats=["PNG"]) as image:
            images.append(image.convert("RGB"))
    path = request.out / f"grid-seed{planned.story.wish.seed}.png"
    texts = planned.story_of(planned.pictures[0]).chunks(*images[0].size)
    save_png(grid(images), path, {n: text for n, text in texts.items() if n in _GRID_TEXTS})
    return path


def _summary(planned: Plan, sheet: Path | None, timings: _Timings) -> dict[str, Any]:
    """What was drawn, and where; settings are the first picture's."""
    from PIL import Image

    first = planned.pictures[0]
    with Image.open(first.path, formats=["PNG"]) as image:
        width, height = image.size
    story = planned.story_of(first)
    settings = asdict(first.wish)
    del settings["prompt"], settings["style"]  # the style is in the prompt
    settings["guidance_scale"] = settings.pop("guidance")
    for name in ("init_image", "mask"):
        settings[name] = None if settings[name] is None else str(settings[name])
    settings |= {
        "batch_size": planned.batch_size,
        "device": story.device,
        "dtype": story.dtype,
        **asdict(story.speed),
        "loras": [{"path": str(x.path), "weight": x.weight, "hash": x.hash} for x in story.loras],
    }
    told = ("negative_prompt", "steps", "guidance_scale", "sampler", "spacing", "seed")
    return {
        "images": [
            {
                "path": str(picture.path),
                "prompt": picture.wish.prompt,
                "index": picture.index,
                "seed": picture.wish.seed,
            }
            for picture in planned.pictures
        ],
        "grid": None if sheet is None else str(sheet),
        "width": width,
        "height": height,
        **{name: settings[name] for name in told},
        "settings": settings,
        "timings": {
            "load_s": round(timings.load_s, 3),
            "draw_s": round(timings.draw_s, 3),
            "num_drawn": timings.num_drawn,
            "images_per_s": (
                round(timings.num_drawn / timings.draw_s, 3) if timings.num_drawn else None
            ),
        },
        "model": story.model_hash,
        "latentdiff": story.version,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr)
