"""Follows the features of a module's matrices through the source of its `forward`.

A fused projection is divided by the module that calls it: `q, k, v = self.qkv(x).chunk(3, dim=-1)`,
`.view(batch, length, heads, 3, head_dim)`, `gate_up[..., ::2]`. [`Reading`] is a small interpreter
of such code. A matrix yields the numbers of its output features; views and splits move these
numbers as they would move activations, elementwise operations keep them, and whatever else
receives them is a use. What the source says in words (`self.num_heads`, `self.config.head_dim`) is
asked of the live module. Nothing of the model is run.

Values are plain Python values, tensors of feature numbers (batch axes have size 1), what the module
reaches by attributes ([`Node`], [`Weight`]), and `UNKNOWN`: what cannot be followed divides
nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .interpreter import UNKNOWN, Closure, Env, Interpreter, parsed, plain, source, tensors

Path = tuple[str, ...]

# Methods and functions that move entries; they are run on the numbers as they stand.
_VIEWS = re.compile(
    "chunk|split|split_with_sizes|tensor_split|unbind|permute|transpose|swapaxes|swapdims|movedim"
    "|moveaxis|unflatten|flatten|squeeze|unsqueeze|select|narrow|t|size|dim|reshape_as|view_as"
)
# Those that keep an entry in its place.
_ENTRYWISE = re.compile(
    "(to|float|half|bfloat16|type|type_as|contiguous|clone|detach|clamp|clip|expand|expand_as|relu"
    "|sigmoid|tanh|softplus|silu|gelu|mul|div|add|sub|masked_fill|dropout|exp|pow|square"
    "|normalize)_?"
)
# Functions that do: rotations act within a map, and short convolutions are depthwise.
_KEEPS = re.compile(r"rotary|rotat|(^|_)rot_|rope|conv1d|mask_to_padding")
_DIVIDES = re.compile(
    r"chunk|split|unbind|view\(|reshape|unflatten|glu\b|GLU|\[\.\.\.,|\[:,|rearrange"
    r"|mm\(|matmul|@ |einsum|linear\("
)
# A layer's number says nothing of its maps, and would make each layer a reading of its own.
_PLACE = re.compile(r"_?layer_(idx|id|index|number)")
_PRODUCTS = frozenset({"matmul", "bmm", "mm", "addmm", "baddbmm"})
_CALLS = frozenset({len, min, max, int, sum, range, list, tuple, abs, bool, isinstance, hasattr})
_DEPTH = 4  # calls within calls that are followed
_SMALL = 4  # matrices of a module whose call is followed, as of one with adapters


_WORK = 4_000  # uses times sums; a module with a division of its own needs far less


class TooLongError(Exception):
    """A reading that costs more than it can tell."""


@dataclass(frozen=True)
class Node:
    """A value reached from the owner by attributes."""

    path: Path
    value: Any


@dataclass(frozen=True)
class Weight:
    """A raw parameter; of the axes of its shape, those that indexing has left, in order."""

    path: Path
    shape: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A matrix whose output features are followed.

    Attributes:
        start, stop: the numbers of its features.
        inputs: number of its input features.
        pattern: how a raw parameter is stored, with `out` for the followed axis; "" for a module.
        outs: sizes of the axes `out0`, `out1`, ... where a raw parameter has several.
    """

    start: int
    stop: int
    inputs: int
    pattern: str = ""
    outs: tuple[int, ...] = ()


@dataclass
class Reading(Interpreter):
    """One reading of a module's `forward`.

    Args:
        owner: the module.
        axes: number of axes of the activations, which the source seldom says.

    Attributes:
        sources: the matrices it calls, by their path under the owner.
        uses: tensors of feature numbers, in the shapes in which something received them.
        reads: signatures of all that was asked of the owner; a module with the same has the same
            reading.
        failures: how often the code did not fit what was assumed of unknown shapes.
        work: how many uses were compared with sums.

    Raises:
        TooLongError: where that is more than a module with a division of its own needs.
    """

    owner: nn.Module
    axes: int
    sources: dict[Path, Source] = field(default_factory=dict)
    uses: list[Tensor] = field(default_factory=list)
    reads: dict[Path, Any] = field(default_factory=dict)
    failures: int = 0
    work: int = 0
    _sums: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _depth: int = 0

    def __post_init__(self) -> None:
        owner = Node((), self.owner)
        if isinstance(self.owner, nn.Sequential):
            self.use(self._module(owner, [UNKNOWN], {}))
        else:
            self.use(self._inline(owner, type(self.owner).forward, [], {}))

    def use(self, *values: Any) -> Any:
        """Note that something receives these features; what comes of them is not known."""
        for features in tensors(values):
            self.work += 1 + len(self._sums)
            if self.work > _WORK:
                raise TooLongError(type(self.owner).__name__)
            received = [features]
            for left, right in reversed(self._sums):
                received += [
                    other
                    for other in (_beside(one, left, right) for one in received)
                    if other is not None and not _holds(received, other)
                ]
            self.uses.extend(received)
        return UNKNOWN

    # Calls

    def _matrix(self, path: Path, source: Source, shape: Iterable[int]) -> Tensor:
        start = max((known.stop for known in self.sources.values()), default=0)
        source = replace(source, start=start, stop=start + source.stop)
        source = self.sources.setdefault(path, source)
        return torch.arange(source.start, source.stop, device="cpu").reshape(*shape)

    def _vector(self, features: int) -> tuple[int, ...]:
        return (*(1,) * (self.axes - 1), features)

    def _module(self, node: Node, args: list[Any], kwargs: Env) -> Any:
        module, given = node.value, list(tensors([args, kwargs]))
        self.reads.setdefault(node.path, signature(module))
        for inner in ("base_layer", "original_module"):  # a layer that PEFT has wrapped
            if hasattr(module, inner):
                return self._module(Node(node.path, getattr(module, inner)), args, kwargs)
        fans = matrix_fans(module)
        if fans is not None:
            shape = self._vector(fans[0])
            if isinstance(module, nn.modules.conv._ConvNd):
                if given and module.groups == fans[0] == fans[1]:
                    return given[0]
                if module.groups > 1:  # its groups are maps of their own
                    return self.use(given)
                shape = (1, fans[0], *(1 for _ in module.kernel_size))
            self.use(given)
            return self._matrix(node.path, Source(0, fans[0], fans[1]), shape)
        if isinstance(module, nn.Sequential):
            for name, child in module.named_children():
                args = [self._module(Node((*node.path, name), child), args, {})]
            return args[0]
        if isinstance(module, nn.GLU):
            return self.use([x.chunk(2, module.dim) for x in given])
        if type(module).__name__ == "Rearrange" and given:
            return rearranged(given[0], module.pattern, module.axes_lengths)
        function = type(module).forward
        if len(given) == 1 and no_matrices(module):
            keeps = _KEEPS.search(type(module).__name__.lower())
            if keeps or not divides(cast(Hashable, type(module))):
                return given[0]
            return self._inline(node, function, args, kwargs)
        small = sum(matrix_fans(child) is not None for child in module.modules()) <= _SMALL
        if small and isinstance(function, types.FunctionType):
            failures = self.failures
            result = self._inline(node, function, args, kwargs)
            self.failures = failures  # its activations may have another number of axes
            return result
        return self.use(given)

    def _inline(self, node: Node | None, function: Any, args: list[Any], kwargs: Env) -> Any:
        """Follow a call into a function's source."""
        function = inspect.unwrap(function)
        tree = parsed(function) if isinstance(function, types.FunctionType) else None
        if tree is None or self._depth >= _DEPTH:
            return self.use(args, kwargs)
        names = [arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args)]
        extra = [arg for arg in (tree.args.vararg, tree.args.kwarg) if arg is not None]
        env = {arg.arg: UNKNOWN for arg in (*tree.args.args, *tree.args.kwonlyargs, *extra)}
        env |= dict(zip(names, [node, *args] if node is not None else args, strict=False)) | kwargs
        env[""] = function.__globals__
        returned: list[Any] = []
        self._depth += 1
        self.block(tree.body, env, returned)
        self._depth -= 1
        best = next((value for value in returned if any(True for _ in tensors([value]))), UNKNOWN)
        self.use(*(value for value in returned if value is not best))
        return best

    def method(self, base: Any, name: str, args: list[Any], kwargs: Env) -> Any:
        """The value of a method call."""
        if isinstance(base, Weight):
            return self._weight_call(base, name, args)
        if base is UNKNOWN and name in _PRODUCTS:
            return self._product(name, [base, *args, *kwargs.values()])
        if isinstance(base, Tensor):
            return self._tensor_call(name, [base, *args], kwargs)
        if isinstance(base, list):
            return getattr(base, name)(*args)
        return self.call(self.attribute(base, name), name, args, kwargs)

    def call(self, function: Any, name: str, args: list[Any], kwargs: Env) -> Any:
        """The value of a call: by the function where it is known, else by its name."""
        given = list(tensors([args, kwargs]))
        if isinstance(function, Node) and isinstance(function.value, nn.Module):
            return self._module(function, args, kwargs)
        if _KEEPS.search(name) and given:
            return given[0] if len(given) == 1 else tuple(given)
        if isinstance(function, Node) and isinstance(function.value, types.MethodType):
            owner = Node(function.path[:-1], function.value.__self__)
            return self._inline(owner, function.value.__func__, args, kwargs)
        if isinstance(function, Closure):
            names = [arg.arg for arg in function.source.args.args]
            env = function.env | dict(zip(names, args, strict=False))
            return self.eval(function.source.body, env)
        if function is map and len(args) == 2 and isinstance(args[1], (tuple, list)):
            return tuple(self.call(args[0], "", [value], {}) for value in args[1])
        if name in _PRODUCTS or any(isinstance(arg, Weight) for arg in args):
            return self._product(name, [*args, *kwargs.values()])
        if name in ("cat", "concat", "concatenate", "stack") and args:
            return self._cat(name, *args, **kwargs)
        if name in ("rearrange", "repeat") and given and given[0] is args[0]:
            return rearranged(given[0], args[1], kwargs)
        if name == "glu":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return self.use([x.chunk(2, dim) for x in given])
        if given and (_VIEWS.fullmatch(name) or _ENTRYWISE.fullmatch(name) or name == "reshape"):
            first = [] if args and isinstance(args[0], Tensor) else [kwargs.pop("input", None)]
            return self._tensor_call(name, [*first, *args], kwargs)
        if given and isinstance(function, types.FunctionType):
            return self._inline(None, function, args, kwargs)
        if any(function is known for known in _CALLS):
            plain = [arg.value if isinstance(arg, Node) else arg for arg in args]
            return UNKNOWN if any(arg is UNKNOWN for arg in plain) else function(*plain, **kwargs)
        return self.use(given)

    def _tensor_call(self, name: str, args: list[Any], kwargs: Env) -> Any:
        tensor, *rest = args
        try:
            if name in ("view", "reshape"):
                return self._reshape(tensor, rest)
            if "split" in name:
                return self._split(tensor, name, *rest, **kwargs)
            if _VIEWS.fullmatch(name):
                return getattr(tensor, name)(*rest, **kwargs)
            if _ENTRYWISE.fullmatch(name):
                return self.both(tensor, rest[0], name[:3] in ("add", "sub")) if rest else tensor
        except (RuntimeError, TypeError, ValueError, IndexError):
            self.failures += 1
        return self.use(args, kwargs)

    def _split(
        self, tensor: Tensor, name: str, sizes: Any = None, dim: int = 0, **kwargs: Any
    ) -> Any:
        """A split whose unknown sizes share what the known ones leave."""
        if sizes is None:
            sizes = next(value for key, value in kwargs.items() if key != "dim")
        if isinstance(sizes, (tuple, list)) and UNKNOWN in sizes and name != "tensor_split":
            known = sum(size for size in sizes if size is not UNKNOWN)
            rest = (tensor.shape[dim] - known) // list(sizes).count(UNKNOWN)
            sizes = [rest if size is UNKNOWN else size for size in sizes]
        return getattr(tensor, name)(sizes, dim=dim)

    def _reshape(self, tensor: Tensor, sizes: list[Any]) -> Tensor:
        """A view whose unknown sizes are batch sizes, 1 here, except the last if it is needed."""
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = list(sizes[0])
        known = [1 if size is UNKNOWN else int(size) for size in sizes]
        if -1 in known and sizes[-1] is UNKNOWN and tensor.shape[-1] > 1:
            known[known.index(-1)] = 1  # the length: features are last, and stay there
        rest, left = divmod(tensor.numel(), abs(math.prod(known)))
        if rest > 1 and not left and -1 not in known and UNKNOWN in sizes:
            known[max(i for i, size in enumerate(sizes) if size is UNKNOWN)] = rest
        elif left or not rest:  # a batch size that is known, as of windows
            start = max(i for i in range(len(known)) if math.prod(known[i:]) == tensor.numel())
            known[:start] = [1] * start
        return tensor.reshape(known)

    def _cat(self, name: str, values: Any, dim: Any = 0, **kwargs: Any) -> Any:
        known, dim = list(tensors([values])), kwargs.get("axis", dim)
        try:
            if name != "stack" and known and all(one.shape[dim] == 1 for one in known):
                for other in known[1:]:  # along the sequence
                    self.both(known[0], other, summed=True)
                return known[0]
            whole = isinstance(values, (list, tuple)) and len(known) == len(values)
            if whole and len({self._source(one) for one in known}) == 1:
                return torch.stack(known, dim) if name == "stack" else torch.cat(known, dim)
        except (RuntimeError, TypeError, IndexError):
            self.failures += 1
        return self.use(known)

    def _source(self, features: Tensor) -> int:
        """The number where the matrix of the first of some features starts."""
        return max(s.start for s in self.sources.values() if s.start <= int(features.min()))

    def both(self, left: Any, right: Any, summed: bool = False) -> Any:
        """An elementwise operation between two values; what becomes of a sum, becomes of both."""
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return left if isinstance(left, Tensor) else right
        if torch.equal(left, right):
            return left
        if not summed or left.numel() != right.numel():
            return self.use(left, right)
        features, order = left.flatten().sort()
        self._sums.append((features, right.flatten()[order]))
        return left

    # Raw parameters

    def _weight_call(self, weight: Weight, name: str, args: list[Any]) -> Any:
        axes = list(weight.axes)
        if name in _PRODUCTS:
            return self._product(name, [weight, *args])
        if name in ("t", "transpose", "swapaxes", "permute"):
            order = torch.empty(*range(1, len(axes) + 1), device="meta")
            moved = getattr(order, name)(*args).shape
            return replace(weight, axes=tuple(axes[size - 1] for size in moved))
        return weight if _ENTRYWISE.fullmatch(name) else UNKNOWN

    def _product(self, name: str, args: list[Any]) -> Any:
        """A product with a raw parameter; `out` is the axis that stays."""
        self.use(args)
        at = next((i for i, arg in enumerate(args) if isinstance(arg, Weight)), None)
        if at is None:
            return UNKNOWN
        weight = args[at]
        if name == "einsum" and isinstance(args[0], str):
            return self._einsum(args[0], at - 1, weight)
        if len(weight.axes) < 2 or name not in (*_PRODUCTS, "linear"):
            return UNKNOWN
        out, into = weight.axes[-2:]
        if at > 0 and name != "linear":  # x W; else W x or F.linear(x, W)
            out, into = into, out
        return self._stored(weight, [out], [into])

    def _einsum(self, equation: str, at: int, weight: Weight) -> Any:
        operands, result = equation.replace(" ", "").split("->")
        letters = operands.split(",")
        others = set("".join(letters[:at] + letters[at + 1 :]))
        axes = dict(zip(letters[at], weight.axes, strict=True))
        out = {letter: axes[letter] for letter in axes if letter in result and letter not in others}
        into = [axis for letter, axis in axes.items() if letter in others and letter not in result]
        followed = self._stored(weight, list(out.values()), into)
        if len(out) < 2 or followed is UNKNOWN:
            return followed
        order = [list(out).index(letter) for letter in result if letter in out]
        shape = [weight.shape[out[letter]] if letter in out else 1 for letter in result]
        stored = followed.reshape([weight.shape[axis] for axis in out.values()])
        return stored.permute(order).reshape(shape)

    def _stored(self, weight: Weight, out: list[int], into: list[int]) -> Any:
        if not out or not into:
            return UNKNOWN
        names: dict[int, str] = {}
        for name, axes in (("out", out), ("in", into)):
            names |= {axis: f"{name}{i}" if len(axes) > 1 else name for i, axis in enumerate(axes)}
        rest = [axis for axis in range(len(weight.shape)) if axis not in names]
        names |= {axis: f"stack{i}" if len(rest) > 1 else "stack" for i, axis in enumerate(rest)}
        pattern = " ".join(names[axis] for axis in range(len(weight.shape)))
        outs = tuple(weight.shape[axis] for axis in out)
        source = Source(0, math.prod(outs), weight.shape[into[0]], pattern, outs)
        return self._matrix(weight.path, source, self._vector(math.prod(outs)))

    # What the module reaches by attributes

    def attribute(self, base: Any, name: str) -> Any:
        """The value of an attribute; of the owner's, with a note that it was read."""
        if isinstance(base, Node):
            if _PLACE.fullmatch(name):
                return UNKNOWN
            value, path = getattr(base.value, name, UNKNOWN), (*base.path, name)
            self.reads[path] = signature(value)
            if isinstance(value, nn.Parameter) and value.ndim > 1:
                return Weight(path, tuple(value.shape), tuple(range(value.ndim)))
            return value if value is UNKNOWN or plain(value) else Node(path, value)
        if isinstance(base, Weight):
            flipped = replace(base, axes=(*base.axes[:-2], base.axes[-1], base.axes[-2]))
            return flipped if name in ("T", "mT") else UNKNOWN
        if isinstance(base, Tensor):
            if name == "T":
                return base.permute(*reversed(range(base.ndim)))
            return getattr(base, name) if name in ("shape", "mT", "ndim") else UNKNOWN
        return getattr(base, name) if isinstance(base, types.ModuleType) else UNKNOWN

    def subscript(self, base: Any, index: Any) -> Any:
        """The value at an index."""
        if isinstance(base, Tensor):
            return self._index(base, index if isinstance(index, tuple) else (index,))
        if isinstance(base, Weight):  # one of a stack
            return (
                UNKNOWN if isinstance(index, (slice, tuple)) else replace(base, axes=base.axes[1:])
            )
        if isinstance(base, Node) and isinstance(base.value, nn.ModuleList):
            return self._child(base, int(index))
        return base[index] if isinstance(base, (tuple, list)) else UNKNOWN

    def _child(self, modules: Node, index: int) -> Node:
        node = Node((*modules.path, str(index)), modules.value[index])
        self.reads[node.path] = signature(node.value)
        return node

    def _index(self, tensor: Tensor, index: tuple[Any, ...]) -> Tensor:
        """Indexing that leaves batch axes, of size 1 here, as they are."""
        if any(i is UNKNOWN for i in index):
            return tensor
        used = sum(i is not None and i is not Ellipsis for i in index)
        result, axis = [], 0
        for i in index:
            if i is Ellipsis:
                axis += tensor.ndim - used
            elif i is not None:
                if tensor.shape[axis] == 1:
                    i = slice(None) if isinstance(i, slice) else 0
                axis += 1
            result.append(i)
        return tensor[tuple(result)]

    def elements(self, values: Any) -> Iterable[Any]:
        """What a loop runs over."""
        if isinstance(values, Node) and isinstance(values.value, nn.ModuleList):
            return [self._child(values, i) for i in range(len(values.value))]
        return values if isinstance(values, (tuple, list, range, Tensor)) else [UNKNOWN]


def _beside(features: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """What is added to some features, None if they are not all in the sum; `left` is sorted."""
    if not features.numel() or not left[0] <= features.min() <= features.max() <= left[-1]:
        return None
    at = torch.searchsorted(left, features)
    return right[at] if torch.equal(left[at], features) else None


def _holds(received: list[Tensor], features: Tensor) -> bool:
    return any(torch.equal(features, known) for known in received)


def rearranged(tensor: Tensor, pattern: str, sizes: dict[str, Any]) -> Tensor:
    """What `einops.rearrange` and `repeat` do, for axes of size 1 whatever their names."""
    left, right = (re.findall(r"\([^()]*\)|\.{3}|\w+", side) for side in pattern.split("->"))
    if "..." in left:
        between = [f"_{i}" for i in range(tensor.ndim - len(left) + 1)]
        left, right = (
            [name for word in side for name in (between if word == "..." else [word])]
            for side in (left, right)
        )
    known: dict[str, int] = {}
    for word, size in zip(left, tensor.shape, strict=True):
        names = re.findall(r"\w+", word)
        given = {name: 1 if size == 1 else sizes.get(name, UNKNOWN) for name in names}
        rest = size // math.prod(n for n in given.values() if n is not UNKNOWN)
        known |= {name: rest if n is UNKNOWN else n for name, n in given.items()}
    names = [name for word in right for name in re.findall(r"\w+", word) if name in known]
    axes = list(known)
    moved = tensor.reshape(list(known.values())).permute([axes.index(name) for name in names])
    return moved.reshape(
        [math.prod(known.get(name, 1) for name in re.findall(r"\w+", word)) for word in right]
    )


@functools.cache
def divides(cls: Hashable) -> bool:
    """Whether a class's methods hold a word that divides or multiplies; most have none."""
    for name, method in inspect.getmembers(cast(type, cls), inspect.isfunction):
        if name == "forward" or name not in nn.Module.__dict__:
            text = source(method)
            if text is not None and _DIVIDES.search(text):
                return True
    return False


def no_matrices(module: nn.Module) -> bool:
    """Whether all that a module learns are gains and offsets."""
    return not any(parameter.ndim > 1 for parameter in module.parameters())


def signature(value: Any) -> Any:
    """What a reading can learn from a value."""
    if isinstance(value, nn.Sequential):
        return type(value), tuple(value._modules)
    if isinstance(value, nn.Module):
        return type(value), matrix_fans(value)
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return value if plain(value) else type(value)


def matrix_fans(module: nn.Module) -> tuple[int, int] | None:
    """(fan_out, fan_in) of a matrix in features or channels; None if it is none."""
    if isinstance(module, nn.Linear):
        return int(module.out_features), int(module.in_features)
    if isinstance(module, nn.modules.conv._ConvNd):
        return int(module.out_channels), int(module.in_channels)
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None
