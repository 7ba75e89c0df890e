"""What an operation gives while nothing is computed: shapes of floats, values of integers.

Floating tensors are on the meta device. Integers and booleans are computed on the CPU, since they
steer the code, and so are a few numbers that follow from them, such as lengths; those that depend
on floating values are guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

Args = tuple[Any, ...]


def is_real(value: Any) -> bool:
    """Whether a value is a tensor that holds numbers, and no integers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def evaluate(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """What an operation gives.

    Args:
        func: the overload.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    name = func.overloadpacket.__name__
    values, _ = tree_flatten((args, kwargs))
    unknown = any(isinstance(value, Tensor) and value.is_meta for value in values)
    special = (unknown and _OF_UNKNOWN.get(name)) or _SPECIAL.get(name)
    if special is not None:
        found = special(func, args, kwargs, unknown)
        if found is not NotImplemented:
            return found
    if not unknown:
        return _of_integers(func, args, kwargs)
    if "device" in kwargs and kwargs["device"] is not None:
        kwargs = kwargs | {"device": torch.device("meta")}
    on_meta = tree_map(_to_meta, (args, kwargs))
    result = func(*on_meta[0], **on_meta[1])
    if func._schema.is_mutable and isinstance(result, Tensor):
        return next((a for a in (kwargs.get("out"), args[0]) if isinstance(a, Tensor)), result)
    return tree_map(_without_unknown_integers, result)


def _of_integers(func: Any, args: Args, kwargs: dict[str, Any]) -> Any:
    """An operation on known integers, or one that makes a tensor of nothing."""
    if _takes_device(func):
        asked = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta"
        result = func(*args, **(kwargs | {"device": torch.device("meta")}))
        if is_real(result) and (asked or result.numel() > _FEW):
            return result
        kwargs = kwargs | {"device": torch.device("cpu")}
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    if torch.Tag.pointwise in func.tags and not func._schema.is_mutable:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        if shape.numel() > _LARGEST:
            result = func(*tree_map(_to_meta, args), **kwargs)
            return result if is_real(result) else torch.zeros((), dtype=result.dtype).expand(shape)
    result = func(*args, **kwargs)
    return tree_map(lambda t: t.to("meta") if is_real(t) and t.numel() > _FEW else t, result)


_FEW = 16  # numbers that are computed
_GUARD = 1e-7  # no unknown number is as near to 0
_LARGEST = 1 << 24  # entries of integers that are computed


def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _without_unknown_integers(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_meta and not is_real(value):
        return _constant(0, value.shape, value.dtype)
    return value


def _constant(value: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of one value, which takes no memory if it is large."""
    if shape.numel() > _LARGEST:
        return torch.full((), value, dtype=dtype).expand(shape)
    return torch.full(shape, value, dtype=dtype)


# ------------------------------------------------------------------------- operations of their own


def _item(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    return True if args[0].dtype == torch.bool else 1.0 if is_real(args[0]) else 1


def _to_copy(func: Any, args: Args, kwargs: dict[str, Any], unknown: bool) -> Any:
    source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
    real = dtype.is_floating_point or dtype.is_complex
    if unknown and not real:
        return _constant(1, source.shape, dtype)
    on_meta = real and (unknown or source.numel() > _FEW)
    return func(*args, **(kwargs | {"device": torch.device("meta" if on_meta else "cpu")}))


def _nonzero(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    return torch.zeros(min(2, args[0].numel()), args[0].ndim, dtype=torch.int64)


def _masked_select(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    if not args[0].is_meta:
        return NotImplemented
    count = args[0].numel() if args[1].is_meta else int(args[1].broadcast_to(args[0].shape).sum())
    return torch.empty(count, dtype=args[0].dtype, device="meta")


def _chosen(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    """Places of the largest values: each in turn, so that every expert is chosen by some token."""
    result = func(*args, **kwargs)
    dim = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
    if func.overloadpacket.__name__ in ("topk", "kthvalue"):
        dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
    elif func.overloadpacket.__name__ == "sort":
        dim = kwargs.get("dim", args[1] if len(args) > 1 and type(args[1]) is int else -1)
    size = args[0].shape[dim] if args[0].ndim else 1

    def places(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta and not is_real(value):
            return (torch.arange(value.numel()) % max(size, 1)).view(value.shape).to(value.dtype)
        return value

    return tree_map(places, result)


def _bincount(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    count = args[2] if len(args) > 2 else kwargs.get("minlength", 1)
    return torch.zeros(max(count, 1), dtype=torch.int64)


def _of_zeros(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    """What meta kernels lack is computed, with zeros for what is unknown."""

    def known(value: Any) -> Any:
        missing = isinstance(value, Tensor) and value.is_meta
        return torch.zeros((), dtype=value.dtype).expand(value.shape) if missing else value

    return tree_map(lambda t: t.to("meta") if is_real(t) else t, func(*map(known, args), **kwargs))


def _indexed(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    """Boolean indices become numbers, since their count must be known."""
    name = func.overloadpacket.__name__
    if name in ("index_put_", "_index_put_impl_"):
        return args[0]
    if name == "index_put":
        return torch.empty_like(args[0])
    places: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            known = torch.ones(index.shape) if index.is_meta else index
            places.extend(known.nonzero(as_tuple=True))
        else:
            places.append(index)
    return func(*tree_map(_to_meta, (args[0], places)))


def _grouped(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    left, right = args[:2]
    if left.ndim == right.ndim == 2:
        groups = (args[2] if len(args) > 2 else kwargs["offs"]).shape[0]
        shape: tuple[int, ...] = (groups, left.shape[0], right.shape[1])
    elif left.ndim == right.ndim:
        shape = (*left.shape[:2], right.shape[-1])
    else:
        shape = (left.shape[-2], right.shape[-1])
    return torch.empty(shape, dtype=left.dtype, device="meta")


def _guess(value: bool) -> Callable[..., Any]:
    """What a comparison of unknown values gives: of equality, that they differ from nothing."""

    def compare(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
        name = func.overloadpacket.__name__
        if func._schema.is_mutable:
            return NotImplemented
        shapes = [a.shape for a in args if isinstance(a, Tensor)]
        if name in ("lt", "le") and isinstance(args[1], float) and 0 < args[1] < _GUARD:
            return _constant(False, shapes[0], torch.bool)
        same = len(args) > 1 and args[0] is args[1]
        answer = value or (same and name == "eq")
        return _constant(answer, torch.broadcast_shapes(*shapes), torch.bool)

    return compare


def _histogram(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    if unknown:
        return NotImplemented
    return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)


def _clamp(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    if all(bound is None for bound in (*args[1:], *kwargs.values())):
        return args[0].clone()
    return NotImplemented


def _product(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    """Products of integers and floats raise an error, which meta kernels do not."""
    if len({is_real(arg) for arg in args if isinstance(arg, Tensor)}) > 1:
        raise RuntimeError("expected operands of one dtype")
    return NotImplemented


def _convolution(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    """Meta kernels do not say how many channels they expect."""
    image, weight, transposed, groups = args[0], args[1], args[6], args[8]
    expected = weight.shape[0] if transposed else weight.shape[1] * groups
    if image.ndim == weight.ndim and image.shape[1] != expected:
        where = f"channels on axis 1 of dimension {weight.ndim}"
        raise RuntimeError(f"expected {expected} {where}, but got {image.shape[1]}")
    return NotImplemented


def _equal(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    return True


def _in_place(func: Any, args: Args, kwargs: Any, unknown: bool) -> Any:
    return args[0]


# Operations on values that are not known.
_OF_UNKNOWN: dict[str, Callable[..., Any]] = {
    "_local_scalar_dense": _item,
    "equal": _equal,
    "nonzero": _nonzero,
    "bincount": _bincount,
    **dict.fromkeys(("unique_consecutive", "_unique2", "unique_dim", "_unique"), _of_zeros),
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), _of_zeros),
    **dict.fromkeys(("index", "index_put", "index_put_", "_index_put_impl_"), _indexed),
    **dict.fromkeys(("topk", "argmax", "argmin", "sort", "argsort", "multinomial"), _chosen),
    **dict.fromkeys(("eq", "isnan", "isinf", "ne"), _guess(False)),
    **dict.fromkeys(("gt", "ge", "lt", "le", "isfinite"), _guess(True)),
    **dict.fromkeys(("bernoulli_", "normal_", "uniform_", "random_", "exponential_"), _in_place),
}
# Others that do not do as their kernels do.
_SPECIAL: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    "clamp": _clamp,
    "convolution": _convolution,
    "_to_copy": _to_copy,
    "masked_select": _masked_select,
    "histc": _histogram,
    "_grouped_mm": _grouped,
}
