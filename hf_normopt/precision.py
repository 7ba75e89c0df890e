"""Momenta in few bits, and weights in 16 bits that lose no small step.

All arithmetic is in float32 at least; here is what is kept of its results.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .sharding import local, placed_like

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)

MOMENTUM_DTYPES = ("float32", "bfloat16", "8bit")
"""8bit: blocks of [`BLOCK`] entries with a scale each (Dettmers et al. 2022, arXiv 2110.02861), by
torchao. What is smaller than 4096 entries, or no whole number of blocks, is in float32."""

BLOCK = 256

ROUNDINGS = ("nearest", "stochastic", "kahan")
"""How weights in 16 bits take a step. A step below half of a weight's last bit is lost to "nearest"
(in bfloat16 1/512 of the weight). "stochastic" rounds up as often as is right on average; "kahan"
keeps what was rounded off, two more bytes for each weight, and adds it to the next step. For
bfloat16 this is the lower half of a float32's bits, so that nothing is lost at all."""


def state_dtype(p: Tensor) -> torch.dtype:
    """Momenta and statistics are computed in float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def is_low(p: Tensor) -> bool:
    """Whether the weights have fewer bits than their arithmetic."""
    return p.dtype != state_dtype(p)


def check_precision(params: Iterable[Tensor], momentum_dtype: str, rounding: str) -> None:
    """Complain about what cannot be done, and say once what will be lost.

    Raises:
        ValueError: for an unknown name, or a dtype that cannot be rounded so.
        ImportError: if torchao is needed and missing.
    """
    for name, value, known in (
        ("momentum_dtype", momentum_dtype, MOMENTUM_DTYPES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}.")
    if momentum_dtype == "8bit":
        _state_8bit()
    low = [p for p in params if is_low(p)]
    if rounding == "stochastic" and any(p.dtype != torch.bfloat16 for p in low):
        dtypes = {str(p.dtype) for p in low}
        raise ValueError(
            f'rounding="stochastic" is for bfloat16 and found {", ".join(sorted(dtypes))}: '
            'use rounding="kahan".'
        )
    if rounding == "nearest" and low:
        warn_once(
            "Some weights are %s, and rounding is to the nearest: a step that is smaller than half "
            "of a weight's last bit (1/512 of the weight for bfloat16) has no effect. With "
            'rounding="stochastic" or "kahan" (optim_args="rounding=kahan") it has, and with '
            "float32 weights.",
            low[0].dtype,
        )


def _state_8bit() -> Any:
    """Torchao's tensor of 8-bit blocks; an import also lets `torch.load` read it."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError(
            f'momentum_dtype="8bit" needs torchao: pip install "hf_normopt[torchao]" ({error}).'
        ) from error
    return OptimState8bit


def new_momentum(p: Tensor, momentum_dtype: str) -> Tensor:
    """Zeros of the shape of p."""
    shard = local(p)
    if momentum_dtype == "8bit" and shard.numel() >= 4096 and shard.numel() % BLOCK == 0:
        zeros = _state_8bit().zeros(
            shard.shape, block_size=BLOCK, device=shard.device, dtype=state_dtype(p)
        )
        return placed_like(zeros, p)
    dtype = torch.bfloat16 if momentum_dtype == "bfloat16" else state_dtype(p)
    return torch.zeros_like(p, dtype=dtype)


def new_compensation(p: Tensor) -> Tensor:
    """Zeros for what `write_inplace` keeps under "kahan"."""
    return torch.zeros_like(p, dtype=torch.int16 if p.dtype == torch.bfloat16 else p.dtype)


def loaded_momentum(saved: Tensor, p: Tensor, momentum_dtype: str) -> Tensor:
    """A checkpoint's momentum as it is kept now; the same bits if it was kept so."""
    momentum = new_momentum(p, momentum_dtype)
    own, other = local(momentum), local(saved)
    is_same = type(own) is type(other)
    own.copy_(other if is_same else local(widened(saved, state_dtype(p))).to(own.device))
    return momentum


def loaded_compensation(saved: Tensor, p: Tensor) -> Tensor:
    """A checkpoint's compensation; 0 where it was kept for weights of another dtype.

    What bfloat16 rounds off is kept as bits, what float16 rounds off as a number.
    """
    compensation = new_compensation(p)
    if saved.dtype == compensation.dtype:
        return compensation.copy_(saved)
    warn_once(
        'rounding="kahan": the checkpoint keeps what was rounded off as %s, for weights of another '
        "dtype than %s. Compensations start at 0.",
        saved.dtype,
        p.dtype,
    )
    return compensation


def widened(momentum: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum in full precision."""
    kept = local(momentum)
    if not hasattr(kept, "block_size"):
        return momentum.to(dtype)
    return placed_like(kept.dequantize().to(dtype), momentum)


def write_inplace(
    p: Tensor,
    update: Tensor,
    rate: Tensor | float,
    kept: Tensor | float,
    rounding: str,
    state: Mapping[str, Tensor],
    noise: torch.Generator | None,
) -> None:
    """P ← kept · p - rate · update in float32, rounded to the 16 bits of p."""
    p, update = local(p), local(update)
    compensation = local(state["compensation"]) if rounding == "kahan" else None
    if compensation is None:
        exact = p.to(update.dtype)
    elif p.dtype == torch.bfloat16:
        exact = ((_bits(p) << 16) + compensation).view(torch.float32)
    else:
        exact = p.to(update.dtype) + compensation
    exact.mul_(kept).sub_(update * rate)
    if compensation is not None and p.dtype == torch.bfloat16:
        upper = (_bits(exact) + (1 << 15)) >> 16
        compensation.copy_(_bits(exact) - (upper << 16))
        rounded = upper.to(torch.int16).view(torch.bfloat16)
        p.copy_(torch.where(exact.isnan(), torch.nan, rounded))
        return
    rounded = _stochastic(exact, noise) if rounding == "stochastic" else exact.to(p.dtype)
    if compensation is not None:
        compensation.copy_(exact - rounded)
    p.copy_(rounded)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a float32, or of a bfloat16, which is the upper half of one."""
    if tensor.dtype == torch.float32:
        return tensor.view(torch.int32)
    return tensor.view(torch.int16).to(torch.int32)


def _stochastic(exact: Tensor, noise: torch.Generator | None) -> Tensor:
    """To bfloat16, the upper half of a float32's bits, by adding noise to the lower half."""
    bits = _bits(exact)
    random = torch.randint(1 << 16, bits.shape, generator=noise, device=bits.device)
    rounded = ((bits + random.to(torch.int32)) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isnan(), exact, rounded).to(torch.bfloat16)
