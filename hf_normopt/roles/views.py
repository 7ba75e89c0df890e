"""How a parameter shows after a view, an index or a product: functions of [`Shown`]."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..norms.layouts import Layout
from .notes import Note, Shown

COPIES = frozenset(
    (
        "clone",
        "contiguous",
        "detach",
        "alias",
        "lift_fresh",
        "_to_copy",
        "lift",
        "to",
        "detach_copy",
    )
)
RESHAPES = frozenset(("_unsafe_view", "view", "reshape", "_reshape_alias"))
_MARKS = (2, 3, 5, 7, 11, 13, 17, 19)


def moved_parameter(
    shown: Shown, func: Any, args: Any, kwargs: Any, outputs: Any
) -> list[Shown | None]:
    """A parameter after a view, for each output."""
    lost: list[Shown | None] = [untracked(shown)] * len(outputs)
    name = func.overloadpacket.__name__
    if name in COPIES:
        return [shown]
    if shown.start is not None or shown.given is not None:
        return permuted(shown, func, args, kwargs, outputs)
    try:
        if name == "as_strided":
            return [shown] if tuple(args[1]) == tuple(shown.view.shape) else lost
        if name in RESHAPES:
            shape = tuple(outputs[0].shape)
            try:
                moved = shown.moved(shown.view.view(shape))
                return [replace(moved, divided=moved.pieces())]
            except RuntimeError:
                return [copied(shown, shape) or untracked(shown)]
        if name == "repeat":
            return [repeated(shown, outputs[0])]
        moved = func(shown.view, *args[1:], **kwargs)
    except RuntimeError:
        return lost
    views = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    expanded = shown.expanded or (name == "expand" and views[0].numel() > shown.view.numel())
    return [replace(shown, view=view, expanded=expanded) for view in views]


def untracked(shown: Shown) -> Shown:
    """A parameter of which no axis is known any more."""
    nothing = torch.empty((), device="meta")
    return replace(shown, view=nothing, given=(), start=None, how=shown.how or "untracked")


def scattered(shown: Shown) -> Shown:
    """A parameter that was written somewhere into a tensor."""
    nothing = torch.empty((), device="meta")
    return replace(shown, how=shown.how or "scatter", view=nothing, given=())


def repeated(shown: Shown, output: Tensor) -> Shown | None:
    """A parameter that was repeated, as activations are."""
    view = shown.view
    for _ in range(output.ndim - view.ndim):
        view = view.unsqueeze(0)
    try:
        return replace(shown, view=view.expand(output.shape), expanded=True)
    except RuntimeError:
        axes = shown.axes()
        given = tuple([()] * (output.ndim - len(axes)) + axes)
        empty = torch.empty(output.shape, device="meta")
        return replace(shown, view=empty, given=given, expanded=True)


def copied(shown: Shown, shape: tuple[int, ...]) -> Shown | None:
    """A parameter whose axes were merged in another order than they are stored in."""
    axes, sizes = shown.axes(), list(shown.view.shape)
    given: list[tuple[int, ...]] = []
    i = 0
    for size in shape:
        merged: tuple[int, ...] = ()
        product = 1
        while i < len(sizes) and (product < size or (sizes[i] == 1 and size == 1 and not merged)):
            product *= sizes[i]
            merged += axes[i]
            i += 1
            if product == size:
                break
        if product != size:
            return None
        given.append(merged)
    return replace(shown, view=torch.empty(shape, device="meta"), given=tuple(given))


def permuted(shown: Shown, func: Any, args: Any, kwargs: Any, outputs: Any) -> list[Shown | None]:
    """The same for one that is no plain view: it follows where axes go."""
    known = func.overloadpacket.__name__ in ("t", "transpose", "permute", "numpy_T")
    if not known or shown.view.ndim != outputs[0].ndim:
        return [untracked(shown)] * len(outputs)
    marks = torch.empty(_MARKS[: shown.view.ndim], device="meta")
    order = [_MARKS.index(size) for size in func(marks, *args[1:], **kwargs).shape]
    start, given = shown.start, shown.given
    if start is not None:
        start = (order.index(start[0]), start[1])
    if given is not None:
        given = tuple(given[d] for d in order)
    view = func(shown.view, *args[1:], **kwargs)
    return [replace(shown, view=view, start=start, given=given)]


def picked_parameter(
    shown: Shown, name: str, args: Any, dims: list[int], result: Tensor
) -> Shown | None:
    """A parameter of which an index picked entries."""
    if shown.start is not None:
        return None
    axes = shown.axes()
    now = {j for d in dims if d < len(axes) for j in axes[d]}
    if shown.expanded and not now:  # rows that are all the same
        shown = replace(shown, how=shown.how or "place")
    picked = shown.picked | now
    given = shown.given
    if name == "gather":
        return replace(
            shown,
            picked=picked,
            view=torch.empty(result.shape, device="meta"),
            given=tuple(() if d in dims else axes[d] for d in range(len(axes))),
        )
    rest = [d for d in range(len(axes)) if d not in dims]
    view = shown.view
    for d in sorted(dims, reverse=True):
        view = view.select(d, 0)
    extra = result.ndim - len(rest)
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if together else 0
    for _ in range(extra):
        view = view.unsqueeze(at)
    view = view.expand(result.shape)
    if given is not None:
        left = [given[d] for d in rest]
        given = (*left[:at], *[()] * extra, *left[at:])
    return replace(shown, picked=picked, view=view, given=given)


def picked_layout(shown: Shown) -> Layout:
    """The layout of a table of which an index picked rows."""
    return table_layout(len(shown.shape), shown.picked)


def table_layout(count: int, rows: Collection[int]) -> Layout:
    """The layout of a table of so many axes, of which some number its rows."""
    return Layout(" ".join(numbered(["in" if j in rows else "out" for j in range(count)])))


def product_layout(shown: Shown, contracted: int, kept: int) -> tuple[Layout | None, list[int]]:
    """The layout of a parameter that a product contracts, and its axes of outputs."""
    if shown.view.ndim <= max(contracted, kept):
        return None, []
    axes = shown.axes()
    into, outs = set(axes[contracted]), set(axes[kept]) - set(axes[contracted])
    batch = {
        j: shown.view.shape[d]
        for d, js in enumerate(axes)
        if d not in (contracted, kept)
        for j in js
    }
    hidden = set(shown.inner)
    if hidden and into and not outs:
        outs = hidden
    elif hidden and outs and not into:
        into = hidden
    # a vector that is a matrix of one row has no axis of outputs
    if not into or not (outs or shown.view.shape[kept] == 1):
        return None, []
    words = []
    for j in range(len(shown.shape)):
        words.append("in" if j in into else "out" if j in outs else "stack")
    words = numbered(words)
    for j, count in batch.items():
        if words[j] in ("in", "out"):
            words[j] = f"(stack={count} {words[j]})"
    listed = [] if hidden and outs == hidden else sorted(outs)
    return Layout(" ".join(words)), listed


def kernel_layout(name: str, shown: Shown, transposed: bool, groups: int) -> Layout | None:
    """The layout of a parameter that is convolved with."""
    if shown.how:
        return None
    axes = shown.axes()
    if name == "conv_tbc":
        order = ["tap", "in", "out"]
    else:
        first = ["in", "out"] if transposed else ["out", "in"]
        order = first + ["tap"] * (len(axes) - 2)
    if len(axes) != len(order):
        return None
    names: dict[int, str] = {}
    for word, js in zip(order, axes, strict=True):
        for j in js:
            names.setdefault(j, word)
    words = []
    for j, size in enumerate(shown.shape):
        word = names.get(j, "tap" if j >= 2 and name != "conv_tbc" else "stack")
        word = f"tap={size}" if word == "tap" else word
        if groups > 1 and word == order[0] and names.get(j) == order[0]:
            word = f"(group={groups} {word})"
        words.append(word)
    try:
        return Layout(" ".join(numbered(words)))
    except ValueError:
        return None


def has_several_axes(shape: Sequence[int]) -> bool:
    """Whether more than one axis has more than one entry, so that it is no vector."""
    return sum(size > 1 for size in shape) > 1


def is_vector(shown: Shown) -> bool:
    """Whether a parameter is a vector with which nothing was done that decides its role."""
    return not (shown.how or has_several_axes(shown.shape))


def numbered(words: list[str]) -> list[str]:
    """Names of axes, with numbers where a name stands for several."""
    return [
        f"{word}{words[:i].count(word)}"
        if words.count(word) > 1 and not word.startswith("tap")
        else word
        for i, word in enumerate(words)
    ]


def is_token(shown: Shown, kept: int) -> bool:
    """Whether a vector was repeated for each row, as a query that is learned."""
    return shown.expanded and kept < shown.view.ndim and shown.view.shape[kept] == 1


def unsqueezed(note: Note, dim: int) -> Note:
    """A note of a vector as one of a matrix."""
    shown = tuple(s.moved(s.view.unsqueeze(dim)) for s in note.shown if s.start is None)
    index = None if note.index is None else note.index.unsqueeze(dim)
    return replace(note, shown=shown, index=index)
