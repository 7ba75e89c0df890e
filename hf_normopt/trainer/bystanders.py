"""The parameters of a model that its optimizer does not move, and which of them expect to move."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..optim.optimizer import NormOpt
from ..roles.graph import canonical_name


class Bystanders:
    """Finds parameters that were unfrozen, added or replaced after the optimizer was made.

    An optimizer holds what required grad when it was made. What did so and was left out, as by an
    optimizer for a part of the model, was left out on purpose. The step looks at those that the
    last walk over the model found, which costs microseconds; a walk takes milliseconds.

    Args:
        optimizer: whose parameters move.
        model: the model that is trained, as soon after the optimizer was made as possible.
    """

    def __init__(self, optimizer: NormOpt, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._holders: tuple[Any, ...] = (optimizer,)
        source = optimizer.made_for() if optimizer.made_for is not None else None
        # The optimizer took everything there that required grad.
        taken = self._held() | {id(p) for p in (source.parameters() if source is not None else ())}
        self._settled = {  # names that are left out or told of, since FSDP replaces parameters
            canonical_name(name)
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in taken
        }
        self._left_out = frozenset(self._settled)
        self._watched: list[tuple[str, Tensor]] = []
        self._is_running = False

    def begin(self, optimizer: Any, model: nn.Module) -> None:
        """Start a run; `optimizer` is the outermost, which may hold others' parameters too."""
        self._holders = optimizer, self.optimizer
        self._settled = set(self._left_out)
        self._watched = self._outside(model)
        self._is_running = True

    def end(self) -> None:
        """Keep no parameter alive; what is unfrozen between runs may be for another optimizer."""
        self._watched = []
        self._is_running = False

    def with_gradient(self) -> list[str]:
        """The names of those that have a gradient, each once in a run."""
        found = {name for name, p in self._watched if p.requires_grad and p.grad is not None}
        return self._told(found) if found else []

    def added(self, model: nn.Module) -> list[str]:
        """The names of those that came since the last walk and require grad, each once in a run."""
        if not self._is_running:
            return []
        before = {id(p) for _, p in self._watched}
        self._watched = self._outside(model)
        found = {name for name, p in self._watched if p.requires_grad and id(p) not in before}
        return self._told(found) if found else []

    def _told(self, names: set[str]) -> list[str]:
        """Those of the names that nobody holds by now, as a callback may have seen to it."""
        held = self._held()
        told = [name for name, p in self._watched if name in names and id(p) not in held]
        self._settled |= set(told)
        self._watched = [one for one in self._watched if one[0] not in names]
        return told

    def _outside(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        held = self._held()
        named = ((canonical_name(name), p) for name, p in model.named_parameters())
        return [(name, p) for name, p in named if id(p) not in held and name not in self._settled]

    def _held(self) -> set[int]:
        groups = [group for holder in self._holders for group in _groups(holder)]
        return {id(p) for group in groups for p in group["params"]}


def _groups(optimizer: Any) -> Any:
    return getattr(optimizer, "param_groups", ())  # a wrapper of the user's may have none
