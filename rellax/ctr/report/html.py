"""Builds HTML as a tree of elements: text is escaped by its place in the tree, wherever it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree.ElementTree import Element, tostring

Child = Element | str | float | None
_NOT_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # no HTML document may hold these

# The browser itself refuses whatever the page would fetch or run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def node(tag: str, *children: Child | Iterable[Child], **attributes: Any) -> Element:
    """An element; of its attributes, `class_` is class, `aria_label` aria-label, and None is left out."""
    element = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            element.set(name.rstrip("_").replace("_", "-"), _text(value))
    for child in children:
        for part in [child] if isinstance(child, (str, float, int, Element)) else child or ():
            _append(element, part)
    return element


def table(
    caption: str,
    head: Sequence[Child],
    rows: Iterable[Sequence[Child | Element]],
    *,
    class_: str | None = None,
) -> Element:
    """A table in a box that scrolls where the screen is narrow; the first cell of a row is its header."""
    body = []
    for first, *others in rows:
        body.append(node("tr", node("th", first, scope="row"), [node("td", cell) for cell in others]))
    titles = node("tr", [node("th", title, scope="col") for title in head])
    whole = node("table", node("caption", caption), node("thead", titles), node("tbody", body), class_=class_)
    return node("div", whole, class_="scroll", role="region", tabindex="0", aria_label=caption)


def details(summary: str, *children: Child | Iterable[Child]) -> Element:
    """What is folded away until it is asked for."""
    return node("details", node("summary", summary), *children)


def document(title: str, style: str, *body: Child | Iterable[Child]) -> bytes:
    """A whole page, which fetches and runs nothing, in UTF-8."""
    head = node(
        "head",
        node("meta", charset="utf-8"),
        node("meta", **{"http-equiv": "Content-Security-Policy"}, content=_POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("link", rel="icon", href="data:,"),  # or browsers ask for /favicon.ico
        node("title", title),
        node("style", style),
    )
    page = node("html", head, node("body", *body), lang="en")
    text = "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    return text.encode("utf-8", "xmlcharrefreplace")


def _append(element: Element, part: Child) -> None:
    if part is None:
        return
    if isinstance(part, Element):
        element.append(part)
    elif len(element):
        element[-1].tail = (element[-1].tail or "") + _text(part)
    else:
        element.text = (element.text or "") + _text(part)


def _text(value: object) -> str:
    return _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(value))
