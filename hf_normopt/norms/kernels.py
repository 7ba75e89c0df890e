"""Symmetric products on Hopper and Blackwell GPUs, by the package gram-newton-schulz.

The package iterates on Gram matrices in float16, with kernels (quack) that compute half of a
symmetric product. It is an extra, `pip install "hf_normopt[kernels]"`, and is used where it is
asked for, as in `optim_args="norm_linear=rms->rms(gram_newton_schulz)"`, and only after a test on
the device: matrices of known singular values must come out as polar factors. Null spaces do not
come out as 0, since products are in float16, which is why it is not the default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RESTART = 3  # steps on one Gram matrix in float16: with four, rounding begins to show
LEAST_EFFICIENCY, LARGEST = 0.97, 1.02
_SHAPE = (256, 512)  # the least for which the package has kernels


@cache
def gram_newton_schulz(
    polynomials: tuple[tuple[float, float, float], ...], device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """The package's iteration of these polynomials; None, with a warning, where it is of no use.

    Args:
        polynomials: (a, b, c) of p(x) = a x + b x³ + c x⁵, in turn.
        device: on which it will run; kernels are used on CUDA devices.

    Returns:
        A function of matrices (k, m, n) of length 1 at most, in float32; the result is too.
    """
    try:
        from gram_newton_schulz import GramNewtonSchulz

        iterate = GramNewtonSchulz(
            ns_coefficients=[list(polynomial) for polynomial in polynomials],
            ns_use_kernels=device.type == "cuda",
            gram_newton_schulz_reset_iterations=list(range(RESTART, len(polynomials), RESTART)),
            compile_kwargs=None,  # else results would lie in memory that the next call overwrites
        )
        complaint = _complaint(iterate, device)
    except Exception as error:  # a missing package, an unknown GPU, a kernel that does not compile
        complaint = f"{type(error).__name__}: {error}"
    if complaint:
        logger.warning(
            "The package gram-newton-schulz is not used on %s: %s. Our own iteration takes its "
            'place. The package is an extra: pip install "hf_normopt[kernels]".',
            device,
            complaint,
        )
        return None
    return iterate


def _complaint(iterate: Callable[[Tensor], Tensor], device: torch.device) -> str:
    """What is wrong with polar factors of known matrices; "" if nothing is."""
    m, n = _SHAPE
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
        found = iterate((x / x.norm())[None].to(device)).float().cpu()[0]
        if not found.isfinite().all():
            return f"{name} give NaN or infinity"
        largest = torch.linalg.matrix_norm(found, 2).item()
        if largest > LARGEST:
            return f"{name} give a singular value of {largest:.3f}"
        efficiency = ((x * found).sum() / (largest * spectrum.sum())).item()
        if not efficiency >= LEAST_EFFICIENCY:
            return f"{name} give an efficiency of {efficiency:.3f}"
    return ""
