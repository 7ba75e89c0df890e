"""Which ranks hold what: replicas (DDP), and shards of a parameter (`DTensor`: FSDP2, TP, EP)."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

NEEDS_WHOLE_MATRICES = (
    "FSDP1 flattens parameters, and a norm needs the whole matrix. Use FSDP2: "
    'TrainingArguments(fsdp=True, fsdp_config={"version": 2}), on the command line --fsdp true '
    """--fsdp_config '{"version": 2}', or accelerate launch --use_fsdp --fsdp_version 2. """
    "DDP and DeepSpeed's ZeRO are right too."
)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor that every rank has, with the placements of `like`."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def placed_as_its_parameter(gradient: Tensor, p: Tensor) -> Tensor:
    """A gradient with its parameter's placements; `Partial` ones are summed over their ranks."""
    if not isinstance(p, DTensor):
        return gradient
    if not isinstance(gradient, DTensor) or gradient.device_mesh != p.device_mesh:
        return sharded_like(gathered(gradient), p)
    if gradient.placements == p.placements:
        return gradient
    return gradient.redistribute(p.device_mesh, p.placements)


def places(p: Tensor) -> list[Tensor]:
    """For each axis of a parameter, the indices that this rank holds."""
    axes = [torch.arange(length, device=p.device) for length in p.shape]
    for axis in set((sharded_axes(p) if isinstance(p, DTensor) else None) or ()):
        assert isinstance(p, DTensor)
        placements = [_of_a_vector(placement, axis) for placement in p.placements]
        numbers = distribute_tensor(axes[axis], p.device_mesh, placements, src_data_rank=None)
        axes[axis] = local(numbers)
    return axes


def _of_a_vector(placement: Any, axis: int) -> Placement:
    """The placement of a vector that lies along one axis of the tensor."""
    if getattr(placement, "dim", None) != axis:
        return Replicate()
    if isinstance(placement, Shard):
        return Shard(0)
    return type(placement)(0, split_factor=placement.split_factor)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds; shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(shard: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor with the placements of `like`, from this rank's part of it.

    Args:
        shard: this rank's part.
        like: gives the placements; also the shape and strides if `shape` is None.
        shape: of the full tensor.
    """
    if not isinstance(like, DTensor):
        return shard
    full = like.shape if shape is None else torch.Size(shape)
    stride = like.stride() if shape is None else torch.empty(full, device="meta").stride()
    return DTensor.from_local(shard, like.device_mesh, like.placements, shape=full, stride=stride)


def sharded_axes(p: DTensor) -> list[int] | None:
    """The stored axes along which a parameter is sharded; None if a placement has no axis."""
    axes = []
    for placement in p.placements:
        if isinstance(placement, Replicate):
            continue
        dim = getattr(placement, "dim", None)  # _StridedShard has it too, but is no Shard
        if dim is None:
            return None
        axes.append(int(dim))
    return axes


def one_shard(p: DTensor) -> tuple[int, ProcessGroup] | None:
    """The axis and the ranks of a parameter's only `Shard`; None if it has others or `Partial`."""
    shards = [
        (placement.dim, p.device_mesh.get_group(i))
        for i, placement in enumerate(p.placements)
        if isinstance(placement, Shard)
    ]
    rest = sum(isinstance(placement, Replicate) for placement in p.placements)
    return shards[0] if len(shards) == 1 and rest == len(p.placements) - 1 else None


def divided_among(p: Tensor) -> tuple[ProcessGroup, ...]:
    """The ranks that hold the shards of a parameter, one group per mesh axis that shards it."""
    return _along_axes(p, is_replicated=False)


def number_of_parts(p: Tensor) -> int:
    """The number of shards of a parameter."""
    return math.prod(map(dist.get_world_size, divided_among(p)))


def copies_of(p: Tensor) -> ProcessGroup | None:
    """The ranks that hold the same shard of a parameter as this one (HSDP)."""
    return next(iter(_along_axes(p, is_replicated=True)), None)


def parts_are_multiples(p: DTensor, axis: int, size: int) -> bool:
    """Whether every shard has a multiple of `size` entries along an axis."""
    length = p.shape[axis]
    for i, placement in enumerate(p.placements):
        if getattr(placement, "dim", None) == axis:
            length = math.ceil(length / p.device_mesh.size(i))
            if length % size:
                return False
    return p.shape[axis] % size == 0


def _along_axes(p: Tensor, is_replicated: bool) -> tuple[ProcessGroup, ...]:
    if not isinstance(p, DTensor):
        return ()
    return tuple(
        p.device_mesh.get_group(i)
        for i, placement in enumerate(p.placements)
        if isinstance(placement, Replicate) == is_replicated and p.device_mesh.size(i) > 1
    )


def total(parts: Iterable[tuple[Tensor, tuple[ProcessGroup, ...]]]) -> Tensor:
    """The sum over parameters and ranks, with one reduction for each set of ranks.

    Args:
        parts: summands, each with the ranks whose summands add up; () if every rank has the sum.
    """
    sums: dict[tuple[ProcessGroup, ...], Tensor] = {}
    for part, ranks in parts:
        sums[ranks] = sums[ranks] + part.to(sums[ranks].device) if ranks in sums else part
    for ranks, part in sums.items():
        sums[ranks] = part = part.clone()
        for group in ranks:
            dist.all_reduce(part, group=group)
    first, *others = sums.values()
    return sum((other.to(first.device) for other in others), start=first)


def shard_sizes(length: int, ranks: int) -> list[int]:
    """The lengths of the parts of a `Shard`: as torch.chunk's, then zeros."""
    size = math.ceil(length / ranks)
    return [max(0, min(size, length - rank * size)) for rank in range(ranks)]


def replicas() -> ProcessGroup | None:
    """The ranks of accelerate's DDP, which hold the same parameters and gradients."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    state: Any = AcceleratorState() if AcceleratorState._shared_state else None
    if not str(getattr(state, "distributed_type", "")).partition(".")[2].startswith("MULTI_"):
        return None  # MULTI_CPU, MULTI_GPU, ...
    if getattr(state, "parallelism_config", None) is not None:
        return None
    return dist.group.WORLD


def wrappers_of(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The DDP modules that average the gradients of these parameters.

    Parameters do not know their DDP module, so this searches all live objects.
    """
    own = set(map(id, params))
    modules = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [
        module
        for module in modules
        if "_modules" in vars(module) and any(id(p) in own for p in module.parameters())
    ]


def is_alone(module: DistributedDataParallel) -> bool:
    """Whether ranks step separately: under `no_sync` (local SGD) or torch's `Join`."""
    joins = getattr(getattr(module, "_join_config", None), "enable", False)
    return bool(joins or not module.require_backward_grad_sync)


def groups_of(
    params: Sequence[Tensor], ranks: ProcessGroup | None, others: Iterable[ProcessGroup] = ()
) -> list[ProcessGroup]:
    """The ranks with which this one must do the same: replicas, every mesh's, and others."""
    groups = [*others] if ranks is None else [ranks, *others]
    for mesh in dict.fromkeys(p.device_mesh for p in params if isinstance(p, DTensor)):
        groups += [mesh.get_group(i) for i in range(mesh.ndim)]
    return [group for group in dict.fromkeys(groups) if dist.get_world_size(group) > 1]


def deepspeed_config() -> dict[str, Any]:
    """The DeepSpeed config that accelerate uses; empty without DeepSpeed."""
    state = AcceleratorState() if AcceleratorState._shared_state else None
    plugin = getattr(state, "deepspeed_plugin", None)
    return getattr(plugin, "deepspeed_config", None) or {}


def deepspeed_stage() -> int:
    """The stage of ZeRO with which accelerate runs DeepSpeed; 0 without."""
    return int((deepspeed_config().get("zero_optimization") or {}).get("stage") or 0)


def check_deepspeed(unfit: str, by_entry: bool) -> None:
    """Complain if DeepSpeed would train otherwise, or put its own optimizer in our place.

    Args:
        unfit: why the optimizer cannot step with ZeRO's partitions; "" if it can.
        by_entry: whether it steps each entry by itself.

    Raises:
        ValueError: says what to change.
    """
    config = deepspeed_config()
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage")
    device = (zero.get("offload_optimizer") or {}).get("device") or "none"
    if device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        way_out = ', or set "zero_force_ds_cpu_optimizer": false' if by_entry else ""
        raise ValueError(
            f"The DeepSpeed config offloads the optimizer to {device}, and accelerate would train "
            f"with DeepSpeedCPUAdam in place of NormOpt. Remove offload_optimizer{way_out}."
        )
    if not stage or by_entry:
        return
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size") or 0
    reasons = {
        f"The optimizer's partitions would be offloaded to {device}, to where the ranks cannot "
        "exchange what a norm needs. Remove offload_optimizer.": device != "none",
        "With round_robin_gradients ZeRO does not say where a parameter's entries are. Remove "
        "it.": zero.get("round_robin_gradients"),
        "Its tensor parallelism divides matrices, and a norm needs the whole one. Set autotp_size "
        "to 1.": tensor_parallel > 1,
        unfit: unfit,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"The DeepSpeed config has ZeRO stage {stage}. {reason}")
