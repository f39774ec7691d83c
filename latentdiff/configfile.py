"""How does a YAML file with `key.sub=value` overrides become a checked config, and a config YAML?

Knows no particular config: give it a pydantic model, or a union of models tagged by `kind`.
Values are read by YAML 1.2's rules: `1e-4` is a number, `no` is the text "no".
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from latentdiff.configerrors import TAG, child, explain, is_model, members, tags

T = TypeVar("T")

MAX_BYTES = 1 << 18  # of one file: read in about a second even if made to be slow
MAX_DEPTH = 64  # of nested lists and mappings
MAX_NODES = 20_000  # keys, values, lists and mappings together


def load_config(
    model: type[T] | TypeAdapter[T], path: str | Path, overrides: Sequence[str] = ()
) -> T:
    """Reads a YAML file, applies overrides and validates the result.

    Args:
        model: A pydantic model class, or a union of them (annotated, or as a `TypeAdapter`).
        path: A YAML file, or a shipped config's name: see `find_config`.
        overrides: `key.sub=value`, applied in order, values in YAML (`layers.0.width=64`,
            `vae={kind: tiny}`). A key that the file leaves to its default can be overridden too.

    Returns:
        The validated config.

    Raises:
        ValueError: There is no such file; it is not YAML, or too large; an override has no place;
            or the config does not validate: then one line a problem, with the key's dotted path.
        OSError: The file cannot be read.
    """
    adapter: TypeAdapter[T] = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    annotation: Any = adapter._type if isinstance(model, TypeAdapter) else model
    raw = _read(find_config(path))
    _apply(raw, overrides, annotation)
    try:
        return adapter.validate_python(raw)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, annotation))) from None


def dump_config(config: BaseModel) -> str:
    """Returns YAML that `load_config` reads back to an equal config, every default written out."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def find_config(name_or_path: str | Path) -> Path:
    """Returns the YAML file of a shipped config by its name (`ldm_emoji`), or of a path.

    Raises:
        ValueError: There is neither; the message lists the shipped names.
    """
    shipped = shipped_configs()
    if str(name_or_path) in shipped:
        return shipped[str(name_or_path)]
    path = Path(name_or_path)
    if path.is_file():
        return path
    close = get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(
        f"config {str(name_or_path)!r}: no such file, nor a shipped config; {hint}"
        f"shipped: {', '.join(shipped) or 'none'}"
    )


def shipped_configs() -> dict[str, Path]:
    """Returns the YAML files that travel with this package, by name, in alphabetical order."""
    package = Path(__file__).parent
    installed, checkout = package / "configs", package.parent / "configs"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(path: Path) -> dict[Any, Any]:
    """Reads a YAML mapping; an empty file is an empty one."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: too large for a config; expected at most {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    with _one_line_errors(str(path)):
        raw = yaml.load(text, Loader=_Loader)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: got {type(raw).__name__}; expected a mapping of keys to values")
    return raw


def _apply(raw: dict[Any, Any], overrides: Sequence[str], annotation: Any) -> None:
    """Writes overrides into the values of a file, in order."""
    settings = [_parse_override(override) for override in overrides]
    kinds = {path[:-1]: value for path, value in settings if path[-1] == TAG}
    for path, value in settings:
        node: Any = raw
        here = annotation
        for depth in range(len(path) - 1):
            slot = _slot(node, path, depth)
            member = _choose(here, node)
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = _default(member, slot, kinds.get(path[: depth + 1]))
            node, here = node[slot], child(member, slot)
        node[_slot(node, path, len(path) - 1)] = value


def _parse_override(override: str) -> tuple[tuple[str, ...], Any]:
    """Splits `key.sub=value` into the key's path and the value, read as YAML."""
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ValueError(
            f"override {override!r}: expected key.sub=value, for example optimizer.lr=1e-4"
        )
    with _one_line_errors(f"{key}: {text!r} is not YAML (quote text that holds ': ' or '#')"):
        return path, yaml.load(text, Loader=_Loader)


def _slot(node: Any, path: Sequence[str], depth: int) -> Any:
    """Returns what to index `node` with for `path[depth]`: a key, or a list's index."""
    if isinstance(node, dict):
        return path[depth]
    key, parent = ".".join(path), ".".join(path[:depth])
    if not isinstance(node, list):
        raise ValueError(f"{key}: {parent} is {node!r}; expected a mapping or a list there")
    if not path[depth].isdecimal() or int(path[depth]) >= len(node):
        raise ValueError(
            f"{key}: {path[depth]!r} is no index of {parent}, which has {len(node)} items; "
            f"expected 0 to {len(node) - 1}"
        )
    return int(path[depth])


def _choose(annotation: Any, node: Any) -> Any:
    """Returns the member of a union that the values in `node` are meant for, or None."""
    options = members(annotation)
    if isinstance(node, Mapping) and len(options) > 1:
        models = [option for option in options if is_model(option)]
        tagged = [option for option in models if node.get(TAG) in tags(option)]
        options = tagged or models
    return options[0] if len(options) == 1 else None


def _default(member: Any, key: str, kind: Any) -> Any:
    """Returns what the file leaves out at `key`: its default values, or an empty mapping.

    `kind` is what another override makes of it, if one does: the default of another member of a
    union is no base for that.
    """
    field = member.model_fields.get(key) if is_model(member) else None
    if field is None:
        return {}
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    values = TypeAdapter(Any).dump_python(default, mode="json")
    if kind is not None and len(members(field.annotation)) > 1:
        same = isinstance(values, dict) and values.get(TAG) == kind
        return values if same else {TAG: kind}
    return {} if values is None else values


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """Turns YAML's many-line errors into one ValueError that opens with `source`."""
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{source}: {place}{problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter: "\\Uffffffff"
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from None


_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_CORE_SCHEMA = {"null": _NULL, "bool": _BOOL, "int": _INT, "float": _FLOAT}  # in order


class _Loader(yaml.SafeLoader):
    """Plain data alone: YAML 1.2 scalars; no tags, no aliases, no key twice, bounded in size."""

    yaml_implicit_resolvers: ClassVar[Any] = {
        None: [
            (f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern.pattern})\\Z"))
            for name, pattern in _CORE_SCHEMA.items()
        ]
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not allowed; write the value out", event)
        if getattr(event, "tag", None) is not None:
            raise self._refusal("tags (!name) are not allowed; write plain values", event)
        self._depth, self._num_nodes = self._depth + 1, self._num_nodes + 1
        if self._depth > MAX_DEPTH:
            raise self._refusal(f"nested deeper than {MAX_DEPTH} levels", event)
        if self._num_nodes > MAX_NODES:
            raise self._refusal(f"more than {MAX_NODES} keys and values", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Hashable, int] = {}  # key -> its line
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in first:
                raise self._refusal(f"key {key!r} stands in line {first[key]} too", key_node)
            if isinstance(key, Hashable):
                first[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: Any) -> int:
        """Reads decimal digits; YAML 1.1 would read 010 as 8."""
        try:
            return int(self.construct_scalar(node))
        except ValueError:  # Python converts some thousand digits and no more
            raise self._refusal("a number of too many digits", node) from None

    @staticmethod
    def _refusal(problem: str, where: Any) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader`, or a YAML 1.1 reader, would take for something else."""

    yaml_implicit_resolvers: ClassVar[Any] = {
        **yaml.SafeDumper.yaml_implicit_resolvers,
        **_Loader.yaml_implicit_resolvers,
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True
