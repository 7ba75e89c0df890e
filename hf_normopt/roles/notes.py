"""What is noted of a tensor while `forward` is observed.

A [`Note`] says which matrices made a tensor last, of which parameters it is a view or a function
alone ([`Shown`]), and which output features of a matrix its entries are. Axes are followed by
strides: a `Shown` holds a view of the parameter's memory on the meta device, moved as the tensor
was moved, and the numbers of features are a small tensor that is moved by the same views as the
activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LARGEST = 1 << 22  # entries of a tensor of feature numbers that had to be copied
NONE: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Shown:
    """A parameter, as a tensor shows it.

    Attributes:
        name: the parameter's.
        shape: its stored shape.
        view: a view of its memory, with the axes of the tensor; 0 is the stride of an axis that
            shows none of it.
        how: what was done with it before, where that decides its role: "gain", "sum", "scatter",
            "place", "rate", "spread",
            "inverse".
        inner: stored axes that a product with another parameter contracted.
        picked: stored axes that an index went along.
        start: (axis, first position) where a concatenation put it, if one did.
        given: the stored axes of each axis, where a copy was made that is no view.
        divided: (stored axis, number of pieces) that a view divided it into.
        expanded: it was repeated along a new axis, as an activation is.
    """

    name: str
    shape: tuple[int, ...]
    view: Tensor
    how: str = ""
    inner: frozenset[int] = NONE
    picked: frozenset[int] = NONE
    start: tuple[int, int] | None = None
    given: tuple[tuple[int, ...], ...] | None = None
    divided: frozenset[tuple[int, int]] = frozenset()
    expanded: bool = False

    @property
    def strides(self) -> list[int]:
        """Strides of the stored tensor."""
        return [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]

    def axes(self) -> list[tuple[int, ...]]:
        """The stored axes that each axis of the view shows, whole or in part."""
        if self.given is not None:
            return list(self.given)
        stored = self.strides
        found: list[tuple[int, ...]] = []
        for size, stride in zip(self.view.shape, self.view.stride(), strict=True):
            found.append(
                tuple(
                    j
                    for j, (s, n) in enumerate(zip(stored, self.shape, strict=True))
                    if n > 1 and size > 1 and stride and max(stride, s) < min(stride * size, s * n)
                )
            )
        # axes of size 1 show stored axes of size 1, in their order
        seen = {j for axes in found for j in axes}
        ones = [j for j, n in enumerate(self.shape) if n == 1 and j not in seen]
        for i, size in enumerate(self.view.shape):
            if size == 1 and ones:
                found[i] = (ones.pop(0),)
        return found

    def pieces(self) -> frozenset[tuple[int, int]]:
        """Stored axes that several axes of the view show, with the size of the first of these."""
        found = set(self.divided)
        first: dict[int, int] = {}
        for size, axes in zip(self.view.shape, self.axes(), strict=True):
            for j in axes:
                if j in first:
                    found.add((j, first[j]))
                first.setdefault(j, size)
        return frozenset(found)

    def entries(self) -> int:
        """How many entries of the parameter the tensor shows."""
        return math.prod(
            size for size, stride in zip(self.view.shape, self.view.stride(), strict=True) if stride
        )

    def moved(self, view: Tensor) -> Shown:
        """The same parameter under another view."""
        return replace(self, view=view)

    def spread(self, size: torch.Size) -> Shown | None:
        """As it shows in a tensor that it was broadcast to."""
        if self.start is not None:
            return self if len(size) == self.view.ndim else None
        try:
            return self.moved(self.view.expand(size))
        except RuntimeError:
            return None

    def numbers(self, dims: list[int], axes: list[int]) -> Tensor:
        """Numbers of the entries along some axes of the view, counted along some stored axes."""
        if self.given is not None:
            return self._numbers_of_copy(dims[0], axes)
        sizes = [self.view.shape[d] for d in dims]
        offsets = torch.zeros(sizes, dtype=torch.int64) + int(self.view.storage_offset())
        for k, d in enumerate(dims):
            along = torch.arange(sizes[k]) * self.view.stride(d)
            offsets = offsets + along.view([-1 if i == k else 1 for i in range(len(dims))])
        stored, result = self.strides, torch.zeros_like(offsets)
        for j in axes:
            result = result * self.shape[j] + offsets // stored[j] % self.shape[j]
        return result

    def _numbers_of_copy(self, dim: int, axes: list[int]) -> Tensor:
        """The same where whole axes were merged in another order."""
        order = self.given[dim] if self.given is not None else ()
        sizes = [self.shape[j] for j in axes]
        stored = torch.arange(math.prod(sizes)).view(sizes)
        if sorted(order) != sorted(axes) or stored.numel() != self.view.shape[dim]:
            return stored.new_empty(0)
        return stored.permute([axes.index(j) for j in order]).flatten()


@dataclass(frozen=True, eq=False)
class Note:
    """What is known of a tensor.

    Attributes:
        makers: names of the matrices that made it last.
        shown: the parameters that it shows.
        fixed: whether it is a function of parameters and constants alone.
        index: numbers of the features that it holds, with its axes.
        squashed: whether a softmax or sigmoid came after the matrices that made it: weights.
        share: whether a softmax has just given it.
        scored: whether the logarithm of a softmax has just given it.
        last: those of them after which no normalisation came: they may have made an output.
        stacked: whether several independent matrices have just made it.
        joined: parameters that were just put beside it.
        patches: whether it holds patches of an image, as of `unfold`.
        head_size: size of the heads of the attention that gave it, 0 if none did.
        times: parameters that it was just multiplied by, entry by entry, with those of their stored
            axes along which it was repeated: once summed, that is a product.
        rates: parameters whose products with activations are its exponents, with the number of
            their first entry.
        decayed: the same of those that multiplied it, or exponents of which did, since the last
            matrix.
    """

    makers: frozenset[str] = frozenset()
    shown: tuple[Shown, ...] = ()
    fixed: bool = False
    index: Tensor | None = None
    squashed: bool = False
    share: bool = False
    scored: bool = False
    last: frozenset[str] = frozenset()
    stacked: bool = False
    joined: frozenset[str] = frozenset()
    patches: bool = False
    head_size: int = 0
    times: tuple[tuple[Shown, frozenset[int]], ...] = ()
    rates: frozenset[tuple[str, int]] = frozenset()
    decayed: frozenset[tuple[str, int]] = frozenset()


def is_batch(index: Tensor, d: int) -> bool:
    """Whether numbers of features are the same all along an axis."""
    if index.shape[d] <= 1 or index.stride(d) == 0:
        return True
    first = index.select(d, 0)
    return torch.equal(first, index.select(d, -1)) and bool((index == first.unsqueeze(d)).all())


def narrowed(index: Tensor, dims: Iterable[int] | None = None) -> Tensor:
    """Numbers of features with size 1 along axes that hold the same all along."""
    for d in range(index.ndim) if dims is None else dims:
        if index.shape[d] > 1 and is_batch(index, d):
            index = index.narrow(d, 0, 1)
    return index


def reshaped(index: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Numbers of features in another shape; None where that would copy too much."""
    try:
        return index.view(shape)
    except RuntimeError:
        pass
    small = list(shape)
    for into, out in groups(tuple(index.shape), shape):
        if into and all(is_batch(index, d) for d in into):
            index = narrowed(index, into)
            for d in out:
                small[d] = 1
    return index.reshape(small).expand(shape) if index.numel() <= LARGEST else None


def groups(
    before: tuple[int, ...], after: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """The axes of two shapes of one size that a reshape divides or merges among themselves."""
    i = j = 0
    while i < len(before) or j < len(after):
        into: list[int] = []
        out: list[int] = []
        left = right = 1
        if i < len(before):
            into.append(i)
            left, i = before[i], i + 1
        while left != right or not out:
            if right < left and j < len(after):
                out.append(j)
                right, j = right * after[j], j + 1
            elif left < right and i < len(before):
                into.append(i)
                left, i = left * before[i], i + 1
            elif not out and j < len(after):
                out.append(j)
                right, j = right * after[j], j + 1
            else:
                break
        yield into, out


def essential(index: Tensor) -> Tensor:
    """Numbers of features without the axes and repetitions that batches have."""
    for d in range(index.ndim):
        if index.shape[d] > 1 and index.stride(d) == 0:
            index = index.narrow(d, 0, 1)
    for d in range(index.ndim):
        size = index.shape[d]
        if size > 1:
            line = index[tuple(slice(None) if i == d else 0 for i in range(index.ndim))]
            period = _period(line)
            if period < size and _equal(index, d, period):
                index, line, size = index.narrow(d, 0, period), line[:period], period
            if (run := _run(line)) > 1:
                index = index.index_select(d, torch.arange(0, size, run))
    return index


def _equal(index: Tensor, d: int, period: int) -> bool:
    size = index.shape[d]
    return torch.equal(index.narrow(d, 0, size - period), index.narrow(d, period, size - period))


def _period(line: Tensor) -> int:
    """The shortest period of a row of numbers."""
    size, first = len(line), (line == line[0]).nonzero().flatten().tolist()
    for p in first[1:]:
        if size % p == 0 and torch.equal(line[p:], line[:-p]):
            return p
    return size


def _run(line: Tensor) -> int:
    """How often each number of a row comes one after the other; 1 if not all equally often."""
    counts = torch.unique_consecutive(line, return_counts=True)[1]
    run = int(counts[0])
    return run if run < len(line) and bool((counts == run).all()) else 1
