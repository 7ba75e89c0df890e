"""How a module divides what its matrices give: into maps, and into heads.

Features that go to the same uses are one map; where they are used in the shape (heads, size), they
are heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A matrix whose output features are followed.

    Attributes:
        start, stop: the numbers of its features.
        inputs: number of its input features.
        pattern: how it is stored, with `out` for the followed axis.
        outs: sizes of the axes `out0`, `out1`, ... where it has several.
    """

    start: int
    stop: int
    inputs: int
    pattern: str = ""
    outs: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Number of its features."""
        return self.stop - self.start


@dataclass(frozen=True)
class Matrix:
    """A matrix as its module uses it.

    Attributes:
        axis: text of the out axis in a layout, as `(part=3 out)`; "out" if it is one map.
        heads: the same with heads as operators of their own; None where there are none.
        sizes: (heads, size of a head) for each map; empty where there are none.
        pattern: the layout, with `out` for that axis.
        inputs: number of input features.
    """

    axis: str
    heads: str | None
    sizes: tuple[tuple[int, int], ...]
    pattern: str
    inputs: int


def divided(matrix: Source, uses: list[Tensor]) -> Matrix:
    """How the features of a matrix are divided.

    Args:
        matrix: the numbers of its features.
        uses: numbers of features, in the shapes in which something received them.
    """
    own = []
    for use in uses:
        if use.numel() and matrix.start <= int(use.min()) and int(use.max()) < matrix.stop:
            own.append(use - matrix.start)
    return _matrix(matrix, own)


def _matrix(matrix: Source, uses: list[Tensor]) -> Matrix:
    size = matrix.stop - matrix.start
    labels = torch.zeros(size, dtype=torch.int64, device="cpu")
    used = torch.zeros(size, dtype=torch.bool, device="cpu")
    for use in uses:
        if use.numel() < size:
            marks = torch.zeros_like(used)
            marks[use.flatten()] = True
            used |= marks
            labels = torch.unique(labels * 2 + marks, return_inverse=True)[1]
    # a part without a use of its own is padding, or was cut off along another axis
    parts = _parts(labels) if size and used.all() else None
    parts = parts or _Parts(1, (size,))
    if len(matrix.outs) > 1:
        pattern = matrix.pattern.replace(f"out{parts.along(matrix.outs)}", "part")
        return Matrix("out", None, (), pattern, matrix.inputs)
    sizes = tuple(_heads(use) for use in parts.uses(uses))
    known = tuple(size for size in sizes if size is not None)
    if known and len(known) < len(sizes):
        sizes = parts.complete(sizes, known[0][1])
        known = tuple(size for size in sizes if size is not None)
    heads = parts.heads(known) if known and len(known) == len(sizes) else None
    return Matrix(parts.text(), heads, known if heads else (), matrix.pattern, matrix.inputs)


@dataclass(frozen=True)
class _Parts:
    """Maps that lie in runs of features, one after the other, the whole repeated."""

    repeats: int
    runs: tuple[int, ...]

    @property
    def _equal(self) -> bool:
        return len(set(self.runs)) == 1

    def text(self) -> str:
        """The out axis in a layout."""
        count = len(self.runs)
        if count == 1:
            return "out"
        if self._equal and self.runs[0] == 1:
            return f"(out part={count})"
        out = "out" if self.repeats == 1 else "out1"
        split = f"part={count} {out}" if self._equal else f"{out}={_sum(self.runs)}"
        return f"({split})" if self.repeats == 1 else f"(out0={self.repeats} {split})"

    def along(self, sizes: tuple[int, ...]) -> int | None:
        """Which of several axes numbers the maps, None if none does."""
        axes = (i for i, size in enumerate(sizes) if size == len(self.runs) > 1 and self._equal)
        return next((i for i in axes if math.prod(sizes[:i]) == self.repeats), None)

    def uses(self, uses: list[Tensor]) -> list[Tensor | None]:
        """For each map a use of all of it, in the shape with the most axes."""
        starts = [sum(self.runs[:i]) for i in range(len(self.runs))]
        found: list[Tensor | None] = []
        for start, run in zip(starts, self.runs, strict=True):
            whole = [u for u in uses if u.numel() == self.repeats * run and int(u.min()) == start]
            shaped = [use for use in whole if _heads(use) is not None]
            found.append(next(iter(shaped or whole), None))
        return found

    def complete(
        self, sizes: tuple[tuple[int, int] | None, ...], size: int
    ) -> tuple[tuple[int, int] | None, ...]:
        """Heads of maps whose uses do not show them, given the size of the others' heads."""
        if self.repeats > 1:  # a gate beside each head
            return tuple(
                known or (self.repeats, run) for known, run in zip(sizes, self.runs, strict=True)
            )
        # a single key that all queries share
        return tuple(
            known or ((1, run) if run == size else None)
            for known, run in zip(sizes, self.runs, strict=True)
        )

    def heads(self, sizes: tuple[tuple[int, int], ...]) -> str | None:
        """The out axis with heads as operators, given each map's number and size of heads."""
        per_run = [heads // self.repeats for heads, _ in sizes]
        if any(
            heads * size != run
            for heads, (_, size), run in zip(per_run, sizes, self.runs, strict=True)
        ):
            return None
        outer = f"head0={self.repeats} " if self.repeats > 1 else ""
        if set(per_run) == {1}:  # a run is a head
            outer = outer.replace("head0", "head")
            if len(self.runs) == 1 or not outer:
                return None
            return (
                f"({outer}part={len(self.runs)} out)"
                if self._equal
                else (f"({outer}out={_sum(self.runs)})")
            )
        if len({size for _, size in sizes}) > 1:
            return None
        if len(self.runs) == 1:
            return f"(head={per_run[0]} out)"
        head = "head1" if outer else "head"
        if self._equal:
            return f"({outer}part={len(self.runs)} {head}={per_run[0]} out)"
        return f"({outer}{head}={_sum(tuple(per_run))} out={sizes[0][1]})"


def _sum(sizes: tuple[int, ...]) -> str:
    return "+".join(map(str, sizes))


def _parts(labels: Tensor) -> _Parts | None:
    """The maps that features belong to, given their labels; None where they lie in no order."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    runs = list(zip(values.tolist(), counts.tolist(), strict=True))
    period = next(
        p
        for p in range(1, len(runs) + 1)
        if len(runs) % p == 0 and runs == runs[:p] * (len(runs) // p)
    )
    repeats, lengths = len(runs) // period, [length for _, length in runs[:period]]
    if len({label for label, _ in runs}) != period:
        return None
    if repeats > 1:
        return _Parts(repeats, tuple(lengths))
    together: list[int] = []  # neighbours of size 1 are scores, such as a span's start and end
    for length, before in zip(lengths, [0, *lengths], strict=False):
        if length == before == 1:
            together[-1] += 1
        else:
            together.append(length)
    return _Parts(1, tuple(together))


def _heads(use: Tensor | None) -> tuple[int, int] | None:
    """(heads, size of a head) of features used in such a shape, whatever the order of its axes."""
    if use is None:
        return None
    inner = [axis for axis, size in enumerate(use.shape) if size > 1]
    if len(inner) != 2:
        return None
    entries = use.permute(*inner, *(axis for axis in range(use.ndim) if axis not in inner))
    entries = entries.reshape(*(use.shape[axis] for axis in inner))
    if entries[1, 0] < entries[0, 1]:  # (size, heads), as of transposed keys
        entries = entries.T
    return tuple(entries.shape)  # type: ignore[return-value]
