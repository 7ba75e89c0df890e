"""Storage in few bits: momenta in 16 or 8, and weights in 16 that do not lose small steps.

All arithmetic is in float32 at least; this file stores its results.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .sharding import local, parts_are_multiples, placed_like, sharded_axes

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)

MOMENTUM_DTYPES = ("float32", "bfloat16", "8bit")
"""8bit: blocks of up to [`BLOCK`] entries, each with a scale (Dettmers et al. 2022, arXiv
2110.02861), by torchao. [`block_of`] says which momenta stay in float32."""

BLOCK = 256
LEAST_BLOCK = 16  # 1.25 bytes an entry

ROUNDINGS = ("nearest", "stochastic", "kahan")
"""How weights in 16 bits take a step. A step below half of a weight's last bit is lost to "nearest"
(in bfloat16 1/512 of the weight). "stochastic" rounds up as often as is right on average; "kahan",
the default, keeps what was rounded off, two more bytes for each weight, and adds it to the next
step. For bfloat16 this is the lower half of a float32's bits, so that nothing is lost at all."""


def state_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which momenta and statistics are computed: float32 at least."""
    return torch.promote_types(p.dtype, torch.float32)


def is_low(p: Tensor) -> bool:
    """Whether the weights are stored in fewer bits than they are computed in."""
    return p.dtype != state_dtype(p)


def check_precision(params: Iterable[Tensor], momentum_dtype: str, rounding: str) -> None:
    """Check the options of precision; warn once where steps will be lost.

    Raises:
        ValueError: for an unknown option, or a rounding that does not suit a dtype.
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
            'rounding="kahan", the default, or "stochastic" it has, and with float32 weights.',
            low[0].dtype,
        )
    if rounding == "kahan" and low:
        logger.info(
            "Weights in %s keep what is rounded off of them: two more bytes each. "
            'rounding="stochastic" needs none.',
            low[0].dtype,
        )


def _state_8bit() -> Any:
    """Torchao's class for 8-bit state; importing it also lets `torch.load` read it."""
    try:
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError(
            f'momentum_dtype="8bit" needs torchao: pip install "hf_normopt[torchao]" ({error}).'
        ) from error
    return OptimState8bit


def block_of(p: Tensor) -> int:
    """The number of entries of an 8-bit momentum that share a scale; 0 if it stays in float32.

    A block lies within a row, and FSDP2 does not cut rows: the blocks are the same on any number of
    ranks. A momentum stays in float32 if it has fewer than 4096 entries, if its rows do not divide
    into blocks of at least [`LEAST_BLOCK`] entries, or if a shard ends within a block.
    """
    row = math.prod(p.shape[1:] or p.shape)  # of the shape alone: p[0] would gather a DTensor
    block = math.gcd(BLOCK, row)
    if p.numel() < 4096 or block < LEAST_BLOCK:
        return 0
    if not isinstance(p, DTensor):
        return block
    axes, last = sharded_axes(p), p.ndim - 1
    if axes is None:
        return 0
    cuts_rows = any(axis > 0 or p.ndim == 1 for axis in axes)
    is_cut = last in axes and not parts_are_multiples(p, last, block)
    return 0 if cuts_rows and (p.shape[last] % block or is_cut) else block


def new_momentum(p: Tensor, momentum_dtype: str) -> Tensor:
    """A momentum of zeros for a parameter."""
    shard = local(p)
    block = block_of(p) if momentum_dtype == "8bit" and shard.numel() else 0
    if block:
        zeros = _state_8bit().zeros(
            shard.shape, block_size=block, device=shard.device, dtype=state_dtype(p)
        )
        return placed_like(zeros, p)
    dtype = torch.bfloat16 if momentum_dtype == "bfloat16" else state_dtype(p)
    return torch.zeros_like(p, dtype=dtype)


def new_compensation(p: Tensor) -> Tensor:
    """Zeros for the rounding errors that `write_inplace` keeps under "kahan"."""
    return torch.zeros_like(p, dtype=torch.int16 if p.dtype == torch.bfloat16 else p.dtype)


def loaded_momentum(saved: Tensor, p: Tensor, momentum_dtype: str) -> Tensor:
    """A checkpoint's momentum in the format of this run; bit for bit if the format is the same."""
    momentum = new_momentum(p, momentum_dtype)
    own, other = local(momentum), local(saved)
    is_same = type(own) is type(other)
    is_same = is_same and getattr(own, "block_size", 0) == getattr(other, "block_size", 0)
    own.copy_(other if is_same else local(widened(saved, state_dtype(p))).to(own.device))
    return momentum


def loaded_compensation(saved: Tensor, p: Tensor) -> Tensor:
    """A checkpoint's rounding errors; 0 if they belong to weights of another dtype.

    Those of bfloat16 are stored as bits, those of float16 as numbers.
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


def packed(state: Mapping[str, Any], p: Tensor, momentum_dtype: str) -> dict[str, Any]:
    """A parameter's state for a checkpoint, in dtypes that ranks can send to each other.

    * 8 bits: codes and scales as two tensors, placed as the parameter;
    * int16 compensations: the same bits as bfloat16, since neither gloo nor NCCL sends int16;
    * no state: a mark, since `torch.distributed.checkpoint` does not load an empty state.
    """
    made = dict(state)
    momentum = made.get("momentum_buffer")
    block = block_of(p) if momentum_dtype == "8bit" and momentum is not None else 0
    if momentum is not None and block:
        kept: Any = local(momentum)
        last = p.shape[-1]
        is_empty = not kept.numel()
        own, full = (
            (*s[:-1], last // block) if last % block == 0 else (s[0], math.prod(s[1:]) // block)
            for s in (kept.shape, p.shape)
        )
        if is_empty or hasattr(kept, "codes"):
            codes = kept.to(torch.uint8) if is_empty else kept.codes
            scale = kept.new_zeros(own) if is_empty else kept.scale.to(kept.dtype).reshape(own)
            del made["momentum_buffer"]
            made["momentum_codes"] = placed_like(codes, p)
            made["momentum_scale"] = placed_like(scale, p, full)
    compensation = made.get("compensation")
    if compensation is not None and compensation.dtype == torch.int16:
        made["compensation"] = placed_like(local(compensation).view(torch.bfloat16), p)
    return made or {"stateless": torch.zeros(1, device=local(p).device)}


def unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of [`packed`]; leaves a state that was not packed as it is."""
    made = {key: value for key, value in state.items() if key != "stateless"}
    if "momentum_codes" in made and "momentum_scale" in made:
        codes, scale = made.pop("momentum_codes"), made.pop("momentum_scale")
        own, scales = local(codes), local(scale)
        kept = own.to(scale.dtype)
        if own.numel():
            cls = _state_8bit()
            qmap = cls.zeros((1,), block_size=1, device=own.device).qmap
            kept = cls(own, scales.flatten().float(), qmap, True, dtype=scale.dtype)
        made["momentum_buffer"] = placed_like(kept, codes)
    compensation = made.get("compensation")
    if isinstance(compensation, Tensor) and compensation.dtype == torch.bfloat16:
        made["compensation"] = placed_like(local(compensation).view(torch.int16), compensation)
    return made


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
    noise: Tensor | None,
) -> None:
    """P ← kept · p - rate · update in float32, rounded to the 16 bits of p.

    Args:
        p: the weights.
        update: the direction, in float32.
        rate: of the update.
        kept: the factor of the weight decay.
        rounding: one of [`ROUNDINGS`].
        state: has the `compensation` for "kahan".
        noise: from [`entry_noise`], for "stochastic".
    """
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
    rounded = exact.to(p.dtype) if noise is None else _stochastic(exact, noise)
    if compensation is not None:
        compensation.copy_(exact - rounded)
    p.copy_(rounded)


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a float32, or of a bfloat16, which is the upper half of one."""
    if tensor.dtype == torch.float32:
        return tensor.view(torch.int32)
    return tensor.view(torch.int16).to(torch.int32)


def entry_noise(text: str, axes: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """16 random bits for each entry: a hash of a text and of the entry's index in the parameter.

    They are the same on every replica, in every sharding, and after a resume. The hash is lowbias32
    (Wellons 2018, github.com/skeeto/hash-prospector), with the text mixed into both rounds.

    Args:
        text: names the draw.
        axes: for each axis, the indices of the entries.
        shape: of the full parameter.
    """
    bits = torch.zeros((), dtype=torch.int32, device=axes[0].device if axes else None)
    for numbers, length in zip(axes, shape, strict=True):
        bits = bits.unsqueeze(-1) * length + numbers.to(torch.int32)
    digest = hashlib.sha256(text.encode()).digest()
    for i, (shift, factor) in enumerate(((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))):
        bits = bits ^ int.from_bytes(digest[4 * i : 4 * i + 4], "big", signed=True)
        bits = (bits ^ _shifted(bits, shift)) * factor
    return _shifted(bits, 16)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> places) & ((1 << (32 - places)) - 1)


def _stochastic(exact: Tensor, noise: Tensor) -> Tensor:
    """Round to bfloat16, the upper half of a float32, after adding noise to the lower half."""
    rounded = ((_bits(exact) + noise.to(exact.device)) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isnan(), exact, rounded).to(torch.bfloat16)
