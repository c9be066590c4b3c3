"""A report as one HTML page that asks for nothing from outside: pictures and style are in it, and a policy says so.

All text comes from a run's files, which may come from anyone: it is escaped here, in one place.
"""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Sequence

from smolora.analysis.report import Picture, Report
from smolora.analysis.run_table import Table
from smolora.analysis.summary import Section

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fbfbfa; --card: #fff; --faint: #5b5b60; --line: #d9d9dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececee; --paper: #17181a; --card: #1f2023; --faint: #a9a9b0; --line: #3a3b40; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
ul { margin: 0; padding-left: 1.2rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.card { margin: 0; padding: 1rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--card); }
.card h2 { margin-top: 0; }
img { display: block; width: 100%; max-width: 26rem; height: auto; margin: 0 auto; border-radius: .25rem; }
figcaption, .note { color: var(--faint); font-size: .875rem; }
figcaption { margin-top: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
"""


def render_page(report: Report) -> str:
    """Return the page."""
    summaries = "".join(_render_summary(label, sections) for label, sections in report.summaries.items())
    pictures = "".join(map(_render_picture, report.pictures))
    notes = "".join(f'<p class="note">{_escape(note)}</p>\n' for note in report.notes)
    rules = "".join(f'<p class="note">{_escape(rule)}</p>\n' for rule in report.rules)
    table = _render_table(report.table)
    if len(report.summaries) == 1:
        parts = [_grid(summaries), rules, "<h2>Plots</h2>\n", _grid(pictures), notes, table]
    else:
        parts = [table, "<h2>Plots</h2>\n", _grid(pictures), notes, "<h2>Each run</h2>\n", _grid(summaries), rules]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(report.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(report.title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


def _grid(content: str) -> str:
    return f'<div class="grid">\n{content}</div>\n'


def _render_summary(label: str, sections: Sequence[Section]) -> str:
    body = "".join(
        f"<h3>{_escape(section.title)}</h3>\n<ul>\n"
        + "".join(f"<li>{_escape(sentence)}</li>\n" for sentence in section.sentences)
        + "</ul>\n"
        for section in sections
    )
    return f'<section class="card">\n<h2>{_escape(label)}</h2>\n{body}</section>\n'


def _render_picture(picture: Picture) -> str:
    width, height = struct.unpack(">II", picture.png[16:24])  # The size stands at the same place in every PNG.
    data = base64.b64encode(picture.png).decode("ascii")
    caption = _escape(picture.caption)
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{caption}">'
    return f'<figure class="card">{image}\n<figcaption>{caption}</figcaption></figure>\n'


def _render_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in table.head)
    rows = "".join(_render_row(row) for row in table.rows)
    body = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"
    return f'<h2>{_escape(table.title)}</h2>\n<div class="wide">\n{body}</div>\n'


def _render_row(row: Sequence[str]) -> str:
    first, *rest = map(_escape, row)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'


def _escape(text: str) -> str:
    """Return text that is only text on the page, and can be written: a folder's name may hold any bytes."""
    return html.escape(text.encode("utf-8", errors="replace").decode("utf-8"))
