"""Which parameters of a group move together, and which part by part.

Small tensors of one shape and rule move together: they are stacked, and one call of the LMO serves
all. Large ones whose parts do not need each other (the vectors of an embedding, the rows of a head,
entries under the sign, experts) move part by part. So a step takes a few times [`PART`] entries
(on GPUs [`ACCELERATED`] times as many) for itself, or a few times one tensor where that is more.
All directions are held where the step size needs them at once; a parameter is taken whole when it
is watched, and where its layout divides the first axis. The two factors of a product always move
together.
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
from .moves import Move, kept, kept_of_rows
from .precision import BLOCK, is_low
from .products import ProductMove
from .rules import Rule
from .sharding import placed_as_its_parameter

SMALL = 2**16  # entries: tensors of one shape up to this size move together, [`PART`] at a time
PART = 2**18  # entries of a part of a large tensor
ACCELERATED = 64  # times as many on other devices, where each call has its price

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
    alike: dict[Any, list[tuple[Tensor, Tensor, str]]] = {}
    layouts = group["layouts"]
    if rule.of_entries or is_flat(group):
        layouts = [_vector(p.ndim) for p in group["params"]]
    for p, layout, name in zip(group["params"], layouts, _names(group), strict=True):
        gradient, size = p.grad, p.numel()
        if gradient is None or size == 0:
            continue
        if isinstance(p, DTensor) or size > SMALL * _more_on(p.device):
            own["names"], own["copies"] = [name], None if isinstance(p, DTensor) else copies
            gradient = placed_as_its_parameter(gradient, p)
            yield Move([p], [gradient], [states[p]], group, rule, _layout(layout), **own)
        else:
            key = layout, p.shape, p.dtype, p.device
            alike.setdefault(key, []).append((p, gradient, name))
    own["copies"] = copies
    for (layout, shape, _, device), found in alike.items():
        count = max(1, PART * _more_on(device) // shape.numel())
        for i in range(0, len(found), count):
            params, gradients, names = map(list, zip(*found[i : i + count], strict=True))
            own["names"] = names
            kept = [states[p] for p in params]
            yield Move(params, gradients, kept, group, rule, _layout(layout), **own)


@cache
def _more_on(device: torch.device) -> int:
    """How many times [`SMALL`] and [`PART`] a device takes at once."""
    return 1 if device.type in ("cpu", "meta") else ACCELERATED


def _names(group: Mapping[str, Any]) -> list[str]:
    """The parameters' names, as every wrapper and number of ranks has them."""
    if is_flat(group):
        return [f"{group['label']} {i}" for i in range(len(group["params"]))]
    return [canonical_name(name) for name in group["param_names"]]


def is_flat(group: Mapping[str, Any]) -> bool:
    """Whether the parameters are no longer those of which the group was made: ZeRO's partitions."""
    if any(p.ndim != 1 for p in group["params"]):
        return False
    shapes = [tuple(p.shape) for p in group["params"]]
    return shapes != [tuple(shape) for shape in group["param_shapes"]]


@cache
def _vector(axes: int) -> str:
    """The layout of a tensor that is one vector."""
    return str(usual_layout("other", (1,) * axes))


def parts(move: Move) -> Iterator[Move]:
    """The same in parts along the first stored axis, where it is large and they are independent."""
    p, rule, gradient = move.param, move.rule, move.gradients[0]
    size = PART * _more_on(p.device)
    if (
        isinstance(p, DTensor)
        or (p.numel() <= size and not gradient.is_sparse)
        or (rule.statistic is not None and not rule.smooths_rows(move.layout, p.shape))
        or rule.scale == "muon"  # asks for the whole shape
        or move.layout.axis(0) not in rule.norm.independent
    ):
        yield move
        return
    if gradient.is_sparse:
        touched = gradient.coalesce()
        remembers = rule.momentum or rule.statistic is not None
        moves_others = remembers or move.group["weight_decay"] or is_low(p)
        if move.alone and touched.sparse_dim() == 1 and not moves_others:
            rows = touched.indices()[0]
            values = touched.values()
            yield replace(move, params=[p[rows]], gradients=[values], rows=(p, rows))
        else:
            yield move
        return
    row = p.numel() // len(p)
    aligned = BLOCK // math.gcd(BLOCK, row)  # rows that make up whole blocks
    count = max(1, size // row // aligned) * aligned
    whole, of_rows = kept(move, 0), kept_of_rows(move)
    for i in range(0, len(p), count):
        at = slice(i, min(i + count, len(p)))
        state = {key: value[at] for key, value in whole.items()}
        if of_rows:  # each part counts the step
            state |= {
                "second_moment": of_rows["second_moment"][at],
                "step": of_rows["step"].clone(),
            }
        part = replace(move, params=[p[at]], gradients=[gradient[at]], states=[state], at=at)
        part.whole = p if move.whole is None else move.whole
        yield part
    if of_rows:
        of_rows["step"].add_(1)


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
        device = rows[2 * members[0]][0].device
        # On CPUs, twice as many: nothing is held in float64, and there are more calls for each.
        more = max(2, _more_on(device))
        count = max(1, PART * more // size)
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
