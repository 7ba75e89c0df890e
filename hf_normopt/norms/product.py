"""Norms of a product W = s B A, by steps of its factors.

A low-rank adapter adds s B A to a weight, with A (r x n), B (m x r) and a scale s. What plays a
role in the network is the product, so the norm is that of its change, to first order

    D = s (D_B A + B D_A).

Such D are the matrices that have no part outside of both the columns of B and the rows of A. Let
F_A, F_B be roots, F_A F_Aᵀ = (A Aᵀ)⁻¹ and F_B F_Bᵀ = (BᵀB)⁻¹, so that Q_A = AᵀF_A and Q_B = B F_B
are orthonormal. In the bases of Q_A and of what the momentum M_A has besides, and of Q_B and of
what M_B has besides, the momentum of W is

    C = [ C_11  C_12 ]        C_11 = F_Bᵀ (M_A Aᵀ + BᵀM_B) F_A / 2,
        [ C_21   0   ]        C_12 C_12ᵀ = F_Bᵀ M_A (1 - Q_A Q_Aᵀ) M_Aᵀ F_B,   C_21 likewise.

The LMO of the spectral norm would be polar(C), which has a fourth block. Without that block its
norm is between 1 and 2/√3, so the direction is √3/2 of the other three: its norm is at most what
was asked for, and at least 0.86 of it. It decreases the loss, to first order, by 0.9 times and more
of what is possible, where steps of D_B and D_A by a half each reach 0.7 (one iteration of the
tangent LMO, LoRA-TSD, arXiv 2609.02734; the halves are LoRA-Muon's, Cesista et al. 2026, arXiv
2606.12921). Nothing depends on how W is divided into factors: under A → R A, B → B R⁻¹ the step of
W stays as it is.

Two things are needed to be safe:

* **Guard.** Where B = 0, as at the start, F_B has no bound: the second step would replace A, at any
  learning rate. S_B + δ² S_A⁻¹ takes the place of S_B = BᵀB, with S_A = A Aᵀ and δ = η / s ρ for a
  step of length η. So A moves by ρ at the most, relative to itself, and where s B A is longer than
  η / ρ nothing changes. It transforms as S_B does.
* **Gauge.** What the step does not depend on, it does not control: A and B would become ever worse
  conditioned while B A stays as it is. `balance` finds the R that makes the rows of A orthogonal,
  and of the length that PEFT gives them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .operators import MaxColumn, Norm, Spectral, Vector
from .operators import parse_norm as parse_plain
from .orthogonalize import orthogonalize, over_length

GUARD = 0.05
"""ρ: how far a factor moves at the most in one step, relative to itself.

Momenta are kept in the coordinates of the factors, so that a factor should not become another one
within their memory: 1 - momentum. On a regression with a target of rank 2, r = 12 and momentum
0.95, the loss after 240 steps was 5e-1, 4e-2, 1e-4 and 4e-4 for ρ = 0.2, 0.1, 0.05 and 0.02.
"""

WORST = 10.0
"""The condition of A Aᵀ from which `balance` acts."""

LENGTH = 3**-0.5
"""Of the balanced rows: that of PEFT's initial A."""

_SHARE = 3**0.5 / 2  # of the length: three blocks of a polar factor have a norm of 2 / √3 at most
_NOISE = 1e-6  # singular values below this fraction of the largest are rounding, in float64
_LEAST_PIVOT = 1e-11  # of A Aᵀ with a unit diagonal; below it rows are taken for dependent
_ENOUGH = 1e-3  # the least pivot for which products in float32 have digits enough
_ROUNDING = 2.5e-7  # of such products, relative to the lengths of their rows
_SUMMED = 1024  # entries that are summed in float32; float64 sums the rest


@dataclass(frozen=True)
class Pair:
    """The factors of a product s B A, or a batch of them, and their smoothed gradients.

    Attributes:
        a: (..., r, n).
        b: (..., m, r).
        scale: s, (..., 1, 1).
        m_a: of a's shape.
        m_b: of b's shape.
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    m_a: Tensor
    m_b: Tensor

    def balanced(self, r: Tensor, inverse: Tensor) -> Pair:
        """The same product and the same gradient of it, with R A and B R⁻¹ for factors."""
        r, inverse = r.to(self.m_a.dtype), inverse.to(self.m_a.dtype)
        a, b = r @ self.a.to(r.dtype), self.b.to(r.dtype) @ inverse
        return Pair(a, b, self.scale, inverse.mT @ self.m_a, self.m_b @ r.mT)


class Product(Norm):
    """The norm of an operator that is a product of two factors, which are stepped together."""

    independent: ClassVar[tuple[str, ...]] = ()

    def factor_lmos(self, pair: Pair, size: float, reach: Tensor | float) -> tuple[Tensor, Tensor]:
        """D_A and D_B; 0 for a factor without gradient.

        Args:
            pair: the factors.
            size: the norm of the product's change, to first order and at the most.
            reach: by what the step will multiply it, for the guard.
        """
        raise NotImplementedError

    def of_rank(self, rank: int) -> Product:
        """The norm of products of one rank, on which the size of their entries may depend."""
        return self

    def factor_duals(self, pair: Pair) -> Tensor:
        """⟨m_A, D_A⟩ + ⟨m_B, D_B⟩ for size 1 and no guard, (...)."""
        d_a, d_b = self.factor_lmos(pair, 1.0, 0.0)
        return (pair.m_a * d_a).sum((-2, -1)) + (pair.m_b * d_b).sum((-2, -1))

    def balance(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """R and R⁻¹, (..., r, r) in float64, by which the factors are to be balanced."""
        return _balance(pair.a)

    def norm_of_product(self, pair: Pair) -> Tensor:
        """‖s B A‖, (...)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SpectralProduct(Spectral, Product):
    """The spectral norm of a product: see this module's docstring.

    Args:
        rank: r, on which the size of entries depends; None: any. No part of its name.
    """

    rank: int | None = None

    independent = ()

    def __str__(self) -> str:
        return f"product {super().__str__()}"

    def of_rank(self, rank: int) -> Product:
        """See [`Product`]."""
        return replace(self, rank=rank)

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        ranks = min(self.rank or fan_out, fan_out, fan_in)
        return math.sqrt(ranks / (fan_out * fan_in))

    def factor_lmos(self, pair: Pair, size: float, reach: Tensor | float) -> tuple[Tensor, Tensor]:
        """D_A and D_B, see [`Product`], as sums of the factors and their momenta."""
        step = _SHARE * size / self.unit(pair.b.shape[-2], pair.a.shape[-1]) / pair.scale.double()
        has_guard = isinstance(reach, Tensor) or reach > 0
        grams = _grams_with_roots(pair, (reach * step / GUARD).square() if has_guard else None)
        root_a, root_b = grams.root_a, grams.root_b
        from_a = root_b.mT @ grams.cross_a @ root_a  # C_11, as M_A knows it
        from_b = root_b.mT @ grams.cross_b @ root_a  # and as M_B does
        whole_a, whole_b = root_b.mT @ grams.m_a @ root_b, root_a.mT @ grams.m_b @ root_a
        c_12 = _besides(whole_a, from_a @ from_a.mT, grams.noise)
        c_21 = _besides(whole_b, from_b.mT @ from_b, grams.noise).mT
        low = pair.m_a.dtype
        p_11, p_12, p_21 = _polar_blocks((from_a + from_b) / 2, c_12, c_21, self.method, low)
        of_a = torch.linalg.solve_triangular(c_12, p_12, upper=False, left=False)
        of_b = torch.linalg.solve_triangular(c_21, p_21, upper=True)
        left, right = root_b * step, (root_a * step).mT
        along_a = left @ (p_11 / 2 - of_a @ from_a) @ root_a.mT
        along_b = root_b @ (p_11 / 2 - from_b @ of_b) @ right
        besides_a, besides_b = left @ of_a @ root_b.mT, root_a @ of_b @ right
        return (
            _sum_of_products(along_a.to(low), pair.a.to(low), besides_a.to(low), pair.m_a),
            _sum_of_products(pair.b.to(low), along_b.to(low), pair.m_b, besides_b.to(low)),
        )

    def norm_of_product(self, pair: Pair) -> Tensor:
        """‖s B A‖ by eigenvalues of r x r matrices."""
        values = torch.linalg.eigvals(_gram(pair.b.mT) @ _gram(pair.a)).abs().amax(-1).sqrt()
        unit = self.unit(pair.b.shape[-2], pair.a.shape[-1])
        return values * pair.scale[..., 0, 0].abs() * unit


@dataclass(frozen=True, kw_only=True)
class ColumnProduct(MaxColumn, Product):
    """The largest column of a product, for a table of vectors that are looked up: a column a token.

    The half of A has a closed form, column by column: s B D_A has columns of one length. For that
    of B the spectral norm bounds the columns: ‖s D_B a‖ <= ‖s D_B S_A^(1/2)‖ ‖S_A^(-1/2) a‖, whose
    last factor is at most 1 and measured. A starts at 0 here, so the guard is on B's half.
    """

    output: Vector = "rms"

    independent: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return f"product {super().__str__()}"

    def factor_lmos(self, pair: Pair, size: float, reach: Tensor | float) -> tuple[Tensor, Tensor]:
        """D_A and D_B, see [`Product`]."""
        half = size / self.unit(pair.b.shape[-2], pair.a.shape[-1]) / 2
        root_b = _inverse_root(pair.b.mT)
        delta = reach * half / (pair.scale.double() * GUARD)
        guard = delta.square() * (root_b @ root_b.mT)
        longest = _longest(_inverse_root(pair.a, guard), pair.a)
        root_a = _inverse_root(pair.a, guard / torch.where(longest > 0, longest, 1).square())
        step = half / pair.scale
        reach = step / torch.where(longest > 0, longest, torch.inf)
        root_a, root_b = root_a.to(pair.m_b.dtype), root_b.to(pair.m_a.dtype)
        d_a = (root_b * step) @ over_length(root_b.mT @ pair.m_a, -2)
        return d_a, _polar(pair.m_b @ root_a) @ (root_a * reach.to(root_a.dtype)).mT

    def balance(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """R and R⁻¹ that make the columns of B orthogonal."""
        r, inverse = _balance(pair.b.mT)
        return inverse.mT, r.mT

    def norm_of_product(self, pair: Pair) -> Tensor:
        """The length of the longest column of s B A, over √m."""
        lengths = ((_gram(pair.b.mT) @ pair.a.double()) * pair.a).sum(-2).clamp_min(0).sqrt()
        unit = self.unit(pair.b.shape[-2], pair.a.shape[-1])
        return lengths.amax(-1) * pair.scale[..., 0, 0].abs() * unit


@dataclass(frozen=True)
class _Grams:
    """The r x r matrices of which a step is made, in float64.

    Attributes:
        cross_a: M_A Aᵀ.
        cross_b: BᵀM_B.
        m_a: M_A M_Aᵀ.
        m_b: M_BᵀM_B.
        root_a: F_A.
        root_b: F_B, of the guarded S_B.
        noise: the rounding of what a momentum has besides, squared and relative, (..., 1, 1).
    """

    cross_a: Tensor
    cross_b: Tensor
    m_a: Tensor
    m_b: Tensor
    root_a: Tensor
    root_b: Tensor
    noise: Tensor | float


def _grams_with_roots(pair: Pair, guard: Tensor | None) -> _Grams:
    """The matrices for a guard δ²: by products in float32 where these have digits enough.

    Only CPUs are asked whether they have. Others may compute float32 in TF32, which has not.
    """
    kinds = {x.dtype for x in (pair.a, pair.b, pair.m_a, pair.m_b)}
    is_full = pair.a.shape[-2] <= min(pair.a.shape[-1], pair.b.shape[-2])
    if pair.a.is_cpu and kinds == {torch.float32} and is_full:
        grams, pivots = _grams_in(torch.float32, pair, guard)
        if bool((pivots > _ENOUGH).all()):
            return grams
    return _grams_in(torch.float64, pair, guard)[0]


def _grams_in(dtype: torch.dtype, pair: Pair, guard: Tensor | None) -> tuple[_Grams, Tensor]:
    """The same by products in a dtype, and the least pivots, (...); one factor after the other."""
    a, m_a = pair.a.to(dtype), pair.m_a.to(dtype)
    gram_a, cross_a, of_m_a = _products(a, a), _products(m_a, a), _products(m_a, m_a)
    root_a, pivot_a = _root_and_pivot(a, gram_a)
    del a, m_a
    b, m_b = pair.b.to(dtype).mT, pair.m_b.to(dtype).mT
    gram_b, cross_b, of_m_b = _products(b, b), _products(b, m_b), _products(m_b, m_b)
    added = None if guard is None else guard * (root_a @ root_a.mT)
    root_b, pivot_b = _root_and_pivot(b, gram_b, added)
    pivots = torch.minimum(pivot_a, pivot_b)
    noise = _NOISE**2 if dtype == torch.float64 else (_ROUNDING / pivots)[..., None, None]
    return _Grams(cross_a, cross_b, of_m_a, of_m_b, root_a, root_b, noise), pivots


def _products(x: Tensor, y: Tensor) -> Tensor:
    """X Yᵀ in float64, of products in their dtype: long sums are made of short ones."""
    if x.dtype == torch.float64 or x.shape[-1] <= _SUMMED:
        return (x @ y.mT).double()
    pairs = zip(x.split(_SUMMED, -1), y.split(_SUMMED, -1), strict=True)
    first, *others = ((one @ other.mT).double() for one, other in pairs)
    return sum(others, first)


def _sum_of_products(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """X Y + U V, without a place for the second product."""
    shape = *x.shape[:-1], y.shape[-1]
    x, y, u, v = (one.reshape(-1, *one.shape[-2:]) for one in (x, y, u, v))
    return torch.bmm(x, y).baddbmm_(u, v).reshape(shape)


def _gram(rows: Tensor) -> Tensor:
    """X Xᵀ in float64: in float32 it loses small singular values."""
    wide = rows.double()
    return wide @ wide.mT


def _inverse_root(rows: Tensor, added: Tensor | None = None) -> Tensor:
    """F with F Fᵀ = (X Xᵀ + added)⁻¹ for X (..., r, n): (..., r, k) in float64."""
    return _root_and_pivot(rows, _gram(rows), added)[0]


def _root_and_pivot(
    rows: Tensor, gram: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same from S = X Xᵀ, and the least pivot of S + added with a unit diagonal, (...).

    For more rows than columns it is F = X (XᵀX)⁻¹, that of the pseudo-inverse. For all else it is
    Cholesky's, batched and without waiting for the device: rows of any length are alike to it, and
    rows of zeros get 0. Other dependent rows get F = diag(S)^(-1/2), with which a step is longer by
    √r at the most.
    """
    if added is not None:
        gram = gram + added
    elif rows.shape[-2] > rows.shape[-1]:
        inner = _inverse_root(rows.mT)
        return rows.double() @ (inner @ inner.mT), gram.new_zeros(gram.shape[:-2])
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    lengths = torch.where(diagonal > 0, diagonal, 1).rsqrt() * (diagonal > 0)
    unit = gram * lengths[..., None] * lengths[..., None, :]
    unit.diagonal(dim1=-2, dim2=-1).fill_(1)
    factor, failed = torch.linalg.cholesky_ex(unit)
    least = torch.where(failed == 0, _pivots(factor).amin(-1), 0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    factor = torch.where((least > _LEAST_PIVOT)[..., None, None], factor, eye)
    root = torch.linalg.solve_triangular(factor, eye, upper=False).mT * lengths[..., None]
    return root, least


def _pivots(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).square()


def _besides(whole: Tensor, seen: Tensor, noise: Tensor | float) -> Tensor:
    """E, lower triangular, with E Eᵀ = whole - seen + ε: what a momentum has besides what is seen.

    ε is `noise` times the size of the whole: where only rounding is left, E⁻¹ times it is shorter
    than 1.
    """
    size = whole.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    size = torch.where(size > 0, size, 1)
    eye = torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device)
    factor, failed = torch.linalg.cholesky_ex(whole - seen + noise * size * eye)
    return torch.where((failed == 0)[..., None, None], factor, size.sqrt() * eye)


def _polar_blocks(
    c_11: Tensor, c_12: Tensor, c_21: Tensor, method: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Three blocks of polar(C), found in `dtype`."""
    zero = c_11.new_zeros(*c_11.shape[:-2], c_21.shape[-2], c_12.shape[-1])
    rows = (torch.cat([c_11, c_12], -1), torch.cat([c_21, zero], -1))
    polar = _polar(torch.cat(rows, -2).to(dtype), method).to(c_11.dtype)
    m, n = c_11.shape[-2:]
    return polar[..., :m, :n], polar[..., :m, n:], polar[..., m:, :n]


def _polar(x: Tensor, method: str = "auto") -> Tensor:
    """The polar factor of a momentum times a root.

    The root is large where the other factor is small, and a momentum has only rounding there: in
    float64, whose polar factor is exact, that counts as 0.
    """
    if x.dtype != torch.float64:
        return orthogonalize(x, method)
    u, singular, vh = torch.linalg.svd(x, full_matrices=False)
    kept = singular > _NOISE * singular.amax(-1, keepdim=True)
    polar: Tensor = (u * kept[..., None, :]) @ vh
    return polar


def _longest(root: Tensor, a: Tensor) -> Tensor:
    """The length of the longest column of Fᵀ A, (..., 1, 1)."""
    return torch.linalg.vector_norm(root.mT @ a.double(), dim=-2, keepdim=True).amax(-1, True)


def _balance(a: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ that make the rows of A orthogonal and of one length; 1 where they nearly are."""
    gram = _gram(a)
    ranks = gram.shape[-1]
    eye = torch.eye(ranks, dtype=gram.dtype, device=gram.device).expand_as(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor = torch.where((failed == 0)[..., None, None], factor, eye)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    condition = torch.linalg.matrix_norm(gram) * torch.linalg.matrix_norm(inverse.mT @ inverse)
    pivots = _pivots(factor)
    is_sound = (failed == 0) & (pivots.amin(-1) > _LEAST_PIVOT * pivots.amax(-1))
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / ranks / LENGTH**2
    is_due = (condition > WORST * ranks) | (size > 4) | (size < 0.25)
    acts = (is_sound & is_due)[..., None, None]
    return torch.where(acts, inverse * LENGTH, eye), torch.where(acts, factor / LENGTH, eye)


def product_norm(norm: Norm) -> Norm:
    """The norm of products that measures as `norm` does.

    Raises:
        ValueError: where no rule is known for factors.
    """
    if isinstance(norm, Spectral):
        return SpectralProduct(input=norm.input, output=norm.output, method=norm.method)
    if isinstance(norm, MaxColumn) and norm.output in ("rms", "l2"):
        return ColumnProduct(output=norm.output)
    raise ValueError(
        f"No rule is known for the factors of a product under {norm}; expected a spectral norm, "
        "such as rms->rms, or l1->rms."
    )


def parse_norm(text: str) -> Norm:
    """The norm that `str(norm)` names, such as `"rms->rms"` or `"product rms->rms"`."""
    word, _, rest = text.strip().partition(" ")
    if word == "product":
        return product_norm(parse_plain(rest))
    return parse_plain(text)
