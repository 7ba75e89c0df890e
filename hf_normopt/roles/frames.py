"""The statements and expressions of one function, followed for `flow.py`."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
from collections import ChainMap
from collections.abc import Mapping
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .calls import DESCRIBES, Reader, call, of_record, of_tensors, product
from .interpreter import OPERATORS
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
    appended,
    attempt,
    either,
    elements,
    entries,
    is_list,
    item_of,
    joined,
    made_of,
    makers,
    merged,
    now,
)

_OF_DICTS = frozenset(("items", "keys", "values", "get", "pop"))


class Frame:
    """One call of a function: its variables, and what it returns."""

    def __init__(self, reader: Reader, function: FunctionType, first: Value) -> None:
        self.reader = reader
        self.function = function
        self.first = first
        self.globals = ChainMap(_closure(function), function.__globals__)
        self.variables: dict[str, Later] = {}
        self.returned: list[Later] = []
        self.ended = False

    def bind(
        self, signature: ast.arguments, arguments: list[Later], keywords: Mapping[str, Later]
    ) -> None:
        """Give the parameters their arguments, or defaults."""
        names = [a.arg for a in [*signature.posonlyargs, *signature.args]]
        defaults = dict(zip(reversed(names), reversed(signature.defaults), strict=False))
        defaults |= {
            a.arg: d for a, d in zip(signature.kwonlyargs, signature.kw_defaults, strict=True) if d
        }
        for name in [*names, *(a.arg for a in signature.kwonlyargs)]:
            default = defaults.get(name)
            # an argument that was not passed may be anything a user passes
            self.variables[name] = now(Known(True) if name == "return_dict" else Made(INPUT))
            if default is None or (not self.reader.depth and ast.unparse(default) == "None"):
                continue
            if self.reader.depth or self.reader.defaults:
                self.variables[name] = self.evaluate(default)
        for name, argument in zip(names, arguments, strict=False):
            self.variables[name] = argument
        if signature.vararg:
            rest = arguments[len(names) :]
            self.variables[signature.vararg.arg] = now(Record(dict(enumerate(rest))))
        self.variables.update({k: v for k, v in keywords.items() if k in self.variables})

    # Statements

    def run(self, body: list[ast.stmt]) -> None:
        """Follow statements until one returns."""
        for statement in body:
            if self.ended:
                return
            method = getattr(self, f"_{type(statement).__name__.lower()}", None)
            if method is not None:
                method(statement)

    def _return(self, statement: ast.Return) -> None:
        if statement.value is not None:
            self.returned.append(self.evaluate(statement.value))
        self.ended = True

    def _raise(self, statement: ast.Raise) -> None:
        self.ended = True

    def _assign(self, statement: ast.Assign) -> None:
        value = self.evaluate(statement.value)
        for target in statement.targets:
            self.assign(target, value)

    def _annassign(self, statement: ast.AnnAssign) -> None:
        if statement.value is not None:
            self.assign(statement.target, self.evaluate(statement.value))

    def _augassign(self, statement: ast.AugAssign) -> None:
        before, value = self.evaluate(statement.target), self.evaluate(statement.value)
        self.assign(statement.target, Later(lambda: joined(before.value, value.value)))

    def _expr(self, statement: ast.Expr) -> None:
        """`x.append(y)`, `x.update(y)`, `x.add_(y)`: x holds y too."""
        called = statement.value
        if not (isinstance(called, ast.Call) and isinstance(called.func, ast.Attribute)):
            return
        method = called.func.attr
        name = called.func.value.id if isinstance(called.func.value, ast.Name) else ""
        if called.args and name in self.variables and name != "self":
            held = [self.variables[name], *map(self.evaluate, called.args)]
            if method == "append":
                _ = held[0].value  # found now: many appends would be as many calls inside calls
            self.variables[name] = Later(lambda: _holding(method, held))

    def _if(self, statement: ast.If) -> None:
        if not statement.orelse and isinstance(statement.body[-1], ast.Raise):
            return  # what is read here goes well
        test = self.truth(statement.test)
        if test is not None:
            self.run(statement.body if test else statement.orelse)
            return
        before = dict(self.variables)
        self.run(statement.body)
        after, ended = self.variables, self.ended
        self.variables, self.ended = before, False
        self.run(statement.orelse)
        if self.ended:
            self.variables, self.ended = after, ended
        elif not ended:
            self.variables = merged(after, self.variables)

    def _match(self, statement: ast.Match) -> None:
        before, after = dict(self.variables), [self.variables]
        for case in statement.cases:
            self.variables, self.ended = dict(before), False
            self.run(case.body)
            if not self.ended:
                after.append(self.variables)
        self.ended = False
        self.variables = after[0]
        for variables in after[1:]:
            self.variables = merged(self.variables, variables)

    def _for(self, statement: ast.For) -> None:
        items = self.items(statement.iter)
        if items is None:
            before = dict(self.variables)
            self.assign(statement.target, Later(lambda: made_of([self.evaluate(statement.iter)])))
            self.run(statement.body)
            self.variables, self.ended = merged(before, self.variables), False
            return
        for item in items:
            self.assign(statement.target, item)
            self.run(statement.body)
            if self.ended and self.returned:
                return
            self.ended = False

    def _while(self, statement: ast.While) -> None:
        before = dict(self.variables)
        self.run(statement.body)
        self.variables, self.ended = merged(before, self.variables), False

    def _with(self, statement: ast.With) -> None:
        self.run(statement.body)

    def _try(self, statement: ast.Try) -> None:
        self.run([*statement.body, *statement.orelse, *statement.finalbody])

    def _functiondef(self, statement: ast.FunctionDef) -> None:
        self.variables[statement.name] = now(Known(Local(statement, self)))

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        """What is imported in a function was imported before, or is not known."""
        for alias in statement.names:
            name = alias.asname or alias.name.partition(".")[0]
            source = getattr(statement, "module", None)
            module = sys.modules.get(source or (alias.name if alias.asname else name))
            found = getattr(module, alias.name, None) if source else module
            self.variables[name] = now(UNKNOWN if found is None else Known(found))

    _importfrom = _import

    def assign(self, target: ast.expr, value: Later) -> None:
        """Bind a name, or take a value apart."""
        if isinstance(target, ast.Name):
            self.variables[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            self._take_apart(target.elts, value)
        elif isinstance(target, ast.Attribute):
            self._put(target.value, target.attr, value)
        elif isinstance(target, ast.Subscript):
            self._put(target.value, getattr(target.slice, "value", None), value)

    def _take_apart(self, targets: list[ast.expr], value: Later) -> None:
        for i, target in enumerate(targets):
            if isinstance(target, ast.Starred):
                self.assign(target.value, value)
                rest = targets[i + 1 :]
                for j, last in enumerate(rest):
                    self.assign(last, _nth(value, j - len(rest)))
                return
            self.assign(target, _nth(value, i))

    def _put(self, node: ast.expr, key: Any, value: Later) -> None:
        """`x.key = value` or `x[key] = value`: x holds the value too."""
        if not isinstance(node, ast.Name):
            return
        if node.id == "self" and isinstance(self.first, Known) and isinstance(key, str):
            self.reader.kept[id(self.first.value), key] = value
        before = self.variables.get(node.id)
        if before is None or node.id == "self":
            return

        def find() -> Value:
            if isinstance(before.value, Record):
                fields = before.value.fields
                return Record(
                    {**fields, key if isinstance(key, (str, int)) else len(fields): value}
                )
            return made_of([before, value])

        self.variables[node.id] = Later(find)

    # Expressions

    def evaluate(self, node: ast.expr) -> Later:
        """The value of an expression, in the variables as they are at this point."""
        if isinstance(node, ast.Constant):
            return now(Known(node.value))
        if isinstance(node, ast.Name):
            return self._name(node.id)
        variables = dict(self.variables)

        def find() -> Value:
            kept, self.variables = self.variables, variables
            try:
                return self._compute(node)
            finally:
                self.variables = kept

        return Later(find)

    def _name(self, name: str) -> Later:
        if name in self.variables:
            return self.variables[name]
        missing = object()
        found = self.globals.get(name, getattr(builtins, name, missing))
        return now(UNKNOWN if found is missing else Known(found))

    def _compute(self, node: ast.expr) -> Value:
        method = getattr(self, f"_value_of_{type(node).__name__.lower()}", None)
        return UNKNOWN if method is None else method(node)

    def _value_of_attribute(self, node: ast.Attribute) -> Value:
        base, name = self.evaluate(node.value).value, node.attr
        if isinstance(base, Record):
            if name in base.fields:
                return base.fields[name].value
            return made_of(base.values()) if is_list(base) else UNKNOWN
        if isinstance(base, Made):
            return UNKNOWN if name in DESCRIBES else base
        if isinstance(base.value, Tensor) and name not in DESCRIBES:
            return base  # a parameter, seen from another side
        if name == "training":
            return Made(INPUT)  # the table is one for training and evaluation
        if (id(base.value), name) in self.reader.kept:
            return self.reader.kept[id(base.value), name].value
        if isinstance(base.value, Some):
            choices = (getattr(choice, name, None) for choice in base.value.choices)
            return Known(Some(tuple(choices)))
        return attempt(getattr, base.value, name)

    def _value_of_subscript(self, node: ast.Subscript) -> Value:
        base = self.evaluate(node.value).value
        if isinstance(node.slice, ast.Slice) and isinstance(base, Record):
            return base
        return item_of(base, self.known(node.slice))

    def _value_of_tuple(self, node: ast.Tuple | ast.List) -> Value:
        fields: list[Later] = []
        for element in node.elts:
            later = self.evaluate(element)
            if isinstance(element, ast.Starred) and isinstance(later.value, Record):
                fields += later.value.values()
            else:
                fields.append(later)
        return Record(dict(enumerate(fields)))

    _value_of_list = _value_of_tuple

    def _value_of_dict(self, node: ast.Dict) -> Value:
        fields: dict[Any, Later] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            inner = entries(self.evaluate(value).value) if key is None else None  # **inner
            if inner is not None:
                fields |= inner.fields
            else:
                known = self.known(key) if key is not None else None
                fields[len(fields) if known is None else known] = self.evaluate(value)
        return Record(fields)

    def _value_of_ifexp(self, node: ast.IfExp) -> Value:
        test = self.truth(node.test)
        if test is not None:
            return self.evaluate(node.body if test else node.orelse).value
        return either([self.evaluate(node.body), self.evaluate(node.orelse)]).value

    def _value_of_boolop(self, node: ast.BoolOp) -> Value:
        return either([self.evaluate(value) for value in node.values]).value

    def _value_of_binop(self, node: ast.BinOp) -> Value:
        left, right = self.evaluate(node.left).value, self.evaluate(node.right).value
        if isinstance(node.op, ast.MatMult):
            return product(self.reader, [now(left), now(right)])
        parameter = next((x for x in (left, right) if _is_tensor(x)), None)
        if parameter is not None and not (makers(left) | makers(right)):
            return parameter  # scaled, say
        if isinstance(left, Known) and isinstance(right, Known):
            return _computed(node.op, left.value, right.value)
        return joined(left, right)

    def _value_of_unaryop(self, node: ast.UnaryOp) -> Value:
        operand = self.evaluate(node.operand).value
        if isinstance(node.op, ast.Not):
            truth = self.truth(node.operand)
            return UNKNOWN if truth is None else Known(not truth)
        if isinstance(operand, Known) and isinstance(operand.value, (int, float)):
            return Known(-operand.value if isinstance(node.op, ast.USub) else operand.value)
        return operand

    def _value_of_compare(self, node: ast.Compare) -> Value:
        if len(node.ops) > 1:
            return UNKNOWN
        left, right = self.evaluate(node.left).value, self.evaluate(node.comparators[0]).value
        if isinstance(right, Record):
            parts = [later.value for later in right.values()]
            known = [part.value for part in parts if isinstance(part, Known)]
            right = Known(known) if len(known) == len(parts) else UNKNOWN
        if isinstance(left, Known) and isinstance(right, Known):
            return _computed(node.ops[0], left.value, right.value)
        return UNKNOWN

    def _value_of_lambda(self, node: ast.Lambda) -> Value:
        return Known(Local(node, self))

    def _value_of_joinedstr(self, node: ast.JoinedStr) -> Value:
        parts = [
            self.known(part.value if isinstance(part, ast.FormattedValue) else part)
            for part in node.values
        ]
        return UNKNOWN if None in parts else Known("".join(map(str, parts)))

    def _value_of_starred(self, node: ast.Starred) -> Value:
        return self.evaluate(node.value).value

    def _value_of_namedexpr(self, node: ast.NamedExpr) -> Value:
        self.assign(node.target, self.evaluate(node.value))
        return self.evaluate(node.value).value

    def _value_of_listcomp(self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp) -> Value:
        generator, kept = node.generators[0], self.variables
        results: dict[Any, Later] = {}
        items = self.items(generator.iter) if len(node.generators) == 1 else None
        for item in items if items is not None else [None]:
            self.variables = dict(kept)
            for each in node.generators:
                value = self.evaluate(each.iter)
                self.assign(each.target, item or now(made_of([value])))
            key = self.known(node.key) if isinstance(node, ast.DictComp) else None
            element = node.value if isinstance(node, ast.DictComp) else node.elt
            results[len(results) if key is None else key] = self.evaluate(element)
        self.variables = kept
        known = items is not None or isinstance(node, ast.DictComp)
        return Record(results) if known else made_of(results.values())

    _value_of_generatorexp = _value_of_dictcomp = _value_of_listcomp

    def _value_of_call(self, node: ast.Call) -> Value:
        arguments = [
            later
            for argument in node.args
            for value in [self.evaluate(argument)]
            for later in (
                value.value.values()
                if isinstance(argument, ast.Starred) and isinstance(value.value, Record)
                else [value]
            )
        ]
        keywords: dict[str, Later] = {}
        for keyword in node.keywords:
            value = self.evaluate(keyword.value)
            inner = None if keyword.arg else entries(value.value)  # **inner
            keywords |= {keyword.arg: value} if keyword.arg else dict(inner.fields) if inner else {}
        callee = self._super(node.func)
        if isinstance(node.func, ast.Attribute) and callee is None:
            base = self.evaluate(node.func.value).value
            record = entries(base)
            if record is not None and (base is record or node.func.attr in _OF_DICTS):
                return of_record(record, node.func.attr, arguments)
            if not isinstance(base, Known) or isinstance(base.value, Tensor):
                found = of_tensors(self.reader, node.func.attr, [now(base), *arguments])
                if found is not None:
                    return found
                return base if isinstance(base, Known) else made_of([now(base), *arguments])
        callee = callee or self.evaluate(node.func).value
        if not isinstance(callee, Known):
            return made_of([*arguments, *keywords.values()])
        return call(self.reader, callee.value, arguments, keywords)

    def _super(self, node: ast.expr) -> Value | None:
        """The method that `super().name` is."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call)):
            return None
        if ast.unparse(node.value.func) != "super" or not isinstance(self.first, Known):
            return None
        own = self.first.value
        classes = iter(type(own).__mro__)
        for cls in classes:
            if any(inspect.unwrap(f) is self.function for f in vars(cls).values() if callable(f)):
                break
        found = next((vars(cls)[node.attr] for cls in classes if node.attr in vars(cls)), None)
        return Known(MethodType(found, own)) if isinstance(found, FunctionType) else None

    def items(self, node: ast.expr) -> list[Later] | None:
        """The elements of what is iterated, where they are known one by one."""
        return elements(self.evaluate(node).value)

    def known(self, node: ast.expr) -> Any:
        """The object that an expression is, None where it is not known."""
        value = self.evaluate(node).value
        return value.value if isinstance(value, Known) else None

    def truth(self, node: ast.expr) -> bool | None:
        """Whether a condition holds, None where that depends on the input."""
        if isinstance(node, ast.BoolOp):
            truths = [self.truth(value) for value in node.values]
            decisive = isinstance(node.op, ast.Or)
            if decisive in truths:
                return decisive
            return None if None in truths else not decisive
        value = self.evaluate(node).value
        if not isinstance(value, Known) or isinstance(value.value, Tensor):
            return None
        result = Known(True) if isinstance(value.value, nn.Module) else attempt(bool, value.value)
        return result.value if isinstance(result, Known) else None


def _closure(function: FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    found = {}
    for name, cell in cells:
        with suppress(ValueError):  # it is empty yet
            found[name] = cell.cell_contents
    return found


def _holding(method: str, held: list[Later]) -> Value:
    """What a list, dict or tensor holds after a method was called with something."""
    before = held[0].value
    if method == "append":
        return appended(before, held[1])
    if method in ("update", "extend") and isinstance(before, Record):
        added = entries(held[1].value)
        return before if added is None else joined(before, added)
    return made_of(held)


def _is_tensor(value: Value) -> bool:
    return isinstance(value, Known) and isinstance(value.value, Tensor)


def _nth(value: Later, index: int) -> Later:
    return Later(lambda: item_of(value.value, index))


def _computed(operator: ast.operator | ast.cmpop, left: Any, right: Any) -> Value:
    """An operation of two known objects, unless one is a tensor, which is not looked into."""
    identity = isinstance(operator, (ast.Is, ast.IsNot))
    if type(operator) not in OPERATORS or (
        not identity and (isinstance(left, Tensor) or isinstance(right, Tensor))
    ):
        return UNKNOWN
    return attempt(OPERATORS[type(operator)], left, right)
