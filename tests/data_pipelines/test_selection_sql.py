"""Does a condition mean what the user wrote, and can it do nothing else?"""

from __future__ import annotations

from typing import Any

import pytest

from data_pipelines.conditions import parse_rules

COLUMNS = {
    "key": "VARCHAR",
    "extensions": "VARCHAR[]",
    "width": "INTEGER",
    "height": "INTEGER",
    "caption": "VARCHAR",
    "aesthetic": "DOUBLE",
    "nice": "BOOLEAN",
    "LICENSE": "VARCHAR",
    "group": "VARCHAR",
    'odd "name"': "VARCHAR",
}


def names(where: Any) -> list[str]:
    return [rule.name for rule in parse_rules(where, COLUMNS)]


# What is let in


def test_no_condition_is_no_rule() -> None:
    assert parse_rules(None, COLUMNS) == parse_rules("", COLUMNS) == parse_rules({}, COLUMNS) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("aesthetic >= 5 and width * height >= 65536 and nice",
         ["aesthetic >= 5", "(width * height) >= 65536", "nice"]),
        ("(width > 1 and (height > 2 and nice)) and not nice",
         ["width > 1", "height > 2", "nice", "NOT nice"]),
        ("width > 1 or height > 2 and nice", ["width > 1 or height > 2 and nice"]),
        ("width between 1 and 2 and nice", ["width BETWEEN 1 AND 2", "nice"]),
        ("key like 'a and b%' and key not ilike '~~ x'",
         ["\"key\" LIKE 'a and b%'", "\"key\" NOT ILIKE '~~ x'"]),
        (["width > 1", "height\n  > 2"], ["width > 1", "height > 2"]),
        ("license = 'MIT' -- a remark", ["license = 'MIT' -- a remark"]),
        ("\"group\" = 'x'", ["\"group\" = 'x'"]),
        ("(width > 1) = (height > 1) and nice", ["(width > 1) = (height > 1)", "nice"]),
    ],
)  # fmt: skip
def test_a_rule_for_each_condition_joined_by_and(where: object, expected: list[str]) -> None:
    assert names(where) == expected


@pytest.mark.parametrize(
    "where",
    [
        "list_contains(extensions, 'txt')",
        "len(list_filter(extensions, lambda e: e like 't%')) > 0",
        "[e for e in extensions if e = 'txt'] <> []",
        "samples.width > 1",
        "regexp_matches(caption, '^a .*') or lower(caption) = 'b'",
        "case when nice then width else height end > 5",
        "cast(caption as integer) > 5",
        "hash(key) % 10 = 0",
        "aesthetic is not null",
    ],
)
def test_expressions_over_columns(where: str) -> None:
    (rule,) = parse_rules(where, COLUMNS)
    assert rule.name == where


def test_allowed_values_are_quoted() -> None:
    where = {"caption": ["it's", 'a "b"'], "width": [1, 2], "nice": [True], 'odd "name"': ["x; --"]}
    rules = parse_rules(where, COLUMNS)
    assert [rule.sql for rule in rules] == [
        "\"caption\" IN ('it''s', 'a \"b\"')",
        '"width" IN (1, 2)',
        '"nice" IN (true)',
        '"odd ""name""" IN (\'x; --\')',
    ]
    assert rules[1].name == "width in (1, 2)"
    numbers: Any = range(9)
    many = parse_rules({"width": numbers}, COLUMNS)
    assert many[0].name == "width in (0, 1, 2, 3, ...)"


# What is refused


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aesthetik > 5", "no column 'aesthetik'; did you mean aesthetic? it has key, extensions"),
        ("caption = \"a dog\"", "no column 'a dog'"),
        ("current_date > '2020-01-01'", "no column 'current_date'"),
        ("samples.nope = 1", "no column 'nope'"),
        ("width = = 5", "is not a condition: syntax error at or near \"=\"; write SQL such as"),
        ("group = 'x'", 'needs quotes: "group"'),
        ("width > 'a", "unterminated string literal"),
        ("width", "'width' must be true or false; it is INTEGER; compare it"),
        ("lower(width) = 'a'", "No function matches"),
        ("nofunction(width) = 1", "nofunction does not exist"),
        ("count(*) > 1", "cannot contain aggregates"),
        ("  ", "a condition has 1 to"),
        ("width > 1 or " * 1000 + "nice", "a condition has 1 to 10000 characters"),
        ("random() < 0.5", "calls random(), whose value is not the sample's own"),
        ("now() > '2020-01-01'", "calls now()"),
        ("getvariable('x') = 1", "calls getvariable()"),
    ],
)  # fmt: skip
def test_mistakes_are_named(where: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_rules(where, COLUMNS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "where",
    [
        "width > 1; drop table samples",
        "width > 1) ; copy (select 1) to ('x'",
        "width > 1) union select (1",
        "width > 1) order by (1",
        "width > 1) group by (width",
        "width > 1) limit (1",
        "width in (select 1)",
        "exists(from read_csv('/etc/passwd'))",
        "(select count(*) from '/etc/passwd') > 1",
        "read_csv('/etc/passwd')",
        "read_text('/etc/passwd') = ''",
        "query('select 1')",
        "copy samples to '/tmp/x'",
        "attach '/tmp/x'",
        "install httpfs",
        "load httpfs",
        "pragma version",
        "set threads = 1",
        "row_number() over () > 1",
        "columns('w.*') > 1",
        "* > 1",
        "width > ?",
        "width > $1",
        "#1 > 1",
        "width > 1) --",
        "width > 1 /*",
        "getenv('HOME') = 'x'",
        "nextval('x') = 1",
        "sleep_ms(1000000) is null",
        "error('x')",
        "(" * 4000 + "nice" + ")" * 4000,
        "a\0b > 1",
    ],
)
def test_nothing_but_an_expression_is_let_in(where: str) -> None:
    with pytest.raises(ValueError):
        parse_rules(where, COLUMNS)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"width": ["1"]}, "width is INTEGER in the index, which '1' cannot equal"),
        ({"caption": [1]}, "caption is VARCHAR in the index, which 1 cannot equal"),
        ({"nice": [1]}, "nice is BOOLEAN in the index, which 1 cannot equal"),
        ({"width": [True]}, "width is INTEGER in the index, which True cannot equal"),
        ({"extensions": ["txt"]}, "extensions is VARCHAR[]"),
        ({"nope": ["x"]}, "no column 'nope'"),
        ({"caption": []}, "caption lets no value in"),
    ],
)
def test_values_must_fit_the_column(where: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_rules(where, COLUMNS)
    assert message in str(error.value)
