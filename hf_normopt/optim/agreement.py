"""Ranks agree before a step, so that all enter the same collectives or all raise.

Each rank hashes the settings that must be equal, and one reduction of fixed size compares the
digests. Only if they differ do ranks exchange the settings themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .sharding import local

Settings = dict[str, dict[str, str]]
"""Options and their values, by the name of a parameter, a group or "the optimizer"."""

DIGITS = 4  # of a digest, 16 bits each: exact in float32
COARSE = 1e-4  # relative difference of the norm of all gradients above which each is compared
FINE = 5e-3  # relative difference of a tensor's norm or sum that rounding may cause


@dataclass
class Proposal:
    """What a rank proposes for the step.

    Attributes:
        params: all parameters of the optimizer.
        complaint: why this rank cannot step; "" if it can.
        text: all that must be equal on the ranks.
        settings: the same by name, for the error; called only if the texts differ.
        is_watched: whether this rank watches the step.
        compares: whether replicas shall compare their gradients and weights by parameter.
    """

    params: Sequence[Tensor]
    complaint: str
    text: str
    settings: Callable[[], Settings]
    is_watched: bool = False
    compares: bool = False


@dataclass
class Decision:
    """What all ranks decided.

    Attributes:
        has_gradient: for each parameter, whether any rank has a gradient.
        is_watched: whether any rank watches the step.
        is_apart: whether replicas train separately: their gradients or weights differ.
        unequal: numbers of the parameters whose gradients replicas have not averaged.
    """

    has_gradient: list[bool]
    is_watched: bool
    is_apart: bool = False
    unequal: list[int] = field(default_factory=list)


def agree(
    proposal: Proposal, groups: Sequence[ProcessGroup], replicas: ProcessGroup | None
) -> Decision:
    """Decide what all ranks do in this step.

    Args:
        proposal: the proposal of this rank.
        groups: the process groups in which all ranks must do the same; includes `replicas`.
        replicas: the ranks that should hold the same gradients, if there are any.

    Raises:
        RuntimeError: on every rank, with the complaints of all ranks, or the first difference.
    """
    has = [p.grad is not None for p in proposal.params]
    if not groups:
        if proposal.complaint:
            raise RuntimeError(proposal.complaint)
        return Decision(has, proposal.is_watched)
    device = _device(proposal.params, groups[0])
    digests = [*_digest(proposal.text), *_digest(str(has))]
    flags = [bool(proposal.complaint), proposal.is_watched, proposal.compares]
    sent = torch.tensor([*flags, *digests, *(-digit for digit in digests)], device=device)
    ends = sent.new_zeros(2)
    for group in groups:
        if group is replicas:
            size = _norm_of_gradients(proposal.params, device)
            both = torch.cat([sent, size, -size])
            dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
            sent, ends = both[:-2], both[-2:]
        else:
            dist.all_reduce(sent, dist.ReduceOp.MAX, group=group)
    *found, most, least = torch.cat([sent, ends]).tolist()
    is_wrong, is_watched, compares, *found = found
    differs = [a != -b for a, b in zip(found[: 2 * DIGITS], found[2 * DIGITS :], strict=True)]
    if is_wrong or any(differs[:DIGITS]):
        raise RuntimeError(_disagreement(proposal, groups))
    decision, everyone = Decision(has, bool(is_watched)), has
    if any(differs[DIGITS:]):
        decision.has_gradient, everyone = _gradients_on_ranks(has, groups, device)
    if replicas is not None:
        decision.unequal = [
            i for i, (a, b) in enumerate(zip(decision.has_gradient, everyone, strict=True)) if a > b
        ]
        if compares or most + least > COARSE * most:
            _compare(proposal.params, everyone, replicas, device, decision)
    return decision


def average_inplace(params: Iterable[Tensor], replicas: ProcessGroup) -> None:
    """Average gradients that DDP has not averaged; every rank has one, possibly zeros."""
    for p in params:
        assert p.grad is not None
        if p.grad.is_sparse:
            p.grad = p.grad.to_dense()
        dist.all_reduce(local(p.grad), group=replicas)
        p.grad /= dist.get_world_size(replicas)


def mean_over(
    value: Tensor | float, groups: Sequence[ProcessGroup], params: Sequence[Tensor]
) -> Tensor:
    """The mean of a number of each rank, on the parameters' device if there are several ranks."""
    mean = torch.as_tensor(value, dtype=torch.float32).clone()
    for group in groups:
        mean = mean.to(_device(params, group))
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
    return mean


def first_difference(settings: Mapping[int, Settings]) -> str:
    """The first difference between ranks: where, in what, and both values; "" if there is none."""
    first, *others = sorted(settings)
    one = settings[first]
    is_same = lambda its: its == one and list(its) == list(one)
    other = next((rank for rank in others if not is_same(settings[rank])), None)
    if other is None:
        return ""
    another = settings[other]
    same = ", ".join(str(rank) for rank in others if settings[rank] == another)
    pairs = [
        (what, option, ours, theirs)
        for what in {**one, **another}
        for option in {**one.get(what, {}), **another.get(what, {})}
        if (ours := one.get(what, {}).get(option)) != (theirs := another.get(what, {}).get(option))
    ]
    absent = sorted(name for name in one.keys() ^ another.keys() if not name.startswith("the "))
    if absent:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        is_here, is_there = ("is not" if absent[0] not in its else "is" for its in (another, one))
        told = f"{absent[0]}{more} {is_here} trained; on rank {first} it {is_there}."
    elif pairs:
        what, option, ours, theirs = pairs[0]
        places = {what for what, *_ in pairs}
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        told = f"{what}{more} has {option} {theirs}; on rank {first} it has {ours}."
    else:
        here, there = next(two for two in zip(another, one, strict=True) if two[0] != two[1])
        told = f"the order of the parameters is another: {here} where rank {first} has {there}."
    return (
        f"On rank {same}: {told} All ranks need the same model and the same options: give every "
        "process the same arguments."
    )


def _digest(text: str) -> list[float]:
    raw = hashlib.sha256(text.encode()).digest()
    return [float(int.from_bytes(raw[2 * i : 2 * i + 2], "big")) for i in range(DIGITS)]


def _device(params: Sequence[Tensor], group: ProcessGroup) -> torch.device:
    if params:
        return local(params[0]).device
    accelerator = torch.accelerator.current_accelerator()
    is_cpu = accelerator is None or "gloo" in dist.get_backend(group)
    return torch.device("cpu") if is_cpu or accelerator is None else accelerator


def _disagreement(proposal: Proposal, groups: Sequence[ProcessGroup]) -> str:
    """The complaints of all ranks, or else their first difference."""
    found: dict[int, tuple[str, Settings]] = {
        dist.get_rank(): (proposal.complaint, proposal.settings())
    }
    for group in groups:
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, found, group=group)
        found = {rank: its for each in everyone for rank, its in each.items()}
    ranks = [str(rank) for rank, (complaint, _) in sorted(found.items()) if complaint]
    if ranks:
        texts = dict.fromkeys(complaint for complaint, _ in found.values() if complaint)
        return f"On rank {', '.join(ranks)}: {' '.join(texts)}"
    return first_difference({rank: settings for rank, (_, settings) in found.items()})


def _gradients_on_ranks(
    has: Sequence[bool], groups: Sequence[ProcessGroup], device: torch.device
) -> tuple[list[bool], list[bool]]:
    """Which parameters have a gradient on any rank, and which on all."""
    marks = torch.tensor([*has, *(not mark for mark in has)], dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(marks, dist.ReduceOp.MAX, group=group)
    found = [bool(mark) for mark in marks.tolist()]
    return found[: len(has)], [not lacks for lacks in found[len(has) :]]


def _norm_of_gradients(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """The norm of all gradients of this rank, as one entry."""
    by_kind: dict[Any, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            grad = _entries(p.grad)
            by_kind.setdefault((grad.dtype, grad.device), []).append(grad)
    norms = [
        norm.to(device, torch.float32)
        for grads in by_kind.values()
        for norm in torch._foreach_norm(grads)
    ]
    total = torch.stack(norms).norm() if norms else torch.zeros((), device=device)
    return total.nan_to_num(nan=3e38, posinf=3e38)[None]


def _entries(tensor: Tensor) -> Tensor:
    """The entries that this rank stores."""
    tensor = local(tensor.detach())
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def _compare(
    params: Sequence[Tensor],
    everyone: Sequence[bool],
    replicas: ProcessGroup,
    device: torch.device,
    decision: Decision,
) -> None:
    """Compare gradients and weights of replicas by norm and sum; note it in the decision."""
    shared = [i for i, has in enumerate(everyone) if has]
    tensors = [_entries(params[i].grad) for i in shared] + [_entries(p) for p in params]  # type: ignore[arg-type]
    sizes = [
        torch.stack([torch.linalg.vector_norm(wide), wide.sum()]).to(device, torch.float32)
        for tensor in tensors
        for wide in [tensor.to(torch.promote_types(tensor.dtype, torch.float32))]
    ]
    found = torch.stack(sizes).nan_to_num(nan=3e38, posinf=3e38, neginf=-3e38)
    ends = torch.stack([found, -found])
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=replicas)
    differs = (ends.double().sum(0) > FINE * ends[0, :, :1].double()).any(1).tolist()
    unequal = [i for i, is_other in zip(shared, differs, strict=False) if is_other]
    moving = (ends[0, : len(shared), 0] > 0).sum().item()
    decision.is_apart = any(differs[len(shared) :]) or 2 * len(unequal) > moving
    decision.unequal += unequal
