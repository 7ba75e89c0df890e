"""The step of a product: two parameters that make up one operator move together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..norms.product import Pair, Product
from .moves import Move, apply_inplace, kept, smooth_inplace
from .precision import is_low, state_dtype, widened, write_inplace
from .rules import SCALES
from .sharding import gathered, local, sharded_like

PERIOD = 20
"""Steps from one balancing of the factors to the next."""


class ProductMove(Move):
    """The update of a product s B A, or of several of one shape; not yet made.

    A factor without gradients stays, and the other moves as if both did.

    Attributes:
        a: the move of A, or of several, stacked.
        b: likewise.
        scales: s of each product.
    """

    def __init__(self, a: Move, b: Move, scales: Sequence[float]) -> None:
        super().__init__(
            [*a.params, *b.params],
            [*a.gradients, *b.gradients],
            [*a.states, *b.states],
            a.group,
            a.rule,
            a.layout,
            names=[*a.names, *b.names],
            sums=a.sums,
        )
        self.a, self.b, self.scales = a, b, scales

    @property
    def moving(self) -> list[Move]:
        """The moves of the factors that have gradients."""
        return [factor for factor in (self.a, self.b) if factor.gradients]

    def each(self) -> Iterator[Move]:
        """The moves of the factors, one by one."""
        sides = ((self.a, self.b), (self.b, self.a))
        for factor, other in sides:
            for i, scale in enumerate(self.scales if factor.gradients else ()):
                yield FactorMove(factor.single(i), other.single(i), scale, is_a=factor is self.a)

    def whole_operators(self) -> Iterator[Move]:
        """The moves of single products, see [`Move`]."""
        for i, scale in enumerate(self.scales):
            a, b = (factor.single(i).of_whole() for factor in (self.a, self.b))
            yield ProductMove(a, b, [scale])

    @property
    def norm(self) -> Product:
        """The rule's, of products."""
        assert isinstance(self.rule.norm, Product)
        return self.rule.norm

    def advance_inplace(self, weight: Tensor | float, unit: Tensor | float) -> None:
        """Advance the momenta, balance the factors now and then, and find the directions."""
        smooth = [
            gathered(smooth_inplace(factor, weight)[0])
            if factor.gradients
            else torch.zeros_like(_stacked(factor), dtype=state_dtype(factor.param))
            for factor in (self.a, self.b)
        ]
        pair = self.pair(*smooth)
        is_due = self.group["steps"] % PERIOD == 0 and not any(map(_has_samples, self.moving))
        if len(self.moving) == 2 and is_due:
            pair = self._balanced_inplace(pair)
        reach = self.group["lr"] * self.group["multiplier"] * unit
        directions = self.norm.factor_lmos(pair, self.size(pair), reach)
        found = zip((self.a, self.b), (pair.m_a, pair.m_b), directions, smooth, strict=True)
        for factor, momentum, direction, like in found:
            layout, shape = factor.stacked_layout, tuple(like.shape)
            factor.smooth = layout.from_operators((momentum.to(like.dtype),), shape)
            factor.direction = layout.from_operators((direction.to(like.dtype),), shape)

    def apply_inplace(self, eta: Tensor | float, steps: int) -> None:
        """Move both factors."""
        for factor in self.moving:
            apply_inplace(factor, eta, steps)

    def pair(self, m_a: Tensor, m_b: Tensor) -> Pair:
        """The factors, and their smoothed gradients (stored as the factors are), as matrices."""
        a, b = (_stacked(factor) for factor in (self.a, self.b))
        operators = [
            factor.stacked_layout.to_operators(tensor)[0]
            for factor, tensor in ((self.a, a), (self.b, b), (self.a, m_a), (self.b, m_b))
        ]
        like = operators[2]
        is_one = len(set(self.scales)) == 1  # then no number travels to the device
        scale = like.new_full((1,), self.scales[0]) if is_one else like.new_tensor(self.scales)
        scale = scale.reshape(-1, *[1] * (like.ndim - 1))
        return Pair(operators[0], operators[1], scale, operators[2], operators[3])

    def size(self, pair: Pair) -> float:
        """The norm of the product's change at rate 1."""
        fan_out, fan_in = pair.b.shape[-2], pair.a.shape[-1]
        norm = self.norm.of_rank(pair.a.shape[-2])
        return SCALES[self.rule.scale](norm, fan_out, fan_in, 1)

    def _balanced_inplace(self, pair: Pair) -> Pair:
        """Change the factors and their momenta so that the product stays and A is well conditioned.

        Nothing is written where they are well conditioned.
        """
        r, inverse = self.norm.balance(pair)
        if r.is_cpu and not (r != torch.eye(r.shape[-1], dtype=r.dtype)).any():
            return pair
        balanced = pair.balanced(r, inverse)  # before what it is made of changes in place
        sides = ((self.a, (r, None), (inverse.mT, None)), (self.b, (None, inverse), (None, r.mT)))
        for factor, of_factor, of_gradient in sides:
            for i, p in enumerate(factor.params):
                one, dual = (
                    [x if x is None or factor.alone else x[i] for x in side]
                    for side in (of_factor, of_gradient)
                )
                _turn_inplace(factor, i, p, *one)
                gradient = _turned(factor, factor.gradients[i], *dual).to(state_dtype(p))
                factor.gradients[i] = sharded_like(gradient, p)
                for key, turn in (
                    ("momentum_buffer", dual),
                    ("gradient_sum", dual),
                    ("anchor", one),
                ):
                    if (value := factor.states[i].get(key)) is not None:
                        wide = _turned(factor, widened(value, state_dtype(p)), *turn)
                        value.copy_(sharded_like(wide.to(state_dtype(p)), value))
        return balanced


class FactorMove(Move):
    """The move of one factor of a product, as step sizes see it: its part in the product's.

    Args:
        move: of the factor.
        other: of the other one.
        scale: s of the product.
        is_a: whether the factor is A.
    """

    def __init__(self, move: Move, other: Move, scale: float, is_a: bool) -> None:
        vars(self).update(vars(move))
        self.other, self.is_a, self.of_product = other, is_a, scale

    def way_inplace(self, stride: int, follows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the product, see [`Move`]: s ⟨G, B₀ A₀ - B A⟩ as a sum over the factors.

        From B₀ = 0 it is B's part: A's would count s ⟨G, B (A₀ - A)⟩ twice.
        """
        inner, grads, ways = super().way_inplace(stride, follows)
        start = self.other.state.get("anchor")
        if not follows and start is not None:
            inner = inner * local(start).any()
        return inner, grads, ways

    def dual(self, tensor: Tensor | None = None) -> Tensor:
        """The factor's part in the product's dual norm, see [`Move`]."""
        if tensor is None:
            return super().dual()
        nothing = torch.zeros_like(gathered(self.other.param), dtype=tensor.dtype)
        if self.is_a:
            whole = ProductMove(self, self.other, [self.of_product])
            pair = whole.pair(tensor, nothing)
        else:
            whole = ProductMove(self.other, self, [self.of_product])
            pair = whole.pair(nothing, tensor)
        duals = whole.norm.factor_duals(pair)
        return duals.sum() * whole.size(pair) * self.group["multiplier"]


def _has_samples(factor: Move) -> bool:
    """Whether only some entries are kept of where a factor started, which cannot be balanced."""
    states = zip(factor.params, factor.states, strict=True)
    return any("anchor" in state and state["anchor"].shape != p.shape for p, state in states)


def _stacked(factor: Move) -> Tensor:
    if factor.alone:
        return gathered(factor.param)
    return torch.stack(factor.params)


def _turned(factor: Move, stored: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """A stored tensor whose operators are multiplied from one side, in float64."""
    whole = gathered(stored).double()
    (operator,) = factor.layout.to_operators(whole)
    turned = operator if left is None else left @ operator
    turned = turned if right is None else turned @ right
    return factor.layout.from_operators((turned,), tuple(whole.shape))


def _turn_inplace(
    factor: Move, i: int, p: Tensor, left: Tensor | None, right: Tensor | None
) -> None:
    turned = sharded_like(_turned(factor, p, left, right), p)
    if is_low(p):
        update = (p.to(turned.dtype) - turned).float()
        rounding = factor.group["rounding"]
        rounding = "nearest" if rounding == "stochastic" else rounding
        write_inplace(p, update, 1.0, 1.0, rounding, kept(factor, i), None)
    else:
        p.copy_(turned)
