"""How does the page's template become HTML? Equations, live source lines, figures and numbers.

The template is HTML with a few tags of its own:

    [[name]]                                  a number or a word that was computed
    <tex>...</tex>, <texblock>...</texblock>  LaTeX, which becomes MathML
    <source of="module:object">...</source>   an object's source, as it is now, behind a summary
    <line of="module:object" has="text">      the one statement of it that contains the text
    <picture of="name">...</picture>          a figure and its caption
    <when is="fact">...</when>                kept for models of which the fact holds; also `not`
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "page.html"
_MACROS = {  # one colour each for the picture and the noise, on the whole page
    r"\clean": r"\textcolor{#1d5fa6}{x_0}",
    r"\guess": r"\textcolor{#1d5fa6}{\hat{x}_0}",
    r"\noise": r"\textcolor{#b93e0a}{\epsilon}",
    r"\net": r"\textcolor{#b93e0a}{\epsilon_\theta}",
    r"\abar": r"\bar{\alpha}",
}
_MATHML_REPAIRS = {  # what latex2mathml says differently from what browsers expect
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",  # \sim is a relation, with space around it
    "<mi>&#x00064;</mi>": '<mi mathvariant="normal">&#x00064;</mi>',  # \mathrm{d} stands upright
    "<mover><": '<mover accent="true"><',
    # fonts without mathematics put an accent onto the letter, where a bar cannot be seen
    '<mover accent="true"><mrow><mi>&#x003B1;</mi></mrow><mo stretchy="true">&#x000AF;</mo>': (
        '<mover><mrow><mi>&#x003B1;</mi></mrow><mo stretchy="false">&#x02013;</mo>'
    ),
}


@dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        file: its name, beside the page.
        width_px: of the file.
        height_px: of the file.
        alt: what it shows, for those who cannot see it.
    """

    file: str
    width_px: int
    height_px: int
    alt: str


def render(
    template: str,
    values: Mapping[str, str],
    figures: Mapping[str, Figure],
    facts: frozenset[str],
) -> str:
    """The page as HTML.

    Args:
        template: the page with the tags above.
        values: for [[name]]; plain text, or HTML in a name that ends in `_html`.
        figures: for <picture>, by name.
        facts: for <when>.
    """
    page = re.sub(
        r'<when (is|not)="(\w+)">(.*?)</when>',
        lambda m: m[3] if (m[2] in facts) == (m[1] == "is") else "",
        template,
        flags=re.DOTALL,
    )
    # Values first: escaped, so that a prompt which looks like a tag stays the text that it is.
    page = re.sub(
        r"\[\[(\w+)\]\]",
        lambda m: values[m[1]] if m[1].endswith("_html") else escape(values[m[1]]),
        page,
    )
    tags = {
        r"<texblock>(.*?)</texblock>": lambda m: equation(m[1], "block"),
        r"<tex>(.*?)</tex>": lambda m: equation(m[1], "inline"),
        r'<picture of="(\w+)">(.*?)</picture>': lambda m: _picture(figures[m[1]], m[2]),
        r'<source of="([^"]+)">(.*?)</source>': lambda m: _source(m[1], m[2]),
        r'<line of="([^"]+)" has="([^"]+)">': lambda m: _line(m[1], m[2]),
        "<style-of-code>": lambda _: _code_style(),
    }
    for pattern, become in tags.items():
        page = re.sub(pattern, become, page, flags=re.DOTALL)
    return page


def equation(latex: str, display: str) -> str:
    """LaTeX -> MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    for macro, meaning in _MACROS.items():
        latex = re.sub(re.escape(macro) + r"(?![a-zA-Z])", lambda _, m=meaning: m, latex)
    mathml = convert(latex.strip(), display=display)
    for said, meant in _MATHML_REPAIRS.items():
        mathml = mathml.replace(said, meant)
    return mathml


def source_of(name: str) -> tuple[str, str, int]:
    """The live source of `module:object`: its text, its file as one would import it, its line."""
    target = resolve(name)
    lines, first = inspect.getsourcelines(target)
    module = name.partition(":")[0]
    return textwrap.dedent("".join(lines)).rstrip(), module.replace(".", "/") + ".py", first


def statement_of(name: str, has: str) -> tuple[str, str, int]:
    """The smallest statement of `module:object` that contains a text; of a loop, its head.

    Returns:
        The statement's text, its file, its line.
    """
    source, file, first = source_of(name)
    lines = source.splitlines()
    found: list[tuple[int, int]] = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt) or _is_docstring(node):
            continue
        body = getattr(node, "body", None)
        last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
        if has in "\n".join(lines[node.lineno - 1 : last]):
            found.append((node.lineno, last))
    if len(found) != 1:
        raise LookupError(f"{has!r} is in {len(found)} statements of {name}; expected one")
    start, last = found[0]
    text = textwrap.dedent("\n".join(lines[start - 1 : last]))
    return text, file, first + start - 1


def resolve(name: str) -> Any:
    """`package.module:Class.method` -> the object."""
    module, _, path = name.partition(":")
    target: Any = importlib.import_module(module)
    for part in path.split("."):
        target = inspect.getattr_static(target, part)
    return target.__func__ if isinstance(target, classmethod | staticmethod) else target


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _source(name: str, summary: str) -> str:
    text, file, first = source_of(name)
    return (
        f'<details class="source"><summary>{summary} <span class="place">{file}, line {first}'
        f"</span></summary>{_highlighted(text)}</details>"
    )


def _line(name: str, has: str) -> str:
    text, file, first = statement_of(name, has)
    place = f'<span class="place">{file.rpartition("/")[2]}:{first}</span>'
    return f'<div class="line">{_highlighted(text)}{place}</div>'


def _highlighted(code: str) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    return highlight(code, PythonLexer(), HtmlFormatter(cssclass="code"))


def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="friendly", cssclass="code").get_style_defs(".code")


def _picture(figure: Figure, caption: str) -> str:
    return (
        f'<figure><a href="{escape(figure.file)}"><img src="{escape(figure.file)}" '
        f'width="{figure.width_px}" height="{figure.height_px}" alt="{escape(figure.alt)}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
