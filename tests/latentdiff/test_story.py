"""Does a picture's file tell all that drew it, and is what strangers write into one refused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakepipeline import FakePipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.cli import run
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.drawing import namedfiles
from latentdiff.drawing.namedfiles import LoraFile
from latentdiff.drawing.story import Story, parse_story
from latentdiff.drawing.wish import Wish
from latentdiff.pictures import read_texts
from latentdiff.speed import Speed

FULL = Story(
    wish=Wish(
        prompt='りんご, "quoted"\nline',
        negative_prompt="b",
        seed=2**64 - 1,
        steps=7,
        guidance=2.5,
        guidance_interval=(0.25, 9.5),
        guidance_rescale=0.1,
        sampler="heun",
        spacing="karras",
        height=64,
        width=128,
        clip_skip=2,
        init_image=Path("in/a cat.png"),
        strength=0.3,
        mask=Path("mask.png"),
        variation_seed=4,
        variation_strength=0.5,
    ),
    index=12,
    batch=(4, 8),
    model_hash="0123456789abcdef",
    model="my/model",
    loras=(LoraFile(Path("x.safetensors"), -0.5, "f" * 16),),
    files={"init_image": "a" * 64, "mask": "b" * 64},
    device="cuda:1",
    dtype="bfloat16",
    speed=Speed(attention="sdpa", compile=True, merge_tokens=0.5, quantise="int8"),
)


@pytest.fixture(autouse=True)
def fresh_hashes() -> None:
    """As in another process."""
    namedfiles.sha256.cache_clear()
    namedfiles.read_picture.cache_clear()


@pytest.fixture
def sample(fake: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, list[str], str]:
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        code = run(["sample", *out, *(str(a) for a in arguments)])
        said, err = capsys.readouterr()
        return code, said.splitlines(), err

    return call


@pytest.fixture
def drawn(sample: Any) -> Path:
    """The sixth of seven pictures, drawn in batches of four."""
    code, said, _ = sample("--prompt", "a cat", "--num-images", 7, "--batch-size", 4, "--steps", 3)
    assert code == 0
    return Path(said[5])


def retold(path: Path, change: Any) -> Path:
    """A copy of a picture whose story is changed."""
    with Image.open(path) as image:
        values = json.loads(image.info["story"])
        found = change(values)
        info = PngInfo()
        info.add_itxt("story", json.dumps(values if found is None else found))
        target = path.with_name("retold.png")
        image.save(target, pnginfo=info)
    return target


# A law: what is written is read back


@pytest.mark.parametrize("story", [FULL, Story(Wish(prompt="a"))])
def test_a_story_comes_back_whole(story: Story) -> None:
    assert parse_story(story.to_json(), "x.png") == (
        story if story.files else Story(Wish(prompt="a"), files={})
    )


def test_what_only_rounds_does_not_decide() -> None:
    from dataclasses import replace

    same = replace(
        FULL,
        batch=(0, 1),
        device="cpu",
        model="elsewhere",
        version="9",
        speed=replace(FULL.speed, attention="math", compile=False, sliced=True),
    )
    assert same.decides == FULL.decides
    others = (
        replace(FULL, index=11),
        replace(FULL, model_hash="f" * 16),
        replace(FULL, loras=()),
        replace(FULL, files={}),
        replace(FULL, dtype="float32"),
        replace(FULL, wish=replace(FULL.wish, guidance_interval=None)),
        replace(FULL, speed=replace(FULL.speed, merge_tokens=0.25)),
        replace(FULL, speed=replace(FULL.speed, tiled=True)),
        replace(FULL, speed=replace(FULL.speed, compile=False, low_memory=True)),
    )
    assert all(other.decides != FULL.decides for other in others)


# Drawn again


def test_again_is_the_same_bytes_and_never_the_same_file(sample: Any, drawn: Path) -> None:
    before = drawn.read_bytes()
    code, said, err = sample("--from", drawn)
    assert (code, err) == (0, "")
    again = Path(said[0])
    assert again == drawn.with_name(f"{drawn.stem}-again.png")
    assert again.read_bytes() == before == drawn.read_bytes()


def test_it_is_drawn_at_its_place_in_a_batch_as_large(
    sample: Any, drawn: Path, fake: FakePipeline
) -> None:
    sample("--from", drawn)
    call = fake.calls[-1]
    assert (call["indices"], call["num_images"]) == ([5, 5, 5], 6)  # the last batch was of three
    sample("--from", drawn, "--batch-size", 1, "--no-resume")
    assert fake.calls[-1]["indices"] == [5]


def test_options_override_what_it_tells(sample: Any, drawn: Path, fake: FakePipeline) -> None:
    assert sample("--from", drawn, "--steps", 5, "--prompt", "a dog")[0] == 0
    call = fake.calls[-1]
    assert (call["steps"], call["prompts"], call["indices"]) == (5, ["a dog"], [5])
    assert sample("--from", drawn, "--num-images", 2)[0] == 0
    assert fake.calls[-1]["indices"] == [5, 6]


def test_all_of_a_story_is_drawn_with(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "mask.png")
    first = sample(
        *("--prompt", "a (cat:1.2)", "--init-image", tmp_path / "in.png", "--strength", 0.5),
        *(
            "--mask",
            tmp_path / "mask.png",
            "--dtype",
            "bfloat16",
            "--merge-tokens",
            0.25,
            "--style",
            "noto",
        ),
        *("--guidance-interval", 1, 5, "--compile"),
    )
    assert first[0] == 0
    speed, dtype = fake.speed, fake.dtype
    path = Path(first[1][0])
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (path, tmp_path / "in.png", tmp_path / "mask.png"):
        file.rename(moved / file.name)
    code, said, _ = sample("--from", moved / path.name)
    assert code == 0
    assert (fake.speed, fake.dtype) == (speed, dtype)
    pair = [{k: v for k, v in call.items() if k not in ("image", "mask")} for call in fake.calls]
    assert pair[0] == pair[1]
    assert fake.calls[1]["prompts"] == ["a (cat:1.2), noto"]
    assert sample("--from", said[0], "--no-compile", "--reuse", 3)[0] == 0
    assert (fake.speed.compile, fake.speed.reuse) == (False, 3)


def test_a_source_that_is_gone_or_changed_is_told(
    sample: Any, fake: FakePipeline, tmp_path: Path
) -> None:
    source, other = tmp_path / "in.png", tmp_path / "other.png"
    Image.new("RGB", (64, 64), "red").save(source)
    Image.new("RGB", (64, 64), "blue").save(other)
    code, said, _ = sample("--prompt", "a", "--init-image", source)
    assert code == 0
    source.write_bytes(other.read_bytes())
    namedfiles.sha256.cache_clear()
    code, _, err = sample("--from", said[0])
    assert code == 2 and f"{source} has changed since {said[0]} was drawn: its SHA-256" in err
    source.unlink()
    code, _, err = sample("--from", said[0])
    assert code == 2 and f"was drawn with {source}, which is not here any more" in err
    assert sample("--from", said[0], "--init-image", other)[0] == 0


def test_loras_are_named_and_checked(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    lora.write_bytes(b"one")
    code, said, _ = sample("--prompt", "a", "--lora", f"{lora}:0.5")
    assert code == 0 and fake.loaded[-1][1] == [(lora, 0.5)]
    assert '"style: ' in read_texts(Path(said[0]))["parameters"]
    assert sample("--from", said[0])[0] == 0
    assert fake.loaded[-1][1] == [(lora, 0.5)]
    lora.write_bytes(b"two")
    namedfiles.sha256.cache_clear()
    code, _, err = sample("--from", said[0], "--no-resume")
    assert code == 2 and f"{lora} has changed since" in err and "or give --lora" in err


def test_a_large_batch_is_not_drawn_for_one_picture(
    sample: Any, drawn: Path, fake: FakePipeline
) -> None:
    other = retold(drawn, lambda values: values.update(batch=[0, 64]))
    assert sample("--from", other)[0] == 0
    assert fake.calls[-1]["indices"] == [5] * 64
    other = retold(drawn, lambda values: values.update(batch=[0, 65]))
    code, _, err = sample("--from", other)
    assert code == 2
    assert f"{other} was drawn in a batch of 65; at most 64 copies are drawn" in err
    assert sample("--from", other, "--batch-size", 1, "--no-resume")[0] == 0
    assert fake.calls[-1]["indices"] == [5]


# The model


def test_other_weights_are_an_error_or_a_warning(
    sample: Any, drawn: Path, fake: FakePipeline
) -> None:
    other = retold(drawn, lambda values: values["model"].update(hash="f" * 16))
    code, _, err = sample("--from", other)
    here = read_texts(drawn)["model"]
    assert code == 2
    assert f"was drawn with weights {'f' * 16}, but {PRETRAINED} has {here}; give --model" in err
    with pytest.warns(UserWarning, match="it will be another picture"):
        assert sample("--from", other, "--model", PRETRAINED)[0] == 0


@pytest.mark.parametrize("name", ["stranger/model", "/nowhere/at/all"])
def test_a_strangers_picture_fetches_no_model(
    sample: Any, drawn: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    other = retold(drawn, lambda values: values["model"].update(name=name))
    code, _, err = sample("--from", other)
    assert code == 2 and f"was drawn with model {name}, which is no directory here" in err
    other = retold(drawn, lambda values: values["speed"].update(tiny_decoder=name))
    code, _, err = sample("--from", other)
    assert code == 2 and f"was drawn with --tiny-decoder {name}, which is no directory" in err


# Damage and malice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: [1], "an object expected"),
        (lambda v: v.update(format=2), "it is of format 2; this version of latentdiff reads 1"),
        (lambda v: v.pop("wish"), "its story lacks 'wish'; it is damaged"),
        (lambda v: v["wish"].update(stepz=3), "unknown key 'stepz'; did you mean steps?"),
        (lambda v: v["wish"].update(steps="many"), "steps must be a whole number; got 'many'"),
        (lambda v: v["wish"].update(steps=True), "steps must be a whole number; got True"),
        (lambda v: v["wish"].update(seed=[1]), "seed must be a whole number; got [1]"),
        (lambda v: v["wish"].update(guidance="1e999"), "--guidance must be finite"),
        (lambda v: v["wish"].update(init_image="a\0b"), "init_image must be a file's name"),
        (lambda v: v["wish"].update(guidance_interval=[1]), "must be two numbers; got [1]"),
        (lambda v: v.update(index=-1), "index must be from 0 to"),
        (lambda v: v.update(index=10**12), "index must be from 0 to"),
        (lambda v: v.update(index="1"), "index must be of type int; got '1'"),
        (lambda v: v.update(batch=[3, 2]), "batch must be a place and a larger number"),
        (lambda v: v.update(batch=[0, 10**9]), "batch must be a place and a larger number"),
        (lambda v: v.update(batch=3), "cannot be read"),
        (lambda v: v["wish"].update(height=2**40), "--height must be at most 16384 px; got 10995"),
        (
            lambda v: v["wish"].update(width=8192, upscale=4),
            "--width 8192 times --upscale 4 must be at most 16384 px",
        ),
        (lambda v: v["wish"].update(steps=10**9), "--steps must be at most 10000; got 1000000000"),
        (
            lambda v: v["wish"].update(mask="m" * 2000),
            "mask must be a file's name of at most 1,024",
        ),
        (lambda v: v["model"].update(name="m" * 2000), "model has 2,000 characters; at most 1,024"),
        (
            lambda v: v["loras"].append({"path": "x", "weight": 10**400, "hash": "f" * 16}),
            "cannot be read: int too large",
        ),
        (lambda v: v["model"].update(hash="../../x"), "'../../x' is no SHA-256"),
        (lambda v: v.update(device="rm -rf"), "device 'rm -rf' is unknown"),
        (lambda v: v.update(dtype="object"), "unknown dtype 'object'"),
        (lambda v: v["speed"].update(exec="1"), "unknown speed 'exec'"),
        (lambda v: v["speed"].update(compile=1), "compile must be of type bool; got 1"),
        (lambda v: v["speed"].update(reuse=True), "reuse must be of type int; got True"),
        (lambda v: v["loras"].append({"path": 3, "weight": 1, "hash": "f" * 16}), "path must be"),
        (lambda v: v["files"].update(mask=1), "hash must be of type str; got 1"),
    ],
)
def test_a_damaged_story_is_refused(sample: Any, drawn: Path, change: Any, message: str) -> None:
    def changed(values: Any) -> Any:
        found = change(values)
        return found if found == [1] else None

    other = retold(drawn, changed)
    code, _, err = sample("--from", other)
    assert code == 2 and err.startswith(f"error: {other}: its story")
    assert message in err and err.count("\n") == 1


def with_chunk(path: Path, name: str, text: str, compress: bool = False) -> Path:
    info = PngInfo()
    info.add_itxt(name, text, zip=compress)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize("text", ["", "{", '{"format": 1', "null", "[" * 100_000, '{"a": 1e9999}'])
def test_what_is_no_story_is_refused(sample: Any, tmp_path: Path, text: str) -> None:
    path = with_chunk(tmp_path / "x.png", "story", text)
    code, _, err = sample("--from", path)
    assert code == 2 and err.startswith(f"error: {path}: its story ")


def test_a_bomb_is_refused(sample: Any, tmp_path: Path) -> None:
    path = with_chunk(tmp_path / "x.png", "story", " " * 50_000_000, compress=True)
    assert path.stat().st_size < 100_000
    code, _, err = sample("--from", path)
    assert code == 2 and "x.png is no PNG that can be read (" in err
    path = with_chunk(tmp_path / "y.png", "story", " " * 2_000_000)
    code, _, err = sample("--from", path)
    assert code == 2 and "its story has 2,000,000 characters; at most 1,048,576" in err


def test_files_that_have_no_end_are_not_read(
    sample: Any, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(path: str) -> Path:
        def change(values: Any) -> None:
            values["wish"]["init_image"] = path
            values["files"] = {"init_image": "f" * 64}

        return retold(drawn, change)

    code, _, err = sample("--from", named("/dev/zero"))
    assert code == 2 and "--init-image /dev/zero is no file" in err
    large = drawn.with_name("large.png")
    with large.open("wb") as file:
        file.truncate(1 << 40)
    code, _, err = sample("--from", named(str(large)))
    assert code == 2 and "has 1,099,511,627,776 bytes; expected at most 134,217,728" in err


def test_what_is_no_png_is_refused(sample: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"GIF89a not a png")
    code, _, err = sample("--from", tmp_path / "x.png")
    assert code == 2 and "x.png is no PNG that can be read" in err
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    code, _, err = sample("--from", tmp_path / "y.png")
    assert code == 2 and "y.png does not tell how it was drawn: expected a PNG with" in err
    code, _, err = sample("--from", tmp_path)
    assert code == 2 and "is no file; expected a PNG" in err
