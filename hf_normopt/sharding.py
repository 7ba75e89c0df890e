"""Parameters that are spread over ranks (FSDP2's `DTensor`): a norm needs the whole operator.

Each rank gathers a parameter's momentum, computes the direction, and keeps its own shard of it. All
ranks enter the same collectives, parameter by parameter.
"""

from __future__ import annotations

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
