"""Which pictures are drawn, which are left alone, what is told and kept when it is cut short?"""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fakepipeline import FakePipeline, picture
from PIL import Image

from latentdiff.drawing.stopping import Stop


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is drawn


def test_options_reach_the_model(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    image, mask = picture(tmp_path / "cat.png", colour="red"), picture(tmp_path / "mask.png")
    code, *_ = sample(
        *("--prompt", "a cat", "--negative-prompt", "a dog", "--seed", 3, "--guidance", 2),
        *("--guidance-interval", 0.5, 10, "--guidance-rescale", 0.3, "--sampler", "heun"),
        *("--spacing", "karras", "--height", 32, "--width", 64, "--clip-skip", 1),
        *("--init-image", image, "--mask", mask, "--variation-seed", 5),
        *("--variation-strength", 0.2, "--batch-size", 4, "--dtype", "bfloat16"),
        *("--attention", "sdpa", "--low-memory", "--tiled", "--reuse", 3),
    )
    assert code == 0
    (call,) = fake.calls
    assert call.pop("image").getpixel((0, 0)) == (255, 0, 0)
    assert call.pop("mask").getpixel((0, 0)) == (255, 255, 255)
    assert call == {
        "prompts": ["a cat"],
        "negatives": ["a dog"],
        "indices": [0],
        "num_images": 1,
        "batch_size": 4,
        "seed": 3,
        "steps": 2,
        "guidance_scale": 2.0,
        "guidance_interval": (0.5, 10.0),
        "guidance_rescale": 0.3,
        "sampler": "heun",
        "spacing": "karras",
        "height": 32,
        "width": 64,
        "clip_skip": 1,
        "strength": 1.0,
        "variation_seed": 5,
        "variation_strength": 0.2,
    }
    assert str(fake.dtype) == "torch.bfloat16"
    speed = fake.speed
    assert (speed.attention, speed.low_memory, speed.tiled, speed.reuse) == ("sdpa", True, True, 3)


def test_lines_with_settings_of_their_own(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    """Equal settings are drawn together; a line's own seed makes it what it is alone."""
    file = tmp_path / "p.jsonl"
    lines = [
        {"prompt": "a"},
        {"prompt": "b", "steps": 3, "negative_prompt": "n"},
        {"prompt": "c", "seed": 9},
        {"prompt": "d", "negative_prompt": "m"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    code, said, _ = sample("--prompts-file", file, "--num-images", 2, "--json")
    assert code == 0
    told = json.loads("\n".join(said))["images"]
    assert [Path(i["path"]).name for i in told][3:6] == [
        *("0003-b-seed0.png", "0004-c-seed9.png", "0005-c-seed9.png"),
    ]
    assert [i["index"] for i in told] == [0, 1, 2, 3, 0, 1, 6, 7]
    assert [i["seed"] for i in told] == [0, 0, 0, 0, 9, 9, 0, 0]
    asked = [(c["indices"], c["steps"], c["seed"]) for c in fake.calls]
    assert asked == [([0, 1, 6, 7], 2, 0), ([2, 3], 3, 0), ([0, 1], 2, 9)]
    assert fake.calls[0]["negatives"] == ["", "n", "", "m"]
    assert fake.calls[2]["prompts"] == ["c"]


def test_a_folder_names_the_pictures(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "cat.txt").write_text("a cat")
    (folder / "zoo.txt").write_text("a lion\n\na zebra\n")
    (folder / "notes.md").write_text("not a prompt")
    code, said, _ = sample("--prompts-file", folder)
    assert code == 0
    assert [Path(line).name for line in said] == ["cat.png", "zoo-0.png", "zoo-1.png"]
    assert fake.calls[0]["prompts"] == ["a cat", "a lion", "a zebra"]
    (folder / "zoo-1.txt").write_text("in the way")
    code, _, err = sample("--prompts-file", folder)
    assert code == 2 and "would both be drawn to" in err and "zoo-1.txt, line 1" in err
    (folder / "zoo-1.txt").rename(folder / "preview.txt")
    code, _, err = sample("--prompts-file", folder)
    assert code == 2 and "--preview and " in err and "preview.txt, line 1 would both" in err


def test_a_grid_is_of_all_pictures(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    fake.before_each = _stop_at(2)
    assert sample("--prompt", "a", "--num-images", 4, "--batch-size", 1)[0] == 130
    fake.before_each = lambda index: None
    code, said, _ = sample("--prompt", "a", "--num-images", 4, "--batch-size", 1, "--grid")
    assert code == 0 and len(said) == 5
    with Image.open(said[-1]) as sheet:
        assert sheet.size == (34, 34)
        for i, name in enumerate(said[:4]):
            with Image.open(name) as one:
                place = (18 * (i % 2), 18 * (i // 2))
                assert sheet.getpixel(place) == one.getpixel((0, 0))


# What is there already


def _receive(number: int) -> None:
    """A signal as the process would take it, without the risk of ending the tests' own process."""
    handler: Any = signal.getsignal(number)
    handler(number, None)


def _stop_at(stop: int, number: int = signal.SIGINT) -> Any:
    def hook(index: int) -> None:
        if index == stop:
            _receive(number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on(
    sample: Any, fake: FakePipeline, tmp_path: Path, number: int
) -> None:
    command = ("--prompt", "a", "--num-images", 5, "--batch-size", 1)
    before = signal.getsignal(signal.SIGTERM)
    fake.before_each = _stop_at(3, number)
    code, said, err = sample(*command)
    assert (code, said) == (130, [])
    assert "stopped: 3 of 5 pictures are finished, in " in err
    assert "the same command goes on" in err
    assert signal.getsignal(signal.SIGTERM) == before
    assert names(tmp_path / "out") == [f"000{i}-a-seed0.png" for i in range(3)]
    fake.before_each = lambda index: None
    code, said, err = sample(*command)
    assert code == 0 and len(said) == 5
    assert err == "already there: 3 of 5 pictures\n"
    assert fake.calls[-1]["indices"] == [3, 4]


@pytest.mark.parametrize("stop", [1, 3])
def test_finished_pictures_of_a_stopped_batch_are_written(
    sample: Any, fake: FakePipeline, tmp_path: Path, stop: int
) -> None:
    """The signal comes while pictures 0 to 3, drawn together, are handed over."""
    fake.before_each = _stop_at(stop)
    code, _, err = sample("--prompt", "a", "--num-images", 9, "--batch-size", 4)
    assert code == 130 and "stopped: 4 of 9 pictures are finished" in err
    assert names(tmp_path / "out") == [f"000{i}-a-seed0.png" for i in range(4)]


def test_what_is_handed_over_after_ctrl_c_is_written(
    sample: Any, fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `generate.stream` does with what a GPU still decodes."""
    stream = fake.stream

    def two_then_stopped(*given: Any, **options: Any) -> Any:
        drawn = stream(*given, **options)
        try:
            yield next(drawn)
            _receive(signal.SIGINT)
            options["progress"](1)
        except KeyboardInterrupt:
            yield next(drawn)
            raise

    monkeypatch.setattr(fake, "stream", two_then_stopped)
    code, _, err = sample("--prompt", "a", "--num-images", 9, "--batch-size", 1)
    assert code == 130 and "stopped: 2 of 9 pictures are finished" in err
    assert names(tmp_path / "out") == [f"000{i}-a-seed0.png" for i in range(2)]


def test_a_second_ctrl_c_does_not_wait() -> None:
    with Stop() as stop:
        stop.hold()
        _receive(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _receive(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
    with Stop(), pytest.raises(KeyboardInterrupt):
        _receive(signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with Stop():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_run_goes_on(
    sample: Any, fake: FakePipeline, tmp_path: Path, run_python: Any
) -> None:
    command = ("--prompt", "a", "--num-images", "9", "--batch-size", "1")
    program = (
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fakepipeline import FakePipeline\n"
        "from latentdiff.cli import run\n"
        "from latentdiff.pipeline import Pipeline\n"
        "fake = FakePipeline()\n"
        "Pipeline.load = fake.load\n"
        "fake.before_each = lambda i: i == 7 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(sys.argv[1:])\n"
    )
    out = ("--out", str(tmp_path / "out"))
    done = run_python("-c", program, "sample", *out, "--steps", "2", *command)
    assert done.returncode == -signal.SIGKILL
    written = sorted((tmp_path / "out").glob("0*.png"))
    assert len(written) < 9
    before = {path.name: path.read_bytes() for path in written}
    code, said, err = sample(*command)
    assert code == 0 and len(said) == 9
    assert fake.calls[0]["indices"] == list(range(len(written), 9))
    assert not written or f"already there: {len(written)} of 9 pictures" in err
    assert len(names(tmp_path / "out")) == 9  # nor is anything half written left
    assert all((tmp_path / "out" / name).read_bytes() == before[name] for name in before)


def test_nothing_is_loaded_when_all_is_there(sample: Any, fake: FakePipeline) -> None:
    assert sample("--prompt", "a", "--num-images", 2)[0] == 0
    code, said, err = sample("--prompt", "a", "--num-images", 2)
    assert code == 0 and len(said) == 2 and "already there: 2 of 2 pictures" in err
    assert len(fake.loaded) == 1
    assert sample("--prompt", "a", "--num-images", 2, "--no-resume")[2] == ""
    assert len(fake.loaded) == 2


@pytest.mark.parametrize(
    "change",
    [("--steps", 3), ("--guidance", 2), ("--tiled",), ("--low-memory",)],
)
def test_what_was_drawn_otherwise_is_drawn_anew(
    sample: Any, fake: FakePipeline, tmp_path: Path, change: Any
) -> None:
    assert sample("--prompt", "a")[0] == 0
    path = tmp_path / "out" / "0000-a-seed0.png"
    first = Image.open(path).info["story"]
    code, _, err = sample("--prompt", "a", *change)
    assert code == 0
    assert err == f"to be drawn anew, for what is there was drawn otherwise: {path}\n"
    assert Image.open(path).info["story"] != first


def test_rounding_is_no_reason_to_draw_anew(sample: Any, fake: FakePipeline) -> None:
    assert sample("--prompt", "a")[0] == 0
    code, _, err = sample("--prompt", "a", "--batch-size", 2, "--attention", "math", "--sliced")
    assert code == 0 and err == "already there: 1 of 1 pictures\n"


def test_damaged_and_strange_files_are_drawn_anew(
    sample: Any, fake: FakePipeline, tmp_path: Path
) -> None:
    assert sample("--prompt", "a", "--num-images", 3)[0] == 0
    first, second, third = sorted((tmp_path / "out").iterdir())
    first.write_bytes(first.read_bytes()[:-20])
    data = bytearray(second.read_bytes())
    data[-20] ^= 1  # in the pixels
    second.write_bytes(data)
    picture(third)
    code, _, err = sample("--prompt", "a", "--num-images", 3)
    assert code == 0 and f"drawn otherwise: {first} and 2 more" in err
    for path in (first, second, third):
        with Image.open(path) as image:
            image.load()
            assert image.size == (16, 16)


def test_a_changed_source_is_seen(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    from latentdiff.drawing import namedfiles

    image = picture(tmp_path / "cat.png", colour="red")
    command = ("--prompt", "a", "--init-image", image)
    assert sample(*command)[0] == 0
    assert "already there: 1 of 1 pictures" in sample(*command)[2]
    picture(image, colour="blue")
    namedfiles.sha256.cache_clear()  # as in another process
    assert "drawn otherwise" in sample(*command)[2]


# What fails


def test_a_failed_write_ends_the_run(
    sample: Any, fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(self: Image.Image, target: Path, **options: Any) -> None:
        if "0003" in str(target):
            Path(target).write_bytes(b"\x89PNG, cut")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        save(self, target, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    code, said, err = sample("--prompt", "a", "--num-images", 60, "--batch-size", 1)
    assert (code, said) == (2, [])
    assert "0003-a-seed0.png: No space left on device" in err
    assert names(tmp_path / "out") == [f"000{i}-a-seed0.png" for i in range(3)]


def test_out_of_memory_says_what_to_try(sample: Any, fake: FakePipeline) -> None:
    def fail(index: int) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried "
            "to allocate 2147483648 bytes."
        )

    fake.before_each = fail
    code, _, err = sample("--prompt", "a", "--num-images", 4)
    assert code == 2
    assert "out of memory on cpu, 2.0 GiB more asked for, drawing 4 pictures at a time" in err
    assert "--batch-size 2" in err


def test_pictures_at_a_time(sample: Any, fake: FakePipeline) -> None:
    for extra, expected in (
        ((), 8),
        (("--low-memory",), 1),
        (("--low-memory", "--batch-size", 3), 3),
    ):
        assert sample("--prompt", "a", "--no-resume", *extra)[0] == 0
        assert fake.calls[-1]["batch_size"] == expected
    code, _, err = sample("--prompt", "a", "--batch-size", 5000)
    assert code == 2 and "--batch-size must be at most 4096; got 5000; 8 is usual" in err


def test_our_own_errors_stay_as_they_are(sample: Any, fake: FakePipeline) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("ours")

    fake.before_each = fail
    with pytest.raises(RuntimeError, match="ours"):
        sample("--prompt", "a")


def test_the_preview_is_written(
    sample: Any, fake: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentdiff import preview

    seen: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, *arguments: Any) -> None:
            seen.append(arguments)

        def __call__(self, step: int, z: Any, indices: Any) -> None:
            seen.append((step, list(indices)))

    monkeypatch.setattr(preview, "PreviewWriter", Writer)
    monkeypatch.setattr(preview, "projection_of", lambda autoencoder, key: "colours")
    assert sample("--prompt", "a", "--num-images", 2, "--preview")[0] == 0
    assert seen == [(tmp_path / "out" / "preview.png", "colours"), (0, [0, 1]), (1, [0, 1])]
