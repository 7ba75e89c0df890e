"""Parameters that require grad but are not in the optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..optim.optimizer import NormOpt
from ..roles.graph import canonical_name


class Bystanders:
    """Finds parameters that were unfrozen, added or replaced after the optimizer was made.

    A parameter that required grad when the optimizer was made and was left out, as by an optimizer
    for a part of the model, was left out on purpose. A step checks only the parameters that the
    last walk over the model found: microseconds, where a walk takes milliseconds.

    Args:
        optimizer: the optimizer of the model.
        model: the model, as soon after the optimizer was made as possible.
    """

    def __init__(self, optimizer: NormOpt, model: nn.Module) -> None:
        self.optimizer = optimizer
        self._optimizers: tuple[Any, ...] = (optimizer,)
        source = optimizer.made_for() if optimizer.made_for is not None else None
        # The optimizer took every parameter of its model that required grad.
        taken = self._held() | {id(p) for p in (source.parameters() if source is not None else ())}
        self._dismissed = {  # names left out or reported: FSDP replaces parameters
            canonical_name(name)
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) not in taken
        }
        self._left_out = frozenset(self._dismissed)
        self._watched: list[tuple[str, Tensor]] = []
        self._is_running = False

    def begin(self, optimizer: Any, model: nn.Module) -> None:
        """Start a run; `optimizer` is the outermost, which may have further parameters."""
        self._optimizers = optimizer, self.optimizer
        self._dismissed = set(self._left_out)
        self._watched = self._outside(model)
        self._is_running = True

    def end(self) -> None:
        """End a run; what is unfrozen between runs may be for another optimizer."""
        self._watched = []
        self._is_running = False

    def with_gradient(self) -> list[str]:
        """The names of bystanders with a gradient; each is returned once in a run."""
        found = {name for name, p in self._watched if p.requires_grad and p.grad is not None}
        return self._newly_reported(found) if found else []

    def added(self, model: nn.Module) -> list[str]:
        """The names of new bystanders that require grad; each is returned once in a run."""
        if not self._is_running:
            return []
        before = {id(p) for _, p in self._watched}
        self._watched = self._outside(model)
        found = {name for name, p in self._watched if p.requires_grad and id(p) not in before}
        return self._newly_reported(found) if found else []

    def _newly_reported(self, names: set[str]) -> list[str]:
        """The names whose parameters no optimizer has taken meanwhile; they count as reported."""
        held = self._held()
        reported = [name for name, p in self._watched if name in names and id(p) not in held]
        self._dismissed |= set(reported)
        self._watched = [one for one in self._watched if one[0] not in names]
        return reported

    def _outside(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        held = self._held()
        named = ((canonical_name(name), p) for name, p in model.named_parameters())
        return [(name, p) for name, p in named if id(p) not in held and name not in self._dismissed]

    def _held(self) -> set[int]:
        groups = [group for optimizer in self._optimizers for group in _groups(optimizer)]
        return {id(p) for group in groups for p in group["params"]}


def _groups(optimizer: Any) -> Any:
    return getattr(optimizer, "param_groups", ())  # a wrapper of the user's may have none
