"""Do YAML files and overrides become the config that was meant, and errors name the key?"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from latentdiff import configfile
from latentdiff.configfile import MAX_BYTES, dump_config, find_config, load_config


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Optimizer(Frozen):
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    decay: Literal["constant", "cosine", "linear"] = "cosine"


class Block(Frozen):
    width: int
    name: str = "block"


class KL(Frozen):
    kind: Literal["kl"] = "kl"
    channels: tuple[int, ...] = (32, 64)
    block: Block = Block(width=8)


class Tiny(Frozen):
    kind: Literal["tiny"] = "tiny"
    scale: float = 1.0


class Identity(Frozen):
    kind: Literal["identity"] = "identity"


Autoencoder = Annotated[KL | Tiny | Identity, Field(discriminator="kind")]


class Train(Frozen):
    kind: Literal["train"] = "train"
    steps: int = Field(ge=1)
    optimizer: Optimizer = Optimizer(lr=3e-4)
    vae: Autoencoder = KL(block=Block(width=16))
    stages: list[Autoencoder] = []
    blocks: tuple[Block, ...] = (Block(width=1), Block(width=2))
    resume: Block | None = None
    weights: dict[str, float] = {}
    out: Path = Path("runs")
    name: str | None = None
    flip: bool = False


class Judge(Frozen):
    kind: Literal["judge"] = "judge"
    metric: str


Run = Annotated[Train | Judge, Field(discriminator="kind")]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Loads YAML text as a `Train`, or as another model."""

    def load_text(text: str, *overrides: str, model: Any = Train) -> Any:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(model, path, overrides)

    return load_text


def problems(load: Any, text: str, *overrides: str, model: Any = Train) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(text, *overrides, model=model)
    assert not isinstance(caught.value, UnicodeError)
    return str(caught.value).split("\n")


# Reading


def test_file_and_defaults_make_the_config(load: Any) -> None:
    config = load("steps: 10\noptimizer: {lr: 0.5}\nvae: {kind: tiny, scale: 2}\n")
    assert config == Train(steps=10, optimizer=Optimizer(lr=0.5), vae=Tiny(scale=2.0))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-.5e+1", -5.0),
        ("1_000", 1000),
        ("010", 10),
        (".inf", float("inf")),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(load: Any, written: str, value: Any) -> None:
    class Holder(Frozen):
        value: Any

    got = load(f"value: {written}", model=Holder).value
    assert got == value
    assert type(got) is type(value)


def test_union_of_runs_is_chosen_by_kind_as_annotation_or_adapter(load: Any) -> None:
    for model in (Run, TypeAdapter(Run)):
        assert load("kind: judge\nmetric: fid", model=model) == Judge(metric="fid")
        assert load("kind: train\nsteps: 1", "steps=2", model=model) == Train(steps=2)


def test_empty_file_leaves_everything_to_defaults(load: Any) -> None:
    assert load("# nothing\n", model=Optimizer) == Optimizer()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", "line 2, column 1: key 'steps' stands in line 1 too"),
        ("a: &x [1]\nb: *x", r"line 2, column 4: aliases \(\*name\) are not allowed"),
        ("a: !!python/name:os.system x", r"line 1, column 4: tags \(!name\) are not allowed"),
        ("a: !!int ''", r"tags \(!name\) are not allowed"),
        ("a: [1", "line 1, column 6: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("[" * 1000, "nested deeper than 64 levels"),
        ("a: [" + "1," * 30_000 + "]", "more than 20000 keys and values"),
        ("a: " + "9" * 5000, "a number of too many digits"),
        ('a: "\\Uffffffff"', "too large to convert"),
        ("? [a]\n: 1", "found unhashable key"),
        ("- 1", "got list; expected a mapping of keys to values"),
        ("#" * (MAX_BYTES + 1), f"expected at most {MAX_BYTES} bytes"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_in_one_line(load: Any, text: str, message: str) -> None:
    (line,) = problems(load, text)
    assert re.search(message, line), line
    assert "run.yaml: " in line


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match=r"run\.yaml: not UTF-8 text at byte 3"):
        load_config(Train, path)


@pytest.mark.parametrize(
    "piece", ["%A\n", "x: |\n ", "#\n", "- ", "k: {", "a b ", "\n ", "'", "? "]
)
def test_slow_looking_files_are_read_or_refused_in_seconds(load: Any, piece: str) -> None:
    start = time.monotonic()
    problems(load, piece * (MAX_BYTES // len(piece)))
    assert time.monotonic() - start < 10  # about one on a quiet machine


# Overrides


def test_overrides_reach_every_kind_of_place(load: Any) -> None:
    config = load(
        "steps: 1\nblocks: [{width: 1}, {width: 2}]\nstages: [{kind: tiny}]\n",
        "steps=7",
        "optimizer.lr=1e-3",
        "optimizer.betas.0=0.5",
        "blocks.1.width=9",
        "stages.0.scale=4",
        "resume.width=3",
        "weights.fid=0.25",
        "name=a red apple",
        "out=runs/a=b",
    )
    assert config == Train(
        steps=7,
        optimizer=Optimizer(lr=1e-3, betas=(0.5, 0.999)),
        blocks=(Block(width=1), Block(width=9)),
        stages=[Tiny(scale=4.0)],
        resume=Block(width=3),
        weights={"fid": 0.25},
        name="a red apple",
        out=Path("runs/a=b"),
    )


def test_override_below_a_default_keeps_the_rest_of_that_default(load: Any) -> None:
    config = load("steps: 1", "optimizer.decay=linear", "vae.block.name=x", "blocks.0.name=first")
    assert config.optimizer == Optimizer(lr=3e-4, decay="linear")
    assert config.vae == KL(block=Block(width=16, name="x"))
    assert config.blocks == (Block(width=1, name="first"), Block(width=2))


@pytest.mark.parametrize("order", [1, -1])
def test_kind_of_a_default_can_be_changed_with_its_keys_in_any_order(load: Any, order: int) -> None:
    config = load("steps: 1", *["vae.kind=tiny", "vae.scale=3"][::order])
    assert config.vae == Tiny(scale=3.0)


def test_later_override_wins_and_whole_mappings_can_be_given(load: Any) -> None:
    config = load("steps: 1", "vae={kind: tiny, scale: 2}", "vae.scale=5", "steps=2", "steps=3")
    assert (config.vae, config.steps) == (Tiny(scale=5.0), 3)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("steps", "override 'steps': expected key.sub=value, for example optimizer.lr=1e-4"),
        ("a..b=1", "override 'a..b=1': expected key.sub=value, for example optimizer.lr=1e-4"),
        ("steps.x=1", "steps.x: steps is 1; expected a mapping or a list there"),
        (
            "blocks.2.width=1",
            "blocks.2.width: '2' is no index of blocks, which has 2 items; expected 0 to 1",
        ),
        ("blocks.x=1", "blocks.x: 'x' is no index of blocks, which has 2 items; expected 0 to 1"),
        (
            "name=[a",
            "name: '[a' is not YAML (quote text that holds ': ' or '#'): line 1, column 3: "
            "while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        (
            "optimizer.lrr=1",
            "optimizer.lrr: unknown key; did you mean optimizer.lr? known keys: lr, betas, decay",
        ),
        (
            "optimzer.lr=1",
            "optimzer: unknown key; did you mean optimizer? known keys: kind, steps, optimizer, "
            "vae, stages, blocks, resume, weights, out, name, flip",
        ),
    ],
)
def test_override_without_a_place_is_told(load: Any, override: str, line: str) -> None:
    assert problems(load, "steps: 1", override) == [line]


# Errors (their words: test_configerrors.py)


def test_every_problem_has_its_own_line(load: Any) -> None:
    text = "optimizer: {lr: -1, foo: 2}\nvae: {kind: kl, block: {name: x}}\nflip: maybe\n"
    keys = [line.split(":")[0] for line in problems(load, "kind: train\n" + text, model=Run)]
    assert keys == ["steps", "optimizer.lr", "optimizer.foo", "vae.block.width", "flip"]


def test_mutated_files_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = b"kind: train\nsteps: 3\nvae: {kind: kl, channels: [1, 2]}\nblocks:\n- width: 1\n"
    pieces = [b": ", b"- ", b"[", b"}", b'"', b"\n", b"|", b"%", b"!", b"&a", b"*a", b"? ", b"\\U"]
    path = tmp_path / "run.yaml"
    num_loaded = 0
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.choice([0, 1, 5])] = rng.choice(pieces)
        path.write_bytes(data)
        try:
            load_config(Train, path)
            num_loaded += 1
        except ValueError as error:
            assert str(error)
    assert 0 < num_loaded < 1000


# Writing and finding


def test_dump_loads_back_to_an_equal_config(load: Any) -> None:
    config = Train(
        steps=3,
        optimizer=Optimizer(lr=1e-5),
        vae=Tiny(scale=float("inf")),
        stages=[KL(), Identity()],
        weights={"no": 1e16, "1e-4": 0.1, "on": 2.0, "ein roter Apfel, 赤いりんご 🍎": 0.0},
        out=Path("a b/c"),
        name="x" * 150 + " 2024-01-01",
    )
    text = dump_config(config)
    assert load(text) == config
    assert "赤いりんご 🍎" in text


AWKWARD_TEXTS = """1e-4 no yes null ~ 010 1_0 2024-01-01 # *a !x <<  = 1:30 .nan 0x1F ' " true 🍎"""


@pytest.mark.parametrize("name", [*AWKWARD_TEXTS.split(), "", " x ", "a\nb", "\t", "- a", "a: b"])
def test_any_text_survives_dump_and_load(load: Any, name: str) -> None:
    assert load(dump_config(Train(steps=1, name=name))).name == name


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the installed package, with two shipped configs."""
    package = tmp_path / "package"
    (package / "configs").mkdir(parents=True)
    for name in ("ldm_emoji", "vae_emoji"):
        (package / "configs" / f"{name}.yaml").write_text("steps: 1\n")
    monkeypatch.setattr(configfile, "__file__", str(package / "configfile.py"))
    monkeypatch.chdir(tmp_path)
    return package / "configs"


def test_configs_are_found_by_name_and_by_path(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: 2\n")
    assert find_config("ldm_emoji") == shipped / "ldm_emoji.yaml"
    assert find_config("mine.yaml") == Path("mine.yaml")
    assert find_config(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert load_config(Train, "vae_emoji", ["steps=5"]).steps == 5


@pytest.mark.parametrize("name", ["ldm_emojis", "ldm_emojis.yaml", "runs/ldm_emojis.yaml"])
def test_config_that_is_nowhere_lists_the_shipped_ones(shipped: Path, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_config(name)
    assert str(caught.value) == (
        f"config {name!r}: no such file, nor a shipped config; did you mean ldm_emoji? "
        "shipped: ldm_emoji, vae_emoji"
    )


def test_checkout_and_wheel_ship_the_same_configs(repository: Path) -> None:
    names = [path.stem for path in sorted((repository / "configs").glob("*.yaml"))]
    assert list(configfile.shipped_configs()) == names
