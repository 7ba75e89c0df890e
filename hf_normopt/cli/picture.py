"""A picture of a model with its norms, as HTML or PNG: `save_picture`.

The rows are the modules in order, layers that are alike drawn once; a box is a tensor, its colour
the role, its width the logarithm of its number of entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from ..roles import ROLES, ParamSpec
from ..tables import fold_names, format_indices, index_of

# Okabe & Ito's palette, told apart by colour-blind people; and black or white ink to write on it.
_COLOURS = {
    "linear": ("#0072b2", "#ffffff"),
    "conv": ("#56b4e9", "#000000"),
    "embedding": ("#009e73", "#000000"),
    "head": ("#d55e00", "#000000"),
    "norm": ("#cc79a7", "#000000"),
    "bias": ("#f0e442", "#000000"),
    "scalar": ("#e69f00", "#000000"),
    "other": ("#bbbbbb", "#000000"),
}
_UNKNOWN = "?"  # on boxes without a known role, so that colour is not all that tells
_DECADE = 20  # pixels of a box's width for each power of ten of its entries
_LEAST = 14
_CAPTION = (
    "A box is a tensor, as wide as the logarithm of its number of entries; its colour is the role. "
    "Layers that are alike are drawn once."
)
_INK, _SOFT, _LINE = "#1b1f24", "#667079", "#d5dade"
_PNG_COLUMN = 800  # pixels in which boxes stand side by side
_PNG_LIMIT = 65_000  # the tallest picture that matplotlib can save, in pixels


class Total(NamedTuple):
    """What a model has of one role."""

    role: str
    norms: list[str]
    tensors: int
    parameters: int


def count_roles(specs: Sequence[ParamSpec], norms: Sequence[str]) -> list[Total]:
    """One [`Total`] for each role that the model has, in the order of `ROLES`."""
    totals = []
    for role in ROLES:
        members = [
            (spec, norm) for spec, norm in zip(specs, norms, strict=True) if spec.role == role
        ]
        if members:
            names = sorted({norm for _, norm in members})
            parameters = sum(math.prod(spec.shape) for spec, _ in members)
            totals.append(Total(role, names, len(members), parameters))
    return totals


def tied_names(specs: Sequence[ParamSpec]) -> list[str]:
    """The other names of tied tensors, without `.weight`, folded over layers."""
    names = [name for spec in specs if spec.tied_to for name in spec.tied_to.split(", ")]
    return [label for label, _ in fold_names([name.removesuffix(".weight") for name in names])]


def check_file(file: str | Path) -> None:
    """Complain early about a file that [`save_picture`] cannot write.

    Raises:
        ValueError: if its suffix is neither .html nor .png.
        OSError: if its folder does not exist.
        ImportError: if a .png is asked for without matplotlib.
    """
    path = Path(file)
    if path.suffix not in _WRITERS:
        raise ValueError(f"A picture is a file {' or '.join(_WRITERS)}, found {file!r}.")
    if not path.parent.is_dir():
        raise OSError(f"There is no folder {path.parent} for the picture {path.name}.")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ImportError(
                "A .png needs matplotlib: pip install hf_normopt[recipes]; a .html needs nothing."
            ) from None


def save_picture(
    file: str | Path, title: str, specs: Sequence[ParamSpec], norms: Sequence[str]
) -> None:
    """Draw a model with its norms.

    Args:
        file: where to; its suffix, .html or .png, says how.
        title: what the picture is called.
        specs: the parameters, from `classify`.
        norms: the name of each parameter's norm.

    Raises:
        ValueError, OSError, ImportError: see [`check_file`].
    """
    check_file(file)
    root = _Module()
    for spec, norm in zip(specs, norms, strict=True):
        *path, leaf = spec.name.split(".")
        module = root
        for word in path:
            module = module.children.setdefault(word, _Module())
        module.tensors[leaf] = _Tensor(spec, norm)
    rows = _row("", 1, root, open_up=True).rows
    _WRITERS[Path(file).suffix](file, title, rows, count_roles(specs, norms))


@dataclass(frozen=True)
class _Tensor:
    spec: ParamSpec
    norm: str

    @property
    def size(self) -> int:
        return math.prod(self.spec.shape)

    @property
    def width(self) -> int:
        return max(_LEAST, round(_DECADE * math.log10(max(self.size, 1))))

    @property
    def text(self) -> str:
        return _brief(self.size) + _UNKNOWN * (self.spec.role == "other")

    @property
    def likeness(self) -> tuple[object, ...]:
        spec = self.spec
        return (spec.shape, spec.role, spec.kind, spec.layout, self.norm, spec.tied_to is None)

    @property
    def tooltip(self) -> str:
        spec = self.spec
        shape = f"{' x '.join(map(str, spec.shape))} read as {spec.layout}"
        return (
            f"{spec.name}{f' = {spec.tied_to}' if spec.tied_to else ''}\n"
            f"{spec.role}{f'/{spec.kind}' if spec.kind else ''}: {self.norm}\n"
            f"{shape if spec.shape else 'one number'}\n{spec.reason}"
        )


@dataclass
class _Module:
    tensors: dict[str, _Tensor] = field(default_factory=dict)
    children: dict[str, _Module] = field(default_factory=dict)

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """Equal for modules that are drawn alike."""
        items: dict[str, _Tensor | _Module] = {**self.tensors, **self.children}
        return tuple((name, item.likeness) for name, item in items.items())

    @cached_property
    def size(self) -> int:
        items: list[_Tensor | _Module] = [*self.tensors.values(), *self.children.values()]
        return sum(item.size for item in items)


@dataclass(frozen=True)
class _Row:
    """A module: its boxes, or the rows below it."""

    label: str
    times: int
    size: int
    boxes: list[tuple[str, _Tensor]] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.label} ×{self.times}" if self.times > 1 else self.label

    @property
    def count(self) -> str:
        return f"{self.times} × {_brief(self.size)}" if self.times > 1 else _brief(self.size)


def _row(label: str, times: int, module: _Module, open_up: bool = False) -> _Row:
    inner = [entry for name, child in module.children.items() for entry in _unfold(name, child)]
    if open_up or any(child.children for _, _, child in inner):
        rows = [_Row(name, 1, own.size, [_box("", own)]) for name, own in module.tensors.items()]
        return _Row(label, times, module.size, rows=rows + [_row(*entry) for entry in inner])
    alone = not inner and len(module.tensors) == 1
    boxes = [_box("" if alone else leaf, own) for leaf, own in module.tensors.items()]
    for name, count, child in inner:
        for i, (leaf, tensor) in enumerate(child.tensors.items()):
            word = name if leaf == "weight" else f"{'' if i else name}.{leaf}"
            boxes.append(_box(f"{word} ×{count}" if count > 1 else word, tensor))
    return _Row(label, times, module.size, boxes)


def _box(label: str, tensor: _Tensor) -> tuple[str, _Tensor]:
    return " = ".join([label, *tied_names([tensor.spec])]).lstrip(), tensor


def _unfold(label: str, module: _Module) -> Iterator[tuple[str, int, _Module]]:
    """A module as (label, how often, module): lists as what they list, the like of it once."""
    children = module.children
    if module.tensors or not (
        len(children) == 1 or all(index_of(name) is not None for name in children)
    ):
        yield label, 1, module
        return
    alike: dict[object, list[str]] = {}
    for name, child in children.items():
        alike.setdefault(child.likeness, []).append(name)
    for names in alike.values():
        if len(names) == 1:
            yield from _unfold(f"{label}.{names[0]}", children[names[0]])
        else:
            numbers = f".{format_indices(names)}"
            some = numbers if len(names) < len(children) else ""
            yield f"{label}{some}", len(names), children[names[0]]


def _brief(count: int) -> str:
    """A number to three digits: 512, 16.8M, 1.05B."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{float(f'{count / unit:.3g}'):g}{letter}"
    return str(count)


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
    for role, (colour, ink) in _COLOURS.items()
)


def _write_html(
    file: str | Path, title: str, rows: Sequence[_Row], totals: Sequence[Total]
) -> None:
    legend = "".join(
        f'<tr><td><span class="swatch {role}">{_UNKNOWN * (role == "other") or "&nbsp;"}</span>'
        f"{role}</td><td>{escape(', '.join(norms))}</td>"
        f'<td class="number">{tensors:,}</td><td class="number">{parameters:,}</td></tr>\n'
        for role, norms, tensors, parameters in totals
    )
    Path(file).write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n<p>{_CAPTION}</p>\n"
        '<table><tr><th>role</th><th>norm</th><th class="number">tensors</th>'
        f'<th class="number">parameters</th></tr>\n{legend}</table>\n'
        f"{''.join(_html(row, 0) for row in rows)}</body></html>\n",
        encoding="utf-8",
    )


def _html(row: _Row, depth: int) -> str:
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


def _write_png(file: str | Path, title: str, rows: Sequence[_Row], totals: Sequence[Total]) -> None:
    canvas = _Canvas()
    canvas.text(0, title, size=17)
    canvas.y += 26
    canvas.text(0, _CAPTION, soft=True)
    canvas.y += 30
    legend = [
        (total.role, ", ".join(total.norms), f"{total.tensors:,}", f"{total.parameters:,}")
        for total in totals
    ]
    norms_end = 150 + max((_measure(norms, 13) for _, norms, _, _ in legend), default=0)
    for role, norms, *counts in [("role", "norm", "tensors", "parameters"), *legend]:
        soft = role == "role"  # the header
        if not soft:
            canvas.box(0, 26, role, _UNKNOWN * (role == "other"))
        canvas.text(0 if soft else 36, role, soft=soft)
        canvas.text(130, norms, soft=soft)
        for count, end in zip(counts, (norms_end + 60, norms_end + 190), strict=True):
            canvas.text(end - _measure(count, 13), count, soft=soft)
        canvas.y += 24
    canvas.y += 16
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
            if x > column and x + width > column + _PNG_COLUMN:
                x, canvas.y = column, canvas.y + 38
            canvas.text(x, label, size=11, soft=True, rise=17)
            canvas.box(x, tensor.width, tensor.spec.role, tensor.text)
            x += width + 10
        canvas.y += 24
        for guide in range(0, indent, 16):
            canvas.line(guide + 3, top, canvas.y)
    canvas.save(file)


def _flat(rows: Sequence[_Row], depth: int) -> Iterator[tuple[int, _Row]]:
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
        colour, ink = _COLOURS[role]
        y = self.y
        style = {"size": 11 * 0.72, "color": ink, "ha": "center", "va": "center"}
        self._marks += [
            lambda axes: axes.barh(y, width, height=18, left=x, color=colour),
            lambda axes: axes.text(x + width / 2, y, text, **style),
        ]
        self._right = max(self._right, x + width)

    def line(self, x: float, top: float, bottom: float) -> None:
        self._marks.append(
            lambda axes: axes.vlines(x, top - 12, bottom - 12, color=_LINE, linewidth=0.8)
        )

    def save(self, file: str | Path) -> None:
        from matplotlib.figure import Figure

        margin = 24
        width, height = self._right + 2 * margin, self.y + 2 * margin
        figure = Figure(figsize=(width / 100, height / 100))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for mark in self._marks:
            mark(axes)
        axes.set(xlim=(-margin, width - margin), ylim=(height - margin, -margin))
        figure.savefig(file, dpi=min(150, 100 * _PNG_LIMIT / height))


_WRITERS = {".html": _write_html, ".png": _write_png}
