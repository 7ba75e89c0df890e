"""What a call returns, in the terms of `values.py`: the part of `flow.py` that knows functions."""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType, MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from .values import (
    INPUT,
    UNKNOWN,
    Known,
    Later,
    Local,
    Made,
    Record,
    Some,
    Value,
    attempt,
    either,
    elements,
    item_of,
    made_of,
    makers,
    now,
)

_CALLED = (nn.Module, MethodType)


class Reader(Protocol):
    """What `flow.Reader` is to this file."""

    names: Mapping[int, str]
    inputs: dict[str, list[Later]]
    defaults: bool
    depth: int
    kept: dict[tuple[int, str], Later]

    def call(
        self, module: nn.Module, arguments: list[Later], keywords: Mapping[str, Later]
    ) -> Value:
        """What comes out of a module."""

    def function(
        self, function: Any, arguments: list[Later], keywords: Mapping[str, Later]
    ) -> Value:
        """What comes out of a Python function."""

    def local(self, local: Local, arguments: list[Later], keywords: Mapping[str, Later]) -> Value:
        """What comes out of a function defined in another one."""


# What these return says something about a tensor and holds nothing of it.
DESCRIBES = {"shape", "size", "device", "dtype", "ndim", "dim", "argmax", "argsort", "nonzero"} | {
    f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn")
}
# What these return holds their first argument only; the others are indices.
_SELECT = {"gather", "index_select", "take_along_dim", "take_along_axis", "masked_select"}
_MULTIPLY = {"matmul", "bmm", "mm", "linear", "einsum", "baddbmm", "addmm", "tensordot", "bilinear"}
# Python's own, which are called where all their arguments are known.
_PLAIN = (int, float, bool, str, range, len, min, max, sum, getattr, isinstance, hasattr, any, all)


def call(
    reader: Reader, callee: Any, arguments: list[Later], keywords: Mapping[str, Later]
) -> Value:
    """What a known object returns when it is called."""
    everything = [*arguments, *keywords.values()]
    if isinstance(callee, Some):
        returned = [now(call(reader, one, arguments, keywords)) for one in callee.choices]
        return either(returned).value if returned else UNKNOWN
    if isinstance(callee, nn.Module):
        return reader.call(callee, arguments, keywords)
    if isinstance(callee, MethodType) and isinstance(callee.__self__, nn.Module):
        return reader.function(callee.__func__, [now(Known(callee.__self__)), *arguments], keywords)
    if callee in (list, tuple, set):
        return arguments[0].value if arguments else Record({})
    if callee in (zip, enumerate, reversed):
        return _iterated(callee, arguments)
    if isinstance(callee, type) and (
        issubclass(callee, (dict, tuple)) or hasattr(callee, "__dataclass_fields__")
    ):
        return _record(callee, arguments, keywords)
    if callee in _PLAIN:
        known = [a.value.value for a in everything if isinstance(a.value, Known)]
        if len(known) == len(everything):
            return attempt(callee, *known)
        if callee is len and isinstance(arguments[0].value, Record):
            return Known(len(arguments[0].value.fields))
    if (
        isinstance(callee, FunctionType)
        and not (callee.__module__ or "").startswith("torch")
        and any(_is(argument, (nn.Module, Tensor, MethodType)) for argument in everything)
    ):
        return reader.function(callee, arguments, keywords)
    if isinstance(callee, Local):
        return reader.local(callee, arguments, keywords)
    if isinstance(getattr(callee, "__self__", None), str):  # "fc{}".format(i)
        known = [a.value.value for a in everything if isinstance(a.value, Known)]
        return attempt(callee, *known) if len(known) == len(everything) else UNKNOWN
    if arguments and isinstance(callee, FunctionType) and _is(arguments[0], _CALLED):
        return call(reader, _known(arguments[0]), arguments[1:], {})  # checkpoint(module, x)
    found = of_tensors(reader, getattr(callee, "__name__", ""), everything)
    if found is not None:
        return found
    parameters = [a.value for a in everything if _is(a, Tensor)]
    if len(parameters) == 1 and not any(isinstance(a.value, Made) for a in everything):
        return parameters[0]  # a function of a parameter alone
    return made_of(everything)


def of_tensors(reader: Reader, name: str, arguments: list[Later]) -> Value | None:
    """What a function or method of tensors returns, by its name; None for most of them."""
    if name in _MULTIPLY:
        return product(reader, arguments)
    if name in DESCRIBES:
        return UNKNOWN
    if name in _SELECT:
        return arguments[0].value if arguments else UNKNOWN
    return None


def product(reader: Reader, factors: list[Later]) -> Value:
    """A product: made by the parameter among its factors; by none where activations meet."""
    values = [factor.value for factor in factors]
    known = [v.value for v in values if isinstance(v, Known)]
    known += [choice for x in known if isinstance(x, Some) for choice in x.choices]
    matrices = frozenset(reader.names[id(x)] for x in known if id(x) in reader.names)
    if matrices:
        for name in matrices:
            reader.inputs.setdefault(name, []).extend(factors)
        return Made(matrices)
    made = [found for value in values if (found := makers(value))]
    if len(made) > 1 and reader.defaults:  # by an input that no matrix made, as of a graph
        made = [found for found in made if found != INPUT]
    return Made(made[0] if len(made) == 1 else INPUT)


def of_record(base: Record, name: str, arguments: list[Later]) -> Value:
    """What a method of a list, dict or output returns."""
    if name in ("get", "pop") and arguments and isinstance(arguments[0].value, Known):
        return item_of(base, arguments[0].value.value)
    if name == "items":
        pairs = [_row(now(Known(key)), later) for key, later in base.fields.items()]
        return Record(dict(enumerate(pairs)))
    if name == "keys":
        return Record(dict(enumerate(now(Known(key)) for key in base.fields)))
    if name in ("values", "to_tuple"):
        return Record(dict(enumerate(base.values())))
    return made_of([now(base), *arguments])


def _record(callee: type, arguments: list[Later], keywords: Mapping[str, Later]) -> Value:
    """An output, a named tuple or a dict."""
    names = getattr(callee, "__dataclass_fields__", getattr(callee, "_fields", None))
    if names is None and arguments:
        return made_of([*arguments, *keywords.values()])
    return Record({**dict(zip(names or (), arguments, strict=False)), **keywords})


def _iterated(callee: Any, arguments: list[Later]) -> Value:
    """What `zip`, `enumerate` and `reversed` yield."""
    lists = [elements(argument.value) for argument in arguments]
    known = [each for each in lists if each is not None]
    if callee is enumerate and not known:
        return Record({0: _row(now(UNKNOWN), now(made_of(arguments)))})
    if not known:
        return made_of(arguments)
    if callee is reversed:
        return Record(dict(enumerate(reversed(known[0]))))
    if callee is enumerate:
        return Record({i: _row(now(Known(i)), x) for i, x in enumerate(known[0])})
    whole = [_whole(argument) for argument in arguments]
    rows = (
        _row(*(each[i] if each is not None else x for each, x in zip(lists, whole, strict=True)))
        for i in range(min(map(len, known)))
    )
    return Record(dict(enumerate(rows)))


def _whole(argument: Later) -> Later:
    return Later(lambda: made_of([argument]))


def _row(*cells: Later) -> Later:
    return now(Record(dict(enumerate(cells))))


def _known(later: Later) -> Any:
    return later.value.value if isinstance(later.value, Known) else None


def _is(later: Later, types: type | tuple[type, ...]) -> bool:
    return isinstance(later.value, Known) and isinstance(later.value.value, types)
