"""What a module does with a parameter of its own, read off the source of its methods.

`x @ self.w` multiplies, `self.scale * x` is a gain, `torch.cat([self.token, x])` places it into the
sequence. [`uses`] follows a parameter from `self.name` through casts, views, transposes, variables
and methods of the module to what decides, and says of a product which stored axis is contracted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Literal, cast

from torch import nn

from .interpreter import parsed

How = Literal["product", "kernel", "lookup", "gain", "sum", "place", "return"]

_CASTS = frozenset(
    ("to", "float", "half", "double", "type", "type_as", "contiguous", "clone", "detach", "data")
)
_SHAPES = frozenset(
    ("view", "reshape", "expand", "expand_as", "repeat", "unsqueeze", "squeeze", "flatten")
) | {"tile", "unflatten", "split", "chunk", "unbind"}
_POINTWISE = frozenset(
    ("exp", "expm1", "log", "abs", "neg", "sqrt", "rsqrt", "square", "sigmoid", "logsigmoid")
) | {"tanh", "softplus", "softmax", "clamp", "clamp_min", "normalize", "relu", "sin", "cos"}
_PRODUCTS = {"matmul", "mm", "bmm", "dot", "mv"}
_GAINS = {"mul", "mul_", "multiply", "div", "div_"}
_SUMS = {"add", "add_", "sub", "sub_"}
_JOINS = {"cat", "stack", "concat", "concatenate", "hstack", "vstack", "where", "pad_sequence"}
_NORMALISE = {"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"}
_SAYS = {"shape", "dtype", "device", "size", "dim", "numel", "ndim", "requires_grad", "is_meta"}


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
        how: what is done.
        layout: of a product: the layout that it gives, "" where it is not clear.
    """

    how: How
    layout: str = ""


@dataclass(frozen=True)
class Shown:
    """A parameter, as an expression shows it.

    Attributes:
        count: number of stored axes.
        axes: the stored axis that each axis shows; None where that is lost.
        picked: the stored axis that an index went along, -1 where that is lost.
        listed: it is a list or dict of parameters yet, of which the parameter is one.
        scaled: it was multiplied by something: a use only where a layer's weight is expected.
    """

    count: int
    axes: tuple[int, ...] | None
    picked: int | None = None
    listed: bool = False
    scaled: bool = False

    def use(self, how: How) -> Use:
        """A use that is no product: what an index picked is looked up, whatever follows."""
        if self.picked is None:
            return Use(how)
        if self.picked < 0:
            return Use("lookup")
        words = ["in" if i == self.picked else "out" for i in range(self.count)]
        return Use("lookup", " ".join(_numbered(words)))

    def product(self, left: bool) -> Use:
        """A matrix to the left (`w @ x`, `F.linear(x, w)`) or to the right (`x @ w`)."""
        if self.axes is None or len(self.axes) < 2:
            return Use("product" if self.picked is None else "lookup")
        out, into = self.axes[-2:] if left else reversed(self.axes[-2:])
        words = {out: "out", into: "in"}
        stored = [words.get(i, "stack") for i in range(self.count)]
        return Use("product", " ".join(_numbered(stored)))

    def lost(self) -> Shown:
        """The same, reshaped or joined with others."""
        return replace(self, axes=None)

    def swapped(self) -> Shown:
        """The same, with its last axes swapped."""
        if self.axes is None or len(self.axes) < 2:
            return self
        return replace(self, axes=(*self.axes[:-2], self.axes[-1], self.axes[-2]))


@cache
def uses(cls: Hashable, leaf: str, axes: int, listed: bool = False) -> frozenset[Use]:
    """What the methods of a module do with its parameter.

    Args:
        cls: the module's class.
        leaf: the parameter's name in the module, or in a module of its own (`child.weight`).
        axes: its number of axes.
        listed: whether `leaf` is a list or dict of parameters, and the question is of one of them.
    """
    return frozenset(
        use
        for reading, node in _occurrences(cast(type, cls)).get(leaf, ())
        for use in reading.fresh().follow(node, Shown(axes, tuple(range(axes)), listed=listed))
    )


@cache
def _occurrences(cls: type) -> dict[str, list[tuple[_Reading, ast.expr]]]:
    """Where `self.name` and `self.module.name` stand in a class, by the part after `self.`."""
    found: dict[str, list[tuple[_Reading, ast.expr]]] = {}
    for function in _methods(cls).values():
        reading = _Reading(cls, function)
        for node in reading.nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                path = ast.unparse(node)
                if path.startswith("self.") and path.count(".") <= 2:
                    found.setdefault(path.removeprefix("self."), []).append((reading, node))
    return found


def _methods(cls: type) -> dict[str, FunctionType]:
    """The methods that run in a forward pass."""
    methods: dict[str, FunctionType] = {}
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.startswith("torch."):
            break
        for name, function in vars(base).items():
            if isinstance(function, FunctionType) and (
                not name.startswith(("__", "_init", "init", "reset")) or name == "__call__"
            ):
                methods.setdefault(name, function)
    return methods


class _Reading:
    """One function's syntax tree, with a way up from every node."""

    def __init__(
        self, cls: type, function: FunctionType, seen: frozenset[str] = frozenset()
    ) -> None:
        self.cls = cls
        self.tree = parsed(function)
        self.globals = function.__globals__
        self.seen = seen | {function.__qualname__}
        self.nodes = list(ast.walk(self.tree)) if self.tree else []
        self.parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        loops = (n for n in self.nodes if isinstance(n, (ast.For, ast.comprehension)))
        # the variables of loops such as `for i in range(n)`: what they pick is used one by one
        self.counters = {
            name.id
            for loop in loops
            if re.match(r"range\(|enumerate\(", ast.unparse(loop.iter))
            for name in ast.walk(loop.target)
            if isinstance(name, ast.Name)
        }
        self.followed: set[tuple[str, Shown, int]] = set()

    def fresh(self) -> _Reading:
        """The same, having followed nothing yet."""
        self.followed.clear()
        return self

    def follow(self, node: ast.expr, shown: Shown) -> Iterator[Use]:
        """What is done with an expression that shows the parameter."""
        parent = self.parents.get(node)
        if isinstance(parent, ast.keyword):
            keyword, parent = parent.arg, self.parents[parent]
        else:
            keyword = None

        if shown.listed:
            yield from self._listed(node, parent, replace(shown, listed=False))
        elif isinstance(parent, ast.Attribute):
            yield from self._attribute(parent, shown)
        elif isinstance(parent, ast.Call) and node is not parent.func:
            yield from self._argument(parent, node, keyword, shown)
        elif isinstance(parent, ast.BinOp):
            yield from self._operator(parent, node, shown)
        elif isinstance(parent, ast.Subscript) and node is parent.value:
            yield from self._subscript(parent, shown)
        elif isinstance(parent, (ast.UnaryOp, ast.IfExp, ast.BoolOp, ast.NamedExpr)):
            if not (isinstance(parent, ast.IfExp) and node is parent.test):
                yield from self.follow(parent, shown)
        elif isinstance(parent, (ast.List, ast.Tuple)):
            yield from self.follow(parent, shown.lost())
        elif isinstance(parent, (ast.Assign, ast.AnnAssign)) and node is parent.value:
            targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield from self._variable(target.id, shown, parent.lineno)
                elif isinstance(target, ast.Tuple):
                    for part in target.elts:
                        if isinstance(part, ast.Name):
                            yield from self._variable(part.id, shown.lost())
                elif isinstance(target, ast.Subscript):
                    yield shown.use("place")
        elif isinstance(parent, ast.AugAssign) and node is parent.value:
            yield Use("gain" if isinstance(parent.op, (ast.Mult, ast.Div)) else "sum")
        elif isinstance(parent, ast.Return):
            yield shown.use("return")

    def _listed(self, node: ast.expr, parent: ast.AST | None, shown: Shown) -> Iterator[Use]:
        """`self.weights[i]`, `for weight in self.weights`, `zip(self.weights, ...)`."""
        if isinstance(parent, ast.Subscript) and node is parent.value:
            yield from self.follow(parent, shown)
        elif isinstance(parent, ast.Attribute):  # self.weights.values()
            call = self.parents.get(parent)
            if isinstance(call, ast.Call):
                yield from self._listed(call, self.parents.get(call), shown)
        elif isinstance(parent, ast.Call) and node in parent.args:  # enumerate, zip
            yield from self._listed(parent, self.parents.get(parent), shown)
        elif isinstance(parent, (ast.For, ast.comprehension)) and node is parent.iter:
            for name in ast.walk(parent.target):
                if isinstance(name, ast.Name) and name.id not in self.counters:
                    yield from self._variable(name.id, shown)

    def _variable(self, name: str, shown: Shown, since: int = 0) -> Iterator[Use]:
        """The uses of a variable, from a line on until it is made anew from itself."""
        if (name, shown, since) in self.followed:
            return
        self.followed.add((name, shown, since))
        loads = [
            node
            for node in self.nodes
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)
        ]
        renewed = (
            assign.end_lineno or 0
            for assign in self.nodes
            if isinstance(assign, ast.Assign)
            and assign.lineno > since
            and any(isinstance(t, ast.Name) and t.id == name for t in assign.targets)
            and any(load in loads for load in ast.walk(assign.value))
        )
        until = min(renewed, default=None)
        for node in loads:
            if until is None or node.lineno <= until:
                yield from self.follow(node, shown)

    def _attribute(self, node: ast.Attribute, shown: Shown) -> Iterator[Use]:
        """`w.T`, `w.to(x)`, `w.matmul(x)`."""
        call = self.parents.get(node)
        called = isinstance(call, ast.Call) and call.func is node
        name = node.attr
        if name in _SAYS:
            return
        if not called:
            if name in ("T", "mT", "H", "mH"):
                yield from self.follow(node, shown.swapped())
            elif name in _CASTS:
                yield from self.follow(node, shown)
            return
        assert isinstance(call, ast.Call)
        if name in _CASTS | _POINTWISE:
            yield from self.follow(call, shown)
        elif name in _SHAPES:
            yield from self.follow(call, shown.lost())
        elif name in ("t", "transpose", "swapaxes", "permute"):
            yield from self.follow(call, _permuted(name, call.args, shown))
        elif name in _PRODUCTS and not shown.scaled:
            yield shown.product(left=True)
        elif name in _GAINS:
            yield shown.use("gain")
        elif name in _SUMS:
            yield shown.use("sum")
        elif name in ("index_select", "gather"):
            yield Use("lookup")

    def _argument(
        self, call: ast.Call, node: ast.expr, keyword: str | None, shown: Shown
    ) -> Iterator[Use]:
        """`torch.matmul(x, w)`, `self.method(w)`, `self.module(w)`."""
        name = (
            call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        )
        position = call.args.index(node) if node in call.args else -1
        rest = shown.use("place")
        if name == "linear":
            if position == 1 or keyword == "weight":
                yield shown.product(left=True)
            else:
                yield Use("sum") if position == 2 or keyword == "bias" else rest
        elif name in _PRODUCTS and not shown.scaled:
            other_is_parameter = position == 0
            yield shown.product(left=other_is_parameter)
        elif name in ("addmm", "baddbmm"):
            yield Use("sum") if position == 0 else shown.product(left=position == 1)
        elif name == "einsum" and not shown.scaled:
            yield _einsum(call, position, shown)
        elif name.startswith("conv") and name[4:5] in ("1", "2", "3", "_"):
            kernel = position == 1 or keyword == "weight"
            added = position == 2 or keyword == "bias"
            yield Use("kernel") if kernel else Use("sum") if added else rest
        elif name == "embedding":
            yield Use("lookup")
        elif name in _NORMALISE:
            bias = 4 if name in ("batch_norm", "instance_norm") else 3
            yield Use("sum" if keyword == "bias" or position == bias else "gain")
        elif name in ("addcmul", "addcdiv"):
            yield shown.use("sum" if position == 0 else "gain")
        elif name in _GAINS:
            yield shown.use("gain")
        elif name in _SUMS:
            yield shown.use("sum")
        elif name in _JOINS:
            yield rest
        elif name in _POINTWISE | _CASTS | {"broadcast_to", "Parameter"}:
            yield from self.follow(call, shown)
        elif name in ("transpose", "permute", "swapaxes", "t"):
            yield from self.follow(call, _permuted(name, call.args[1:], shown))
        elif name == "append":
            yield rest
        elif isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "self":
            method = _methods(self.cls).get(name)
            if method is None:
                yield rest  # given to a module of its own, as activations are
            elif method.__qualname__ not in self.seen:
                yield from self._inside(method, position + 1, keyword, shown)
        elif isinstance(call.func, ast.Name):
            function = self.globals.get(name)
            if isinstance(function, FunctionType) and function.__qualname__ not in self.seen:
                yield from self._inside(function, position, keyword, shown)

    def _inside(
        self, function: FunctionType, position: int, keyword: str | None, shown: Shown
    ) -> Iterator[Use]:
        """What a function does with an argument."""
        inner = _Reading(self.cls, function, self.seen)
        names = [argument.arg for argument in inner.tree.args.args] if inner.tree else []
        name = keyword or (names[position] if 0 <= position < len(names) else None)
        if name is not None:
            yield from inner._variable(name, shown)

    def _operator(self, node: ast.BinOp, operand: ast.expr, shown: Shown) -> Iterator[Use]:
        other = node.right if operand is node.left else node.left
        if isinstance(node.op, ast.MatMult) and shown.scaled:
            return
        if isinstance(node.op, ast.MatMult):
            yield shown.product(left=operand is node.left)
        elif isinstance(other, ast.Constant):
            yield from self.follow(node, shown)  # 1 + weight, -weight
        elif isinstance(node.op, (ast.Mult, ast.Div)):
            scaled = replace(shown, scaled=True)
            weights = [
                use
                for use in (self.follow(node, scaled) if shown.count > 1 else ())
                if use.how in ("product", "kernel")
            ]
            yield from weights or [shown.use("gain")]
        elif isinstance(node.op, (ast.Add, ast.Sub)):
            yield shown.use("sum")

    def _subscript(self, node: ast.Subscript, shown: Shown) -> Iterator[Use]:
        """Views such as `w[None, :]`, and rows such as `w[index]`."""
        index, axes = node.slice, shown.axes
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        at = [i for i, p in enumerate(parts) if not isinstance(p, ast.Slice) and not _is_view(p)]
        counted = all(getattr(parts[i], "id", None) in self.counters for i in at)
        if not at:
            whole = all(isinstance(part, ast.Slice) for part in parts)
            yield from self.follow(node, shown if whole else shown.lost())
        elif axes is None or at[0] >= len(axes) or any(map(_is_view, parts)):
            yield from self.follow(node, replace(shown, axes=None, picked=None if counted else -1))
        else:
            left = tuple(axis for i, axis in enumerate(axes) if i not in at)
            picked = shown.picked if counted else axes[at[0]]
            yield from self.follow(node, replace(shown, axes=left, picked=picked))


def _is_view(part: ast.expr) -> bool:
    if isinstance(part, ast.UnaryOp):
        part = part.operand
    return isinstance(part, ast.Constant)


def _permuted(name: str, arguments: list[ast.expr], shown: Shown) -> Shown:
    """After `t()`, `transpose(i, j)` or `permute(i, j, ...)`."""
    if shown.axes is None or name == "t":
        return shown.swapped()
    order = list(shown.axes)
    try:
        text = ", ".join(map(ast.unparse, arguments))
        numbers = [
            i % len(order) for i in ast.literal_eval(f"[{text}]".replace("(", "").replace(")", ""))
        ]
    except (ValueError, TypeError, SyntaxError):
        return shown.lost()
    if name == "permute" and sorted(numbers) == list(range(len(order))):
        return replace(shown, axes=tuple(order[i] for i in numbers))
    if name != "permute" and len(numbers) == 2:
        i, j = numbers
        order[i], order[j] = order[j], order[i]
        return replace(shown, axes=tuple(order))
    return shown.lost()


def _einsum(call: ast.Call, position: int, shown: Shown) -> Use:
    equation = call.args[0]
    if not (isinstance(equation, ast.Constant) and isinstance(equation.value, str)):
        return Use("product")
    inputs, _, output = equation.value.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not 1 <= position <= len(terms):
        return Use("product")
    own = terms[position - 1].replace("...", "")
    others = "".join(terms[: position - 1] + terms[position:])
    kinds = [
        "in" if letter not in output else "stack" if letter in others else "out" for letter in own
    ]
    if "in" not in kinds:
        return shown.use("place" if "out" in kinds else "gain")
    if shown.axes is None or len(own) != len(shown.axes):
        return Use("product")
    words = dict(zip(shown.axes, kinds, strict=True))
    stored = [words.get(i, "stack") for i in range(shown.count)]
    return Use("product", " ".join(_numbered(stored)))


def _numbered(words: list[str]) -> list[str]:
    """Words that occur more than once get numbers."""
    return [
        word if words.count(word) == 1 else f"{word}{words[:i].count(word)}"
        for i, word in enumerate(words)
    ]
