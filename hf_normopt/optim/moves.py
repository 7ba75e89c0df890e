"""One step of the parameters: momentum, direction, and the move itself.

Momenta are kept in the group's `momentum_dtype`, and weights in 16 bits are written as its
`rounding` says; all arithmetic is in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..norms.layouts import Layout
from ..norms.operators import Spectral
from .precision import (
    entry_noise,
    is_low,
    new_compensation,
    new_momentum,
    state_dtype,
    widened,
    write_inplace,
)
from .rules import SCALES, Rule, bias_correction
from .sharding import (
    copies_of,
    divided_among,
    gathered,
    local,
    number_of_parts,
    placed_like,
    places,
    sharded_axes,
    sharded_like,
)
from .zero import Partition

_layout = cache(Layout)


@dataclass
class Move:
    """The update of a parameter, of a part of one, or of several of one shape; not yet made.

    `smooth` and `direction` of several are stacked.
    """

    params: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    group: dict[str, Any]
    rule: Rule
    layout: Layout  # of one
    rows: tuple[Tensor, Tensor] | None = None  # the param is a copy of these rows of a parameter
    copies: ProcessGroup | None = None  # ranks that hold the same, and may share the work
    shards: tuple[ProcessGroup, ...] = ()  # ranks that hold the other shards, if it is of a shard
    names: list[str] = field(default_factory=list)
    whole: Tensor | None = None  # the parameter, if the param is a shard of it or some of its rows
    at: slice = field(default_factory=lambda: slice(None))  # which rows of the shard
    partition: Partition | None = None  # if the param is one of ZeRO's
    sums: dict[torch.device, Tensor] = field(default_factory=dict)  # see `note_inplace`
    factors: int = 1  # parameters that make up one operator, each of which decays by a root
    smooth: Tensor = field(init=False)
    direction: Tensor = field(init=False)

    @property
    def alone(self) -> bool:
        """Whether it is the move of one parameter."""
        return len(self.params) == 1

    @property
    def stacked_layout(self) -> Layout:
        """How `smooth` and `direction` are read."""
        return self.layout if self.alone else _layout(f"many {self.layout}")

    def each(self) -> Iterator[Move]:
        """The moves of single parameters, which have `param`, `state` and `grad`."""
        for i in range(len(self.params)):
            yield self.single(i)

    def single(self, i: int) -> Move:
        """The move of the i-th parameter."""
        if self.alone:
            return self
        rows = slice(i, i + 1)
        one = replace(
            self,
            params=self.params[rows],
            gradients=self.gradients[rows],
            states=self.states[rows],
            names=self.names[rows],
        )
        if hasattr(self, "smooth"):
            one.smooth, one.direction = self.smooth[i], self.direction[i]
        return one

    def whole_operators(self) -> Iterator[Move]:
        """The moves of whole operators, for who looks on: all ranks gather them, whoever looks."""
        return (one.of_whole() for one in self.each())

    def advance_inplace(self, weight: Tensor | float, unit: Tensor | float) -> None:
        """Advance the momenta and find the directions, see [`advance_inplace`]."""
        advance_inplace(self, weight, unit)

    def apply_inplace(self, eta: Tensor | float, steps: int) -> None:
        """Move the parameters, see [`apply_inplace`]."""
        apply_inplace(self, eta, steps)

    def of_whole(self) -> Move:
        """The same for who looks on: all ranks gather the parameter, whoever looks."""
        if not isinstance(self.param, DTensor):
            return self
        whole = replace(
            self, params=[gathered(self.param)], gradients=[gathered(self.gradients[0])]
        )
        whole.smooth, whole.direction = self.smooth, self.direction
        return whole

    def of_shard(self) -> Move:
        """The move of what this rank holds of a parameter."""
        state = {key: local(value) for key, value in (kept(self, 0) | kept_of_rows(self)).items()}
        return replace(
            self,
            params=[local(self.param)],
            gradients=[local(self.gradients[0])],
            states=[state],
            copies=copies_of(self.param),
            shards=divided_among(self.param),
            whole=self.param,
        )

    @property
    def param(self) -> Tensor:
        """The parameter."""
        return self.params[0]

    @property
    def state(self) -> dict[str, Any]:
        """What is kept for the parameter."""
        return self.states[0]

    @property
    def grad(self) -> Tensor:
        """The gradient, dense, finite, and in the dtype of the arithmetic."""
        gradient = _dense(self.gradients[0]).to(state_dtype(self.param))
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    def way_inplace(self, stride: int, follows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """⟨g, w_0 - w⟩ and the squares of g and w_0 - w, over the entries that this rank holds.

        What moves as a product measures these of the product.

        Args:
            stride: keep every stride-th entry of w_0 only, and estimate all three from these.
            follows: let w be the w_0 of the next call; else it is that of the first.
        """
        grad = self.grad
        now = _every(self.param, stride).to(grad.dtype)
        if "anchor" not in self.state:
            self.state["anchor"] = now.clone()
        way = self.state["anchor"] - now
        if follows:
            self.state["anchor"].copy_(now)
        grad = _every(grad, stride)
        ranks = 1 if stride == 1 else number_of_parts(self.param)  # that have the same sum
        pairs = ((grad, way), (grad, grad), (way, way))
        inner, grads, ways = (stride / ranks * (local(a) * local(b)).sum() for a, b in pairs)
        return inner, grads, ways

    def dual(self, tensor: Tensor | None = None) -> Tensor:
        """Scale · multiplier · dual norm: a part of the network's dual norm (Prop. 7)."""
        if tensor is None:  # what the direction was made of: ⟨M, lmo(M)⟩
            return (self.smooth * self.direction).sum() * self.group["multiplier"]
        if not tensor.numel():  # a shard of no rows
            return tensor.new_zeros(())
        if self.rule.entrywise:
            return self.dual_of(tensor.reshape(1, -1))
        return torch.stack([self.dual_of(o) for o in self.layout.to_operators(tensor)]).sum()

    def dual_of(self, operators: Tensor) -> Tensor:
        """The same of operators (..., fan_out, fan_in) in place of a whole tensor.

        A nuclear norm is what the LMO reaches of it, 0.97 at least: singular values cost ten times
        as much.
        """
        norm = self.rule.norm
        if isinstance(norm, Spectral):
            duals = (operators * norm.lmo(operators)).sum((-2, -1))
        else:
            duals = norm.dual_norm(operators)
        return duals.sum() * self.scale(operators.shape) * self.group["multiplier"]

    def scale(self, shape: Sequence[int]) -> float:
        """What multiplies the LMO of an operator (..., fan_out, fan_in)."""
        fan_out, fan_in = shape[-2:]
        return SCALES[self.rule.scale](self.rule.norm, fan_out, fan_in, self.layout.taps)


def advance_inplace(move: Move, weight: Tensor | float, unit: Tensor | float) -> None:
    """Advance momenta and statistics by the weighted gradients; find the directions.

    `unit` is what the weights amount to in the step, for the statistic's eps.
    """
    rule, layout = move.rule, move.stacked_layout
    if isinstance(move.param, DTensor) and (rule.entrywise or smooths_own_rows(move)):
        shard = move.of_shard()
        advance_inplace(shard, weight, unit)
        move.smooth = gathered(placed_like(shard.smooth, move.param))
        move.direction = gathered(placed_like(shard.direction, move.param))
        return
    smooth, grad = smooth_inplace(move, weight)
    move.smooth = gathered(smooth)
    if not move.smooth.numel() and rule.statistic is None:  # norms take no maximum of nothing
        move.direction = torch.empty_like(move.smooth)
        return
    if rule.entrywise and rule.statistic is None:
        row = move.smooth.reshape(1, -1)
        move.direction = rule.norm.lmo(row, move.scale((1, 1))).reshape(move.smooth.shape)
        return
    if rule.entrywise:
        (ratio,) = _over_statistics_inplace(move, [move.smooth], [gathered(grad)], unit)
        move.direction = ratio.mul_(move.scale((1, 1)))
        return
    operators = layout.to_operators(move.smooth)
    if rule.statistic is None:
        found = [rule.norm.lmo(operator, move.scale(operator.shape)) for operator in operators]
    else:
        received = layout.to_operators(gathered(grad))
        ratios = _over_statistics_inplace(move, operators, received, unit)
        found = [ratio.mul_(move.scale(ratio.shape)) for ratio in ratios]
    move.direction = layout.from_operators(tuple(found), tuple(move.smooth.shape))


def smooth_inplace(move: Move, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """Advance the momenta; return what the norm receives, and the weighted gradient.

    Entries of the gradient that are NaN or infinite count as 0, and are noted.
    """
    gradients = [_dense(gradient) for gradient in move.gradients]
    grad = (gradients[0] if move.alone else torch.stack(gradients)).to(state_dtype(move.param))
    is_finite = note_inplace(move.sums, grad)
    if not (isinstance(weight, float) and weight == 1):
        grad = grad * weight
    if not is_finite:
        is_own = grad is not gradients[0]
        grad = (torch.nan_to_num_ if is_own else torch.nan_to_num)(grad, 0.0, 0.0, 0.0)
    is_overwritten = move.rule.statistic is not None and not move.alone  # and needed as it is
    return _momenta_inplace(move, grad.clone() if is_overwritten else grad), grad


def note_inplace(sums: dict[torch.device, Tensor], grad: Tensor) -> bool:
    """Note for each device whether a gradient had an entry that is NaN or infinite.

    The note is 0 times the sum of all gradients: NaN if there was one. It stays where it is, as a
    CUDA graph needs it.

    Returns:
        Whether this one is known to be finite: only CPUs are asked, which nobody has to wait for.
    """
    total = local(grad).sum()
    if total.device not in sums:
        sums[total.device] = torch.zeros((), dtype=torch.float32, device=total.device)
    sums[total.device].add_(total, alpha=0)
    return total.is_cpu and math.isfinite(total)


def apply_inplace(move: Move, eta: Tensor | float, steps: int) -> None:
    """Move the parameters, and let go of the directions; `steps` is the number of this step."""
    group, params = move.group, move.params
    step = group["lr"] * eta
    step = step.reshape(()) if isinstance(step, Tensor) else step
    decay = group["weight_decay"]
    keep = (1 - step * decay) ** (1 / move.factors) if decay else 1.0
    rate = step * group["multiplier"]
    if move.factors > 1:
        rate = rate / keep  # the other factor has decayed too
    direction = sharded_like(move.direction, move.param) if move.alone else move.direction
    vars(move).pop("smooth", None)
    del move.direction
    if is_low(params[0]):
        for i, p in enumerate(params):
            update = direction if move.alone else direction[i]
            state = kept(move, i)
            noise = _noise(move, i, steps) if group["rounding"] == "stochastic" else None
            write_inplace(p, update, rate, keep, group["rounding"], state, noise)
    elif decay and not isinstance(step, Tensor) and step:
        # A weighted mean of a parameter and a goal, in one pass
        share = step * decay
        if move.factors > 1:
            share = -math.expm1(math.log1p(-share) / move.factors)  # 1 - keep, to its last digits
        goals = direction.mul_(-rate / share)
        torch._foreach_lerp_(params, [goals] if move.alone else goals.unbind(), share)
    else:
        if decay:
            torch._foreach_mul_(params, keep)
        updates = direction.mul_(rate)
        torch._foreach_sub_(params, [updates] if move.alone else updates.unbind())
    if move.rows is not None:
        parameter, rows = move.rows
        parameter.index_copy_(0, rows, move.param)


def _noise(move: Move, i: int, steps: int) -> Tensor:
    """What rounding adds to the i-th parameter; each entry's own, whoever else holds it."""
    whole = move.params[i] if move.whole is None else move.whole
    axes = places(whole)
    if axes:
        axes[0] = axes[0][move.at]
    return entry_noise(f"{steps} {move.names[i]}", axes, whole.shape)


def _every(tensor: Tensor, stride: int) -> Tensor:
    return tensor if stride == 1 else gathered(tensor).flatten()[::stride]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def kept(move: Move, i: int) -> dict[str, Tensor]:
    """The i-th parameter's momentum, what its rounding keeps, and Adam's statistic; 0 at first."""
    state, p, group = move.states[i], move.params[i], move.group
    own = {}
    if move.rule.momentum:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = new_momentum(p, group["momentum_dtype"])
        own["momentum_buffer"] = state["momentum_buffer"]
    if group["rounding"] == "kahan" and is_low(p):
        if "compensation" not in state:
            state["compensation"] = new_compensation(p)
        own["compensation"] = state["compensation"]
    if move.rule.entrywise and move.rule.statistic is not None:
        if "second_moment" not in state:
            state["second_moment"] = torch.zeros_like(p, dtype=state_dtype(p))
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        own |= {"second_moment": state["second_moment"], "step": state["step"]}
    return own


def kept_of_rows(move: Move, i: int = 0) -> dict[str, Tensor]:
    """What the i-th parameter's rows smooth, (rows, 1), and its steps; 0 at first.

    {} if its rows smooth nothing.
    """
    p, state = move.params[i], move.states[i]
    if not move.rule.smooths_rows(move.layout, p.shape):
        return {}
    if "second_moment" not in state:
        is_sharded = smooths_own_rows(move)  # as the rows are; else all ranks have all of them
        rows = len(local(p)) if is_sharded else len(p)
        own = torch.zeros(rows, 1, dtype=state_dtype(p), device=p.device)
        state["second_moment"] = placed_like(own, p, (len(p), 1)) if is_sharded else own
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
    return {"second_moment": state["second_moment"], "step": state["step"]}


def smooths_own_rows(move: Move) -> bool:
    """Whether a shard's rows have their statistic to themselves, and are sharded alone."""
    p = move.param
    if not isinstance(p, DTensor) or not move.rule.smooths_rows(move.layout, p.shape):
        return False
    axes = sharded_axes(p)
    return axes is not None and set(axes) <= {0}


def _momenta_inplace(move: Move, grad: Tensor) -> Tensor:
    """Advance the moving averages of gradients; return them, or their Nesterov form.

    `grad` is the gradient of one parameter, or the stacked ones of several, which are overwritten.
    """
    rule = move.rule
    if not rule.momentum:
        return grad
    grads = [grad] if move.alone else list(grad.unbind())
    buffers = [kept(move, i)["momentum_buffer"] for i in range(len(grads))]
    is_wide = move.group["momentum_dtype"] == "float32"
    smooth = buffers if is_wide else [widened(buffer, grad.dtype) for buffer in buffers]
    torch._foreach_lerp_(smooth, grads, 1 - rule.momentum)
    if not is_wide:
        for buffer, wide in zip(buffers, smooth, strict=True):
            buffer.copy_(wide)
    if move.alone:  # maybe a DTensor, which had no such foreach before torch 2.13
        return grad.lerp(smooth[0], rule.momentum) if rule.nesterov else smooth[0]
    if rule.nesterov:
        torch._foreach_lerp_(grads, smooth, rule.momentum)
    else:
        torch._foreach_copy_(grads, smooth)
    return grad


def _over_statistics_inplace(
    move: Move,
    operators: Sequence[Tensor],
    gradients: Sequence[Tensor],
    unit: Tensor | float,
) -> Iterator[Tensor]:
    """The momentum over the norm's statistic, for each operator."""
    rule, alone = move.rule, move.alone
    statistic = rule.statistic
    assert statistic is not None
    for i in range(len(move.params)):
        kept_of_rows(move, i)
    zero = torch.zeros((), dtype=torch.float32, device=gradients[0].device)
    steps = _states(move, "step", [zero] * len(move.params))
    torch._foreach_add_(steps, 1)
    step = steps[0] if alone else torch.stack(steps)
    for i, (m, g) in enumerate(zip(operators, gradients, strict=True)):
        step = step if alone else step.reshape(-1, *[1] * (m.ndim - 1))
        moments = {}
        for name, moment in rule.norm.moments(g).items():
            states = _states(move, f"{name}_{i}" if i else name, [moment] if alone else moment)
            whole = states[0] if alone else torch.stack(states)
            moments[name] = statistic.update_inplace(whole, moment, step)
            if not alone:
                torch._foreach_copy_(states, whole.unbind())
        yield over_moments(rule, m, moments, step, unit)


def over_moments(
    rule: Rule, m: Tensor, moments: dict[str, Tensor], step: Tensor, unit: Tensor | float
) -> Tensor:
    """An operator's momentum over the norm's smoothed moments, both as they are at a step."""
    assert rule.statistic is not None
    if rule.statistic.bias_correction:  # m's weights sum to 1 - momentum^t, Nesterov's one ahead
        m = m / bias_correction(rule.momentum, step + rule.nesterov)
    return rule.norm.precondition(m, moments, rule.statistic.eps * unit)


def _states(move: Move, key: str, likes: Iterable[Tensor]) -> list[Tensor]:
    """What the parameters keep under a key, in the shapes of `likes`; it starts at 0."""
    found = []
    for state, like in zip(move.states, likes, strict=True):
        if key not in state:
            state[key] = torch.zeros_like(like)
        found.append(state[key].view(like.shape))  # moments of rows have other shapes in shards
    return found
