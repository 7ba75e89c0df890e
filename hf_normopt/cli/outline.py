"""A model as rows of tensors: its modules in order, equal layers once.

Every picture draws these rows, and the tables share the totals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..roles import ROLES, ParamSpec
from ..tables import fold_names, format_indices, index_of

# Okabe and Ito's palette, which colour-blind people can tell apart, and the ink to write on it.
COLOURS = {
    "linear": ("#0072b2", "#ffffff"),
    "conv": ("#56b4e9", "#000000"),
    "embedding": ("#009e73", "#000000"),
    "head": ("#d55e00", "#000000"),
    "norm": ("#cc79a7", "#000000"),
    "bias": ("#f0e442", "#000000"),
    "scalar": ("#e69f00", "#000000"),
    "other": ("#bbbbbb", "#000000"),
}
UNKNOWN = "?"  # on boxes of the role `other`, whose colour alone would say too little
_DECADE = 20  # pixels of a box's width for each power of ten of its entries
_LEAST = 14
CAPTION = (
    "A box is a tensor, as wide as the logarithm of its number of entries; its colour is the role. "
    "Layers that are alike are drawn once."
)


class Total(NamedTuple):
    """What a model has of one role."""

    role: str
    norms: list[str]
    tensors: int
    parameters: int

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Role, norms and both numbers, as a table shows them."""
        return self.role, ", ".join(self.norms), f"{self.tensors:,}", f"{self.parameters:,}"


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
    """The further names of tied tensors, without `.weight`, folded over layers."""
    names = [name for spec in specs if spec.tied_to for name in spec.tied_to.split(", ")]
    return [label for label, _ in fold_names([name.removesuffix(".weight") for name in names])]


def outline(specs: Sequence[ParamSpec], norms: Sequence[str]) -> list[Row]:
    """The rows of a model, from its parameters and the name of each one's norm."""
    root = _Module()
    for spec, norm in zip(specs, norms, strict=True):
        *path, leaf = spec.name.split(".")
        module = root
        for word in path:
            module = module.children.setdefault(word, _Module())
        module.tensors[leaf] = Tensor(spec, norm)
    return _row("", 1, root, open_up=True).rows


@dataclass(frozen=True)
class Tensor:
    """A parameter and the name of its norm: what a box shows."""

    spec: ParamSpec
    norm: str

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.spec.shape)

    @property
    def width(self) -> int:
        """Of the box, in pixels."""
        return max(_LEAST, round(_DECADE * math.log10(max(self.size, 1))))

    @property
    def text(self) -> str:
        """What stands on the box."""
        return _brief(self.size) + UNKNOWN * (self.spec.role == "other")

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for tensors that are drawn the same."""
        spec = self.spec
        return (spec.shape, spec.role, spec.kind, spec.layout, self.norm, spec.tied_to is None)

    @property
    def tooltip(self) -> str:
        """What the box says when the mouse is over it."""
        spec = self.spec
        shape = f"{' x '.join(map(str, spec.shape))} read as {spec.layout}"
        return (
            f"{spec.name}{f' = {spec.tied_to}' if spec.tied_to else ''}\n"
            f"{spec.role}{f'/{spec.kind}' if spec.kind else ''}: {self.norm}\n"
            f"{shape if spec.shape else 'one number'}\n{spec.reason}"
        )


@dataclass
class _Module:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    children: dict[str, _Module] = field(default_factory=dict)

    @cached_property
    def likeness(self) -> tuple[object, ...]:
        """Equal for modules that are drawn the same."""
        items: dict[str, Tensor | _Module] = {**self.tensors, **self.children}
        return tuple((name, item.likeness) for name, item in items.items())

    @cached_property
    def size(self) -> int:
        items: list[Tensor | _Module] = [*self.tensors.values(), *self.children.values()]
        return sum(item.size for item in items)


@dataclass(frozen=True)
class Row:
    """A module, or several equal ones: labelled boxes, or the rows of its children."""

    label: str
    times: int
    size: int
    boxes: list[tuple[str, Tensor]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The label, and how often the module stands in the model."""
        return f"{self.label} ×{self.times}" if self.times > 1 else self.label

    @property
    def count(self) -> str:
        """The number of parameters."""
        return f"{self.times} × {_brief(self.size)}" if self.times > 1 else _brief(self.size)


def _row(label: str, times: int, module: _Module, open_up: bool = False) -> Row:
    inner = [entry for name, child in module.children.items() for entry in _unfold(name, child)]
    if open_up or any(child.children for _, _, child in inner):
        rows = [Row(name, 1, own.size, [_box("", own)]) for name, own in module.tensors.items()]
        return Row(label, times, module.size, rows=rows + [_row(*entry) for entry in inner])
    alone = not inner and len(module.tensors) == 1
    boxes = [_box("" if alone else leaf, own) for leaf, own in module.tensors.items()]
    for name, count, child in inner:
        for i, (leaf, tensor) in enumerate(child.tensors.items()):
            word = name if leaf == "weight" else f"{'' if i else name}.{leaf}"
            boxes.append(_box(f"{word} ×{count}" if count > 1 else word, tensor))
    return Row(label, times, module.size, boxes)


def _box(label: str, tensor: Tensor) -> tuple[str, Tensor]:
    return " = ".join([label, *tied_names([tensor.spec])]).lstrip(), tensor


def _unfold(label: str, module: _Module) -> Iterator[tuple[str, int, _Module]]:
    """Yield a module as (label, times, module); open lists, and yield equal members once."""
    children = module.children
    if module.tensors or not (
        len(children) == 1 or all(index_of(name) is not None for name in children)
    ):
        yield label, 1, module
        return
    equal: dict[object, list[str]] = {}
    for name, child in children.items():
        equal.setdefault(child.likeness, []).append(name)
    for names in equal.values():
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
