"""A model's parameters with their surroundings: what the matchers of roles look at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..norms.layouts import Layout
from .parts import Matrix
from .seen import Seen


@cache
def canonical_name(name: str) -> str:
    """A name without what DDP, torch.compile, FSDP and activation checkpointing wrap around it."""
    return _WRAPPERS.sub("", name).rstrip(".")


_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.)+"
    r"|(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)(?:\.|$)"
)
_PEFT_COPIES = re.compile(
    r"(?<![^.])(?:base_layer|original_module|token_adapter"
    r"|(?:modules_to_save|ln_tuning_layers)\.[^.]+)(?:\.|$)"
)
_PARAMETRIZED = re.compile(r"(?<![^.])parametrizations\.([^.]+)\.original\d*$")


def place(name: str) -> str:
    """Where a module or parameter stands, also if PEFT or torch put something of its own there."""
    name = _PARAMETRIZED.sub(r"\1", canonical_name(name))
    return _PEFT_COPIES.sub("", name).rstrip(".")


MATRIX = (nn.Linear, Conv1D, nn.Bilinear, nn.modules.conv._ConvNd)


def is_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, and does nothing else that matters."""
    return isinstance(module, MATRIX)


@dataclass(frozen=True)
class Finding:
    """A matcher's answer; `layout` None asks for the role's usual one."""

    role: str
    reason: str
    layout: Layout | None = None
    kind: str = ""
    also_head: bool = False  # of an embedding: whether it is the head too


@dataclass(frozen=True)
class View:
    """A parameter under one of its names, and what is known about its surroundings."""

    name: str
    shape: tuple[int, ...]
    owners: tuple[tuple[str, nn.Module], ...]  # (path below that owner, owner), the innermost first
    head: str | None  # why it is a head, if it is
    seen: Seen
    key: str  # the parameter's name in what was seen

    @property
    def uses(self) -> dict[str, Layout | None]:
        """What `forward` was seen to do with it, with the layout that this gives."""
        uses = self.seen.uses.get(self.key, {})
        if "mixture" not in uses:
            return uses
        rest = {how: layout for how, layout in uses.items() if how != "mixture"}
        return rest if rest.keys() & {"product", "kernel"} else rest | {"product": uses["mixture"]}

    @property
    def matrix(self) -> Matrix | None:
        """How the features of the matrix, or of that to which a bias belongs, are divided."""
        return self.seen.matrices.get(self.seen.beside.get(self.key, self.key))

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.owners[0][1]

    @property
    def leaf(self) -> str:
        """The parameter's name in its owner."""
        return self.owners[0][0]

    @property
    def owner_class(self) -> str:
        """The owner's class name."""
        return type(self.owner).__name__


def owner_layout(view: View) -> Layout | None:
    """The layout of a weight that torch or transformers multiply by themselves."""
    owner, shape = view.owner, view.shape
    if view.leaf not in ("weight", "default") or len(shape) < 2:
        return None
    if isinstance(owner, Conv1D):
        return Layout("in out")
    if isinstance(owner, nn.Linear):
        return Layout("out in")
    if isinstance(owner, nn.modules.conv._ConvNd):
        first, second = ("in", "out") if owner.transposed else ("out", "in")
        groups = f"(group={owner.groups} {first})" if owner.groups > 1 else first
        return Layout(" ".join([groups, second, *(f"tap={size}" for size in shape[2:])]))
    if isinstance(owner, nn.Bilinear):
        return Layout("out in1 in2")
    return None
