"""Does a wrong config's error name the key as the file has it, the value, and what is expected?"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from latentdiff.configerrors import explain


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
    steps: int = Field(default=1, ge=1)
    vae: Autoencoder = KL()
    backup: Autoencoder | None = None
    stages: list[Autoencoder] = []
    block: Block | None = None
    pair: tuple[Block, int] = (Block(width=1), 2)
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    attention: int | Literal["auto"] = "auto"
    crops: list[int] | Block | None = None
    weights: dict[str, Block] = {}
    flip: bool = False
    text: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Train:
        if self.flip and self.text:
            raise ValueError("flip mirrors text; got true for both;\nset flip: false")
        return self


class Judge(Frozen):
    kind: Literal["judge"] = "judge"
    metric: str
    train: Train = Train()


Run = Annotated[Train | Judge, Field(discriminator="kind")]


def explained(model: Any, values: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(values)
    return explain(caught.value, model)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"steps": "x"},
            "steps: got 'x'; expected a valid integer, unable to parse string as an integer",
        ),
        ({"steps": 0}, "steps: got 0; expected a value greater than or equal to 1"),
        ({"steps": None}, "steps: got null; expected a valid integer"),
        ({"pair": 3}, "pair: got 3; expected a list"),
        ({"stages": True}, "stages: got true; expected a valid list"),
        ({"block": 3}, "block: got 3; expected a mapping of keys"),
        ({"block": {}}, "block.width: missing; expected an integer"),
        ({"pair": [{"name": "x"}, 1]}, "pair.0.width: missing; expected an integer"),
        (
            {"decay": "cosin"},
            "decay: got 'cosin'; expected 'constant', 'cosine' or 'linear'; did you mean cosine?",
        ),
        (
            {"stepz": 1},
            "stepz: unknown key; did you mean steps? known keys: kind, steps, vae, backup, stages, "
            "block, pair, decay, attention, crops, weights, flip, text",
        ),
        (
            {"block": {"width": 1, "widht": 2}},
            "block.widht: unknown key; did you mean block.width? known keys: width, name",
        ),
        (
            {"weights": {"a": {"width": 1, "zzz": 2}}},
            "weights.a.zzz: unknown key; known keys: width, name",
        ),
    ],
)
def test_plain_keys(values: Any, line: str) -> None:
    assert explained(Train, values) == [line]


@pytest.mark.parametrize("key", ["vae", "backup"])
@pytest.mark.parametrize(
    ("value", "rest"),
    [
        (
            {"kind": "kll"},
            ".kind: got 'kll'; expected one of 'kl', 'tiny', 'identity'; did you mean kl?",
        ),
        ({"scale": 1}, ".kind: missing; expected one of 'kl', 'tiny', 'identity'"),
        ("kl", ": got 'kl'; expected a mapping of keys"),
        ({"kind": "kl", "channels": [1, None]}, ".channels.1: got null; expected a valid integer"),
        ({"kind": "kl", "block": {"name": "x"}}, ".block.width: missing; expected an integer"),
        (
            {"kind": "kl", "chanels": []},
            ".chanels: unknown key; did you mean {}.channels? known keys: kind, channels, block",
        ),
    ],
)
def test_union_shows_its_kind_and_none_of_pydantics_labels(key: str, value: Any, rest: str) -> None:
    assert explained(Train, {key: value}) == [key + rest.format(key)]


def test_union_in_a_list_and_at_the_root() -> None:
    values = {"kind": "train", "stages": [{"kind": "tiny"}, {"kind": "tiny", "scael": 1}]}
    assert explained(Run, values) == [
        "stages.1.scael: unknown key; did you mean stages.1.scale? known keys: kind, scale"
    ]
    nested = {"kind": "judge", "metric": "fid", "train": {"vae": {"kind": "kl", "block": 3}}}
    assert explained(Run, nested) == ["train.vae.block: got 3; expected a mapping of keys"]


def test_root_has_no_path() -> None:
    assert explained(Run, {"kind": "trian"}) == [
        "kind: got 'trian'; expected 'train' or 'judge'; did you mean train?"
    ]
    assert explained(Run, {}) == ["kind: missing; expected 'train' or 'judge'"]
    assert explained(Train, []) == ["got []; expected a mapping of keys"]


def test_union_without_kind_joins_what_its_members_expect() -> None:
    assert explained(Train, {"attention": "fast"}) == [
        "attention: got 'fast'; expected a valid integer, unable to parse string as an integer "
        "or 'auto'"
    ]
    assert explained(Train, {"crops": 1}) == [
        "crops: got 1; expected a valid list or a mapping of keys"
    ]
    assert explained(Train, {"crops": ["x"]})[0] == (
        "crops.0: got 'x'; expected a valid integer, unable to parse string as an integer"
    )


def test_own_validators_speak_for_themselves_on_one_line() -> None:
    impossible = {"flip": True, "text": True}
    text = "flip mirrors text; got true for both; set flip: false"
    assert explained(Train, impossible) == [text]
    assert explained(Judge, {"metric": "x", "train": impossible}) == [f"train: {text}"]


def test_missing_key_says_what_it_takes() -> None:
    class Everything(Frozen):
        vae: Autoencoder
        block: Block | None
        prompts: list[str]
        decay: Literal["a", "b"]
        size: int | str
        flip: bool
        lr: float

    assert explained(Everything, {}) == [
        "vae: missing; expected a mapping with kind: kl or a mapping with kind: tiny "
        "or a mapping with kind: identity",
        "block: missing; expected a mapping with the keys width, name",
        "prompts: missing; expected a list",
        "decay: missing; expected 'a' or 'b'",
        "size: missing; expected an integer or text",
        "flip: missing; expected true or false",
        "lr: missing; expected a number",
    ]


def test_long_values_are_cut() -> None:
    (line,) = explained(Train, {"steps": "x" * 500})
    assert len(line) < 200
