"""One step of the parameters: momentum, direction, and the move itself.

Small tensors of one shape and rule move together: they are stacked, and one call of the LMO serves
all. Large ones whose parts do not need each other (the vectors of an embedding, the rows of a head,
entries under the sign, experts) move part by part. So a step takes a few times [`PART`] or
[`TOGETHER`] entries for itself, or a few times one tensor where that is more. All directions are
held where the step size needs them at once; a parameter is taken whole when it is watched, and
where its layout divides the first axis.

Momenta are kept in the group's `momentum_dtype`, and weights in 16 bits are written as its
`rounding` says; all arithmetic is in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layouts import Layout
from .precision import BLOCK, is_low, new_momentum, state_dtype, widened, write_inplace
from .rules import SCALES, Rule, bias_correction
from .sharding import gathered, sharded_like

SMALL = 2**16  # entries: tensors of one shape up to this size move together,
TOGETHER = 2**19  # so many entries at a time
PART = 2**18  # entries of a part of a large tensor

_layout = cache(Layout)


@dataclass
class Move:
    """The update of one parameter, or of a part of it, not yet made."""

    param: Tensor
    gradient: Tensor
    group: dict[str, Any]
    rule: Rule
    layout: Layout
    state: dict[str, Any]
    rows: tuple[Tensor, Tensor] | None = None  # `param` is a copy of these rows of a parameter
    smooth: Tensor = field(init=False)
    direction: Tensor = field(init=False)

    @property
    def grad(self) -> Tensor:
        """The gradient, dense and in the state's dtype."""
        return _dense(self.gradient).to(state_dtype(self.param))

    def dual(self, tensor: Tensor | None = None) -> Tensor:
        """Scale · multiplier · dual norm: a part of the network's dual norm (Prop. 7)."""
        if tensor is None:  # what the direction was made of: ⟨M, lmo(M)⟩
            return (self.smooth * self.direction).sum() * self.group["multiplier"]
        duals = [
            (self.rule.norm.dual_norm(operator) * self.scale(operator)).sum()
            for operator in self.layout.to_operators(gathered(tensor))
        ]
        return torch.stack(duals).sum() * self.group["multiplier"]

    def scale(self, operator: Tensor) -> float:
        """What multiplies the LMO of an operator."""
        fan_out, fan_in = operator.shape[-2:]
        taps = self.layout.taps
        return SCALES[self.rule.scale](self.rule.norm, fan_out, fan_in, taps) / taps


def moves_of(
    group: dict[str, Any], rule: Rule, states: Mapping[Tensor, dict[str, Any]]
) -> Iterator[list[Move]]:
    """The moves of a group's parameters that have a gradient; a list holds those made together."""
    alike: dict[Any, list[Move]] = {}
    for p, layout in zip(group["params"], group["layouts"], strict=True):
        if p.grad is None or p.numel() == 0:
            continue
        move = Move(p, p.grad, group, rule, _layout(layout), states[p])
        if p.numel() > SMALL or isinstance(p, DTensor):
            yield [move]
        else:
            alike.setdefault((layout, p.shape, p.dtype, p.device), []).append(move)
    for moves in alike.values():
        count = max(1, TOGETHER // moves[0].param.numel())
        yield from (moves[i : i + count] for i in range(0, len(moves), count))


def parts(moves: list[Move]) -> Iterator[list[Move]]:
    """The same in parts along the first stored axis, where they are large and independent."""
    move = moves[0]  # what moves together is small
    p, rule, gradient = move.param, move.rule, move.gradient
    if (
        isinstance(p, DTensor)
        or (p.numel() <= PART and not gradient.is_sparse)
        or rule.statistic is not None
        or rule.scale == "muon"  # asks for the whole shape
        or move.layout.first not in rule.norm.independent
    ):
        yield moves
        return
    if gradient.is_sparse:
        touched = gradient.coalesce()
        moves_others = rule.momentum or move.group["weight_decay"] or _kept(move)
        if touched.sparse_dim() == 1 and not moves_others:
            rows = touched.indices()[0]
            yield [replace(move, param=p[rows], gradient=touched.values(), rows=(p, rows))]
        else:
            yield moves
        return
    row = p.numel() // len(p)
    aligned = BLOCK // math.gcd(BLOCK, row)  # rows that make up whole blocks
    count = max(1, PART // row // aligned) * aligned
    whole = _kept(move)
    for i in range(0, len(p), count):
        at = slice(i, min(i + count, len(p)))
        state = {key: value[at] for key, value in whole.items()}
        yield [replace(move, param=p[at], gradient=gradient[at], state=state)]


def advance_inplace(moves: Sequence[Move], weight: Tensor | float, unit: Tensor | float) -> None:
    """Advance momenta and statistics by the weighted gradients; find the directions.

    `unit` is what the weights amount to in the step, for the statistic's eps.
    """
    rule, layout = moves[0].rule, moves[0].layout
    alone = len(moves) == 1
    gradients = [_dense(move.gradient) for move in moves]
    grad = (gradients[0] if alone else torch.stack(gradients)).to(state_dtype(moves[0].param))
    if not (isinstance(weight, float) and weight == 1):
        grad = grad * weight
    is_needed = rule.statistic is not None  # as it is
    smooth = gathered(_momenta_inplace(moves, grad.clone() if is_needed else grad))
    layout = layout if alone else _layout(f"many {layout}")
    operators = layout.to_operators(smooth)
    if rule.statistic is None:
        ratios: Iterable[Tensor] = map(rule.norm.lmo, operators)
    else:
        ratios = _over_statistics_inplace(
            moves, operators, layout.to_operators(gathered(grad)), unit
        )
    ratios = tuple(ratio.mul_(moves[0].scale(ratio)) for ratio in ratios)
    direction = layout.from_operators(ratios, tuple(smooth.shape))
    if alone:
        moves[0].smooth, moves[0].direction = smooth, direction
        return
    for move, received, found in zip(moves, smooth.unbind(), direction.unbind(), strict=True):
        move.smooth, move.direction = received, found


def apply_inplace(
    moves: Sequence[Move], eta: Tensor | float, noise: Callable[[torch.device], torch.Generator]
) -> None:
    """Move the parameters, and let go of the directions."""
    group, params = moves[0].group, [move.param for move in moves]
    step = group["lr"] * eta
    step = step.reshape(()) if isinstance(step, Tensor) else step
    kept, rate = 1 - step * group["weight_decay"], step * group["multiplier"]
    updates = [sharded_like(move.direction, move.param) for move in moves]
    if is_low(params[0]):
        for move, update in zip(moves, updates, strict=True):
            state, generator = _kept(move), noise(move.param.device)
            write_inplace(move.param, update, rate, kept, group["rounding"], state, generator)
    else:
        if group["weight_decay"]:
            torch._foreach_mul_(params, kept)
        if isinstance(rate, Tensor):
            torch._foreach_sub_(params, [update * rate for update in updates])
        else:
            torch._foreach_add_(params, updates, alpha=-rate)
    for move in moves:
        if move.rows is not None:
            parameter, rows = move.rows
            parameter.index_copy_(0, rows, move.param)
        del move.smooth, move.direction


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def _kept(move: Move) -> dict[str, Tensor]:
    """The momentum of a parameter and what its rounding keeps, both of which start at 0."""
    state, p, group = move.state, move.param, move.group
    kept = {}
    if move.rule.momentum:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = new_momentum(p, group["momentum_dtype"])
        kept["momentum_buffer"] = state["momentum_buffer"]
    if group["rounding"] == "kahan" and is_low(p):
        if "compensation" not in state:
            state["compensation"] = torch.zeros_like(p)
        kept["compensation"] = state["compensation"]
    return kept


def _momenta_inplace(moves: Sequence[Move], grad: Tensor) -> Tensor:
    """Advance the moving averages of gradients; return them, or their Nesterov form.

    `grad` is the gradient of one move, or the stacked ones of several, which are overwritten.
    """
    rule, alone = moves[0].rule, len(moves) == 1
    if not rule.momentum:
        return grad
    grads = [grad] if alone else list(grad.unbind())
    buffers = [_kept(move)["momentum_buffer"] for move in moves]
    smooth = [widened(buffer, grad.dtype) for buffer in buffers]
    torch._foreach_lerp_(smooth, grads, 1 - rule.momentum)
    for buffer, wide in zip(buffers, smooth, strict=True):
        if wide is not buffer:
            buffer.copy_(wide)
    if alone:  # maybe a DTensor, which had no such foreach before torch 2.13
        return grad.lerp(smooth[0], rule.momentum) if rule.nesterov else smooth[0]
    if rule.nesterov:
        torch._foreach_lerp_(grads, smooth, rule.momentum)
    else:
        torch._foreach_copy_(grads, smooth)
    return grad


def _over_statistics_inplace(
    moves: Sequence[Move],
    operators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    unit: Tensor | float,
) -> Iterator[Tensor]:
    """The momentum over the norm's statistic, for each operator."""
    rule = moves[0].rule
    statistic = rule.statistic
    assert statistic is not None
    alone = len(moves) == 1
    steps = _states(
        moves,
        "step",
        [torch.zeros((), dtype=torch.float32, device=gradients[0].device)] * len(moves),
    )
    torch._foreach_add_(steps, 1)
    step = steps[0] if alone else torch.stack(steps)
    for i, (m, g) in enumerate(zip(operators, gradients, strict=True)):
        step = step if alone else step.reshape(-1, *[1] * (m.ndim - 1))
        moments = {}
        for name, moment in rule.norm.moments(g).items():
            states = _states(moves, f"{name}_{i}" if i else name, [moment] if alone else moment)
            whole = states[0] if alone else torch.stack(states)
            moments[name] = statistic.update_inplace(whole, moment, step)
            if not alone:
                torch._foreach_copy_(states, whole.unbind())
        if statistic.bias_correction:  # m's weights sum to 1 - momentum^t, Nesterov's one ahead
            m = m / bias_correction(rule.momentum, step + rule.nesterov)
        yield rule.norm.precondition(m, moments, statistic.eps * unit)


def _states(moves: Sequence[Move], key: str, likes: Iterable[Tensor]) -> list[Tensor]:
    """What the parameters keep under a key, which starts at 0."""
    for move, like in zip(moves, likes, strict=True):
        if key not in move.state:
            move.state[key] = torch.zeros_like(like)
    return [move.state[key] for move in moves]
