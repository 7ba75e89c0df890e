"""Which parameters made an output last: a module's `forward`, read backwards from its `return`.

Nothing is run. The source of `forward` is read against the living module, so that `self.head` is
that module, `range(self.config.num_heads)` that range, and a branch on a known value that branch;
tensors are unknown, and only what made them last is followed. Values are found when they are asked
for: what lies before the last matrix is never looked at, however deep the model is.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .frames import Frame
from .interpreter import parsed
from .values import UNKNOWN, Known, Later, Local, Made, Makers, Value, either, made_of, now

_DEPTH = 30  # calls inside calls
_CALLS = 2_000  # calls in all, after which a model is taken as one that cannot be read


@dataclass
class Reader:
    """Reads the sources of one model.

    Args:
        names: the place of every module and parameter, by identity.
        last: what the call of a module is made of by itself: its matrices for `nn.Linear` and its
            likes, [`INPUT`] for a table or a normalisation, None for modules that have to be read.
        unwrapped: the module that a wrapper passes its input to.
        defaults: whether the model is called with the defaults of its optional arguments; if not,
            they may be anything.
    """

    names: Mapping[int, str]
    last: Callable[[nn.Module], Makers | None]
    unwrapped: Callable[[nn.Module], nn.Module]
    defaults: bool
    depth: int = field(default=0, init=False)
    # what matrices were given, and what modules keep in attributes of their own
    inputs: dict[str, list[Later]] = field(default_factory=dict, init=False)
    kept: dict[tuple[int, str], Later] = field(default_factory=dict, init=False)
    calls: int = field(default=0, init=False)

    def call(
        self, module: nn.Module, arguments: list[Later], keywords: Mapping[str, Later]
    ) -> Value:
        """What comes out of a module."""
        module = self.unwrapped(module)
        own = self.last(module)
        if own is not None:
            for name in own:
                self.inputs.setdefault(name, []).extend([*arguments, *keywords.values()])
            return Made(own)
        if isinstance(module, nn.Sequential):
            for child in module:
                arguments = [now(self.call(child, arguments, keywords))]
            return arguments[0].value if arguments else UNKNOWN
        forward = getattr(module.forward, "__func__", None)
        if forward is None or type(module).__module__.startswith("torch.nn"):
            return made_of([*arguments, *keywords.values()])
        return self.function(forward, [now(Known(module)), *arguments], keywords)

    def local(self, local: Local, arguments: list[Later], keywords: Mapping[str, Later]) -> Value:
        """What comes out of a function defined in another one."""
        self.calls += 1
        if self.depth > _DEPTH or self.calls > _CALLS:
            return made_of([*arguments, *keywords.values()])
        frame = Frame(self, local.frame.function, local.frame.first)
        frame.variables = dict(local.frame.variables)
        self.depth += 1
        try:
            frame.bind(local.node.args, arguments, keywords)
            if isinstance(local.node, ast.Lambda):
                return frame.evaluate(local.node.body).value
            frame.run(local.node.body)
            return either(frame.returned).value if frame.returned else UNKNOWN
        finally:
            self.depth -= 1

    def function(
        self, function: Any, arguments: list[Later], keywords: Mapping[str, Later]
    ) -> Value:
        """What comes out of a Python function."""
        tree = parsed(inspect.unwrap(function))
        self.calls += 1
        if self.calls > _CALLS:
            raise RecursionError(f"more than {_CALLS} calls")
        if tree is None or self.depth > _DEPTH:
            return made_of([*arguments, *keywords.values()])
        frame = Frame(self, inspect.unwrap(function), arguments[0].value if arguments else UNKNOWN)
        frame.bind(tree.args, arguments, keywords)
        self.depth += 1
        try:
            frame.run(tree.body)
            return either(frame.returned).value if frame.returned else UNKNOWN
        finally:
            self.depth -= 1
