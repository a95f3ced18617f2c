"""Pieces of the static HTML pages that `report` writes. Pages load nothing: pictures stand in them."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;
overflow-wrap:anywhere}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.3em .8em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto}
.wide{overflow-x:auto}.wide td,.wide th{white-space:nowrap}"""


def document(title: str, sections: Iterable[str], style: str = "") -> str:
    """A whole page, readable on a telephone. `title`: text; `sections`: HTML; `style`: CSS behind the common one."""
    name = html.escape(title)
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
    view = '<meta name=viewport content="width=device-width,initial-scale=1"><link rel=icon href="data:,">'
    return f"{head}{view}<style>{STYLE}{style}</style><h1>{name}</h1>" + "\n".join(sections)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls where it is too wide. `header`: text; `rows`: cells as HTML."""
    head = "".join(f"<th>{html.escape(h)}" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def image(path: Path) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{html.escape(text)}</pre>"
