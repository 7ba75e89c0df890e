"""Polar factors on Hopper and Blackwell GPUs by the package gram-newton-schulz.

The package iterates on Gram matrices in float16, with kernels (quack) that compute only half of
each symmetric product. It is an extra, `pip install "hf_normopt[kernels]"`, for those who ask for
it, as in `optim_args="norm_linear=rms->rms(gram_newton_schulz)"`. It is used only if a test on the
device passes: matrices of known singular values must give their polar factors. It is not the
default because float16 products do not map a null space to 0.
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
    """The package's iteration of these polynomials; None, with a warning, if it cannot be used.

    Args:
        polynomials: (a, b, c) of p(x) = a x + b x³ + c x⁵, in the order of application.
        device: the device it will run on; CUDA devices use the kernels.

    Returns:
        A function from matrices (k, m, n) of Frobenius norm at most 1 to their polar factors, both
        in float32.
    """
    try:
        from gram_newton_schulz import GramNewtonSchulz

        iterate = GramNewtonSchulz(
            ns_coefficients=[list(polynomial) for polynomial in polynomials],
            ns_use_kernels=device.type == "cuda",
            gram_newton_schulz_reset_iterations=list(range(RESTART, len(polynomials), RESTART)),
            compile_kwargs=None,  # CUDA graphs would overwrite results at the next call
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
    """What is wrong with the polar factors of known matrices; "" if they are right."""
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
