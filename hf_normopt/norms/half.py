"""Polar Express with products in float16, for devices on which these are far faster than float32.

Products of 16-bit factors are accumulated in float32 and rounded once. float16, and not bfloat16:
of equal rate, it has 11 bits where bfloat16 has 8, and all that is multiplied here is scaled to lie
in its range. What rounding adds to a null space is multiplied by all later steps, up to 1940: in
bfloat16 it ends in singular values of 1, in float16 below [`NULL`]. TF32 has float16's bits at half
of its rate.

Three things keep it there:

* X is divided by what its largest singular value needs, and not by ‖X‖_F, where small singular
  values would matter, and else by up to ‖X‖_F, see `_bound`;
* the part a I of each factor a I + b X Xᵀ + c (X Xᵀ)² is added and never rounded into a factor;
* a Gram matrix is iterated upon for [`RESTART`] steps at most, and then found anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LEAST, NULL = 64, 0.25
"""Matrices of fewer rows are computed in float32: there rounding is greatest, and time least. And
the largest singular value of what rounding puts into a null space."""

RESTART = 3
SIZE = 4.0
"""The largest singular value, so that entries lie in float16's range: from 4 / √(m n) to 16."""

_SMALL = 60.0  # see `_bound`


@dataclass(frozen=True)
class Device:
    """What a device does in a second, by its maker's data sheet, without sparsity.

    Attributes:
        float32: operations of products in float32 as torch computes them by default.
        float16: those of products in float16 that are accumulated in float32.
        bandwidth: bytes of its memory.
    """

    float32: float
    float16: float
    bandwidth: float

    @property
    def is_faster_in_16_bits(self) -> bool:
        """By enough to pay for the conversions."""
        return self.float16 >= 1.5 * self.float32


# By compute capability for CUDA, by architecture for ROCm. Of the data-center part where there are
# several, which has the highest ratio: the ratio is at least 1.5 on all of them.
DEVICES = {
    "7.0": Device(15.7e12, 125e12, 0.9e12),  # V100 SXM2
    "7.5": Device(8.1e12, 65e12, 0.32e12),  # T4
    "8.0": Device(19.5e12, 312e12, 2.04e12),  # A100 SXM 80 GB
    "8.6": Device(31.2e12, 125e12, 0.6e12),  # A10
    "8.9": Device(91.6e12, 362e12, 0.864e12),  # L40S
    "9.0": Device(67e12, 989e12, 3.35e12),  # H100 SXM; an H200 has 4.8e12 bytes
    "10.0": Device(75e12, 2250e12, 7.7e12),  # B200
    "12.0": Device(104.8e12, 209.5e12, 1.79e12),  # GeForce RTX 5090
    "gfx90a": Device(23.9e12, 191.5e12, 1.6e12),  # MI250X, one of two dies
    "gfx942": Device(163.4e12, 1307e12, 5.3e12),  # MI300X
    "xpu": Device(52e12, 839e12, 3.2e12),  # Data Center GPU Max 1550
}
NAMES = {"v100": "7.0", "t4": "7.5", "a100": "8.0", "a10": "8.6", "l40s": "8.9", "h100": "9.0"}
NAMES |= {"h200": "9.0", "b200": "10.0", "mi250": "gfx90a", "mi300": "gfx942"}


@cache
@torch.compiler.assume_constant_result
def device_of(device: str | torch.device) -> Device | None:
    """The row of a device, or of one's name; None where nothing is known, as for CPUs and MPS.

    A CUDA device newer than the table is taken for the last one before it, and "cuda" on a machine
    without one for an H100.
    """
    name = str(device)
    if name in NAMES:
        return DEVICES[NAMES[name]]
    kind = name.split(":")[0]
    if kind == "xpu":
        return DEVICES["xpu"]
    if kind != "cuda":
        return None
    if not torch.cuda.is_available():
        return DEVICES["9.0"]
    if torch.version.hip:
        return DEVICES.get(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    capability = torch.cuda.get_device_capability(device)
    known = [key for key in DEVICES if key[0].isdigit()]
    older = [key for key in known if tuple(map(int, key.split("."))) <= capability]
    return DEVICES[older[-1]] if older else None


class Products:
    """Products of batches of matrices in float16, accumulated in float32."""

    def rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """Scale · x in 16 bits, for x in float32 or in 16 bits, in one pass."""
        if x.requires_grad or torch.compiler.is_compiling():
            return (x * scale).to(torch.float16)
        return torch.mul(x, scale, out=torch.empty_like(x, dtype=torch.float16))

    def product(self, a: Tensor, b: Tensor, symmetric: bool = False) -> Tensor:
        """A B; `symmetric` says that the result is, for those who use it."""
        return torch.bmm(a, b)

    def added(
        self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, symmetric: bool = False
    ) -> Tensor:
        """Beta C + alpha A B, rounded once."""
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha)


def steps_of(m: int) -> int:
    """Polynomials for m singular values of 1e-3 of the largest and more."""
    return 6 if m <= 4096 else 7


def segment(m: int, n: int) -> int:
    """Steps on one Gram matrix, two products with X: one where X is not much longer."""
    return RESTART if 2 * n > 3 * m else 1


def work(m: int, n: int) -> float:
    """Operations for a matrix; those of symmetric products are counted in full."""
    steps, size = steps_of(m), segment(m, n)
    starts = math.ceil(steps / size)
    return starts * 4.0 * m * m * n + (steps + 3 * (steps - starts)) * 2.0 * m**3


def in_16_bits(
    x: Tensor, polynomials: Sequence[tuple[float, float, float]], by: Products
) -> Tensor:
    """Polar factors of wide matrices (k, m, n) in float32, m >= 2.

    Efficiency is 0.98 where all singular values are 1e-3 of the largest or more, or are 0; none
    ends above 1.02, and a null space in [`NULL`] at most.
    """
    size = segment(*x.shape[-2:])
    starts = range(0, len(polynomials), size)
    x = by.rounded(x, SIZE * _over_length(x))
    for start in starts:
        gram = by.product(x, x.mT, symmetric=True)
        last = SIZE if start == starts[-1] else 1.0
        if start:
            x = _segment(x, gram, polynomials[start : start + size], by, last)
            continue
        bound = _bound(gram, by)
        gram = by.rounded(gram, 1 / bound.square())
        x = _segment(x, gram, polynomials[:size], by, last)
        x = by.rounded(x, 1 / bound)
    return x.float()


def _over_length(x: Tensor) -> Tensor:
    """1 / ‖X‖_F, and where squares have overflowed or underflowed a smaller one; 1 for 0."""
    length = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    largest = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
    sound = (length > 1e-15) & (length < 1e15)
    most = largest * math.sqrt(x.shape[-2] * x.shape[-1])
    length = torch.where(sound, length, most.clamp(1e-37, 3e38))
    return torch.where(largest == 0, 1.0, torch.where(largest.isfinite(), 1 / length, torch.nan))


def _bound(gram: Tensor, by: Products) -> Tensor:
    """What X is to be divided by, at least its largest singular value.

    That is at most (Σ σ⁸)^(1/8), the Frobenius norm of (X Xᵀ)², which is near it. But the more is
    multiplied by the first steps, the more is rounding, so that X is not made larger than need be.
    At l = 60 ‖X‖_F² / (m σ) no more than 0.9 % is lost: Polar Express loses 1.5e-4 l for each
    singular value below 1e-3 l, and their sum is ‖X‖_F² / σ at least.

    Args:
        gram: SIZE² X Xᵀ, for ‖X‖_F near 1.
        by: the products.
    """
    m, scale = gram.shape[-1], SIZE**2
    fourth = torch.linalg.matrix_norm(gram.float(), keepdim=True)
    fourth = torch.where(fourth == 0, 1.0, fourth) / scale  # (Σ σ⁴)^(1/2)
    gram = by.rounded(gram, 1 / fourth)
    squares = gram.diagonal(dim1=-2, dim2=-1).float().sum(-1)[..., None, None] / scale
    square = by.product(gram, gram, symmetric=True).float()
    eighth = torch.linalg.matrix_norm(square, keepdim=True).sqrt().sqrt() / SIZE
    eighth = torch.where(eighth == 0, 1.0, eighth)
    most = torch.minimum(squares.sqrt(), _SMALL / m * squares / eighth)
    return torch.maximum(eighth, most) * fourth.sqrt()


def _segment(
    x: Tensor,
    gram: Tensor,
    polynomials: Sequence[tuple[float, float, float]],
    by: Products,
    size: float,
) -> Tensor:
    """(α I + Q) X over `size`, for the product α I + Q of the factors a I + B.

    `gram`, all Q and B are SIZE² times what they stand for.
    """
    over = SIZE**-2
    total, whole = 1.0, None
    for i, (a, b, c) in enumerate(polynomials):
        factor = by.added(gram, gram, gram, b, c * over, symmetric=True)
        if i + 1 < len(polynomials):  # (a I + B) X Xᵀ (a I + B)
            gram = by.added(gram, gram, factor, a, over, symmetric=True)
            gram = by.added(gram, factor, gram, a, over, symmetric=True)
        if whole is None:
            whole = factor
        else:  # (a I + B) (α I + Q)
            both = by.added(whole, factor, whole, a, over, symmetric=True)
            whole = both.add_(factor, alpha=total)
        total *= a
    assert whole is not None
    return by.added(x, whole, x, total / size, over / size)
