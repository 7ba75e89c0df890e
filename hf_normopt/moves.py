"""One step of the parameters: momentum, direction, and the move itself.

Small tensors of one shape and rule move together: their momenta are stacked, and one call of the
LMO serves all. Large ones whose parts do not need each other (the vectors of an embedding, the rows
of a head, entries under the sign, experts) move part by part. So the directions of a step take a
few times [`PART`] entries, or one operator where that is more. All are held where the step size
needs them at once; a parameter is taken whole under a statistic, when it is watched, and where its
layout divides the first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .layouts import Layout
from .orthogonalize import CACHE
from .rules import SCALES, Rule, bias_correction
from .sharding import gathered, sharded_like

SMALL = 2**16  # entries: tensors of one shape up to this size move together, CACHE at a time
PART = 2**18  # entries of a part of a large tensor


@dataclass
class Move:
    """The update of one parameter, or of a part of it, not yet made."""

    param: Tensor
    gradient: Tensor
    group: dict[str, Any]
    rule: Rule
    layout: Layout
    state: dict[str, Any]
    smooth: Tensor = field(init=False)
    direction: Tensor = field(init=False)

    @property
    def grad(self) -> Tensor:
        """The gradient, dense and in the state's dtype."""
        grad = self.gradient.to_dense() if self.gradient.is_sparse else self.gradient
        return grad.to(state_dtype(self.param))

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
        move = Move(p, p.grad, group, rule, Layout(layout), states[p])
        if p.numel() > SMALL or isinstance(p, DTensor) or rule.statistic is not None:
            yield [move]
        else:
            alike.setdefault((layout, p.shape, p.dtype, p.device), []).append(move)
    for moves in alike.values():
        count = max(1, CACHE // moves[0].param.numel())
        yield from (moves[i : i + count] for i in range(0, len(moves), count))


def parts(moves: list[Move]) -> Iterator[list[Move]]:
    """The same in parts along the first stored axis, where they are large and independent."""
    move = moves[0]  # what moves together is small
    p, rule = move.param, move.rule
    plain = not isinstance(p, DTensor) and not move.gradient.is_sparse and rule.statistic is None
    count = max(1, PART * len(p) // p.numel()) if plain and p.numel() > PART else 0
    if not count or move.layout.first not in rule.norm.independent or rule.scale == "muon":
        yield moves  # the scale of Muon asks for the whole shape
        return
    whole = _momentum_buffer(move.state, p) if rule.momentum else None
    for i in range(0, len(p), count):
        at = slice(i, i + count)
        state = {} if whole is None else {"momentum_buffer": whole[at]}
        yield [replace(move, param=p[at], gradient=move.gradient[at], state=state)]


def advance_inplace(moves: Sequence[Move], weight: Tensor | float, unit: Tensor | float) -> None:
    """Advance momenta and statistics by the weighted gradients; find the directions.

    `unit` is what the weights amount to in the step, for the statistic's eps.
    """
    rule, layout = moves[0].rule, moves[0].layout
    grads = [move.grad for move in moves]
    if not (isinstance(weight, float) and weight == 1):
        grads = [grad * weight for grad in grads]
    smooth = _momenta_inplace(rule, grads, [move.state for move in moves])
    if len(moves) == 1:
        (move,), whole = moves, gathered(smooth[0])
        smooth, shape = [whole], tuple(move.param.shape)
    else:
        whole = torch.stack(smooth)
        layout, smooth, shape = Layout(f"many {layout}"), list(whole.unbind()), tuple(whole.shape)
    operators = layout.to_operators(whole)
    if rule.statistic is None:
        ratios: Iterable[Tensor] = map(rule.norm.lmo, operators)
    else:
        ratios = _over_statistic_inplace(moves[0], operators, gathered(grads[0]), unit)
    direction = layout.from_operators(tuple(r * moves[0].scale(r) for r in ratios), shape)
    directions = [direction] if len(moves) == 1 else direction.unbind()
    for move, received, found in zip(moves, smooth, directions, strict=True):
        move.smooth, move.direction = received, found


def apply_inplace(moves: Sequence[Move], eta: Tensor | float) -> None:
    """Move the parameters, and let go of the directions."""
    group, params = moves[0].group, [move.param for move in moves]
    step = group["lr"] * eta
    step = step.reshape(()) if isinstance(step, Tensor) else step
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - step * group["weight_decay"])
    rate = step * group["multiplier"]
    updates = [sharded_like(move.direction, move.param) for move in moves]
    if isinstance(rate, Tensor):
        torch._foreach_sub_(params, [update * rate for update in updates])
    else:
        torch._foreach_add_(params, updates, alpha=-rate)
    for move in moves:
        del move.smooth, move.direction


def state_dtype(p: Tensor) -> torch.dtype:
    """Momenta and statistics are kept in float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def _momenta_inplace(
    rule: Rule, grads: list[Tensor], states: Sequence[dict[str, Any]]
) -> list[Tensor]:
    """Advance the moving averages of gradients; return them, or their Nesterov form."""
    if not rule.momentum:
        return grads
    buffers = [_momentum_buffer(state, g) for state, g in zip(states, grads, strict=True)]
    torch._foreach_lerp_(buffers, grads, 1 - rule.momentum)
    if not rule.nesterov:
        return buffers
    if len(grads) == 1:  # maybe a DTensor, which had no such foreach before torch 2.13
        return [grads[0].lerp(buffers[0], rule.momentum)]
    return list(torch._foreach_lerp(grads, buffers, rule.momentum))


def _momentum_buffer(state: dict[str, Any], like: Tensor) -> Tensor:
    """The moving average, which starts at 0."""
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(like, dtype=state_dtype(like))
    buffer: Tensor = state["momentum_buffer"]
    return buffer


def _over_statistic_inplace(
    move: Move, operators: tuple[Tensor, ...], grad: Tensor, unit: Tensor | float
) -> Iterator[Tensor]:
    """The momentum over the norm's statistic, for each operator."""
    rule, state = move.rule, move.state
    statistic = rule.statistic
    assert statistic is not None
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=grad.device)
    step = state["step"].add_(1)
    for i, (m, g) in enumerate(zip(operators, move.layout.to_operators(grad), strict=True)):
        moments = {}
        for name, moment in rule.norm.moments(g).items():
            key = f"{name}_{i}" if i else name
            if key not in state:
                state[key] = torch.zeros_like(moment)
            moments[name] = statistic.update_inplace(state[key], moment, step)
        if statistic.bias_correction:  # m's weights sum to 1 - momentum^t, Nesterov's one ahead
            m = m / bias_correction(rule.momentum, step + rule.nesterov)
        yield rule.norm.precondition(m, moments, statistic.eps * unit)
