"""The step on several ranks: every operator has one owner, which computes its direction for all.

* Replicas (DDP) all have the momenta. Each rank computes the directions of its own operators and
  broadcasts them: 1 / ranks of the work, and each entry of these operators sent once per step.
* Shards (FSDP2, TP) go to the parameter's owner, and its direction comes back, by all-to-all: each
  entry that the owner does not hold is sent twice per step. Where shards have replicas (HSDP), the
  owner is one rank among all of them and broadcasts the answer to its replicas.

Some directions do not need other shards: those of experts, of the rows of a head, of Adam. Each
rank computes its part of them ([`_localized`]). Every rank gathers what is left (several sharded
axes, other statistics). The same owners compute dual norms; only the sum is communicated.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ..norms.layouts import Layout
from ..norms.operators import Norm, Spectral
from ..norms.orthogonalize import plan
from .batches import parts
from .moves import Move, smooth_inplace, smooths_own_rows
from .precision import state_dtype
from .sharding import (
    copies_of,
    gathered,
    local,
    one_shard,
    shard_sizes,
    sharded_axes,
)

BUCKET = 2**24  # entries sent at a time, or four operators of each rank if that is more


@lru_cache
def assign(costs: tuple[float, ...], ranks: int) -> tuple[int, ...]:
    """The owner of each piece of work: the largest first, to the least busy rank (Graham 1969)."""
    loads = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        owners[i] = rank
        heapq.heappush(loads, (load + costs[i], rank))
    return tuple(owners)


def _localized(move: Move) -> Move | None:
    """This rank's shard as a move of its own; None if its direction needs other shards."""
    p, rule = move.param, move.rule
    axes = sharded_axes(p) if isinstance(p, DTensor) else None
    if axes is None:
        return None
    if not rule.entrywise:
        needs_others = rule.statistic is not None and not smooths_own_rows(move)
        if needs_others or rule.scale == "muon":
            return None
        if any(move.layout.axis(i) not in rule.norm.independent for i in axes):
            return None
    return move.of_shard()


def _routed(moves: Sequence[Move], full: bool = False) -> tuple[list[Move], list[Move], list[Move]]:
    """Moves that replicas share, moves whose shards go to owners, and moves of this rank alone.

    Replicas share spectral directions, which cost more to compute than to send. Unless every rank
    needs the full direction, a move that needs no other shard becomes that of this rank's shard.
    """
    shared, exchanged, own = [], [], []
    for move in moves:
        p, rule = move.param, move.rule
        if not rule.norm.independent:  # a product, whose factors stay together
            own.append(move)
            continue
        shard = None if full else _localized(move)
        is_spectral = isinstance(rule.norm, Spectral) and rule.statistic is None
        has_one_shard = isinstance(p, DTensor) and one_shard(p) is not None
        if is_spectral and (shard or move).copies is not None:
            shared.append(shard or move)
        elif shard is None and not full and rule.statistic is None and has_one_shard:
            exchanged.append(move)
        else:
            own.append(shard or move)
    return shared, exchanged, own


def directed_inplace(
    moves: Sequence[Move], weight: Tensor | float, unit: Tensor | float, keep: bool, full: bool
) -> Iterator[Move]:
    """Compute the directions; yield each move with its own, sharded ones as moves of the shard.

    Args:
        moves: moves of parameters, advanced by this.
        weight: the weight of the gradients.
        unit: the sum of the weights in this step, for the statistic's eps.
        keep: whether `smooth` is needed later; large moves are then not split into parts.
        full: whether every rank needs the full direction of each parameter.
    """
    shared, exchanged, own = _routed(moves, full)
    for together in _stackable(shared):
        yield from _by_replicas_inplace(together, weight, keep)
    for together in _stackable(exchanged):
        yield from _by_owners_inplace(together, weight, keep)
    for move in own if keep else chain(*map(parts, own)):
        move.advance_inplace(weight, unit)
        yield move


def dual_norms(
    moves: Sequence[Move], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, tuple[ProcessGroup, ...]]]:
    """Parts of the network's dual norm: scale · multiplier · dual norm of each tensor.

    Args:
        moves: moves of single parameters.
        tensors: one for each move, placed as its parameter.

    Yields:
        Values that this rank has computed, with the ranks over which they add up.
    """
    placed = {move.param: tensor for move, tensor in zip(moves, tensors, strict=True)}

    def tensor_of(move: Move) -> Tensor:
        return placed[move.param] if move.whole is None else local(placed[move.whole])

    shared, exchanged, own = _routed(moves)
    for move in own:
        yield move.dual(gathered(tensor_of(move))), move.shards
    for together in _stackable(shared):
        assert together[0].copies is not None
        ranks = (together[0].copies, *together[0].shards)
        for move, ownerships in zip(together, _ownerships(together), strict=True):
            dual = tensor_of(move).new_zeros(())
            operators = move.layout.to_operators(tensor_of(move))
            for ownership, operator in zip(ownerships, operators, strict=True):
                dual = dual + move.dual_of(ownership.mine_of(operator))
            yield dual, ranks
    for together in _stackable(exchanged):
        for exchange in _exchanges(together):
            exchange.send([local(tensor_of(move)) for move in exchange.moves])
            yield exchange.empty.new_zeros(()), exchange.ranks  # all enter the reduction
            for move, full in exchange.received():
                yield move.dual(full), exchange.ranks


# Replicas


def _by_replicas_inplace(
    moves: Sequence[Move], weight: Tensor | float, keep: bool
) -> Iterator[Move]:
    """Compute the directions of this rank's operators, and broadcast them bucket by bucket.

    A rank holds its own directions and those of two buckets.
    """
    ownerships = _ownerships(moves)
    for move, of_move in zip(moves, ownerships, strict=True):
        smooth = smooth_inplace(move, weight)[0]
        if keep:
            move.smooth = smooth
        operators = move.stacked_layout.to_operators(smooth)
        for ownership, operator in zip(of_move, operators, strict=True):
            mine = ownership.mine_of(operator)
            ownership.directions = (
                move.rule.norm.lmo(mine, move.scale(mine.shape)) if len(mine) else mine
            )
    pending = None
    sizes = [math.prod(_stored_shape(move)) for move in moves]
    for bucket in [*buckets(sizes, dist.get_world_size(moves[0].copies)), []]:
        sending = _broadcasts([one for i in bucket for one in ownerships[i]], moves[0])
        if pending is not None:
            yield from _arrived(moves, ownerships, *pending)
        pending = bucket, sending


class _Ownership:
    """Which rank owns which of the operators (batch, m, n) of a tensor.

    Attributes:
        directions: of the operators that this rank owns, until they are sent.
    """

    directions: Tensor

    def __init__(self, shape: tuple[int, ...], owners: Iterator[int], world: int, me: int) -> None:
        self.shape, self.me = shape, me
        self.owned: list[list[int]] = [[] for _ in range(world)]
        for i in range(math.prod(shape[:-2])):
            self.owned[next(owners)].append(i)

    def entries(self, rank: int) -> int:
        """The number of entries of the operators that a rank owns."""
        return len(self.owned[rank]) * math.prod(self.shape[-2:])

    def mine_of(self, operators: Tensor) -> Tensor:
        """The operators that this rank owns, (owned, m, n)."""
        return operators.reshape(-1, *operators.shape[-2:])[self.owned[self.me]]


def _ownerships(moves: Sequence[Move]) -> list[list[_Ownership]]:
    """The ownership of each tensor of operators, for each move."""
    ranks = moves[0].copies
    world, me = dist.get_world_size(ranks), dist.get_rank(ranks)
    shapes = [operator_shapes(move.stacked_layout, _stored_shape(move)) for move in moves]
    owners = iter(assign(tuple(_costs(moves, shapes)), world))
    return [[_Ownership(shape, owners, world, me) for shape in of_move] for of_move in shapes]


class _Broadcasts:
    """A buffer from each rank to its replicas, all on their way at once."""

    def __init__(self, buffers: Sequence[Tensor], ranks: ProcessGroup) -> None:
        self._buffers = buffers
        self._works = [
            dist.broadcast(buffer, group=ranks, group_src=source, async_op=True)
            for source, buffer in enumerate(buffers)
            if buffer.numel()
        ]

    def wait(self) -> Sequence[Tensor]:
        """The buffers, once all have arrived."""
        for work in self._works:
            work.wait()
        return self._buffers


def _broadcasts(ownerships: Sequence[_Ownership], move: Move) -> _Broadcasts:
    """Broadcasts of the directions that each rank has computed."""
    ranks = move.copies
    assert ranks is not None
    me, empty = dist.get_rank(ranks), _empty(move)
    buffers = [
        torch.cat([one.directions.flatten() for one in ownerships] or [empty])
        if rank == me
        else empty.new_empty(sum(one.entries(rank) for one in ownerships))
        for rank in range(dist.get_world_size(ranks))
    ]
    return _Broadcasts(buffers, ranks)


def _arrived(
    moves: Sequence[Move],
    ownerships: Sequence[Sequence[_Ownership]],
    bucket: Sequence[int],
    sending: _Broadcasts,
) -> Iterator[Move]:
    """Put the directions of a bucket together; yield its moves."""
    received = sending.wait()
    taken = [0] * len(received)
    for i in bucket:
        directions = []
        for ownership in ownerships[i]:
            *batch, m, n = ownership.shape
            direction = received[0].new_empty((math.prod(batch), m, n))
            for rank, (owned, buffer) in enumerate(zip(ownership.owned, received, strict=True)):
                end = taken[rank] + ownership.entries(rank)
                direction[owned] = buffer[taken[rank] : end].reshape(-1, m, n)
                taken[rank] = end
            directions.append(direction.reshape(ownership.shape))
            del ownership.directions
        shape = _stored_shape(moves[i])
        moves[i].direction = moves[i].stacked_layout.from_operators(tuple(directions), shape)
        yield moves[i]


# Shards


def _by_owners_inplace(moves: Sequence[Move], weight: Tensor | float, keep: bool) -> Iterator[Move]:
    """Send shards to their owners bucket by bucket; yield the moves whose directions came back.

    While owners compute the directions of one bucket, the next bucket travels to them and the one
    before travels back. A rank holds its shards of three buckets, and the full parameters that it
    owns in one.
    """
    sent = answered = None
    for exchange in chain(_exchanges(moves), (None, None)):
        if exchange is not None:
            shards = [move.of_shard() for move in exchange.moves]
            smooth = [smooth_inplace(shard, weight)[0] for shard in shards]
            exchange.send(smooth)
            if keep:
                for shard, momentum in zip(shards, smooth, strict=True):
                    shard.smooth = momentum
        if sent is not None:
            sent[0].answer([direction_of(move, full) for move, full in sent[0].received()])
        if answered is not None:
            for i, direction in answered[0].returned():
                answered[1][i].direction = direction
                yield answered[1][i]
        answered, sent = sent, None if exchange is None else (exchange, shards)


def direction_of(move: Move, smooth: Tensor) -> Tensor:
    """The LMO at what the norm receives, without a statistic."""
    layout = move.stacked_layout
    operators = layout.to_operators(smooth)
    directions = tuple(move.rule.norm.lmo(o, move.scale(o.shape)) for o in operators)
    return layout.from_operators(directions, tuple(smooth.shape))


def _exchanges(moves: Sequence[Move]) -> Iterator[_AllToAll]:
    """One exchange for each bucket of sharded parameters."""
    owners = math.prod(map(dist.get_world_size, _AllToAll.ranks_of(moves[0])))
    for bucket in buckets([move.param.numel() for move in moves], owners):
        yield _AllToAll([moves[i] for i in bucket])


class _AllToAll:
    """Sends the shards of tensors to their owners, and the owners' answers back as shards.

    Owners are numbered by replica, and within a replica by rank among the shards. Each replica
    exchanges what it owns, and broadcasts every shard of the answers to the other replicas.

    Args:
        moves: moves of the parameters that give the tensors their shapes and placements.
    """

    def __init__(self, moves: Sequence[Move]) -> None:
        self.moves = moves
        self._axes = [self._shard_of(move)[0] for move in moves]
        self.ranks = self.ranks_of(moves[0])
        self.empty = _empty(moves[0])
        self.group, *rest = self.ranks
        self.copies = rest[0] if rest else None
        self.me, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.replica = dist.get_rank(self.copies) if self.copies else 0
        replicas = dist.get_world_size(self.copies) if self.copies else 1
        shapes = [operator_shapes(move.layout, tuple(move.param.shape)) for move in moves]
        costs = tuple(sum(_costs([m], [of])) for m, of in zip(moves, shapes, strict=True))
        self._owned: list[list[list[int]]] = [
            [[] for _ in range(self.world)] for _ in range(replicas)
        ]
        for i, owner in enumerate(assign(costs, self.world * replicas)):
            self._owned[owner // self.world][owner % self.world].append(i)

    @staticmethod
    def ranks_of(move: Move) -> tuple[ProcessGroup, ...]:
        """The ranks that hold the shards, and the replicas of a shard if there are any."""
        group, copies = _AllToAll._shard_of(move)[1], copies_of(move.param)
        return (group,) if copies is None else (group, copies)

    @staticmethod
    def _shard_of(move: Move) -> tuple[int, ProcessGroup]:
        assert isinstance(move.param, DTensor)
        shard = one_shard(move.param)
        assert shard is not None
        return shard

    def send(self, shards: Sequence[Tensor]) -> None:
        """Start sending this rank's shards to the owners."""
        mine = self._owned[self.replica]
        self._gone = [sum(self._entries(i, self.me) for i in owned) for owned in mine]
        self._come = [
            sum(self._entries(i, rank) for i in mine[self.me]) for rank in range(self.world)
        ]
        outgoing = torch.cat([self.empty, *(shards[i].flatten() for i in chain(*mine))])
        self._travel(outgoing, self._come, self._gone)

    def received(self) -> Iterator[tuple[Move, Tensor]]:
        """The full tensors that this rank owns, each with the move of its parameter."""
        owned = self._owned[self.replica][self.me]
        sizes = [self._entries(i, rank) for rank in range(self.world) for i in owned]
        pieces = self._arrival().split(sizes)
        for place, i in enumerate(owned):
            parts = [
                pieces[rank * len(owned) + place].reshape(self._shape(i, rank))
                for rank in range(self.world)
            ]
            yield self.moves[i], torch.cat(parts, self._axes[i])

    def answer(self, answers: Sequence[Tensor]) -> None:
        """Start sending back one full tensor for each that was received, in the same order."""
        owned = self._owned[self.replica][self.me]
        parts: list[list[Tensor]] = [[] for _ in range(self.world)]
        for i, full in zip(owned, answers, strict=True):
            axis = self._axes[i]
            lengths = shard_sizes(full.shape[axis], self.world)
            for rank, part in enumerate(full.split(lengths, axis)):
                parts[rank].append(part.flatten())
        self._travel(torch.cat([self.empty, *chain(*parts)]), self._gone, self._come)

    def returned(self) -> Iterator[tuple[int, Tensor]]:
        """This rank's shards of the answers, each with the number of its parameter."""
        orders = [list(chain(*owned)) for owned in self._owned]
        sizes = [[self._entries(i, self.me) for i in order] for order in orders]
        buffers: Sequence[Tensor] = [
            self._arrival() if replica == self.replica else self.empty.new_empty(sum(entries))
            for replica, entries in enumerate(sizes)
        ]
        if self.copies is not None:
            buffers = _Broadcasts(buffers, self.copies).wait()
        for order, entries, buffer in zip(orders, sizes, buffers, strict=True):
            for i, piece in zip(order, buffer.split(entries), strict=True):
                yield i, piece.reshape(self._shape(i, self.me))

    def _travel(self, outgoing: Tensor, come: list[int], gone: list[int]) -> None:
        self._outgoing, self._arriving = outgoing, outgoing.new_empty(sum(come))
        self._work = dist.all_to_all_single(
            self._arriving, outgoing, come, gone, group=self.group, async_op=True
        )

    def _arrival(self) -> Tensor:
        self._work.wait()
        del self._outgoing
        return self._arriving

    def _shape(self, i: int, rank: int) -> tuple[int, ...]:
        shape, axis = list(self.moves[i].param.shape), self._axes[i]
        shape[axis] = shard_sizes(shape[axis], self.world)[rank]
        return tuple(shape)

    def _entries(self, i: int, rank: int) -> int:
        return math.prod(self._shape(i, rank))


# Both


def _stackable(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Groups of moves that can be sent together: of one dtype, device and set of ranks."""
    kinds: dict[Any, list[Move]] = {}
    for move in moves:
        p = move.param
        ranks = _AllToAll.ranks_of(move) if isinstance(p, DTensor) else (move.copies, move.shards)
        kinds.setdefault((state_dtype(p), p.device, ranks), []).append(move)
    yield from kinds.values()


def _empty(move: Move) -> Tensor:
    """A tensor without entries, of the dtype and device in which momenta are sent."""
    return torch.empty(0, dtype=state_dtype(move.param), device=move.param.device)


def _stored_shape(move: Move) -> tuple[int, ...]:
    """The shape of `smooth`."""
    shape = tuple(move.param.shape)
    return shape if move.alone else (len(move.params), *shape)


@cache
def operator_shapes(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a tensor's operators."""
    operators = layout.to_operators(torch.empty(shape, device="meta"))
    return tuple(tuple(operator.shape) for operator in operators)


def _costs(moves: Sequence[Move], shapes: Sequence[tuple[tuple[int, ...], ...]]) -> Iterator[float]:
    """The work of each operator, the same on ranks with different GPUs."""
    for move, of_move in zip(moves, shapes, strict=True):
        device = "cpu" if move.param.device.type == "cpu" else "meta"
        yield from costs(move.rule.norm, of_move, device)


def costs(norm: Norm, shapes: Sequence[tuple[int, ...]], device: str) -> Iterator[float]:
    """The work of each operator of a tensor."""
    for *batch, m, n in shapes:
        work = float(m * n)
        if isinstance(norm, Spectral):
            work += plan((m, n), torch.float32, device, norm.method).work
        yield from (work for _ in range(math.prod(batch)))


def buckets(sizes: Sequence[int], owners: int) -> Iterator[list[int]]:
    """Consecutive moves that make up [`BUCKET`] entries, or four operators for each owner."""
    most = max(BUCKET, 4 * owners * max(sizes, default=0))
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
