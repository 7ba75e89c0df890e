"""Norms on operators, each with its dual norm and its linear minimization oracle (LMO).

The paper, Definition 1: the operator norm of a matrix M that takes inputs measured by ‖·‖_α to
outputs measured by ‖·‖_β is

    ‖M‖_{α→β} = max_x ‖M x‖_β / ‖x‖_α.

[`operator_norm`] takes the two vector norms by name and returns the norm's class, for every pair
with a closed form. All of them are one of five shapes, up to a unit, since ‖x‖_rms = ‖x‖_2 / √dim:

| class       | norm(W)                          | pairs                                   |
| ----------- | -------------------------------- | --------------------------------------- |
| `Spectral`  | largest singular value           | l2 or rms → l2 or rms                   |
| `MaxColumn` | largest lp norm of a column      | l1 → lp, l1 → rms         (Prop. 8)     |
| `MaxRow`    | largest lq norm of a row         | lp → linf, rms → linf     (Prop. 8)     |
| `MaxEntry`  | largest entry                    | l1 → linf                 (Prop. 8)     |
| `Frobenius` | l2 norm of all entries           | none: no operator norm    (Table 1)     |

For every norm the dual norm and the LMO are, as in Prop. 1 (the LMO is the maximiser here),

    lmo(G) = argmax_{norm(T) <= 1} ⟨G, T⟩,    dual_norm(G) = ⟨G, lmo(G)⟩,

so steepest descent under the norm steps by `-dual_norm(G) / λ · lmo(G)`. A new norm is one
dataclass here and one line in `tests/test_norms.py`.

**Convolutions.** A kernel maps a patch of `taps · fan_in` entries to one output,
W_1 x_1 + ... + W_T x_T. Its LMO is computed tap by tap, and its norm is `weight(taps)` times the
largest norm of a tap: the smallest multiple that bounds the norm of the map. By Hölder's inequality
the weight is

| input | weight         | why                                                                   |
| ----- | -------------- | --------------------------------------------------------------------- |
| l1    | 1              | the worst patch has one entry, in one tap; the bound is the norm      |
| lp    | taps^(1 - 1/p) | the worst patch spreads over all taps, and their outputs add up       |
| rms   | taps           | √taps as for l2, and √taps because the mean is over taps · fan_in     |

so it is k² for rms → rms and k x k taps, as in Large et al. 2024; l1 → linf is the largest entry.

**Statistics.** The optimizers of the paper divide their momentum by a statistic of the gradients.
With the statistic of the current gradient alone, that division is the LMO. So a norm has its
statistic: `moments(g)` returns the quantities to smooth over time and `precondition(m, moments)`
divides by them. Up to the unit, `precondition(g, moments(g)) = lmo(g)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .orthogonalize import METHODS, orthogonalize, over_length

Vector = str | float
"""A vector norm: "l1", "l2", "linf", "rms", or a real number p in [1, ∞] for ‖·‖_p."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm on operators `(..., fan_out, fan_in)`; leading axes are independent operators.

    Subclasses define the norm without its unit (`_norm`, `_lmo`). This class applies the unit, and
    computes float16 and bfloat16 in float32.
    """

    input: Vector | None = None
    output: Vector | None = None

    independent: ClassVar[tuple[str, ...]] = ("batch",)
    """The kinds of axes along which a tensor can be cut, and the LMO computed for each part."""

    of_entries: ClassVar[bool] = False
    """Whether the norm takes a tensor's entries as one vector and ignores its operators."""

    def __post_init__(self) -> None:
        if self.input is not None and self.output is not None:
            family = _family(self.input, self.output)
            if not isinstance(self, family) and not (
                family is MaxEntry and "Max" in type(self).__name__
            ):
                raise ValueError(
                    f"{self.input!r} -> {self.output!r} is the pair of {family.__name__}, not of "
                    f"{type(self).__name__}; operator_norm finds the class for a pair."
                )

    def unit(self, fan_out: int, fan_in: int) -> float:
        """The unit of the norm: √fan_in for rms inputs, times 1/√fan_out for rms outputs."""
        unit = math.sqrt(fan_in) if self.input == "rms" else 1.0
        return unit / math.sqrt(fan_out) if self.output == "rms" else unit

    def weight(self, taps: int) -> float:
        """A convolution's norm over the largest norm of a tap, see this module's docstring."""
        if self.input is None or taps == 1:
            return 1.0
        return float(taps) if self.input == "rms" else taps ** (1 - 1 / _exponent(self.input))

    def norm(self, w: Tensor) -> Tensor:
        """The norm of each operator: `(..., fan_out, fan_in)` to `(...)`."""
        return _homogeneous(self._norm, _wide(w)) * self.unit(*w.shape[-2:])

    def lmo(self, g: Tensor, size: float = 1.0) -> Tensor:
        """The operator of norm `size` with the largest inner product with g; 0 for g = 0.

        It has g's dtype. [`Spectral`] computes it to the accuracy of its method.
        """
        return self._lmo(_wide(g)).mul_(size / self.unit(*g.shape[-2:])).to(g.dtype)

    def dual_norm(self, g: Tensor) -> Tensor:
        """The dual norm of each operator, ⟨g, lmo(g)⟩: `(..., fan_out, fan_in)` to `(...)`."""
        return _homogeneous(self._dual, _wide(g)) / self.unit(*g.shape[-2:])

    def entry_rms(self, fan_out: int, fan_in: int) -> float:
        """RMS of the LMO's entries, for a g of full rank with entries of equal magnitude."""
        return self._entry_rms(fan_out, fan_in) / self.unit(fan_out, fan_in)

    def moments(self, g: Tensor) -> dict[str, Tensor]:
        """The statistics of one gradient, which an [`EMA`](hf_normopt.EMA) may smooth over time.

        Raises:
            NotImplementedError: if the norm has none.
        """
        squares, block = _wide(g).square(), self._block()
        return {"second_moment": squares.sum(block, keepdim=True) if block else squares}

    def precondition(self, m: Tensor, moments: dict[str, Tensor], eps: float | Tensor) -> Tensor:
        """M over the root of its statistics, in the unit of the LMO; 0 where both are 0."""
        root = moments["second_moment"].sqrt() + eps
        unit = self.unit(*m.shape[-2:]) if m.ndim > 1 else 1.0  # entries alone have none
        return m / torch.where(root == 0, 1, root) / unit

    def _block(self) -> tuple[int, ...]:
        """The axes along which the LMO divides by one length.

        Raises:
            NotImplementedError: if the LMO is no such division.
        """
        raise NotImplementedError(f"The norm {self} has no statistic: use statistic=None.")

    def _norm(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def _lmo(self, g: Tensor) -> Tensor:
        raise NotImplementedError

    def _dual(self, g: Tensor) -> Tensor:
        return (g * self._lmo(g)).sum((-2, -1))

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{_name(self.input)}->{_name(self.output)}"


@dataclass(frozen=True, kw_only=True)
class Spectral(Norm):
    """The largest singular value: l2 or rms → l2 or rms (Prop. 5; rms → rms in the Epilogue).

    norm(W)      = σ_max(W)
    dual_norm(G) = Σ σ_i(G), the nuclear norm
    lmo(G)       = U Vᵀ for G = U Σ Vᵀ

    In the unit of the pair, `norm` has the factor √fan_in for rms inputs and 1/√fan_out for rms
    outputs; `dual_norm` and `lmo` have the inverse.

    Args:
        input: "l2" or "rms".
        output: "l2" or "rms".
        method: how the LMO is computed, see [`orthogonalize`](hf_normopt.orthogonalize).
    """

    input: Vector = "l2"
    output: Vector = "l2"
    method: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(
                f"Unknown method {self.method!r}; expected one of {', '.join(METHODS)}."
            )

    def __str__(self) -> str:
        return super().__str__() + (f" ({self.method})" if self.method != "auto" else "")

    def moments(self, g: Tensor) -> dict[str, Tensor]:
        """The Gram matrices G Gᵀ and Gᵀ G, Shampoo's statistics (Eq. 12)."""
        g = _wide(g)
        return {"left": g @ g.mT, "right": g.mT @ g}

    def precondition(self, m: Tensor, moments: dict[str, Tensor], eps: float | Tensor) -> Tensor:
        """(L + eps)^(-1/4) M (R + eps)^(-1/4), over the unit (Eq. 13); eps 0: pseudo-inverse."""
        left, right = (_inverse_fourth_root(moments[side], eps) for side in ("left", "right"))
        return (left @ m.double() @ right).to(m.dtype) / self.unit(*m.shape[-2:])

    def _norm(self, w: Tensor) -> Tensor:
        return _singular_values(w).amax(-1)

    def _lmo(self, g: Tensor) -> Tensor:
        return orthogonalize(g, self.method)

    def _dual(self, g: Tensor) -> Tensor:
        return _singular_values(g).sum(-1)

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        return 1 / math.sqrt(max(fan_out, fan_in))


@dataclass(frozen=True, kw_only=True)
class MaxColumn(Norm):
    """The largest lp norm of a column: l1 → lp, l1 → rms (Prop. 8).

    norm(W)      = max_j ‖W_{:,j}‖_p
    dual_norm(G) = Σ_j ‖G_{:,j}‖_q, 1/p + 1/q = 1
    lmo(G)       = sign(g) |g|^(q-1) / ‖g‖_q^(q-1) for each column g; g / ‖g‖_2 for p = 2

    A column of an embedding is the vector of one token. rms divides `norm` by √fan_out.

    Args:
        output: the vector norm of a column.
    """

    input: Vector = "l1"
    output: Vector = "l2"

    independent: ClassVar[tuple[str, ...]] = ("batch", "in")

    def _norm(self, w: Tensor) -> Tensor:
        return torch.linalg.vector_norm(w, _exponent(self.output), dim=-2).amax(-1)

    def _lmo(self, g: Tensor) -> Tensor:
        return _dual_vector(g, _exponent(self.output), dim=-2)

    def _dual(self, g: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, _conjugate(_exponent(self.output)), dim=-2).sum(-1)

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        return _dual_vector_rms(_exponent(self.output), fan_out)

    def _block(self) -> tuple[int, ...]:
        return (-2,) if _exponent(self.output) == 2 else super()._block()


@dataclass(frozen=True, kw_only=True)
class TiedTable(MaxColumn):
    """The norm of a table W that embeds tokens and, as Wᵀ, scores them: the larger of its two uses.

    norm(W)      = max(‖W‖_{l1→rms}, ‖Wᵀ‖_{rms→linf}) = √fan_out · max_j ‖W_{:,j}‖_2
    dual_norm(G) = Σ_j ‖G_{:,j}‖_2 / √fan_out
    lmo(G)       = g / ‖g‖_2 / √fan_out for each column g

    The second of the two is fan_out times the first, so it is always the larger one. W is read as
    a table is: fan_out is the width, and a column the vector of one token.
    """

    def unit(self, fan_out: int, fan_in: int) -> float:
        """√fan_out: that of rms inputs of Wᵀ."""
        return math.sqrt(fan_out)

    def __str__(self) -> str:
        return "tied rms->linf"


@dataclass(frozen=True, kw_only=True)
class MaxRow(Norm):
    """The largest lq norm of a row: lp → linf, rms → linf, 1/p + 1/q = 1 (Prop. 8).

    norm(W)      = max_i ‖W_{i,:}‖_q
    dual_norm(G) = Σ_i ‖G_{i,:}‖_p
    lmo(G)       = sign(g) |g|^(p-1) / ‖g‖_p^(p-1) for each row g; g / ‖g‖_2 for p = 2

    A row of a head computes one output. rms multiplies `norm` by √fan_in.

    Args:
        input: the vector norm of the operator's input.
    """

    input: Vector = "l2"
    output: Vector = "linf"

    independent = ("batch", "out")

    def _norm(self, w: Tensor) -> Tensor:
        return torch.linalg.vector_norm(w, _conjugate(_exponent(self.input)), dim=-1).amax(-1)

    def _lmo(self, g: Tensor) -> Tensor:
        return _dual_vector(g, _conjugate(_exponent(self.input)), dim=-1)

    def _dual(self, g: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, _exponent(self.input), dim=-1).sum(-1)

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        return _dual_vector_rms(_conjugate(_exponent(self.input)), fan_in)

    def _block(self) -> tuple[int, ...]:
        return (-1,) if _exponent(self.input) == 2 else super()._block()


@dataclass(frozen=True, kw_only=True)
class MaxEntry(Norm):
    """The largest entry: l1 → linf (Prop. 2 and 3: the norm under which Adam is steepest descent).

    norm(W)      = max_ij |W_ij|
    dual_norm(G) = Σ_ij |G_ij|
    lmo(G)       = sign(G)
    """

    independent = ("batch", "in", "out")
    of_entries = True

    input: Vector = "l1"
    output: Vector = "linf"

    def _norm(self, w: Tensor) -> Tensor:
        return w.abs().amax((-2, -1))

    def _lmo(self, g: Tensor) -> Tensor:
        most = torch.finfo(g.dtype).max
        return (g * most).mul_(most).clamp_(-1, 1)  # torch.sign(NaN) is 0 and would hide it

    def _dual(self, g: Tensor) -> Tensor:
        return g.abs().sum((-2, -1))

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        return 1.0

    def _block(self) -> tuple[int, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Frobenius(Norm):
    """The Euclidean norm of all entries (Table 1: the norm of gradient descent).

    norm(W)      = ‖W‖_F
    dual_norm(G) = ‖G‖_F
    lmo(G)       = G / ‖G‖_F

    A tensor of several operators has one length: that of all entries.
    """

    of_entries = True

    def __str__(self) -> str:
        return "frobenius"

    def _norm(self, w: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(w)

    def _lmo(self, g: Tensor) -> Tensor:
        return over_length(g, (-2, -1))

    def _dual(self, g: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(g)

    def _entry_rms(self, fan_out: int, fan_in: int) -> float:
        return 1 / math.sqrt(fan_out * fan_in)

    def _block(self) -> tuple[int, ...]:
        return (-2, -1)


def operator_norm(input: Vector, output: Vector) -> Norm:
    """The operator norm ‖·‖_{input→output} of Definition 1, for pairs with a closed form.

    Args:
        input: the vector norm of inputs: "l1", "l2", "linf", "rms", or a number p in [1, ∞].
        output: the vector norm of outputs, likewise.

    Returns:
        The norm, with `norm(w)`, `lmo(g)` and `dual_norm(g)` for operators `(..., fan_out,
        fan_in)`.

    Raises:
        ValueError: for an unknown vector norm, or a pair without a closed form.

    Example:
        >>> linear = operator_norm("rms", "rms")
        >>> linear.lmo(torch.eye(2)) # its own polar factor
        tensor([[1., 0.],
                [0., 1.]])
    """
    family = _family(input, output)
    return (
        family()
        if family is MaxEntry
        else family(input=_canonical(input), output=_canonical(output))
    )


def _family(input: Vector, output: Vector) -> type[Norm]:
    """The class of a pair with a closed form."""
    p, q = _exponent(input), _exponent(output)
    if p == 1:
        return MaxEntry if q == math.inf else MaxColumn
    if q == math.inf:
        return MaxRow
    if p == q == 2:
        return Spectral
    raise ValueError(
        f"The operator norm {input!r} -> {output!r} has no closed form. Those that have one: l1 "
        "-> any p, l1 -> rms, any p -> linf, rms -> linf, and l2 or rms -> l2 or rms."
    )


def parse_norm(text: str) -> Norm:
    """The norm that `str(norm)` names, such as `"rms->rms"`, `"l2->l2 (muon)"`, `"frobenius"`."""
    for named in (Frobenius(), TiedTable()):
        if text == str(named):
            return named
    pair, _, method = text.replace(" ", "").rstrip(")").partition("(")
    names = pair.split("->")
    if len(names) != 2:
        raise ValueError(
            f"Cannot read the norm {text!r}; expected `input->output`, such as `rms->rms`, or "
            "`frobenius`."
        )
    norm = operator_norm(*names)
    if not method:
        return norm
    if not isinstance(norm, Spectral):
        raise ValueError(f"Norm {text!r}: only spectral norms have a method, {norm} has none.")
    return Spectral(input=norm.input, output=norm.output, method=method)


def _exponent(vector: Vector) -> float:
    """The p of a vector norm; rms is l2 in another unit."""
    names = {"rms": 2.0, "l1": 1.0, "l2": 2.0, "linf": math.inf}
    try:
        p = names[vector] if vector in names else float(str(vector).removeprefix("l"))
    except ValueError:
        p = math.nan
    if not p >= 1:
        raise ValueError(
            f'Unknown vector norm {vector!r}; expected "l1", "l2", "linf", "rms" or a '
            "number p >= 1."
        )
    return p


def _canonical(vector: Vector) -> Vector:
    return "rms" if vector == "rms" else _name(_exponent(vector))


def _name(vector: Vector | None) -> str:
    return vector if isinstance(vector, str) else f"l{vector:.17g}"


def _conjugate(p: float) -> float:
    """The q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def _wide(x: Tensor) -> Tensor:
    """X in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _homogeneous(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm of x, computed on x over its largest entry so that no square under- or overflows."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    scale = torch.where((largest == 0) | largest.isinf(), 1, largest)
    return function(x / scale) * scale[..., 0, 0]


def _singular_values(x: Tensor) -> Tensor:
    """Singular values; NaN for a matrix that is not finite (LAPACK would raise)."""
    finite = x.isfinite().all((-2, -1))
    values = torch.linalg.svdvals(torch.where(finite[..., None, None], x, 0))
    return torch.where(finite[..., None], values, torch.nan)


def _dual_vector(g: Tensor, p: float, dim: int) -> Tensor:
    """The maximiser of ⟨g, t⟩ over ‖t‖_p <= 1 along one axis; 0 for g = 0."""
    if p == 2:
        return over_length(g, dim)
    largest = g.abs().amax(dim, keepdim=True)
    g = g / torch.where(largest == 0, 1, largest)  # so that no power under- or overflows
    if p == 1:
        first = torch.zeros_like(g).scatter_(dim, g.abs().argmax(dim, keepdim=True), 1)
        return first * g  # the first largest entry, which is ±1
    if p == math.inf:
        return MaxEntry()._lmo(g)
    q = _conjugate(p)
    length = torch.linalg.vector_norm(g, q, dim=dim, keepdim=True)
    return g.sign() * (g.abs() / torch.where(length == 0, 1, length)) ** (q - 1)


def _dual_vector_rms(p: float, dim: int) -> float:
    """RMS of `_dual_vector`'s entries for a g of equal magnitudes; exact for p in {1, 2, ∞}."""
    return dim**-0.5 if p == 1 else dim ** (-1 / p)


def _inverse_fourth_root(gram: Tensor, eps: float | Tensor) -> Tensor:
    """(gram + eps)^(-1/4) in float64; 0 on the null space where eps is 0."""
    finite = gram.isfinite().all((-2, -1))[..., None, None]  # LAPACK raises otherwise
    values, q = torch.linalg.eigh(torch.where(finite, gram, 0).double())
    values = values.clamp_min(0)
    kept = values > 1e-12 * values.amax(-1, keepdim=True)  # of squares: 1e-6 of singular values
    shifted = torch.where(kept, values, 0) + eps
    roots = torch.where(shifted > 0, torch.where(shifted > 0, shifted, 1) ** -0.25, 0)
    return torch.where(finite, (q * roots[..., None, :]) @ q.mT, torch.nan)
