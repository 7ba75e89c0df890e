"""The polar factor of a matrix: `orthogonalize(G) = U Vᵀ` for the reduced SVD `G = U Σ Vᵀ`.

It is the LMO of the spectral norm (Bernstein & Newhouse 2024, Prop. 5) and the nearest
semi-orthogonal matrix (Prop. 4), unique where G has full rank. On the null space every choice
attains the same inner product; here it is mapped to 0, so that nothing is moved without a gradient.

Two families of methods:

* exact: `svd`, and `gram`, the eigendecomposition in float64 of the smaller Gram matrix,
  `(G Gᵀ)^(-1/2) G`, the form that the paper's equations 12 to 16 give to Shampoo;
* iterations of odd polynomials (Appendix A, equation 37), which need matrix products only: every
  key of [`POLYNOMIALS`].
"""

from __future__ import annotations

import torch
from torch import Tensor

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
}

METHODS = ("auto", "svd", "gram", *POLYNOMIALS)

# Singular values below this fraction of the largest count as 0. For float64 input: above the
# rounding of an SVD. For all else, in float32 at best: above the rounding of a product of
# rank-deficient factors, and so small that what it drops is at most 0.4 % of the nuclear norm at
# 4096 singular values.
_NULL_FLOAT64 = 1e-13
_NULL_FLOAT32 = 8 * torch.finfo(torch.float32).eps


def orthogonalize(g: Tensor, method: str = "auto", accuracy: float | None = None) -> Tensor:
    """Polar factor of every matrix in a batch.

    Args:
        g: matrices of shape (..., m, n), any floating dtype; never changed.
        method: one of [`METHODS`]. `"auto"` is exact on CPUs (`svd` in float64, `gram` in the other
            dtypes) and the converged `polar_express` iteration on other devices, in float32: with
            products in float16 or bfloat16 it fills a null space with singular values of 1.
        accuracy: the least LMO efficiency ⟨G, O⟩ / (‖O‖ ‖G‖†) that `"auto"` must give on every
            spectrum. Every choice that it makes today has at least 0.98; a larger number asks for
            an exact method.

    Returns:
        A tensor of g's shape and dtype, computed in float32 at least. Zero matrices and null spaces
        give 0 (rounding to float16 or bfloat16 has filled a null space before it comes here); a
        matrix that holds an infinity or NaN gives NaN.

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
    if method == "auto":
        exact = g.device.type == "cpu" or g.dtype == torch.float64 or (accuracy or 0) > 0.98
        method = "polar_express" if not exact else "svd" if g.dtype == torch.float64 else "gram"

    x = g.to(torch.promote_types(g.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    wide = wide / _largest_entry(wide)  # no square below can overflow or underflow
    if method in ("svd", "gram") and wide.shape[-2] == 1:
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        polar = wide / torch.where(length == 0, 1, length)  # depthwise kernels: thousands of them
    elif method == "svd":
        polar = _svd(wide)
    elif method == "gram":
        polar = _gram(wide)
    else:
        polar = _iterate(wide, POLYNOMIALS[method])
    return (polar.mT if tall else polar).to(g.dtype)


def _largest_entry(x: Tensor) -> Tensor:
    """Largest absolute entry of each matrix, 1 for a zero matrix."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest == 0, torch.ones_like(largest), largest)


def _inverse(singular: Tensor, tolerance: float) -> Tensor:
    """1 / σ, and 0 where σ is 0 to within the tolerance; σ in ascending or descending order."""
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
    """(X Xᵀ)^(-1/2) X for wide X, in float64; a square has half of its digits."""
    x = x.double()
    gram = x @ x.mT
    finite = gram.isfinite().all((-2, -1))[..., None, None]
    eigenvalues, q = torch.linalg.eigh(torch.where(finite, gram, 0))
    inverse = _inverse(eigenvalues.clamp_min(0).sqrt(), _NULL_FLOAT32)
    return torch.where(finite, (q * inverse[..., None, :]) @ q.mT @ x, torch.nan)


def _iterate(x: Tensor, polynomials: tuple[Polynomial, ...]) -> Tensor:
    """Odd polynomials of wide X, each one p(X) = a X + (b X Xᵀ + c (X Xᵀ)²) X."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x
