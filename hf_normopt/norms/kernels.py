"""Symmetric products on Hopper and Blackwell GPUs, by the package quack.

Its kernel computes one half of a symmetric product. It comes with the package gram-newton-schulz,
an extra, `pip install "hf_normopt[kernels]"`, and is used for products in float16 once a test on
the device has passed: matrices of known singular values must come out as `half.py` promises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .half import NULL, Products, in_16_bits

logger = logging.getLogger(__name__)

LEAST_EFFICIENCY, LARGEST = 0.98, 1.02
SHAPE = (256, 512)  # the least for which there are kernels

Kernel = Callable[..., Tensor]
Polynomials = tuple[tuple[float, float, float], ...]


class SymmetricProducts(Products):
    """The same, with a kernel for those whose result is symmetric."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def product(self, a: Tensor, b: Tensor, symmetric: bool = False) -> Tensor:
        """A B."""
        if not symmetric or a.shape[-2] < SHAPE[0]:
            return super().product(a, b)
        return self.kernel(a, b)

    def added(
        self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float, symmetric: bool = False
    ) -> Tensor:
        """Beta C + alpha A B."""
        if not symmetric or a.shape[-2] < SHAPE[0]:
            return super().added(c, a, b, beta, alpha)
        return self.kernel(a, b, C=c, alpha=alpha, beta=beta)


def products_on(device: torch.device, polynomials: Polynomials) -> Products:
    """The products of a device: with the kernel where there is one and it does what it should."""
    if device.type != "cuda" or torch.version.hip or torch.compiler.is_compiling():
        return Products()
    return _tested(device, polynomials)


@cache
def _tested(device: torch.device, polynomials: Polynomials) -> Products:
    if torch.cuda.get_device_capability(device)[0] < 9:
        return Products()
    return symmetric_products(device, polynomials)


def symmetric_products(device: torch.device, polynomials: Polynomials) -> Products:
    """With the kernel if it is installed and passes the test; a warning says what it fails."""
    try:
        from quack.gemm_interface import gemm_symmetric
    except ImportError:
        return Products()
    try:
        by = SymmetricProducts(gemm_symmetric)
        complaint = _complaint(by, device, polynomials)
    except Exception as error:  # an unknown GPU, a kernel that does not compile, other arguments
        complaint = f"{type(error).__name__}: {error}"
    if not complaint:
        return by
    logger.warning(
        "The package quack is installed, but its symmetric product is not used on %s: %s. PyTorch's"
        " own takes its place.",
        device,
        complaint,
    )
    return Products()


def _complaint(by: Products, device: torch.device, polynomials: Polynomials) -> str:
    """What is wrong with polar factors of known matrices; "" if nothing is."""
    m, n = SHAPE
    generator = torch.Generator().manual_seed(0)
    spectra = {
        "singular values from 1 to 1e-3": torch.logspace(0, -3, m),
        "equal singular values": torch.ones(m),
        "rank 1": torch.eye(m)[0],
    }
    for name, spectrum in spectra.items():
        u = torch.linalg.qr(torch.randn(m, m, generator=generator))[0]
        v = torch.linalg.qr(torch.randn(n, m, generator=generator))[0]
        x = (u * spectrum) @ v.T
        found = in_16_bits(x[None].to(device), polynomials, by).float().cpu()[0]
        if not found.isfinite().all():
            return f"{name} give NaN or infinity"
        largest = torch.linalg.matrix_norm(found, 2).item()
        if largest > LARGEST:
            return f"{name} give a singular value of {largest:.3f}"
        efficiency = ((x * found).sum() / (largest * spectrum.sum())).item()
        if not efficiency >= LEAST_EFFICIENCY:
            return f"{name} give an efficiency of {efficiency:.3f}"
        null = torch.linalg.matrix_norm(u[:, spectrum == 0].T @ found, 2) if not spectrum[-1] else 0
        if null > NULL:
            return f"{name} give a null space of {float(null):.3f}"
    return ""
