"""Which conditions may be put to the index? Expressions over a sample's columns, nothing more."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

Value = str | int | float | bool
Where = str | Sequence[str] | Mapping[str, Sequence[Value]]

_MAX_CHARS = 10_000
_EXAMPLE = 'write SQL such as "aesthetic >= 5 and width * height >= 65536"'
# What DuckDB's parser may find in a condition; a sub-query, a parameter, a window are not here.
_ALLOWED = {
    *("BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION"),
    *("CONSTANT", "FUNCTION", "LAMBDA", "LAMBDA_REF", "OPERATOR", "TYPE"),
}
_NUMBERS = ("INT", "DOUBLE", "FLOAT", "DECIMAL")
_LIKE = {"!~~*": "NOT ILIKE", "!~~": "NOT LIKE", "~~*": "ILIKE", "~~": "LIKE"}
_QUOTED = re.compile(r"""('(?:[^']|'')*'|"(?:[^"]|"")*")""")


@dataclass(frozen=True)
class Rule:
    """A condition that every kept sample fulfils.

    Attributes:
        name: as it is shown.
        sql: an expression over the index's columns, true for what is kept.
    """

    name: str
    sql: str


def parse_rules(where: Where | None, columns: Mapping[str, str]) -> list[Rule]:
    """Turn what the user asks for into rules, one for each condition joined by a top-level AND.

    Nothing of the user's text is executed: DuckDB parses it, the tree is checked to hold an
    expression over the columns alone, and the rules' SQL is written from that tree.

    Args:
        where: SQL, several of it, or metadata field -> the values that are let in.
        columns: the index's columns, name -> DuckDB's type.

    Raises:
        ValueError: it is no such condition, or names a column that is not there.
    """
    if not where:
        return []
    with _parser(columns) as connection:
        if isinstance(where, Mapping):
            rules = [_one_of(field, allowed, columns) for field, allowed in where.items()]
        else:
            texts = [where] if isinstance(where, str) else where
            rules = [rule for text in texts for rule in _split(text, columns, connection)]
        for rule in rules:
            _bind(rule, connection)
    return rules


def quote_name(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """A string as SQL."""
    return "'" + text.replace("'", "''") + "'"


def first_line(error: Exception) -> str:
    """What DuckDB complains about, without the kind of error and the picture of the query."""
    line = str(error).partition("\n")[0]
    return line.partition("Error: ")[2] or line


def _parser(columns: Mapping[str, str]) -> duckdb.DuckDBPyConnection:
    """A connection that knows an empty table of these columns, and can reach nothing else."""
    import duckdb

    connection = duckdb.connect(":memory:", config={"python_enable_replacements": False})
    described = ", ".join(f"{quote_name(name)} {kind}" for name, kind in columns.items())
    connection.execute(f"CREATE TABLE samples ({described})")
    connection.execute("SET enable_external_access = false; SET lock_configuration = true")
    return connection


def _one_of(field: str, allowed: Sequence[Value], columns: Mapping[str, str]) -> Rule:
    kind = _known(field, columns)
    values = [allowed] if isinstance(allowed, str | int | float) else list(allowed)
    if not values:
        raise ValueError(f"where: {field} lets no value in; name at least one")
    for value in values:
        if isinstance(value, bool):
            fits = kind == "BOOLEAN"
        elif isinstance(value, int | float):
            fits = any(number in kind for number in _NUMBERS)
        else:
            fits = kind == "VARCHAR"
        if not fits:
            raise ValueError(
                f"where: {field} is {kind} in the index, which {value!r} cannot equal; "
                "give values of that type (quotes make text of a number)"
            )
    literals = ", ".join(quote_text(v) if isinstance(v, str) else str(v).lower() for v in values)
    shown = ", ".join(str(value) for value in values[:4]) + (", ..." if len(values) > 4 else "")
    return Rule(f"{field} in ({shown})", f"{quote_name(field)} IN ({literals})")


def _split(
    text: str, columns: Mapping[str, str], connection: duckdb.DuckDBPyConnection
) -> Iterator[Rule]:
    """The rules of one text: its tree, cut at each AND at the top."""
    if not text.strip() or len(text) > _MAX_CHARS:
        raise ValueError(
            f"a condition has 1 to {_MAX_CHARS} characters; got {len(text)}; {_EXAMPLE}"
        )
    frame = _parse("true", connection)
    # the newline ends a comment in the text, so that the bracket after it counts
    select = _parse(text, connection)
    condition = select.pop("where_clause")
    frame.pop("where_clause")
    if _without_places(select) != _without_places(frame):
        raise ValueError(f"{text!r} is more than a condition; {_EXAMPLE}")
    _check(text, condition, columns, connection)
    parts = list(_conjuncts(condition))
    for part in parts:
        statement = {"node": {**frame, "select_list": [part]}, "named_param_map": []}
        tree = json.dumps({"error": False, "statements": [statement]})
        (row,) = connection.execute("SELECT json_deserialize_sql(?::JSON)", [tree]).fetchall()
        sql = row[0].removeprefix("SELECT ")
        yield Rule(" ".join(text.split()) if len(parts) == 1 else _shown(sql), sql)


def _parse(text: str, connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """The tree of `SELECT 1 WHERE (text)`."""
    import duckdb

    try:
        statement = f"SELECT 1 WHERE (\n{text}\n)"
        (row,) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchall()
    except duckdb.Error as error:
        raise ValueError(f"{text!r} cannot be read: {first_line(error)}; {_EXAMPLE}") from error
    parsed = json.loads(row[0])
    if parsed["error"]:
        raise ValueError(
            f"{text!r} is not a condition: {parsed['error_message']}; {_EXAMPLE} "
            '(a name that is also a word of SQL needs quotes: "group")'
        )
    if len(parsed["statements"]) != 1 or parsed["statements"][0]["node"]["type"] != "SELECT_NODE":
        raise ValueError(f"{text!r} is more than a condition; {_EXAMPLE}")
    return parsed["statements"][0]["node"]


def _check(
    text: str,
    condition: Any,
    columns: Mapping[str, str],
    connection: duckdb.DuckDBPyConnection,
) -> None:
    nodes = list(_nodes(condition))
    for node in nodes:
        kind = node.get("class")
        if kind is not None and kind not in _ALLOWED:
            what = str(kind).lower().replace("_", " ")
            raise ValueError(
                f"{text!r} holds a {what}; a condition is an expression over one sample's columns"
            )
    functions = {node["function_name"].lower() for node in nodes if node.get("function_name")}
    if functions:
        changing = connection.execute(
            "SELECT DISTINCT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
        ).fetchall()
        for name in sorted(functions.intersection(row[0] for row in changing)):
            raise ValueError(
                f"{text!r} calls {name}(), whose value is not the sample's own, so that the "
                "selection would change; for a random part write hash(key) % 10 = 0"
            )
    bound = {  # the variables of lambdas
        name
        for node in nodes
        if node.get("class") == "LAMBDA"
        for inner in _nodes(node.get("lhs"))
        for name in inner.get("column_names", ())
    }
    for node in nodes:
        names = node.get("column_names") if node.get("class") == "COLUMN_REF" else None
        if names and names[0] not in bound:
            is_table = names[0].lower() == "samples" and len(names) > 1
            _known(names[1] if is_table else names[0], columns)


def _known(name: str, columns: Mapping[str, str]) -> str:
    """The type of a column; SQL's names do not tell capitals from small letters."""
    lower = {column.lower(): kind for column, kind in columns.items()}
    if name.lower() not in lower:
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"the index has no column {name!r}; {hint}it has {', '.join(columns)} "
            "(text stands in single quotes)"
        )
    return lower[name.lower()]


def _bind(rule: Rule, connection: duckdb.DuckDBPyConnection) -> None:
    """Let DuckDB match functions and types."""
    import duckdb

    try:
        connection.execute(f"EXPLAIN SELECT 1 FROM samples WHERE {rule.sql}")
        (row,) = connection.execute(f"DESCRIBE SELECT {rule.sql} FROM samples").fetchall()
    except duckdb.Error as error:
        raise ValueError(f"{rule.name!r} is not a condition: {first_line(error)}") from error
    kind = row[1]
    if kind != "BOOLEAN":
        raise ValueError(f"{rule.name!r} must be true or false; it is {kind}; compare it")


def _conjuncts(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if node.get("type") == "CONJUNCTION_AND":
        for child in node["children"]:
            yield from _conjuncts(child)
    else:
        yield node


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from _nodes(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _nodes(value)


def _without_places(tree: Any) -> Any:
    """The tree without its positions in the text."""
    if isinstance(tree, dict):
        return {k: _without_places(v) for k, v in tree.items() if not k.startswith("query_loc")}
    return [_without_places(value) for value in tree] if isinstance(tree, list) else tree


def _shown(sql: str) -> str:
    """As a person would write it: no bracket around the whole, LIKE for ~~."""
    bare = _QUOTED.sub(lambda quoted: "_" * len(quoted[0]), sql)
    depths = list(accumulate((letter == "(") - (letter == ")") for letter in bare))
    if bare.startswith("(") and 0 not in depths[:-1]:
        sql = sql[1:-1]
    parts = _QUOTED.split(sql)
    for operator, word in _LIKE.items():
        parts[::2] = [part.replace(f" {operator} ", f" {word} ") for part in parts[::2]]
    return "".join(parts)
