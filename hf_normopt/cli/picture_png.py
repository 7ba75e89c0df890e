"""The picture of a model as PNG, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .outline import CAPTION, COLOURS, UNKNOWN, Row, Total

_INK, _SOFT, _LINE = "#1b1f24", "#667079", "#d5dade"
_COLUMN = 800  # pixels in which boxes stand side by side
_HEIGHT_LIMIT = 65_000  # the tallest picture that matplotlib can save, in pixels


def write_png(file: str | Path, title: str, rows: Sequence[Row], totals: Sequence[Total]) -> None:
    """Write the picture: title, legend of the roles, then the rows."""
    canvas = _Canvas()
    canvas.text(0, title, size=17)
    canvas.y += 26
    canvas.text(0, CAPTION, soft=True)
    canvas.y += 30
    _draw_legend(canvas, totals)
    canvas.y += 16
    _draw_rows(canvas, rows)
    canvas.save(file)


def _draw_legend(canvas: _Canvas, totals: Sequence[Total]) -> None:
    legend = [total.cells for total in totals]
    norms_end = 150 + max((_measure(norms, 13) for _, norms, _, _ in legend), default=0)
    for role, norms, *counts in [("role", "norm", "tensors", "parameters"), *legend]:
        soft = role == "role"  # the header
        if not soft:
            canvas.box(0, 26, role, UNKNOWN * (role == "other"))
        canvas.text(0 if soft else 36, role, soft=soft)
        canvas.text(130, norms, soft=soft)
        for count, end in zip(counts, (norms_end + 60, norms_end + 190), strict=True):
            canvas.text(end - _measure(count, 13), count, soft=soft)
        canvas.y += 24


def _draw_rows(canvas: _Canvas, rows: Sequence[Row]) -> None:
    lines = [(16 * depth, row) for depth, row in _flat(rows, 0)]
    names = [indent + _measure(row.name, 13) + _measure(row.count, 11) for indent, row in lines]
    column = 32 + max(names, default=0)
    for indent, row in lines:
        top, x = canvas.y, column
        canvas.y += 14 * any(label for label, _ in row.boxes)
        end = canvas.text(indent, row.name)
        canvas.text(end + 8, row.count, size=11, soft=True)
        for label, tensor in row.boxes:
            width = max(tensor.width, _measure(label, 11))
            if x > column and x + width > column + _COLUMN:
                x, canvas.y = column, canvas.y + 38
            canvas.text(x, label, size=11, soft=True, rise=17)
            canvas.box(x, tensor.width, tensor.spec.role, tensor.text)
            x += width + 10
        canvas.y += 24
        for guide in range(0, indent, 16):
            canvas.line(guide + 3, top, canvas.y)


def _flat(rows: Sequence[Row], depth: int) -> Iterator[tuple[int, Row]]:
    for row in rows:
        yield depth, row
        yield from _flat(row.rows, depth + 1)


def _measure(text: str, size: float) -> float:
    """The width of a text in the font's own unit."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=size).get_extents().width + 2 if text else 0.0


class _Canvas:
    """Marks on a line `y`, in pixels from the top left; drawn when the whole size is known."""

    def __init__(self) -> None:
        self.y = 0.0
        self._right = 0.0
        self._marks: list[Callable[[Any], object]] = []

    def text(
        self, x: float, text: str, *, size: float = 13, soft: bool = False, rise: float = 0
    ) -> float:
        """Write, and return where it ends."""
        style = {"size": size * 0.72, "color": _SOFT if soft else _INK, "va": "center"}
        y = self.y - rise
        self._marks.append(lambda axes: axes.text(x, y, text, parse_math=False, **style))
        end = x + _measure(text, size)
        self._right = max(self._right, end)
        return end

    def box(self, x: float, width: float, role: str, text: str) -> None:
        """Draw a box with a text in its middle."""
        colour, ink = COLOURS[role]
        y = self.y
        style = {"size": 11 * 0.72, "color": ink, "ha": "center", "va": "center"}
        self._marks += [
            lambda axes: axes.barh(y, width, height=18, left=x, color=colour),
            lambda axes: axes.text(x + width / 2, y, text, **style),
        ]
        self._right = max(self._right, x + width)

    def line(self, x: float, top: float, bottom: float) -> None:
        """Draw a line downwards."""
        self._marks.append(
            lambda axes: axes.vlines(x, top - 12, bottom - 12, color=_LINE, linewidth=0.8)
        )

    def save(self, file: str | Path) -> None:
        """Write the picture, of the size that its marks need."""
        from matplotlib.figure import Figure

        margin = 24
        width, height = self._right + 2 * margin, self.y + 2 * margin
        figure = Figure(figsize=(width / 100, height / 100))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for mark in self._marks:
            mark(axes)
        axes.set(xlim=(-margin, width - margin), ylim=(height - margin, -margin))
        figure.savefig(file, dpi=min(150, 100 * _HEIGHT_LIMIT / height))
