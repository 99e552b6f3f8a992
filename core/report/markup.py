# SPDX-License-Identifier: Apache-2.0
"""HTML out of elements. Text is escaped because there is no other way in: only `element` makes `Html`."""

from __future__ import annotations

import html
import re

VOID = frozenset({"meta", "link", "br", "hr"})
NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")


class Html(str):
    """Finished markup. Anything else that is put into an element is text."""

    __slots__ = ()


Child = object  # Html as it is; a list or tuple of children; None leaves nothing; anything else as escaped text


def element(tag: str, /, *children: Child, **attributes: object) -> Html:
    """`<tag attributes>children</tag>`. An attribute None or False is left out, True stands alone; `class_` is class, `stroke_width` stroke-width."""
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        if not NAME.fullmatch(name):
            raise ValueError(f"attribute name {name!r}")
        parts.append(name if value is True else f'{name}="{html.escape(_plain(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if tag in VOID else Html(f"{opening}{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """Children side by side, texts escaped."""
    return Html("".join(_child(child) for child in children))


def style(css: str) -> Html:
    """A style sheet of this program's own. Raises ValueError where it would end its element early."""
    if "</" in css:
        raise ValueError("a style sheet cannot hold '</'")
    return Html(f"<style>{css}</style>")


def _child(child: Child) -> str:
    if isinstance(child, Html):
        return child
    if child is None:
        return ""
    if isinstance(child, list | tuple):
        return join(*child)
    return html.escape(_plain(child), quote=False)


def _plain(value: object) -> str:
    """Text without control characters, which no HTML parser takes; a float as short as it reads in a drawing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "".join(character if character >= " " or character in "\n\t" else "�" for character in str(value))
