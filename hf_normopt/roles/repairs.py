"""Other inputs for a module that refused some, by what its error says.

Errors of torch name what does not fit: two sizes, a number of axes, a type. [`repaired`] changes
accordingly arguments of one shape, or one alone; a search over these is in `observe.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import chain, permutations, repeat, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .follow import tensors_of
from .inputs import ROWS, Inputs
from .namesakes import of_rows

Pair = tuple[int, int]
Kind = Callable[[Tensor, list[Pair]], Iterator[Any]]

_AXES = re.compile(r"unpack|size|axes|[Dd]imension|[Dd]ims|\dD|subscripts|indices|shape|batch")
_UNPACKED = re.compile(r"values to unpack \(expected (\d+), got (\d+)\)")
_TYPES = re.compile(r"type|Long|[Ii]ndices|[Ii]ntegers?|index|iterable|scalar")
_PLACES = re.compile(r"\b(dim|dimension|axis|index|argument|operand|entry|at)\b:? [#-]?\d+")
_CHANNELS = re.compile(r"expected (\d+) channels on axis 1 of dimension (\d)")
_RANKS = re.compile(r"[Nn]umber of dimensions|\dD|\d-D|dimensional")
_LISTS = re.compile(r"(tuple|list) of Tensors")
_MATRICES = re.compile(r"\d+(?:x|, )(\d+)\]? (?:and|X) \[?(\d+)(?:x|, )\d+")
_BROADCAST = re.compile(r"of length (\d+) at (-\d+).*broadcastable to \[([\d, ]+)\]")
_NUMBERS = 6  # of an error that are looked at
_SIDE = 32  # of an image
_LARGEST = 4096  # size of an axis
_MOST = 1 << 24  # entries of an argument


def repaired(inputs: Inputs, said: str) -> Iterator[Inputs]:
    """Inputs with arguments of another shape or type: of each kind of change one after another.

    Args:
        inputs: what was refused.
        said: the error.
    """
    values, form = tree_flatten(inputs)
    pairs = _pairs(said.rpartition(" (")[0] or said)
    kinds: list[Kind] = [_listed] if _LISTS.search(said) else []
    kinds += [_typed] if _TYPES.search(said) else []
    kinds += [_same, _shaped, _scaled] if _AXES.search(said) else [_same, _scaled]
    changes = [
        zip(repeat(places), kind(values[places[0]], pairs))
        for kind in kinds
        for places in _together(values)
    ]
    yield from (tree_unflatten(new, form) for new in _of_other_ranks(values, said))
    for places, other in filter(None, chain.from_iterable(zip_longest(*changes))):
        if other is None:
            continue
        new = [other if i in places else value for i, value in enumerate(values)]
        yield tree_unflatten(new, form)


def _of_other_ranks(values: list[Any], said: str) -> Iterator[list[Any]]:
    """Arguments without the axis of a sequence, or an image for one that is none."""
    flat = [of_rows(value) for value in values]
    if _RANKS.search(said) and sum(a is not b for a, b in zip(flat, values, strict=True)) > 1:
        yield flat
    if (found := _CHANNELS.search(said)) is not None:
        channels, axes = map(int, found.groups())
        image = torch.empty(ROWS, channels, *[_SIDE] * (axes - 2), device="meta")
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and value.ndim != axes:
                yield [image if j == i else v for j, v in enumerate(values)]


def approached(before: Inputs, after: Inputs, said: str, now: str) -> Iterator[Inputs]:
    """Inputs with the size at which an error would vanish whose number a change moved.

    Args:
        before: inputs that were refused.
        after: the same with other sizes of an axis or of sides.
        said: the error of those before.
        now: that of those after.
    """
    values, form = tree_flatten(after)
    old = tree_flatten(before)[0]
    wrong = {new: size for size, new in reversed(_pairs(said.rpartition(" (")[0]))}
    moved = [(wrong[n], s, n) for s, n in _pairs(now.rpartition(" (")[0]) if wrong.get(n, s) != s]
    for i, (value, other) in enumerate(zip(values, old, strict=False)):
        if not (moved and isinstance(value, Tensor) and value.ndim == other.ndim):
            continue
        axes = [d for d in range(value.ndim) if value.shape[d] != other.shape[d]]
        if not axes or len({value.shape[d] for d in axes}) > 1:
            continue
        first, second, wanted = (n ** (1 / len(axes)) for n in moved[0])
        size, slope = value.shape[axes[0]], value.shape[axes[0]] - other.shape[axes[0]]
        guess = size + (wanted - second) * slope / (second - first)
        for near in dict.fromkeys((round(guess), math.floor(guess), math.ceil(guess))):
            if 0 < near <= _LARGEST:
                shape = tuple(near if d in axes else n for d, n in enumerate(value.shape))
                new = [_filled(shape, value) if j == i else v for j, v in enumerate(values)]
                yield tree_unflatten(new, form)


def _together(values: list[Any]) -> list[tuple[int, ...]]:
    """Which arguments are changed at once: those of one shape and type, then each alone."""
    alike: dict[Any, tuple[int, ...]] = {}
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            key = (value.shape, value.dtype)
            alike[key] = (*alike.get(key, ()), i)
    # of the first argument most is known, of the last least
    alone = [(i,) for places in alike.values() if len(places) > 1 for i in places]
    alone += [places for places in alike.values() if len(places) == 1]
    return [p for p in alike.values() if len(p) > 1] + sorted(alone, reverse=True)


def described(inputs: Inputs) -> str:
    """The shapes and types of inputs, which tell whether two are alike."""
    values = tree_flatten(inputs)[0]
    return str([(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in values])


def axes_of(inputs: Inputs, said: str) -> int:
    """The axes of arguments, those of one shape once; how many are wrong if the error says."""
    if asked := _UNPACKED.search(said):
        return abs(int(asked[1]) - int(asked[2]))
    return sum(len(shape) for shape, _ in {(v.shape, v.dtype) for v in tensors_of(inputs)})


def _pairs(said: str) -> list[Pair]:
    """Sizes in an error that may have to become others in it."""
    matrices = _MATRICES.search(said)
    if matrices is not None:
        return [(int(matrices[1]), int(matrices[2]))]
    if (broadcast := _BROADCAST.search(said)) is not None:
        shape = [int(n) for n in broadcast[3].split(",")]
        one, other = int(broadcast[1]), shape[int(broadcast[2])]
        return [(other, one), (one, other)]
    # not those in names such as `float32`
    found = re.findall(r"(?<![\w.])\d+(?![\w.])", _PLACES.sub("", said))
    sizes = dict.fromkeys(int(n) for n in found if 0 < int(n) <= _LARGEST)
    return list(permutations(list(sizes)[:_NUMBERS], 2))


def _filled(shape: tuple[int, ...], like: Tensor, is_real: bool | None = None) -> Tensor | None:
    """An argument of another shape or type; None if it were larger than any that is needed."""
    real = like.is_floating_point() if is_real is None else is_real
    if math.prod(shape) > _MOST:
        return None
    if real:
        return torch.empty(shape, device="meta")
    return torch.zeros(shape, dtype=torch.int64 if is_real is False else like.dtype)


def _same(value: Tensor, pairs: list[Pair]) -> Iterator[Tensor | None]:
    """A size that the error names becomes another one that it names."""
    for old, new in pairs:
        yield from _resized(value, old, new)


def _scaled(value: Tensor, pairs: list[Pair]) -> Iterator[Tensor | None]:
    """A size changes as one that the error names should: by the same factor or difference.

    Sides of a square image change by the root of the factor.
    """
    for old, new in pairs:
        if not old:  # a part of a sharded parameter may be empty
            continue
        side = value.shape[-1] if value.ndim else 1
        is_square = value.ndim > 3 and value.shape[-2] == side and value.shape[-3] not in (old, new)
        if is_square and 2 * max(old, new) >= side:
            other = side * math.sqrt(new / old)
            middle = (side + other) / 2  # kernels without padding
            sizes = (round(other), *(4 * math.ceil(n / 4) for n in (other, middle)), round(middle))
            for size in dict.fromkeys(sizes):
                yield from _resized(value, side, max(1, size))
        for size in dict.fromkeys(reversed(value.shape)):
            for other in (size * new // old if size * new % old == 0 else 0, size + new - old):
                if old != size and 0 < other <= _LARGEST:
                    yield from _resized(value, size, other)


def _resized(value: Tensor, old: int, new: int) -> Iterator[Tensor | None]:
    """An axis of some size with another one; both sides of a square at once."""
    first = min(1, value.ndim - 1)  # after the rows
    axes = [(d,) for d in reversed(range(first, value.ndim)) if value.shape[d] == old]
    sides = tuple(d for d in range(2, value.ndim) if value.shape[d] == old)
    if tuple(value.shape) == (old, old):  # a graph's edges
        sides = (0, 1)
    for change in [sides] if len(sides) > 1 else axes:
        yield _filled(tuple(new if d in change else n for d, n in enumerate(value.shape)), value)


def _shaped(value: Tensor, pairs: list[Pair]) -> Iterator[Tensor | None]:
    """One axis more or less."""
    shape = tuple(value.shape)
    if len(shape) > 1:
        yield _filled((*shape[:-2], shape[-1]), value)
    if len(shape) < 5:  # frames come before channels and sides
        at = 1 if len(shape) == 4 else max(len(shape) - 1, 0)
        yield _filled((*shape[:at], 4 if len(shape) > 1 else ROWS, *shape[at:]), value)
    if len(shape) > 1:
        yield _filled(shape[:-1], value)
    if len(shape) < 5:
        yield _filled((*shape, shape[-1] if shape else 2), value)


def _listed(value: Tensor, pairs: list[Pair]) -> Iterator[list[Tensor]]:
    """A list of rows."""
    if value.ndim > 1:
        yield list(value)


def _typed(value: Tensor, pairs: list[Pair]) -> Iterator[Tensor | None]:
    """Numbers of classes for activations, and the reverse."""
    shape = tuple(value.shape)
    if value.is_floating_point():
        if len(shape) > 1:
            yield _filled(shape[:-1], value, False)
        yield _filled(shape, value, False)
        if len(shape) > 2:
            yield _filled(shape[:1], value, False)
    else:
        yield _filled(shape, value, True)
        yield _filled((*shape, *(pairs[0][:1] if pairs else shape[-1:])), value, True)
