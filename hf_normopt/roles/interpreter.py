"""An interpreter of Python functions in which most values are unknown.

It follows assignments, branches, loops and arithmetic, as far as they can be told from the source;
what a call, an attribute or an index does is left to a subclass. An unknown condition takes both
branches. Values that a branch or a loop leaves are joined: what is known of them stays.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

Env = dict[str, Any]

_UNROLLED = 256  # rounds of a loop that are followed

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda _: "UNKNOWN"})()

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda x, y: x in y,
    ast.NotIn: lambda x, y: x not in y,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}


@dataclass(frozen=True)
class Closure:
    """A lambda, and the variables around it."""

    source: ast.Lambda
    env: Env


class Interpreter:
    """Evaluates a function's statements; values are Python's own, tensors, and `UNKNOWN`.

    Attributes:
        axes: number of axes of the activations, which the source seldom says.
        failures: how often the code did not fit what was assumed of unknown values.
    """

    axes: int
    failures: int

    # What a subclass decides

    def use(self, *values: Any) -> Any:
        """Something receives these values; what comes of them is UNKNOWN."""
        raise NotImplementedError

    def call(self, function: Any, name: str, args: list[Any], kwargs: Env) -> Any:
        """The value of a call, of a function that is known or only has a name."""
        raise NotImplementedError

    def method(self, base: Any, name: str, args: list[Any], kwargs: Env) -> Any:
        """The value of a method call."""
        raise NotImplementedError

    def attribute(self, base: Any, name: str) -> Any:
        """The value of an attribute."""
        raise NotImplementedError

    def subscript(self, base: Any, index: Any) -> Any:
        """The value at an index."""
        raise NotImplementedError

    def elements(self, values: Any) -> Iterable[Any]:
        """What a loop runs over."""
        raise NotImplementedError

    def both(self, left: Any, right: Any, summed: bool = False) -> Any:
        """An elementwise operation, at least one side a tensor."""
        raise NotImplementedError

    # Expressions

    def eval(self, expression: ast.expr | None, env: Env) -> Any:
        """The value of an expression, UNKNOWN if it cannot be told."""
        if expression is None:
            return None
        method = getattr(self, f"_{type(expression).__name__.lower()}", None)
        if method is None:
            return UNKNOWN
        try:
            return method(expression, env)
        except Exception:  # a guess about shapes that did not hold: the value stays unknown
            self.failures += 1
            return UNKNOWN

    def _call(self, call: ast.Call, env: Env) -> Any:
        args = self._items(call.args, env)
        kwargs = {k.arg: self.eval(k.value, env) for k in call.keywords if k.arg is not None}
        if isinstance(call.func, ast.Attribute):
            return self.method(self.eval(call.func.value, env), call.func.attr, args, kwargs)
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        return self.call(self.eval(call.func, env), name, args, kwargs)

    def _constant(self, expression: ast.Constant, env: Env) -> Any:
        return expression.value

    def _name(self, expression: ast.Name, env: Env) -> Any:
        name, known = expression.id, env[""]
        if name in env:
            return env[name]
        return known[name] if name in known else getattr(builtins, name)

    def _attribute(self, expression: ast.Attribute, env: Env) -> Any:
        return self.attribute(self.eval(expression.value, env), expression.attr)

    def _subscript(self, expression: ast.Subscript, env: Env) -> Any:
        return self.subscript(self.eval(expression.value, env), self.eval(expression.slice, env))

    def _slice(self, expression: ast.Slice, env: Env) -> Any:
        bounds = [self.eval(b, env) for b in (expression.lower, expression.upper, expression.step)]
        return UNKNOWN if UNKNOWN in bounds else slice(*bounds)

    def _tuple(self, expression: ast.Tuple, env: Env) -> tuple[Any, ...]:
        return tuple(self._items(expression.elts, env))

    def _list(self, expression: ast.List, env: Env) -> list[Any]:
        return self._items(expression.elts, env)

    def _items(self, expressions: list[ast.expr], env: Env) -> list[Any]:
        """Values of a list, with `*shape` written out; an unknown shape is that of the batch."""
        values: list[Any] = []
        for item in expressions:
            if isinstance(item, ast.Starred):
                value = self.eval(item.value, env)
                values.extend([1] * (self.axes - 1) if value is UNKNOWN else value)
            else:
                values.append(self.eval(item, env))
        return values

    def _binop(self, expression: ast.BinOp, env: Env) -> Any:
        left, right = self.eval(expression.left, env), self.eval(expression.right, env)
        if isinstance(expression.op, ast.MatMult):
            return self.call(UNKNOWN, "matmul", [left, right], {})
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            return self.both(left, right, isinstance(expression.op, (ast.Add, ast.Sub)))
        if left is UNKNOWN and isinstance(right, tuple):  # x.shape[:-1] + (...)
            left = (1,) * (self.axes - 1)
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        return OPERATORS[type(expression.op)](left, right)

    def _unaryop(self, expression: ast.UnaryOp, env: Env) -> Any:
        value = self.eval(expression.operand, env)
        if plain(value):
            return OPERATORS[type(expression.op)](value)
        return value if isinstance(value, Tensor) else UNKNOWN

    def _compare(self, expression: ast.Compare, env: Env) -> Any:
        left, right = self.eval(expression.left, env), self.eval(expression.comparators[0], env)
        told = left is not UNKNOWN and right is not UNKNOWN and len(expression.ops) == 1
        if told and ((plain(left) and plain(right)) or left is None or right is None):
            return OPERATORS[type(expression.ops[0])](left, right)
        return UNKNOWN

    def _boolop(self, expression: ast.BoolOp, env: Env) -> Any:
        values = [self.eval(value, env) for value in expression.values]
        decides = isinstance(expression.op, ast.Or)
        for value in values:
            if value is not UNKNOWN and bool(value) == decides:
                return value
        return UNKNOWN if any(value is UNKNOWN for value in values) else values[-1]

    def _ifexp(self, expression: ast.IfExp, env: Env) -> Any:
        test = self.eval(expression.test, env)
        if test is not UNKNOWN:
            return self.eval(expression.body if test else expression.orelse, env)
        return either(self.eval(expression.body, env), self.eval(expression.orelse, env))

    def _lambda(self, expression: ast.Lambda, env: Env) -> Any:
        return Closure(expression, env)

    def _generatorexp(self, expression: ast.GeneratorExp | ast.ListComp, env: Env) -> Any:
        (generator,) = expression.generators
        results = []
        for value in self.elements(self.eval(generator.iter, env)):
            inner = dict(env)
            self._bind(generator.target, value, inner)
            results.append(self.eval(expression.elt, inner))
        return tuple(results)

    _listcomp = _generatorexp

    # Statements

    def block(self, body: list[ast.stmt], env: Env, returned: list[Any]) -> bool:
        """Follow statements; True if they surely return."""
        for statement in body:
            try:
                if self._statement(statement, env, returned):
                    return True
            except Exception:  # as in `eval`
                self.failures += 1
        return False

    def _statement(self, statement: ast.stmt, env: Env, returned: list[Any]) -> bool:
        if isinstance(statement, ast.Return):
            returned.append(self.eval(statement.value, env))
        elif isinstance(statement, ast.If):
            return self._branch(statement, env, returned)
        elif isinstance(statement, ast.For):
            self._loop(statement, env, returned)
        elif isinstance(statement, (ast.With, ast.Try, ast.While)):
            return self.block(statement.body, env, returned)
        elif isinstance(statement, ast.Assign):
            value = self.eval(statement.value, env)
            for target in statement.targets:
                self._bind(target, value, env)
        elif isinstance(statement, ast.AnnAssign):
            self._bind(statement.target, self.eval(statement.value, env), env)
        elif isinstance(statement, ast.AugAssign):
            both = ast.BinOp(statement.target, statement.op, statement.value)
            self._bind(statement.target, self.eval(both, env), env)
        elif isinstance(statement, ast.Expr):
            self.eval(statement.value, env)
        return isinstance(statement, (ast.Return, ast.Raise))

    def _branch(self, statement: ast.If, env: Env, returned: list[Any]) -> bool:
        test = self.eval(statement.test, env)
        if test is not UNKNOWN:
            return self.block(statement.body if test else statement.orelse, env, returned)
        body, orelse = dict(env), dict(env)
        ends = self.block(statement.body, body, returned)
        other = self.block(statement.orelse, orelse, returned)
        if ends or other:
            env.update(orelse if ends else body)
        else:
            for name in (body.keys() | orelse.keys()) - {""}:
                env[name] = either(body.get(name, UNKNOWN), orelse.get(name, UNKNOWN))
        return ends and other

    def _loop(self, statement: ast.For, env: Env, returned: list[Any]) -> None:
        for value in islice(self.elements(self.eval(statement.iter, env)), _UNROLLED):
            self._bind(statement.target, value, env)
            self.block(statement.body, env, returned)

    def _bind(self, target: ast.expr, value: Any, env: Env) -> None:
        if isinstance(target, ast.Starred):
            target = target.value
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple):
            values = list(value) if isinstance(value, (tuple, list, Tensor)) else []
            for i, part in enumerate(target.elts):
                if isinstance(part, ast.Starred):
                    rest = len(target.elts) - 1 - i
                    values[i : len(values) - rest] = [tuple(values[i : len(values) - rest])]
            if len(values) != len(target.elts):
                self.failures += value is not UNKNOWN
                self.use(value)
                values = [UNKNOWN] * len(target.elts)
            for part, item in zip(target.elts, values, strict=True):
                self._bind(part, item, env)
        elif not _same(self.eval(target, env), value):  # as of a rotation in place
            self.use(value)


def _same(left: Any, right: Any) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)


def tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


def either(left: Any, right: Any) -> Any:
    """What is known of a value that two branches leave."""
    for value in (left, right):
        if any(True for _ in tensors([value])):
            return value
    return left if left is right or (plain(left) and left == right) else UNKNOWN


def plain(value: Any) -> bool:
    """Whether a value is made of numbers, texts and None alone."""
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


@functools.cache
def source(function: types.FunctionType) -> str | None:
    """A function's source, None where there is none or it is torch's."""
    try:
        if (function.__module__ or "").startswith(("torch.", "transformers.modeling_utils")):
            return None
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError):
        return None


@functools.cache
def parsed(function: types.FunctionType) -> ast.FunctionDef | None:
    """A function's syntax tree, None where there is none."""
    text = source(function)
    try:
        tree = ast.parse(text).body[0] if text else None
    except SyntaxError:
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None
