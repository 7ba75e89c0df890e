"""Parameters that are spread over ranks (FSDP2's `DTensor`): a norm needs the whole operator.

Each rank gathers a parameter's momentum, computes the direction, and keeps its own shard of it. All
ranks enter the same collectives, parameter by parameter.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, placed as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


NEEDS_WHOLE_MATRICES = (
    "FSDP1 and DeepSpeed ZeRO flatten parameters, and a norm needs the whole matrix: use DDP, or "
    'FSDP2 (fsdp_config={"version": 2}), or ZeRO stage 0.'
)


def deepspeed_config() -> dict[str, Any]:
    """The config with which accelerate runs DeepSpeed, whoever gave it; empty without DeepSpeed."""
    state = AcceleratorState() if AcceleratorState._shared_state else None
    plugin = getattr(state, "deepspeed_plugin", None)
    return getattr(plugin, "deepspeed_config", None) or {}


def check_deepspeed() -> None:
    """Complain if DeepSpeed would take the matrices apart, or put its own optimizer in our place.

    Raises:
        ValueError: naming the way out.
    """
    config = deepspeed_config()
    zero = config.get("zero_optimization") or {}
    if zero.get("stage"):
        raise ValueError(
            f"The DeepSpeed config has ZeRO stage {zero['stage']}. {NEEDS_WHOLE_MATRICES}"
        )
    device = (zero.get("offload_optimizer") or {}).get("device") or "none"
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"The DeepSpeed config offloads the optimizer to {device}, and accelerate would train "
            "with DeepSpeedCPUAdam in place of NormOpt. Remove offload_optimizer, or set "
            '"zero_force_ds_cpu_optimizer": false.'
        )
