"""The picture of a model as one HTML file, without scripts or links."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .outline import CAPTION, COLOURS, UNKNOWN, Row, Total

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --soft: #667079; --line: #d5dade; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #98a2ab; --line: #3a424a; --page: #15191d; }
}
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0; }
p { color: var(--soft); margin: .2rem 0 1rem; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th { color: var(--soft); font-weight: normal; text-align: left; }
th, td { padding: .15rem 1.5rem .15rem 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 1.6em; text-align: center; margin-right: .6em; }
summary { cursor: pointer; padding: .2rem 0; }
.row { display: flex; align-items: flex-end; gap: 1rem; padding: .2rem 0; }
details > .row, details > details { margin-left: .3rem; padding-left: calc(1.2rem - 1px);
  border-left: 1px solid var(--line); }
.name { flex: none; width: calc(20rem - 1.5rem * var(--depth)); overflow-wrap: anywhere; }
.count { color: var(--soft); font-size: 12px; margin-left: .5em; white-space: nowrap; }
.boxes { display: flex; flex-wrap: wrap; align-items: flex-end; gap: .35rem .6rem; }
.boxes small { display: block; font-size: 11px; color: var(--soft); white-space: nowrap; }
.box { display: block; font-size: 11px; line-height: 18px; height: 18px; border-radius: 3px;
  text-align: center; white-space: nowrap; }
"""
_STYLE += "".join(
    f".{role} {{ background: {colour}; color: {ink}; }}\n"
    for role, (colour, ink) in COLOURS.items()
)


def write_html(file: str | Path, title: str, rows: Sequence[Row], totals: Sequence[Total]) -> None:
    """Write the picture: title, legend of the roles, then the rows, which fold."""
    legend = "".join(
        f'<tr><td><span class="swatch {role}">{UNKNOWN * (role == "other") or "&nbsp;"}</span>'
        f"{role}</td><td>{escape(norms)}</td>"
        f'<td class="number">{tensors}</td><td class="number">{parameters}</td></tr>\n'
        for role, norms, tensors, parameters in (total.cells for total in totals)
    )
    Path(file).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<p>{CAPTION}</p>\n"
        '<table><tr><th>role</th><th>norm</th><th class="number">tensors</th>'
        f'<th class="number">parameters</th></tr>\n{legend}</table>\n'
        f"{''.join(_html(row, 0) for row in rows)}</body></html>\n",
        encoding="utf-8",
    )


def _html(row: Row, depth: int) -> str:
    name = f'{escape(row.name)}<span class="count">{row.count}</span>'
    if row.rows:
        inner = "".join(_html(inner, depth + 1) for inner in row.rows)
        return f"<details open><summary>{name}</summary>\n{inner}</details>\n"
    boxes = "".join(
        f'<div title="{escape(tensor.tooltip)}"><small>{escape(label)}</small>'
        f'<span class="box {tensor.spec.role}" style="width: {tensor.width}px">{tensor.text}</span>'
        "</div>"
        for label, tensor in row.boxes
    )
    name = f'<div class="name" style="--depth: {depth}">{name}</div>'
    return f'<div class="row">{name}<div class="boxes">{boxes}</div></div>\n'
