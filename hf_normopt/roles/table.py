"""What every parameter does: `classify(model)` gives it a role, a layout and a reason.

The matchers of `matchers.py` are tried in order and the first that answers decides. They look at
the module that owns a parameter, at what `forward` does with it, and last at names; never at the
number of axes alone. What no matcher knows is `other`, with a reason that says so.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..norms.layouts import Layout, usual_layout
from .factors import Factor, factor_of
from .graph import Finding, View, place
from .heads import find_heads
from .matchers import find
from .observe import observe

# In the order in which optimizers keep their groups: the main matrices first.
ROLES: dict[str, str] = {
    "linear": "a matrix from activations to activations",
    "conv": "a convolution kernel",
    "embedding": "vectors looked up by an index, or placed into a sequence",
    "head": "the final matrix that makes the task's output",
    "norm": "an elementwise gain",
    "bias": "an additive vector",
    "scalar": "a single number",
    "other": "none of these, or not known",
}

# Sub-roles, for policies that tell them apart, and the role that each refines.
KINDS: dict[str, str] = {
    "router": "linear",
    "expert": "linear",
    "adapter_a": "linear",
    "adapter_b": "linear",
    "position": "embedding",
    "product": "linear",
    "table_product": "embedding",
    "tied": "embedding",
}


@dataclass(frozen=True)
class ParamSpec:
    """One row of the table: what a parameter is, and why we think so.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: the stored shape.
        role: a key of [`ROLES`].
        kind: a key of [`KINDS`], or "".
        layout: how the stored tensor is read as operators.
        reason: why, for a person to read.
        tied_to: the other names of the same tensor, or None.
        factor: of which product it is a factor, such as LoRA's B A, or None.
        also_head: of an embedding: whether it is the head too, as tied tables are. A policy may
            have a rule for the kind `tied`.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    kind: str
    layout: Layout
    reason: str
    tied_to: str | None = None
    factor: Factor | None = None
    also_head: bool = False


def classify(
    model: nn.Module,
    overrides: Mapping[str, str] | None = None,
    *,
    inputs: Any = None,
    heads: bool = False,
) -> list[ParamSpec]:
    """Find the role and the layout of every trainable parameter.

    Args:
        model: any module: a transformers model, one wrapped by PEFT, a plain one; on any device,
            meta included. Nothing is computed or allocated.
        overrides: role (a key of [`ROLES`] or [`KINDS`]) by regular expression, searched in the
            parameter's name; the first expression that is found decides. A parameter whose layout
            its module determines keeps it, a raw one gets its new role's usual layout.
        inputs: one example of what `forward` takes: a tuple of positional or a mapping of keyword
            arguments, such as a batch of the collator. Only shapes and integers are looked at. If
            None, they are made from the signature of `forward`, the config and the modules' sizes.
        heads: whether each attention head is an operator of its own, in queries, keys, values and
            the map after them; one operator for all heads if not.

    Returns:
        One [`ParamSpec`] for each trainable parameter, in the order of `model.named_parameters()`.

    Raises:
        TypeError: for a module that TorchScript made, if it has trainable parameters.
        ValueError: for an unknown role, or an override that matches no trainable parameter.
    """
    _refuse_scripts(model)
    overrides = _checked(overrides or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's properties, which are looked at
        graph = _Graph(model, inputs)
        specs = [
            _spec(graph, tensor, names, overrides, heads) for tensor, names in graph.trainable()
        ]
    names = [name for _, aliases in graph.trainable() for name in aliases]
    for pattern in overrides:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"The override {pattern!r} matches none of {len(specs)} trainable parameters; it "
                "is searched as a regular expression in names such as "
                f"{', '.join(near or names[:3])}."
            )
    return specs


def _refuse_scripts(model: nn.Module) -> None:
    """Complain where the code that uses a parameter is TorchScript, of which nothing is seen."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(
            param.requires_grad for param in module.parameters()
        ):
            what = getattr(module, "original_name", "") or type(module).__name__
            raise TypeError(
                f"{f'{name} ({what})' if name else what} is a TorchScript module, and roles are "
                "seen when eager modules run. Classify or optimize the model before "
                "torch.jit.script or torch.jit.trace; or freeze the module."
            )


def _spec(
    graph: _Graph,
    tensor: nn.Parameter,
    names: list[str],
    overrides: Mapping[str, str],
    heads: bool,
) -> ParamSpec:
    shape, tied_to = tuple(tensor.shape), ", ".join(names[1:]) or None
    views = list(graph.views(tensor, names))
    merged = _merged(find(view, heads) for view in views)
    found = _overridden(merged, names, overrides)
    layout = found.layout or usual_layout(found.role, shape)
    factor = factor_of(views[0]) if found is merged and tied_to is None else None
    return ParamSpec(
        names[0],
        shape,
        found.role,
        found.kind,
        layout,
        found.reason,
        tied_to,
        factor,
        found.also_head,
    )


def _checked(overrides: Mapping[str, str]) -> dict[str, str]:
    known = [*ROLES, *KINDS]
    for pattern, role in overrides.items():
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Unknown role {role!r} in the override {pattern!r}; expected one of "
                f"{', '.join(known)}.{hint}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"The override {pattern!r} is no regular expression: {error}."
            ) from None
    return dict(overrides)


def _merged(findings: Iterable[Finding]) -> Finding:
    """One finding for a tensor with several names; a table that is the head too is a table."""
    findings = list(findings)
    best = min(findings, key=lambda found: {"embedding": 0, "head": 1}.get(found.role, 2))
    if best.role == "embedding" and any(found.role == "head" for found in findings):
        return replace(best, reason=f"{best.reason}, and the head", also_head=True)
    return best


def _overridden(found: Finding, names: list[str], overrides: Mapping[str, str]) -> Finding:
    for pattern, role in overrides.items():
        if any(re.search(pattern, name) for name in names):
            new = KINDS.get(role, role)
            return Finding(
                role=new,
                reason=f"override {pattern!r} (found: {found.role}, {found.reason})",
                # a table is stored as a head is, not as it is looked up
                layout=None if found.role == "embedding" != new else found.layout,
                kind=role if role in KINDS else "",
                also_head=role == "tied",
            )
    return found


class _Graph:
    """A model's parameters by all their names, and its heads."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._seen = observe(model, inputs)
        self._heads = find_heads(self._modules, self._seen)
        self._names: dict[int, list[str]] = {}
        self._tensors: dict[int, nn.Parameter] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self._tensors[id(tensor)] = tensor
            self._names.setdefault(id(tensor), []).append(name)

    def trainable(self) -> Iterator[tuple[nn.Parameter, list[str]]]:
        for key, tensor in self._tensors.items():
            if tensor.requires_grad:
                yield tensor, self._names[key]

    def views(self, tensor: nn.Parameter, names: list[str]) -> Iterator[View]:
        for name in names:
            parts = name.split(".")
            owners = tuple(
                (".".join(parts[i:]), self._modules[".".join(parts[:i])])
                for i in range(len(parts) - 1, -1, -1)
            )
            stands = place(name)
            head = self._heads.get(stands, self._heads.get(stands.rpartition(".")[0]))
            yield View(name, tuple(tensor.shape), owners, head, self._seen, names[0])
