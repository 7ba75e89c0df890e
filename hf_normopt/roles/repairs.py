"""Other inputs for a module that refused some, by what its error says.

Errors of torch name what does not fit: two sizes, a number of axes, a type. [`repaired`] changes
one argument at a time accordingly; a search over these changes is in `observe.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs

_AXES = re.compile(r"unpack|axes|[Dd]imension|[Dd]ims|\dD|subscripts|indices|shape|batch")
_TYPES = re.compile(r"type|Long|[Ii]ndices|[Ii]ntegers?|index|iterable|scalar")
_NUMBERS = 6  # of an error that are looked at
_LARGEST = 4096  # size of an axis


def repaired(inputs: Inputs, said: str) -> Iterator[Inputs]:
    """Inputs with one argument of another shape or type, the likeliest first.

    Args:
        inputs: what was refused.
        said: the error.
    """
    args, kwargs = inputs
    values = [*args, *kwargs.values()]
    # of the first argument most is known, of the last least
    places = [i for i, value in reversed(list(enumerate(values))) if isinstance(value, Tensor)]
    changes = [_typed] if _TYPES.search(said) else []
    changes += [_same, _shaped] if _AXES.search(said) else [_same]
    numbers = _numbers(said)
    for change in [*changes, _scaled]:
        for i in places:
            for other in change(values[i], numbers):
                new = [other if j == i else value for j, value in enumerate(values)]
                yield tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True))


def described(inputs: Inputs) -> str:
    """The shapes and types of inputs, which tell whether two are alike."""
    args, kwargs = inputs
    return str([(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in (*args, *kwargs.values())])


def _numbers(said: str) -> list[int]:
    """The numbers in an error, without those in names such as `float32`."""
    apart = re.sub(r"(?<=\d)x(?=\d)", " ", said.rpartition(" (")[0] or said)
    found = re.findall(r"(?<![\w.])\d+(?![\w.])", apart)
    return list(dict.fromkeys(int(n) for n in found if 0 < int(n) <= _LARGEST))[:_NUMBERS]


def _filled(shape: tuple[int, ...], like: Tensor, is_real: bool | None = None) -> Tensor:
    real = like.is_floating_point() if is_real is None else is_real
    if real:
        return torch.empty(shape, device="meta")
    return torch.zeros(shape, dtype=torch.int64 if is_real is False else like.dtype)


def _same(value: Tensor, numbers: list[int]) -> Iterator[Tensor]:
    """A size that the error names becomes another one that it names."""
    for d in reversed(range(value.ndim)):
        for old, new in permutations(numbers, 2):
            if value.shape[d] == old:
                yield _filled((*value.shape[:d], new, *value.shape[d + 1 :]), value)


def _scaled(value: Tensor, numbers: list[int]) -> Iterator[Tensor]:
    """A size changes as one that the error names does: by the same factor or difference."""
    for d in reversed(range(value.ndim)):
        size = value.shape[d]
        for old, new in permutations(numbers, 2):
            for other in (size * new // old if size * new % old == 0 else 0, size + new - old):
                if old != size and 0 < other <= _LARGEST:
                    yield _filled((*value.shape[:d], other, *value.shape[d + 1 :]), value)


def _shaped(value: Tensor, numbers: list[int]) -> Iterator[Tensor]:
    """One axis more or less."""
    shape = tuple(value.shape)
    if len(shape) > 1:
        yield _filled((*shape[:-2], shape[-1]), value)
        yield _filled(shape[:-1], value)
    if len(shape) < 5:
        yield _filled((*shape[:-1], 4, *shape[-1:]), value)
        yield _filled((*shape, shape[-1] if shape else 2), value)


def _typed(value: Tensor, numbers: list[int]) -> Iterator[Tensor]:
    """Numbers of classes for activations, and the reverse."""
    shape = tuple(value.shape)
    if value.is_floating_point():
        yield _filled(shape[:-1], value, False)
        yield _filled(shape, value, False)
        if len(shape) > 2:
            yield _filled(shape[:1], value, False)
    else:
        yield _filled(shape, value, True)
        yield _filled((*shape, *(numbers[:1] or shape[-1:])), value, True)
