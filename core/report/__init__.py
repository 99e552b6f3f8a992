# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one self-contained page about a bundle. No script, no network, no other file; everything from the manifest is escaped.

`render` takes plain data, so that the page can be made anew from a bundle (manifest, `reports/bench-*.json`) at any time.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from isthmus.cost import Cost
from isthmus.errors import IsthmusError
from isthmus.lint import LintRow
from isthmus.measurement import Measurement
from isthmus.report import details, sections
from isthmus.report.lint import linted
from isthmus.report.markup import Html, element, join, style

if TYPE_CHECKING:
    from isthmus.graph import QuantGraph

FOOTER = "Made by isthmus from the bundle's own manifest. This page loads nothing and runs no script."


def layers_of(graph: QuantGraph) -> list[dict[str, Any]]:
    """What the layer table needs of each node beside its cost: name, op, kind, fused activation, scale and zero point of the output."""
    rows = []
    for node in graph.nodes:
        if node.kind == "border":
            continue
        spec = graph.tensors[node.output]
        rows.append({"name": node.name, "op": node.op, "kind": node.kind, "activation": node.activation, "scale": spec.scale, "zero_point": spec.zero_point})
    return rows


def render(
    manifest: Mapping[str, Any],
    measurements: Mapping[str, Measurement],
    cost: Cost,
    layers: Sequence[Mapping[str, Any]],
    *,
    logs: Mapping[str, Mapping[str, str]] | None = None,
    unmeasured: Mapping[str, str] | None = None,
    lint: Mapping[str, Sequence[LintRow]] | None = None,
) -> str:
    """The page as text.

    `manifest` is a bundle's; `measurements` are by profile; `layers` is `layers_of(graph)`; `logs` are the last lines of each step's log, by
    profile and step; `unmeasured` says why a profile has no latency (else "needs the board" or "not measured"); `lint` has, by profile, each layer as its
    target would run it. Raises `IsthmusError` where the manifest lacks a field or holds one of another type.
    """
    reasons = unmeasured or {}
    try:
        parts = [
            ("", sections.summary(manifest, cost, measurements)),
            ("Artifacts", sections.artifacts(manifest, measurements, reasons)),
            ("Accuracy", sections.accuracy(manifest)),
            ("Latency", sections.latency(manifest, measurements, reasons)),
            ("Layers", sections.layers(cost, layers)),
            ("Lint", linted(lint or {})),
            ("Build", details.build(manifest, logs or {})),
            ("Verification", details.verification(manifest)),
            ("Provenance", details.provenance(manifest, measurements)),
        ]
        shown = [(link, part) for link, part in parts if part is not None]
        return page(f"{manifest.get('name', 'model')}: isthmus report", sections.header(manifest), shown, FOOTER)
    except (KeyError, TypeError, AttributeError) as error:
        raise IsthmusError(f"no report can be made of this manifest ({type(error).__name__}: {error}); compile again") from error


def page(title: str, header: Html, parts: Sequence[tuple[str, Html]], footer: str) -> str:
    """A whole page: `parts` are (name in the navigation or "", section)."""
    css = (resources.files("isthmus.report") / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    # Nothing may be loaded or run, and no other style than ours: a hostile name that slipped through would still be dead text.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    links = [element("a", link, href=f"#{link.lower()}") for link, _ in parts if link]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        style(css),
    )
    body = element(
        "body",
        element("a", "Skip to the results", href="#main", class_="skip"),
        header,
        element("nav", links, aria_label="Sections"),
        element("main", [part for _, part in parts], id="main"),
        element("footer", footer),
    )
    return join(Html("<!doctype html>\n"), element("html", head, body, lang="en"), "\n")


__all__ = ["layers_of", "page", "render"]
