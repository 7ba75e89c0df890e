"""Several ranks: every whole operator has one owner, which computes its direction for all.

* Replicas (DDP) all have the momenta. Each computes the directions of its own operators and
  broadcasts them: 1 / ranks of the work, and the entries of these operators once per step.
* Shards (FSDP2, TP) go to the parameter's owner and its direction comes back, by all-to-all: each
  entry is sent twice per step, but for those that the owner holds.

Directions whose shards do not need each other, such as experts, the rows of a head and Adam's, are
found where they lie ([`localized`]). What is left (several sharded axes, other statistics, step
sizes that need dual norms of shards) is gathered by every rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from .layouts import Layout
from .moves import Move, smooth_inplace
from .norms import Spectral
from .orthogonalize import plan
from .precision import state_dtype
from .sharding import one_shard, shard_sizes, sharded_axes

BUCKET = 2**24  # entries that are sent at a time, or one operator of each rank if that is more


@lru_cache
def assign(costs: tuple[float, ...], ranks: int) -> tuple[int, ...]:
    """The owner of each piece of work: the largest first, each to who has least (Graham 1969)."""
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + costs[i], rank))
    return tuple(owners)


def is_shared(move: Move) -> bool:
    """Whether replicas share the work: an operator's direction costs more than to send it."""
    is_spectral = isinstance(move.rule.norm, Spectral) and move.rule.statistic is None
    return is_spectral and not isinstance(move.param, DTensor)


def localized(move: Move) -> Move | None:
    """The move of this rank's shard by itself, where it is that of the whole parameter."""
    p, rule = move.param, move.rule
    axes = sharded_axes(p) if isinstance(p, DTensor) else None
    if axes is None:
        return None
    if not rule.entrywise:
        if rule.statistic is not None or rule.scale == "muon":
            return None
        if any(move.layout.axis(i) not in rule.norm.independent for i in axes):
            return None
    return move.of_shard()


def is_exchanged(move: Move) -> bool:
    """Whether a parameter's shards can be sent to an owner and back."""
    p = move.param
    return isinstance(p, DTensor) and move.rule.statistic is None and one_shard(p) is not None


def shared_inplace(
    moves: Sequence[Move], ranks: ProcessGroup, weight: Tensor | float, keep: bool
) -> Iterator[Move]:
    """Find the directions of replicas' moves; each is yielded with its own.

    A rank holds the directions of its own operators, and those of two buckets.

    Args:
        moves: of replicas.
        ranks: who hold them.
        weight: of the gradients.
        keep: whether `smooth` is wanted too.
    """
    for alike in _alike(moves):
        yield from _shared_inplace(alike, ranks, weight, keep)


def _shared_inplace(
    moves: Sequence[Move], ranks: ProcessGroup, weight: Tensor | float, keep: bool
) -> Iterator[Move]:
    me, world = dist.get_rank(ranks), dist.get_world_size(ranks)
    shapes = [operator_shapes(move.stacked_layout, _stored_shape(move)) for move in moves]
    owners = iter(assign(tuple(_costs(moves, shapes)), world))
    shares = [[_Share(shape, owners, world) for shape in of_move] for of_move in shapes]
    for move, share in zip(moves, shares, strict=True):
        smooth = smooth_inplace(move, weight)[0]
        if keep:
            move.smooth = smooth
        operators = move.stacked_layout.to_operators(smooth)
        for part, operator in zip(share, operators, strict=True):
            if part.places[me]:
                mine = operator.reshape(-1, *operator.shape[-2:])[part.places[me]]
                part.found = move.rule.norm.lmo(mine, move.scale(mine.shape))
    pending = None
    for bucket in _buckets([math.prod(_stored_shape(move)) for move in moves], world):
        parts = [part for i in bucket for part in shares[i]]
        like = torch.empty(0, dtype=state_dtype(moves[0].param), device=moves[0].param.device)
        sending = [_Broadcast(parts, rank, like, ranks) for rank in range(world)]
        if pending is not None:
            yield from _arrived(moves, shares, *pending)
        pending = bucket, sending
    if pending is not None:
        yield from _arrived(moves, shares, *pending)


class _Share:
    """The operators (batch, m, n) of a tensor: which are whose, and the directions of one's own."""

    def __init__(self, shape: tuple[int, ...], owners: Iterator[int], world: int) -> None:
        self.shape = shape
        self.places: list[list[int]] = [[] for _ in range(world)]
        for i in range(math.prod(shape[:-2])):
            self.places[next(owners)].append(i)
        self.found: Tensor | None = None

    def entries(self, rank: int) -> int:
        return len(self.places[rank]) * math.prod(self.shape[-2:])


class _Broadcast:
    """The directions that one rank has found of some tensors."""

    def __init__(
        self, parts: Sequence[_Share], rank: int, like: Tensor, ranks: ProcessGroup
    ) -> None:
        self.size = sum(part.entries(rank) for part in parts)
        if not self.size:
            return
        if rank == dist.get_rank(ranks):
            self.buffer = torch.cat([p.found.flatten() for p in parts if p.found is not None])
        else:
            self.buffer = like.new_empty(self.size)
        self.work = dist.broadcast(self.buffer, group=ranks, group_src=rank, async_op=True)

    def wait(self) -> Tensor | None:
        if not self.size:
            return None
        self.work.wait()
        return self.buffer


def _arrived(
    moves: Sequence[Move],
    shares: Sequence[Sequence[_Share]],
    bucket: Sequence[int],
    sending: Sequence[_Broadcast],
) -> Iterator[Move]:
    received = [one.wait() for one in sending]
    taken = [0] * len(received)
    for i in bucket:
        directions = []
        for part in shares[i]:
            direction = None
            for rank, (places, buffer) in enumerate(zip(part.places, received, strict=True)):
                if not places:
                    continue
                assert buffer is not None
                found = buffer[taken[rank] : taken[rank] + part.entries(rank)]
                taken[rank] += part.entries(rank)
                if direction is None:
                    direction = found.new_empty((math.prod(part.shape[:-2]), *part.shape[-2:]))
                direction[places] = found.reshape(-1, *part.shape[-2:])
            assert direction is not None
            directions.append(direction.reshape(part.shape))
            part.found = None
        shape = _stored_shape(moves[i])
        moves[i].direction = moves[i].stacked_layout.from_operators(tuple(directions), shape)
        yield moves[i]


def exchanged_inplace(moves: Sequence[Move], weight: Tensor | float) -> Iterator[Move]:
    """Find the directions of sharded moves; each is yielded as the move of this rank's shard.

    A rank holds its shards of a bucket of parameters, and those that it owns whole, a few times.
    """
    for alike in _alike(moves):
        yield from _exchanged_inplace(alike, _shard(alike[0])[1], weight)


def _exchanged_inplace(
    moves: Sequence[Move], ranks: ProcessGroup, weight: Tensor | float
) -> Iterator[Move]:
    me, world = dist.get_rank(ranks), dist.get_world_size(ranks)
    for bucket in _buckets([move.param.numel() for move in moves], world):
        some = [moves[i] for i in bucket]
        shapes = [operator_shapes(move.layout, tuple(move.param.shape)) for move in some]
        costs = tuple(sum(_costs([m], [of])) for m, of in zip(some, shapes, strict=True))
        owners = assign(costs, world)
        axes = [_shard(move)[0] for move in some]
        sizes = [
            [
                math.prod(_shard_shape(m.param, axis, rank, world))
                for m, axis in zip(some, axes, strict=True)
            ]
            for rank in range(world)
        ]  # of each rank's shards
        shards = [move.of_shard() for move in some]
        smooth = [smooth_inplace(shard, weight)[0] for shard in shards]
        owned = [[i for i, owner in enumerate(owners) if owner == rank] for rank in range(world)]
        gone = [sum(sizes[me][i] for i in owned[rank]) for rank in range(world)]
        come = [sum(sizes[rank][i] for i in owned[me]) for rank in range(world)]
        outgoing = torch.cat([smooth[i].flatten() for rank in range(world) for i in owned[rank]])
        arrived = outgoing.new_empty(sum(come))
        dist.all_to_all_single(arrived, outgoing, come, gone, group=ranks)
        pieces = _cut(arrived, [sizes[rank][i] for rank in range(world) for i in owned[me]])
        answers: list[list[Tensor]] = [[] for _ in range(world)]
        for place, i in enumerate(owned[me]):
            move, axis = some[i], axes[i]
            whole = torch.cat(
                [
                    pieces[rank * len(owned[me]) + place].reshape(
                        _shard_shape(move.param, axis, rank, world)
                    )
                    for rank in range(world)
                ],
                axis,
            )
            found = tuple(
                move.rule.norm.lmo(operator, move.scale(operator.shape))
                for operator in move.layout.to_operators(whole)
            )
            direction = move.layout.from_operators(found, tuple(whole.shape))
            lengths = shard_sizes(whole.shape[axis], world)
            for rank, part in enumerate(direction.split(lengths, axis)):
                answers[rank].append(part.flatten())
        back = torch.cat([part for rank in range(world) for part in answers[rank]] or [arrived])
        returned = torch.empty_like(outgoing)
        dist.all_to_all_single(returned, back, gone, come, group=ranks)
        order = [i for rank in range(world) for i in owned[rank]]
        for i, piece in zip(order, _cut(returned, [sizes[me][i] for i in order]), strict=True):
            shards[i].direction = piece.reshape(shards[i].param.shape)
            yield shards[i]


def _shard(move: Move) -> tuple[int, ProcessGroup]:
    p = move.param
    assert isinstance(p, DTensor)
    shard = one_shard(p)
    assert shard is not None
    return shard


def _alike(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Moves that can be sent together."""
    kinds: dict[Any, list[Move]] = {}
    for move in moves:
        p = move.param
        ranks = _shard(move)[1] if isinstance(p, DTensor) else None
        kinds.setdefault((state_dtype(p), p.device, ranks), []).append(move)
    yield from kinds.values()


def _shard_shape(p: Tensor, axis: int, rank: int, world: int) -> tuple[int, ...]:
    shape = list(p.shape)
    shape[axis] = shard_sizes(shape[axis], world)[rank]
    return tuple(shape)


def _cut(flat: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return flat.split(list(sizes)) if sizes else []


def _stored_shape(move: Move) -> tuple[int, ...]:
    """Of `smooth`."""
    shape = tuple(move.param.shape)
    return shape if move.alone else (len(move.params), *shape)


@cache
def operator_shapes(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a tensor's operators."""
    operators = layout.to_operators(torch.empty(shape, device="meta"))
    return tuple(tuple(operator.shape) for operator in operators)


def _costs(moves: Sequence[Move], shapes: Sequence[tuple[tuple[int, ...], ...]]) -> Iterator[float]:
    """The work of each operator."""
    for move, of_move in zip(moves, shapes, strict=True):
        norm = move.rule.norm
        for *batch, m, n in of_move:
            work = float(m * n)
            if isinstance(norm, Spectral):
                work += plan((m, n), torch.float32, move.param.device.type, norm.method).work
            yield from (work for _ in range(math.prod(batch)))


def _buckets(sizes: Sequence[int], world: int) -> Iterator[list[int]]:
    """Consecutive moves that make up [`BUCKET`] entries, or more for a few operators a rank."""
    most = max(BUCKET, 4 * world * max(sizes, default=0))
    bucket: list[int] = []
    entries = 0
    for i, size in enumerate(sizes):
        if bucket and entries + size > most:
            yield bucket
            bucket, entries = [], 0
        bucket.append(i)
        entries += size
    if bucket:
        yield bucket
