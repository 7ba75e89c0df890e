"""Which parameters of a group move together, and which part by part.

Small tensors of one shape and rule move together: they are stacked, and one call of the LMO serves
all. Large ones whose parts do not need each other (the vectors of an embedding, the rows of a head,
entries under the sign, experts) move part by part. So a step takes a few times [`PART`] entries
for itself, or a few times one tensor where that is more. All directions are held where the step
size needs them at once; a parameter is taken whole when it is watched, and where its layout divides
the first axis. The two factors of a product always move together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..norms.layouts import Layout, usual_layout
from ..roles.graph import canonical_name
from .moves import Move, kept
from .precision import BLOCK, is_low
from .products import ProductMove
from .rules import Rule
from .sharding import placed_as_its_parameter

SMALL = 2**16  # entries: tensors of one shape up to this size move together, [`PART`] at a time
PART = 2**18  # entries of a part of a large tensor

_layout = cache(Layout)


def moves_of(
    group: dict[str, Any],
    rule: Rule,
    states: Mapping[Tensor, dict[str, Any]],
    copies: ProcessGroup | None = None,
    sums: dict[torch.device, Tensor] | None = None,
) -> Iterator[Move]:
    """The moves of a group's parameters that have a gradient: small ones of one shape together.

    Args:
        group: of the optimizer.
        rule: of the group.
        states: of the optimizer.
        copies: the ranks that hold the same parameters; a `DTensor` knows its own.
        sums: of the optimizer, see `note_inplace`.
    """
    own: dict[str, Any] = {"sums": {} if sums is None else sums}
    if group.get("scales"):
        yield from _products(group, rule, states, own)
        return
    alike: dict[Any, list[Tensor]] = {}
    layouts = group["layouts"]
    if rule.of_entries or is_flat(group):
        layouts = [_vector(p.ndim) for p in group["params"]]
    names = dict(zip(group["params"], _names(group), strict=True))
    for p, layout in zip(group["params"], layouts, strict=True):
        if p.grad is None or p.numel() == 0:
            continue
        own["names"], own["copies"] = [names[p]], None if isinstance(p, DTensor) else copies
        if isinstance(p, DTensor) or p.numel() > SMALL:
            gradient = placed_as_its_parameter(p.grad, p)
            yield Move([p], [gradient], [states[p]], group, rule, _layout(layout), **own)
        else:
            alike.setdefault((layout, p.shape, p.dtype, p.device), []).append(p)
    for (layout, *_), params in alike.items():
        count = max(1, PART // params[0].numel())
        for i in range(0, len(params), count):
            some = params[i : i + count]
            gradients = [p.grad for p in some if p.grad is not None]
            kept = [states[p] for p in some]
            own["names"], own["copies"] = [names[p] for p in some], copies
            yield Move(some, gradients, kept, group, rule, _layout(layout), **own)


def _names(group: Mapping[str, Any]) -> list[str]:
    """The parameters' names, as every wrapper and number of ranks has them."""
    if is_flat(group):
        return [f"{group['label']} {i}" for i in range(len(group["params"]))]
    return [canonical_name(name) for name in group["param_names"]]


def is_flat(group: Mapping[str, Any]) -> bool:
    """Whether the parameters are no longer those of which the group was made: ZeRO's partitions."""
    shapes = [tuple(p.shape) for p in group["params"]]
    is_changed = shapes != [tuple(shape) for shape in group["param_shapes"]]
    return is_changed and all(len(shape) == 1 for shape in shapes)


@cache
def _vector(axes: int) -> str:
    """The layout of a tensor that is one vector."""
    return str(usual_layout("other", (1,) * axes))


def parts(move: Move) -> Iterator[Move]:
    """The same in parts along the first stored axis, where it is large and they are independent."""
    p, rule, gradient = move.param, move.rule, move.gradients[0]
    if (
        isinstance(p, DTensor)
        or (p.numel() <= PART and not gradient.is_sparse)
        or rule.statistic is not None
        or rule.scale == "muon"  # asks for the whole shape
        or move.layout.axis(0) not in rule.norm.independent
    ):
        yield move
        return
    if gradient.is_sparse:
        touched = gradient.coalesce()
        moves_others = rule.momentum or move.group["weight_decay"] or is_low(p)
        if move.alone and touched.sparse_dim() == 1 and not moves_others:
            rows = touched.indices()[0]
            values = touched.values()
            yield replace(move, params=[p[rows]], gradients=[values], rows=(p, rows))
        else:
            yield move
        return
    row = p.numel() // len(p)
    aligned = BLOCK // math.gcd(BLOCK, row)  # rows that make up whole blocks
    count = max(1, PART // row // aligned) * aligned
    whole = kept(move, 0)
    for i in range(0, len(p), count):
        at = slice(i, min(i + count, len(p)))
        state = {key: value[at] for key, value in whole.items()}
        part = replace(move, params=[p[at]], gradients=[gradient[at]], states=[state], at=at)
        part.whole = p if move.whole is None else move.whole
        yield part


def _products(
    group: dict[str, Any], rule: Rule, states: Mapping[Tensor, dict[str, Any]], own: dict[str, Any]
) -> Iterator[Move]:
    """The moves of products, whose factors follow each other; those of one shape together."""
    rows = list(zip(group["params"], group["layouts"], _names(group), strict=True))
    alike: dict[Any, list[int]] = {}
    for i in range(len(group["scales"])):
        (a, a_layout, _), (b, b_layout, _) = rows[2 * i : 2 * i + 2]
        has_gradient = a.grad is not None, b.grad is not None
        if not any(has_gradient) or not a.numel() or not b.numel():
            continue
        key: Any = (a_layout, a.shape, b_layout, b.shape, a.dtype, b.dtype, a.device, has_gradient)
        is_alone = isinstance(a, DTensor) or isinstance(b, DTensor)
        alike.setdefault(i if is_alone else key, []).append(i)
    for members in alike.values():
        size = sum(rows[2 * members[0] + side][0].numel() for side in (0, 1))
        count = max(1, PART // size)
        for start in range(0, len(members), count):
            some = members[start : start + count]
            factors: list[Move] = []
            for side in (0, 1):
                params, layouts, names = zip(*(rows[2 * i + side] for i in some), strict=True)
                gradients = [
                    placed_as_its_parameter(p.grad, p) for p in params if p.grad is not None
                ]
                kept_states = [states[p] for p in params]
                layout = _layout(layouts[0])
                made = dict(own, names=[*names], factors=2)
                factors.append(Move([*params], gradients, kept_states, group, rule, layout, **made))
            yield ProductMove(factors[0], factors[1], [group["scales"][i] for i in some])
