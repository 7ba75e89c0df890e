"""What `flow.py` knows of a value: an object of the living model, or what made a tensor last.

A tensor is known by its makers, the names of the matrices that made it last. Fields of a record are
found when they are asked for, so that nothing is read that does not reach the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor, nn

Makers = frozenset[str]
CONSTANT: Makers = frozenset()  # it does not depend on the input
INPUT: Makers = frozenset({""})  # it does, and no matrix is in between

_DEEP = 90  # values that wait for each other; Python's own limit is not far
UNROLLED = 64  # elements of a list, iterations of a loop, that are followed one by one


@dataclass(frozen=True)
class Known:
    """An object of the living model: a module, a config, a number, a function."""

    value: Any


@dataclass(frozen=True)
class Made:
    """A tensor, by the names of the matrices that made it last."""

    makers: Makers = CONSTANT


@dataclass(frozen=True)
class Record:
    """A tuple, list, dict or `ModelOutput`: fields by name or position, not yet found."""

    fields: Mapping[Any, Later]

    def values(self) -> list[Later]:
        """The fields."""
        return list(self.fields.values())


@dataclass(frozen=True)
class Some:
    """One of several objects of a list in the model; which one depends on the input."""

    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Local:
    """A function or lambda that is defined in another one: its syntax tree, and that one's call."""

    node: Any
    frame: Any


Value = Known | Made | Record
UNKNOWN = Made()


class Later:
    """A value that is found when it is asked for, once."""

    _depth = 0  # values that are being found now

    def __init__(self, find: Callable[[], Value]) -> None:
        self._find = find

    @cached_property
    def value(self) -> Value:
        """The value; one that depends on itself, or on too long a chain, adds nothing."""
        self.__dict__["value"] = UNKNOWN
        if Later._depth > _DEEP:
            return Made(INPUT)
        Later._depth += 1
        try:
            return self._find()
        finally:
            Later._depth -= 1


def now(value: Value) -> Later:
    """A value that is known already."""
    return Later(lambda: value)


def makers(value: Value) -> Makers:
    """What made a value, or any of its fields, last."""
    if isinstance(value, Made):
        return value.makers
    if isinstance(value, Record):
        return CONSTANT.union(*(makers(later.value) for later in value.values()))
    return CONSTANT


def made_of(laters: Iterable[Later]) -> Made:
    """What several values made together, without a matrix of its own."""
    return Made(CONSTANT.union(*(makers(later.value) for later in laters)))


def either(laters: list[Later]) -> Later:
    """One of several values."""

    def find() -> Value:
        values = [later.value for later in laters]
        values = [v for v in values if not is_none(v)] or values
        if all(isinstance(v, Record) for v in values):
            keys = dict.fromkeys(k for v in values if isinstance(v, Record) for k in v.fields)
            return Record(
                {
                    k: either(
                        [v.fields[k] for v in values if isinstance(v, Record) and k in v.fields]
                    )
                    for k in keys
                }
            )
        if all(same(v, values[0]) for v in values):
            return values[0]
        return Made(CONSTANT.union(*map(makers, values)))

    return laters[0] if len(laters) == 1 else Later(find)


def is_none(value: Value) -> bool:
    """Whether a value is known to be None."""
    return isinstance(value, Known) and value.value is None


def same(a: Value, b: Value) -> bool:
    """Whether two values are surely equal."""
    if isinstance(a, Known) and isinstance(b, Known):
        simple = (int, float, str)
        return a.value is b.value or (
            isinstance(a.value, simple) and isinstance(b.value, simple) and a.value == b.value
        )
    return a is b or (isinstance(a, Made) and isinstance(b, Made) and a.makers == b.makers)


def elements(value: Value) -> list[Later] | None:
    """What an iteration over a value yields, None where that is not known one by one."""
    if isinstance(value, Record):
        return value.values()
    if isinstance(value, Known):
        known = (nn.ModuleList, nn.ModuleDict, nn.Sequential, list, tuple, range, dict)
        if isinstance(value.value, known):
            return [now(Known(x)) for x in islice(value.value, UNROLLED)]
    return None


def entries(value: Value) -> Record | None:
    """A record, or a dict of the model as one."""
    if isinstance(value, Record):
        return value
    if isinstance(value, Known) and isinstance(value.value, (nn.ModuleDict, dict)):
        return Record({key: now(Known(entry)) for key, entry in value.value.items()})
    return None


def item_of(value: Value, index: Any) -> Value:
    """`value[index]`; an index of None is not known."""
    if isinstance(value, Record):
        if index in value.fields:
            return value.fields[index].value
        if isinstance(index, int):
            laters = value.values()
            return laters[index].value if -len(laters) <= index < len(laters) else UNKNOWN
        if isinstance(index, str) or not value.fields:
            return UNKNOWN
        return either(value.values()).value
    if isinstance(value, Known) and not isinstance(value.value, Tensor):
        if index is not None:
            return attempt(lambda: value.value[index])
        if isinstance(value.value, (nn.ModuleDict, nn.ParameterDict)):
            return Known(Some(tuple(value.value.values())))
        if isinstance(value.value, (nn.ModuleList, nn.ParameterList, nn.Sequential)):
            return Known(Some(tuple(value.value)))
        return UNKNOWN
    return value


def appended(value: Value, new: Later) -> Value:
    """A list with one more element."""
    if isinstance(value, Record):
        return Record({**value.fields, len(value.fields): new})
    return made_of([now(value), new])


def joined(left: Value, right: Value) -> Value:
    """The sum of two values: of tensors, lists, or other."""
    if isinstance(left, Record) and isinstance(right, Record):
        if is_list(left) and is_list(right):
            return Record(dict(enumerate([*left.values(), *right.values()])))
        return Record({**left.fields, **right.fields})
    return Made(makers(left) | makers(right))


def is_list(record: Record) -> bool:
    """Whether a record's fields are known by position alone."""
    return all(isinstance(key, int) for key in record.fields)


def merged(first: dict[str, Later], second: dict[str, Later]) -> dict[str, Later]:
    """The variables after either of two branches."""
    both = {}
    for name in first.keys() | second.keys():
        found = (first.get(name), second.get(name))
        both[name] = either(list({id(x): x for x in found if x is not None}.values()))
    return both


def attempt(function: Callable[..., Any], *arguments: Any) -> Value:
    """What a function of known objects returns; a model's own objects may raise anything."""
    try:
        return Known(function(*arguments))
    except Exception:
        return UNKNOWN
