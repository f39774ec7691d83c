"""Does the page tell the truth: its words, its lines of code and its command, all offline?"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import explain as explaining
from latentdiff.cli import run
from latentdiff.config import DiffusionRun
from latentdiff.explain import Plan, colours, curves, explain, figures, page
from latentdiff.explain.request import DEFAULT_CAPTION
from latentdiff.explain.sheet import Row, Sheet, short
from latentdiff.grids import SPACINGS
from latentdiff.pipeline import Pipeline
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule

TINY = Plan(
    num_columns=3,
    ddpm_steps=4,
    ddim_steps=3,
    evaluations=(2, 3),
    reference_evaluations=4,
    guidance_scales=(0, 1, 3),
    num_noises=2,
)
PROMPT = "a <tex>x</tex> & [[seed]], fluent 3d"  # what looks like the template's own tags


@pytest.fixture(scope="module")
def book(tiny_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole explanation of the tiny model."""
    out = tmp_path_factory.mktemp("explain") / "new" / "book"
    done: list[tuple[int, int]] = []
    written = explain(
        out,
        tiny_pipeline,
        prompt=PROMPT,
        plan=TINY,
        progress=lambda *at: done.append(at),
    )
    assert written == out / "index.html"
    assert [at for at, _ in done] == sorted(at for at, _ in done)
    assert done[-1][0] / done[-1][1] > 0.9  # the bar does not stop half-way
    return out


@pytest.fixture(scope="module")
def text(book: Path) -> str:
    return (book / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def unconditional() -> Pipeline:
    """DDPM's own kind of model, untrained: pixels, no text."""
    run = {
        "out": "nowhere",
        "data": {"shards": ["none.tar"], "size_px": 8},
        "unet": {
            "channels": [16, 16],
            "cross_attention": [],
            "layers_per_block": 1,
            "head_dim": 8,
            "norm_num_groups": 4,
        },
        "schedule": {"kind": "cosine", "num_timesteps": 20},
        "samples": {"num_steps": 2, "guidance_scale": 1.0},
        "loop": {"num_steps": 1},
    }
    pipeline = Pipeline.new(DiffusionRun.model_validate(run))
    pipeline.unet.eval()
    return pipeline


# The page


class _Links(HTMLParser):
    """Collects what a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[dict[str, str | None]] = []
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.tags: set[str] = set()
        self.open: list[str] = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.tags.add(tag)
        if tag == "img":
            self.loaded.append(values)
        if tag == "a":
            self.targets.append(values["href"] or "")
        if values.get("id"):
            self.anchors.add(values["id"] or "")


def parsed(text: str) -> _Links:
    links = _Links()
    links.feed(text)
    assert links.open == []
    return links


def test_page_needs_nothing_but_its_own_files(book: Path, text: str) -> None:
    links = parsed(text)
    assert {"script", "link", "iframe", "object", "embed"}.isdisjoint(links.tags)
    assert not re.search(r"@import|url\(|\bon\w+=|(src|srcset)=\"(https?:)?//", text)
    shown_files = {str(image["src"]) for image in links.loaded}
    assert shown_files == {path.name for path in book.glob("*.png")}
    for image in links.loaded:
        with Image.open(book / str(image["src"])) as picture:
            assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
        assert len(image["alt"] or "") > 20
    for target in links.targets:
        if target.startswith("#"):
            assert target[1:] in links.anchors
        else:
            assert (book / target).is_file() or target.startswith("https://arxiv.org/abs/")


def test_pictures_carry_their_story(book: Path) -> None:
    with Image.open(book / "reverse.png") as picture:
        assert picture.info["prompt"] == PROMPT
        assert picture.info["seed"] == "0"


def test_page_shows_the_live_lines(text: str) -> None:
    plain = html.unescape(re.sub(r"<[^>]+>", "", text))
    template = page.TEMPLATE.read_text(encoding="utf-8")
    sources = re.findall(r'<source of="([^"]+)"', template)
    lines = re.findall(r'<line of="([^"]+)" has="([^"]+)">', template)
    assert len(sources) > 10 and len(lines) > 10
    for name in sources:
        source, file, first = page.source_of(name)
        assert source in plain
        assert f"{file}, line {first}" in plain
    for name, has in lines:
        statement, _, first = page.statement_of(name, has)
        assert has in statement and statement in plain
        assert f":{first}" in plain
    for name in ("ddpm", "ddim", "heun"):  # the samplers that the text speaks of
        assert f"latentdiff.samplers:{name}" in sources


def test_equations_are_mathml(text: str) -> None:
    equations = re.findall(r"<math.*?</math>", text, re.DOTALL)
    assert len(equations) > 40
    for equation in equations:
        tree = ElementTree.fromstring(equation)
        said = "".join(tree.itertext())
        assert said.strip() and "\\" not in said and "{" not in said
        assert not list(tree.iter("{http://www.w3.org/1998/Math/MathML}merror"))


def test_nothing_of_the_template_is_left(text: str) -> None:
    prompt = html.escape(PROMPT)
    assert text.count(prompt) >= 4
    rest = text.replace(prompt, "")
    assert not re.search(r"\[\[\w+\]\]|</?(tex|texblock|when|line|picture)\b", rest)
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", rest, flags=re.DOTALL)


def test_unconditional_model_in_pixels(unconditional: Pipeline, tmp_path: Path) -> None:
    written = explain(tmp_path, unconditional, plan=TINY)
    text = written.read_text(encoding="utf-8")
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert {"forward", "reverse", "deterministic", "stochastic"} <= names
    assert names.isdisjoint({"autoencoder", "text", "guidance"})
    assert {"forward", "reverse"} <= parsed(text).anchors
    assert parsed(text).anchors.isdisjoint({"latents", "text", "guidance"})
    assert "latent" not in re.sub(
        r"<[^>]+>|latentdiff\S*|Latent Diffusion", "", text.split("<h2")[2]
    )
    with pytest.raises(ValueError, match="unconditional: it knows no text; leave out --prompt"):
        explain(tmp_path, unconditional, prompt="a cat", plan=TINY)


def test_an_error_leaves_the_old_page(
    tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.html").write_text("old")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("latentdiff.explain.story.save_png", full)
    with pytest.raises(OSError, match="No space left"):
        explain(tmp_path / "out", tiny_pipeline, plan=TINY)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["index.html"]
    assert (tmp_path / "out" / "index.html").read_text() == "old"


# What the page is made of


def test_statements_are_found_alone() -> None:
    heun = "latentdiff.samplers:heun"
    assert page.statement_of(heun, "denoised = den")[0] == "denoised = denoise(x, sigma)"
    assert page.statement_of(heun, "for step,")[0] == "for step, sigma, following in steps(sigmas):"
    with pytest.raises(LookupError, match=r"'sigma' is in \d+ statements of .*:heun; expected one"):
        page.statement_of(heun, "sigma")
    with pytest.raises(LookupError, match="is in 0 statements"):
        page.statement_of(heun, "Karras et al.")  # its docstring is no statement


def test_render_keeps_what_holds_and_escapes_what_was_said() -> None:
    template = (
        '<when is="text">A [[prompt]]</when><when not="text">B</when> <tex>\\clean</tex> '
        "[[bold_html]]"
    )
    said = {"prompt": "<tex>[[bold_html]]</tex>", "bold_html": "<b>!</b>"}
    rendered = page.render(template, said, {}, frozenset({"text"}))
    assert rendered.startswith("A &lt;tex&gt;[[bold_html]]&lt;/tex&gt; <math ")
    assert rendered.endswith("</math> <b>!</b>")
    assert page.render(template, said, {}, frozenset()).startswith("B <math ")
    with pytest.raises(KeyError):
        page.render("[[unknown]]", said, {}, frozenset())


def test_sheets_enlarge_by_whole_factors() -> None:
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3) * 5
    large = figures.enlarged(pixels, 128)
    np.testing.assert_array_equal(large, pixels.repeat(32, 0).repeat(32, 1))
    assert figures.enlarged(np.zeros((300, 300, 3), np.uint8), 128).shape == (128, 128, 3)
    sheet = figures.draw_sheet(Sheet(["one", "two"], [Row("row", [pixels, pixels], ["a", "b"])]))
    drawn = np.asarray(sheet)
    found = [(drawn == colour).all(-1).sum() for colour in pixels.reshape(-1, 3)]
    assert found == [2 * 32 * 32] * 16  # both pictures, pixel for pixel


def test_latent_colours() -> None:
    mix = colours.FOUR_TO_RGB
    torch.testing.assert_close(mix @ mix.T, torch.eye(3))
    assert (colours.latent_colours(torch.zeros(4, 2, 2)) == 128).all()
    for channels in (1, 2, 3, 4, 16):
        assert colours.latent_colours(torch.randn(channels, 5, 6)).shape == (5, 6, 3)
    image = torch.rand(3, 4, 4) * 2 - 1
    back = torch.from_numpy(colours.pixel_colours(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(back, image, atol=1 / 255, rtol=0)


def test_every_schedule_has_its_curve_and_its_line() -> None:
    made = curves.noise_schedules()
    assert {"linear", "scaled_linear", "cosine", "sigmoid", "beta_sigmoid"} <= set(made)
    assert "from_betas" not in made
    facts = {line.name: line for line in curves.schedule_facts()}
    for name, schedule in made.items():
        assert facts[name].last_signal == short(schedule.alphas_cumprod[-1].sqrt().item())
        assert (facts[f"{name}, zero-SNR"].last_signal, facts[f"{name}, zero-SNR"].sigma_max) == (
            "0",
            "∞",
        )
    assert facts["flow"].balance == "50%"  # sigma is 1 half-way
    assert facts["edm"].sigma_max == "80.0"
    assert curves.is_same(made["linear"], NoiseSchedule.linear())
    assert not curves.is_same(made["linear"], made["cosine"])
    assert not curves.is_same(FlowSchedule(), FlowSchedule(shift=3))


def test_grids_show_every_spacing_of_a_schedule() -> None:
    grids = curves.grids_of(NoiseSchedule.scaled_linear(), 10)
    assert {name for names in grids for name in names.split(", ")} == set(SPACINGS)
    assert len({tuple(sigmas.tolist()) for sigmas in grids.values()}) == len(grids)
    assert "trailing" not in curves.grids_of(EDMSchedule(), 10)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        *((0, "0"), (0.0294, "0.029"), (1.5, "1.50"), (14.61, "14.6"), (1175.2, "1175")),
        *((6e-4, "6·10⁻⁴"), (2.03e4, "2·10⁴")),
    ],
)
def test_short(value: float, written: str) -> None:
    assert short(value) == written


# The command


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs `latentdiff explain` on the tiny model with the tiny plan into tmp_path/out."""
    monkeypatch.setattr(explaining, "Plan", lambda: TINY)

    def call(*arguments: str) -> int:
        fixed = ["explain", "--model", str(tiny_model), "--out", str(tmp_path / "out")]
        return run([*fixed, *arguments])

    yield call


def test_command_prints_the_page(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "wide.jpg"
    Image.new("RGB", (90, 60), "navy").save(own)
    arguments = ["--image", str(own), "--caption", "the sea", "--prompt", "a cat", "--seed", "5"]
    assert command(*arguments) == 0
    out = tmp_path / "out" / "index.html"
    assert capsys.readouterr() == (f"{out}\n", "")
    text = out.read_text(encoding="utf-8")
    for said in ("wide.jpg", "“the sea”", "“a cat”", "--seed 5"):
        assert said in text
    assert DEFAULT_CAPTION not in text and "hamster" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png: No such file"),
        (["--image", "{text}"], "not a readable picture (of no known format); expected JPEG"),
        (["--out", "{text}"], "note.txt is a file; expected a directory, which may be new"),
        (["--model", "{missing}"], "not found"),
        (["--device", "abacus"], "device 'abacus' is unknown"),
        (["--seed", "many"], "Invalid value for '--seed'"),
    ],
)
def test_mistakes(
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("not a picture")
    places = {"{text}": str(note), "{missing}": str(tmp_path / "missing")}
    assert command(*(places.get(a, a) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
