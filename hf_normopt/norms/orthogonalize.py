"""The polar factor of a matrix: `orthogonalize(G) = U Vᵀ` for the reduced SVD `G = U Σ Vᵀ`.

It is the LMO of the spectral norm (Bernstein & Newhouse 2024, Prop. 5) and the nearest
semi-orthogonal matrix (Prop. 4), unique if G has full rank. On the null space every choice attains
the same inner product; here it is mapped to 0, so that nothing moves without a gradient.

Each method applies a function f to the singular values; f = 1 is exact. There are three families:

* exact: `svd`, and `gram`, which computes `(G Gᵀ)^(-1/2) G` by an eigendecomposition of the smaller
  Gram matrix in float64, the form of Shampoo in the paper's equations 12 to 16;
* `rational`: the same inverse root as a sum of inverses, Σ w_j (G Gᵀ + t_j)^(-1), in float32;
* iterations of odd polynomials (Appendix A, equation 37), which need matrix products only: every
  key of [`POLYNOMIALS`]; and `float16`, Polar Express with products in 16 bits (`half.py`).

What a method loses is stated as the efficiency of the oracle, ⟨G, O⟩ / (‖O‖ ‖G‖†), which is 1 for
U Vᵀ. `float32` takes the cheapest method, by the costs in [`WORK`], that has 0.98 on every spectrum
(0.97 for small matrices). `auto` does too, but on devices with faster products in 16 bits, by the
table in `half.py`, it takes `float16`, which has 0.98 where no singular value other than 0 is below
1e-3 of the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .half import LEAST, device_of, in_16_bits, steps_of
from .half import work as work_in_16_bits
from .kernels import products_on

Polynomial = tuple[float, float, float]
"""(a, b, c) of p(x) = a x + b x³ + c x⁵."""

# Each row: the polynomials of one iteration, applied to the singular values of G / ‖G‖_F in turn.
POLYNOMIALS: dict[str, tuple[Polynomial, ...]] = {
    # Bernstein & Newhouse 2024, equation 36. Converges on (0, √3), slowly where it is near 0.
    "cubic": ((1.5, -0.5, 0.0),) * 30,
    # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, and torch.optim.Muon. Steep at
    # 0, and for that never converges: singular values end in 0.68 to 1.13.
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    # Amsel et al. 2025, Polar Express (arXiv 2505.16932), optimal for singular values in [1e-3, 1],
    # and made safe as published: all but the last are p(x / 1.01), since the first ones rise
    # steeply beyond 1, where rounding may take the largest singular value. The last is Newton and
    # Schulz's quintic, repeated until singular values of 1e-5 have converged as well.
    "polar_express": (
        *(
            (a / 1.01, b / 1.01**3, c / 1.01**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            )
        ),
        *((1.875, -1.25, 0.375),) * 8,
    ),
    # The same construction in five steps for singular values in [3e-3, 1], with 1.002.
    "polar_express_5": (
        (8.366941560345492, -24.617917004235863, 18.174619679715985),
        (4.035350182151393, -2.993408907358642, 0.5638510917544739),
        (3.4985740302800616, -2.6109580742907963, 0.5204939381316775),
        (2.4851452499549755, -1.8233130082025821, 0.43249242681732586),
        (1.917776271014647, -1.2967503137814849, 0.3797049603090754),
    ),
}

# f(σ) = σ (c₀ + c₁ σ² + Σ w / (σ² + t)) with the first two, three and four of these poles t: near 1
# from the second number on. Found by minimizing the greatest |f - 1|, _DELTA, over all of t, c and
# w at once; with the poles given, each row is the best (Remez). Below the range f falls to 0 with
# σ. The smallest t is 75 times what float32 rounds at 1, so that a Gram matrix in float32 does.
POLES = (7.163e-02, 3.362e-03, 1.536e-04, 4.472e-06)
WEIGHTS = (  # least σ, (c₀, c₁), w of each pole, and see `_inverse_root`
    (0.1, (0.95843414, -0.27994015), (0.25381281, 0.07843791), 1.185e-2),
    (0.025, (0.9206887, -0.24586229), (0.27264265, 0.05405733, 0.016731005), 2.554e-3),
    (
        0.0025,
        (0.94931479, -0.27504484),
        (0.26506514, 0.056528361, 0.0123584, 0.003202248),
        3.81e-4,
    ),
)
_DELTA = 0.0065  # |f - 1| in each range
_NARROWED = 1.3e-3  # σ / f(σ) with four poles, where f(σ) < 0.1

METHODS = ("auto", "float32", "float16", "svd", "gram", "rational", *POLYNOMIALS)

# Work as (a, b, c) of a m³ + b m² + c, in operations of a float32 product, which are the unit: an
# m x m by m x n product has 2 m² n. Measured on one core (Zen 3, torch 2.13 with MKL, m = 64 to
# 768): an inverse by Cholesky takes 1.9 products of m x m at m = 384 and 1.6 at 768, the
# eigendecomposition in float64 16 and 13. A product in float64 takes two in float32. The constants
# are 10 µs and 25 µs of calls, for matrices so small that nothing else counts.
WORK = {"inverse": (3.2, 1000.0, 8e5), "eigh": (25.0, 2500.0, 2e6)}

# Singular values below this fraction of the largest count as 0. For float64 input: above the
# rounding of an SVD. For all else, in float32 at best: above the rounding of a product of
# rank-deficient factors, and so small that what it drops is at most 0.4 % of the nuclear norm at
# 4096 singular values.
_NULL_FLOAT64 = 1e-13
_NULL_FLOAT32 = 8 * torch.finfo(torch.float32).eps

CACHE = 2**16
"""The entries that fit in a core's cache; small matrices are computed in batches of so many."""

EFFICIENCY = 0.98
"""The least efficiency of `auto` on every spectrum; for small matrices see `accuracy`."""


@dataclass(frozen=True)
class Plan:
    """How to compute the polar factors of a batch.

    Attributes:
        method: one of [`METHODS`], not `auto` or `float32`.
        steps: polynomials of an iteration that are applied; 0 for other methods.
        work: operations for the whole batch, see [`WORK`].
    """

    method: str
    steps: int
    work: float


@lru_cache
def plan(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    method: str = "auto",
    accuracy: float | None = None,
) -> Plan:
    """What [`orthogonalize`] does with matrices of a shape (..., m, n); the arguments are its.

    `device` may also be a name of [`half.NAMES`](hf_normopt.norms.half.NAMES), such as "h100".
    """
    *batch, rows, columns = shape
    m, n, count = min(rows, columns), max(rows, columns), math.prod(batch)
    on_cpu = str(device).startswith("cpu")
    known = device_of(device)
    is_faster = known is not None and known.is_faster_in_16_bits and dtype != torch.float64
    if method == "auto" and is_faster and accuracy is None and m >= LEAST:
        method = "float16"
    if method == "float16":
        return Plan(method, steps_of(m), count * work_in_16_bits(m, n))
    if method not in ("auto", "float32"):
        steps = len(POLYNOMIALS.get(method, ()))
        return Plan(method, steps, count * _work(method, m, n, steps, on_cpu))

    def cost(name: str) -> float:
        return _work(name, m, n, _steps(name, m), on_cpu)

    if dtype == torch.float64:
        method = "svd"
    elif (accuracy or 0) > EFFICIENCY or m <= 1:
        method = "gram"
    else:
        method = "polar_express"
        others = ["rational"] if on_cpu else []
        if 8 < m <= (64 if accuracy is None else 40):
            others.append("polar_express_5")
        for other in others:
            if cost(other) < cost(method):
                method = other
    return Plan(method, _steps(method, m), count * cost(method))


def _steps(method: str, m: int) -> int:
    """The number of polynomials that m singular values need.

    After six polynomials of Polar Express f is in [0.994, 1.0012] for σ >= 1e-3, and
    σ (1 - f(σ)) <= 1.5e-4 below: m such values lose up to 1.5e-4 m next to one of 1. Each further
    polynomial almost halves that. Up to eight values get a seventh, which costs next to nothing and
    makes f = 1 to five digits.
    """
    most = len(POLYNOMIALS.get(method, ()))
    if method != "polar_express":
        return most
    return 7 if m <= 8 else min(6 + max(0, math.ceil(math.log(m / 100, 1.875))), most)


def _work(method: str, m: int, n: int, steps: int, on_cpu: bool) -> float:
    product, square = 2.0 * m * m * n, 2.0 * m**3
    if method in POLYNOMIALS:
        if not _by_gram(m, n, on_cpu):
            return steps * (2 * product + square)
        return _segments(method, m, steps) * 2 * product + steps * 4 * square
    if m <= 1:
        return 2 * product  # its length
    a, b, c = WORK["inverse" if method == "rational" else "eigh"]
    if method == "rational":
        return 2 * product + 3 * (a * m**3 + b * m**2 + c)  # two to seven
    return 4 * product + 2 * square + a * m**3 + b * m**2 + c  # an SVD of float64 is no less


def orthogonalize(g: Tensor, method: str = "auto", accuracy: float | None = None) -> Tensor:
    """Polar factor of every matrix in a batch.

    Args:
        g: matrices of shape (..., m, n), any floating dtype; never changed.
        method: one of [`METHODS`]. `"float32"` is what [`plan`] chooses: on CPUs `polar_express_5`,
            or `polar_express` with as many steps as the size needs, for small matrices, and
            `rational` for others; on other devices only the iterations. It is exact for float64.
            `"auto"` is the same, but `"float16"` for matrices that are not small on devices whose
            products in 16 bits are much faster.
        accuracy: the least LMO efficiency ⟨G, O⟩ / (‖O‖ ‖G‖†) that `"auto"` must give on every
            spectrum. By default 0.98, but 0.97 for more than 40 and up to 64 singular values, and
            for `"float16"` where no singular value but 0 is below 1e-3 of the largest. If it is
            given it is met in float32; above 0.98 the method is exact.

    Returns:
        A tensor of g's shape and dtype, computed in float32 at least but for `"float16"`. Zero
        matrices give 0, and so do null spaces, but for `"float16"`: there they have singular values
        up to 0.25 (and rounding g to 16 bits has filled one before it comes here). A matrix that
        holds an infinity or NaN gives NaN.

    Raises:
        ValueError: for an unknown method, an accuracy outside of (0, 1], or fewer than two axes.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; expected one of {', '.join(METHODS)}.")
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ValueError(f"accuracy is an LMO efficiency in (0, 1], found {accuracy}.")
    if g.ndim < 2:
        raise ValueError(
            f"Expected matrices (..., m, n), found a tensor of shape {tuple(g.shape)}."
        )
    if g.numel() == 0:
        return g.clone()
    chosen = plan(tuple(g.shape), g.dtype, g.device, method, accuracy)

    x = g.to(torch.promote_types(g.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    if chosen.method == "float16" and wide.shape[-2] > 1:
        polar = _in_16_bits(wide, chosen.steps)
    elif chosen.method in POLYNOMIALS:
        polar = _iterate(wide, chosen)
    elif wide.shape[-2] == 1:
        polar = over_length(wide)  # depthwise kernels: thousands of them
    elif chosen.method == "rational":
        polar = _rational(wide)
    else:
        polar = (_svd if chosen.method == "svd" else _gram)(over_length(wide))
    return (polar.mT if tall else polar).to(g.dtype)


def over_length(x: Tensor, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """A tensor divided by its Euclidean length along some axes; 0 for 0."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    sound = _is_sound(length)
    if x.device.type == "cpu" and sound.all():
        return x / length
    largest = x.abs().amax(dim, keepdim=True)  # squares may have overflowed, or underflowed
    scaled = x / torch.where(largest == 0, 1, largest)
    length_scaled = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    scaled = scaled / torch.where(length_scaled == 0, 1, length_scaled)
    return torch.where(sound, x / length, scaled)  # none depends on the others


def _is_sound(length: Tensor) -> Tensor:
    """Whether a length was computed without squares that overflow or underflow in float32."""
    return (length > 1e-15) & (length < 1e15)


def _inverse(singular: Tensor, tolerance: float) -> Tensor:
    """1 / σ, or 0 where σ is below the tolerance times the largest."""
    largest = singular.amax(-1, keepdim=True)
    kept = singular > tolerance * largest
    return torch.where(kept, 1 / torch.where(kept, singular, torch.ones_like(singular)), 0)


def _svd(x: Tensor) -> Tensor:
    """U Vᵀ, in float64."""
    finite = x.isfinite().all((-2, -1))[..., None, None]
    u, singular, vh = torch.linalg.svd(torch.where(finite, x, 0).double(), full_matrices=False)
    tolerance = _NULL_FLOAT64 if x.dtype == torch.float64 else _NULL_FLOAT32
    kept = _inverse(singular, tolerance) * singular
    return torch.where(finite, (u * kept[..., None, :]) @ vh, torch.nan)


def _gram(x: Tensor) -> Tensor:
    """(X Xᵀ)^(-1/2) X for wide X, in float64, since squaring halves the number of digits."""
    x = x.double()
    gram = x @ x.mT
    finite = gram.isfinite().all((-2, -1))[..., None, None]
    eigenvalues, q = torch.linalg.eigh(torch.where(finite, gram, 0))
    inverse = _inverse(eigenvalues.clamp_min(0).sqrt(), _NULL_FLOAT32)
    return torch.where(finite, (q * inverse[..., None, :]) @ q.mT @ x, torch.nan)


def _rational(x: Tensor) -> Tensor:
    """f(X) for wide X, one matrix at a time, with as few poles as its spectrum allows."""
    if x.ndim == 2:
        return _rational_of_one(x)
    return torch.stack([_rational_of_one(one) for one in x.flatten(0, -3)]).reshape(x.shape)


def _rational_of_one(x: Tensor) -> Tensor:
    gram = x @ x.mT
    size = torch.linalg.matrix_norm(gram)
    if not _is_sound(size):  # a sum of fourth powers
        x = over_length(x)
        gram = x @ x.mT
        size = torch.linalg.matrix_norm(gram)
        if size == 0 or not size.isfinite():
            return x
    root, inner, is_enough = _inverse_root(gram / size)
    if is_enough:
        return _times(root, x).div_(size.sqrt())
    # The spectrum is too broad for the poles, but they have narrowed it: f(X) has the same U Vᵀ.
    narrow = _times(root, x).div_(size.sqrt() * (1 + _DELTA))
    root, _, is_enough = _inverse_root(narrow @ narrow.mT, inner)
    return _times(root, narrow) if is_enough else _gram(x).to(x.dtype)


def _times(root: Tensor, x: Tensor) -> Tensor:
    """Root X in the memory order of X, so that a transposed X is read along cache lines."""
    return root @ x if x.stride(-1) == 1 else (x.mT @ root.mT).mT


def _inverse_root(gram: Tensor, inner: float | None = None) -> tuple[Tensor, float, bool]:
    """c₀ + c₁ A + Σ w (A + t)^(-1) for A of norm at most 1, with as few poles as suffice.

    The traces of the inverses give ⟨X, f(X)⟩ = tr(c₀ A + c₁ A² + Σ w A (A + t)^(-1)), and a bound
    on the loss from singular values below f's range. While the bound is too large, the next pole is
    added.

    Args:
        gram: A = X Xᵀ of Frobenius norm 1, or of an X whose spectrum f has already narrowed.
        inner: ⟨X, f(X)⟩ of the original X, if f has narrowed it.

    Returns:
        The root, ⟨X, f(X)⟩, and whether the efficiency is at least [`EFFICIENCY`].
    """
    share, total = (1.0, 0.0) if inner is None else (_NARROWED, inner)
    trace = gram.diagonal().sum(dtype=torch.float64).item()
    inverses: list[Tensor] = []
    small: list[float] = []  # Σ t / (σ² + t)
    for _, (c0, c1), weights, lost in WEIGHTS:
        for t in POLES[len(inverses) : len(weights)]:
            shifted = gram.clone()
            shifted.diagonal().add_(t)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if failed:
                return torch.zeros_like(gram), 0.0, False
            inverses.append(torch.cholesky_inverse(factor))
            small.append(t * inverses[-1].diagonal().sum(dtype=torch.float64).item())
        if inner is None:
            parts = (w * (len(gram) - s) for w, s in zip(weights, small, strict=True))
            total = c0 * trace + c1 + sum(parts)
        u, t = POLES[len(weights) - 2 : len(weights)]
        below = (u * small[-1] - t * small[-2]) / (u - t)  # Σ t u / (σ² + t) (σ² + u)
        bound = total / (total + share * lost * below) * (1 - _DELTA) / (1 + _DELTA)
        if bound >= EFFICIENCY:
            break
    root = c1 * gram
    root.diagonal().add_(c0)
    for w, inverse in zip(weights, inverses, strict=True):
        root.add_(inverse, alpha=w)
    return root, total, bound >= EFFICIENCY


_RESTART = 4  # steps after which rounding in a Gram matrix would begin to show


def _segments(method: str, m: int, steps: int) -> int:
    """How often an iteration on Gram matrices starts anew; once if [`_SHIFT`] suffices."""
    is_shifted = method.startswith("polar_express") and steps <= 7 and m <= 100
    return 1 if is_shifted else math.ceil(steps / _RESTART)


_SHIFT = 2.0
"""Added to the diagonal of a Gram matrix of trace 1, in units of eps, so that rounding makes no
eigenvalue negative. A singular value loses at most 1.5e-4; m <= 100 of them lose 1.5 %."""


def _by_gram(m: int, n: int, on_cpu: bool) -> bool:
    """Whether a step costs less on the Gram matrix: four m x m products for two of m x n.

    Only on CPUs: other devices may compute float32 in TF32, whose rounding would be amplified.
    """
    return on_cpu and 2 * n > 5 * m


def _in_16_bits(x: Tensor, steps: int) -> Tensor:
    """Polar Express with products in float16."""
    if x.dtype == torch.float64:
        return _in_16_bits(over_length(x).float(), steps).double()
    flat = x.reshape(-1, *x.shape[-2:])
    polynomials = POLYNOMIALS["polar_express"][:steps]
    by = products_on(x.device, polynomials)
    return in_16_bits(flat, polynomials, by).reshape(x.shape)


def _iterate(x: Tensor, chosen: Plan) -> Tensor:
    """Odd polynomials of wide X: p(X) = a X + (b X Xᵀ + c (X Xᵀ)²) X = q(X Xᵀ) X for each."""
    polynomials = POLYNOMIALS[chosen.method][: chosen.steps]
    flat = x.reshape(-1, *x.shape[-2:])
    on_cpu = x.device.type == "cpu"
    if _by_gram(flat.shape[-2], flat.shape[-1], on_cpu):
        count = _segments(chosen.method, flat.shape[-2], chosen.steps)
        return _iterate_by_gram(flat, polynomials, count).reshape(x.shape)
    flat = over_length(flat)
    parts = flat.split(max(1, CACHE // flat[0].numel())) if on_cpu else [flat]
    done = []
    for part in parts:
        for a, b, c in polynomials:
            gram = torch.bmm(part, part.mT)
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            part = torch.baddbmm(part, factor, part, beta=a)
        done.append(part)
    return (done[0] if len(done) == 1 else torch.cat(done)).reshape(x.shape)


_SUMMED = 512
"""Entries of a row that are summed in float32; float64 sums the rest. If the entries have a large
mean, all terms of X Xᵀ are near one number, and their rounding errors add up."""


def _gram_matrices(x: Tensor) -> Tensor:
    """X Xᵀ in float64 for a batch of X in float32, with an error that [`_SHIFT`] covers.

    Up to eight rows are multiplied in float64: they need more digits (see `_steps`), and the loops
    that libraries use for them lose up to 500 eps over 10,000 entries.
    """
    if x.shape[-2] <= 8:
        x = x.double()
        return torch.bmm(x, x.mT)
    first, *others = (torch.bmm(part, part.mT).double() for part in x.split(_SUMMED, -1))
    return sum(others, first)


def _iterate_by_gram(x: Tensor, polynomials: tuple[Polynomial, ...], count: int) -> Tensor:
    """The same for a batch (k, m, n) of long X, which multiplies the factors q first.

    R ← q R q replaces X Xᵀ, as in the package gram-newton-schulz, and X is multiplied only `count`
    times. Each new factor is multiplied from the left, as it would be on X: with rounding the
    factors do not commute. From the right, what rounding mixes of the largest singular direction
    into the smallest would be amplified by the earlier factors, up to 564 times.
    """
    gram = _gram_matrices(x)
    length = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[..., None, None]
    sound = _is_sound(length)
    if not sound.all():
        x = torch.where(sound, x, over_length(x))
        gram = _gram_matrices(x)
        length = torch.where(sound, length, 1)
    gram, length = (gram / length.square()).to(x.dtype), length.to(x.dtype)
    if count == 1:
        gram.diagonal(dim1=-2, dim2=-1).add_(_SHIFT * torch.finfo(gram.dtype).eps)
    size = math.ceil(len(polynomials) / count)
    for start in range(0, len(polynomials), size):
        gram = _gram_matrices(x).to(x.dtype) if start else gram
        factor = whole = gram
        for i, (a, b, c) in enumerate(polynomials[start : start + size]):
            gram = torch.bmm(factor, torch.bmm(gram, factor)) if i else gram
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            whole = torch.bmm(factor, whole) if i else factor
        x = _times(whole if start else whole / length, x)
    return x
