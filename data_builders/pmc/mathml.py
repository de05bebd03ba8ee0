"""MathML and TeX of a caption in, one line of plain text out: `x^2`, `(a+b)/c`, `√(n)`.

A caption is read by a text tower that knows neither, so the reading is what a person would type. Every token of the
formula is kept, in the order it is written (a root's index excepted); grouping becomes parentheses only where the
formula would otherwise change its meaning.
"""

from __future__ import annotations

import re
from functools import cache

from data_builders.pmc.xml_input import Element

_SKIPPED = frozenset(("annotation", "annotation-xml", "mphantom", "maligngroup", "malignmark"))
_DOCUMENT = re.compile(r"\\begin\s*\{document\}(.*?)(?:\\end\s*\{document\}|\Z)", re.DOTALL)
_PREAMBLE = re.compile(r"\\(?:documentclass|usepackage|setlength|oddsidemargin)\b(?:\[[^\]]*\])?(?:\{[^{}]*\})*")
_PLAIN = re.compile(r"[+\-−–]?[\w.]*|\([^()]*\)")
_DOLLARS = re.compile(r"^\$+|\$+$")


def render_math(element: Element) -> str:
    """The text of a MathML element, whitespace collapsed."""
    return " ".join(_render(element).split())


def strip_tex(source: str) -> str:
    """The formula inside a `tex-math` element, without its LaTeX document and dollar signs."""
    body = _DOCUMENT.search(source)
    formula = body[1] if body else _PREAMBLE.sub("", source)
    return " ".join(_DOLLARS.sub("", formula.strip()).split())


def _render(element: Element) -> str:
    name = _local_name(element.tag)
    if name in _TOKENS and not len(element):
        return (element.text or "").strip()
    if name in _ROWS:
        return _render_children(element)
    if not name or name in _SKIPPED:
        return ""
    if name == "mspace":
        return " "
    parts = [_render(child) for child in element]
    rule = _RULES.get(name)
    if rule is not None and len(parts) == rule[0]:
        return rule[1].format(*parts, *map(_group, parts))
    if name == "msqrt":
        return "√" + _group("".join(parts))
    if name == "mfenced":
        separator = element.get("separators", ",").strip()[:1]
        inside = f"{separator} ".join(parts) if separator else "".join(parts)
        return element.get("open", "(") + inside + element.get("close", ")")
    if name in ("mtr", "mlabeledtr", "mtable"):
        return " ".join(parts) + " "
    return _render_children(element)


_ROWS = frozenset(("mrow", "math", "mstyle", "mtext", "mpadded", "semantics", "merror", "menclose", "mtd"))
_TOKENS = frozenset(("mi", "mn", "mo", "ms"))
_RULES = {
    # element -> (number of children, pattern); the second half of the arguments are the grouped children
    "msup": (2, "{0}^{3}"),
    "msub": (2, "{0}_{3}"),
    "msubsup": (3, "{0}_{4}^{5}"),
    "mfrac": (2, "{2}/{3}"),
    "mroot": (2, "√[{1}]{2}"),
    "munder": (2, "{0}_{3}"),
    "munderover": (3, "{0}_{4}^{5}"),
    "mover": (2, "{0}{1}"),
}


@cache
def _local_name(tag: object) -> str:
    return tag.rpartition("}")[2].rpartition(":")[2] if isinstance(tag, str) else ""


def _render_children(element: Element) -> str:
    parts = [(element.text or "").strip()]
    for child in element:
        parts.append(_render(child))
        tail = child.tail
        if tail:
            parts.append(tail.strip())
    return "".join(parts)


def _group(text: str) -> str:
    """The text in parentheses unless it is one character, number or word."""
    text = text.strip()
    return text if len(text) < 2 or text.isalnum() or _PLAIN.fullmatch(text) else f"({text})"
