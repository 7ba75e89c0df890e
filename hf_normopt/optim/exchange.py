"""Several ranks: every whole operator has one owner, which computes its direction for all.

* Replicas (DDP) all have the momenta. Each computes the directions of its own operators and
  broadcasts them: 1 / ranks of the work, and the entries of these operators once per step.
* Shards (FSDP2, TP) go to the parameter's owner and its direction comes back, by all-to-all: each
  entry is sent twice per step, but for those that the owner holds. Where shards have replicas
  (HSDP), the owner is one rank among all of them, and its replicas get their shards from it.

Directions whose shards do not need each other, such as experts, the rows of a head and Adam's, are
found where they lie ([`localized`]). What is left (several sharded axes, other statistics) is
gathered by every rank. Dual norms are found by the same owners, and only their sum is shared.
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
from .moves import Move, advance_inplace, parts, smooth_inplace
from .precision import state_dtype
from .sharding import (
    copies_of,
    gathered,
    local,
    one_shard,
    shard_sizes,
    sharded_axes,
)

BUCKET = 2**24  # entries that are sent at a time, or four operators of each rank if that is more


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


def is_shared(move: Move) -> bool:
    """Whether replicas share the work: an operator's direction costs more than to send it."""
    is_spectral = isinstance(move.rule.norm, Spectral) and move.rule.statistic is None
    return is_spectral and move.copies is not None


def is_exchanged(move: Move) -> bool:
    """Whether a parameter's shards can be sent to an owner and back."""
    p = move.param
    return isinstance(p, DTensor) and move.rule.statistic is None and one_shard(p) is not None


def directed_inplace(
    moves: Sequence[Move], weight: Tensor | float, unit: Tensor | float, keep: bool, whole: bool
) -> Iterator[Move]:
    """Find the directions; each move is yielded with its own, sharded ones as moves of the shard.

    Args:
        moves: of parameters, advanced by this.
        weight: of the gradients.
        unit: what the weights amount to in the step, for the statistic's eps.
        keep: whether `smooth` is wanted too; moves are not taken in parts then.
        whole: whether all of each parameter is wanted on every rank.
    """
    shared, exchanged, rest = [], [], []
    for move in moves:
        shard = None if whole else localized(move)
        if is_shared(shard or move):
            shared.append(shard or move)
        elif shard is None and not whole and is_exchanged(move):
            exchanged.append(move)
        else:
            rest.append(shard or move)
    for alike in _alike(shared):
        yield from _shared_inplace(alike, weight, keep)
    for alike in _alike(exchanged):
        yield from _exchanged_inplace(alike, weight, keep)
    for move in rest if keep else chain(*map(parts, rest)):
        advance_inplace(move, weight, unit)
        yield move


def dual_norms(
    moves: Sequence[Move], tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, tuple[ProcessGroup, ...]]]:
    """Parts of the network's dual norm: scale · multiplier · dual norm of each tensor.

    Args:
        moves: of single parameters.
        tensors: placed as the parameters are.

    Yields:
        Values that this rank has found, with the ranks over which they are to be added up.
    """
    received = {id(move): tensor for move, tensor in zip(moves, tensors, strict=True)}
    shared, exchanged = [], []
    for move in moves:
        shard, tensor = localized(move), received[id(move)]
        if is_shared(shard or move):
            shared.append(shard or move)
            received[id(shard or move)] = local(tensor)
        elif shard is not None:
            yield shard.dual(local(tensor)), shard.shards
        elif is_exchanged(move):
            exchanged.append(move)
        else:
            yield move.dual(gathered(tensor)), ()
    for alike in _alike(shared):
        assert alike[0].copies is not None
        ranks = (alike[0].copies, *alike[0].shards)
        for move, of_operators in zip(alike, _shares(alike), strict=True):
            found = received[id(move)].new_zeros(())
            operators = move.layout.to_operators(received[id(move)])
            for share, operator in zip(of_operators, operators, strict=True):
                found = found + move.dual_of(share.mine_of(operator))
            yield found, ranks
    for alike in _alike(exchanged):
        for trade in _trades(alike):
            trade.send([local(received[id(move)]) for move in trade.moves])
            yield trade.like.new_zeros(()), trade.ranks  # all enter the reduction
            for move, whole in trade.received():
                yield move.dual(whole), trade.ranks


# Replicas


def _shared_inplace(moves: Sequence[Move], weight: Tensor | float, keep: bool) -> Iterator[Move]:
    """A rank holds the directions of its own operators, and those of two buckets."""
    shares = _shares(moves)
    for move, of_operators in zip(moves, shares, strict=True):
        smooth = smooth_inplace(move, weight)[0]
        if keep:
            move.smooth = smooth
        operators = move.stacked_layout.to_operators(smooth)
        for share, operator in zip(of_operators, operators, strict=True):
            mine = share.mine_of(operator)
            share.found = move.rule.norm.lmo(mine, move.scale(mine.shape)) if len(mine) else mine
    pending = None
    sizes = [math.prod(_stored_shape(move)) for move in moves]
    for bucket in [*buckets(sizes, dist.get_world_size(moves[0].copies)), []]:
        sending = _broadcasts([share for i in bucket for share in shares[i]], moves[0])
        if pending is not None:
            yield from _arrived(moves, shares, *pending)
        pending = bucket, sending


class _Share:
    """The operators (batch, m, n) of a tensor: which are whose, and the directions of one's own."""

    def __init__(self, shape: tuple[int, ...], owners: Iterator[int], world: int, me: int) -> None:
        self.shape, self.me = shape, me
        self.places: list[list[int]] = [[] for _ in range(world)]
        for i in range(math.prod(shape[:-2])):
            self.places[next(owners)].append(i)
        self.found: Tensor

    def entries(self, rank: int) -> int:
        return len(self.places[rank]) * math.prod(self.shape[-2:])

    def mine_of(self, operators: Tensor) -> Tensor:
        return operators.reshape(-1, *operators.shape[-2:])[self.places[self.me]]


def _shares(moves: Sequence[Move]) -> list[list[_Share]]:
    """Of each move, those of its operators."""
    ranks = moves[0].copies
    world, me = dist.get_world_size(ranks), dist.get_rank(ranks)
    shapes = [operator_shapes(move.stacked_layout, _stored_shape(move)) for move in moves]
    owners = iter(assign(tuple(_costs(moves, shapes)), world))
    return [[_Share(shape, owners, world, me) for shape in of_move] for of_move in shapes]


class _Broadcast:
    """What one rank sends to its replicas."""

    def __init__(self, buffer: Tensor, source: int, ranks: ProcessGroup) -> None:
        self.buffer = buffer
        self.work = (
            dist.broadcast(buffer, group=ranks, group_src=source, async_op=True)
            if buffer.numel()
            else None
        )

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.buffer


def _broadcasts(shares: Sequence[_Share], move: Move) -> list[_Broadcast]:
    """One from each rank, of the directions that it has found."""
    ranks = move.copies
    assert ranks is not None
    me, like = dist.get_rank(ranks), _like(move)
    sending = []
    for rank in range(dist.get_world_size(ranks)):
        if rank == me:
            buffer = torch.cat([share.found.flatten() for share in shares] or [like])
        else:
            buffer = like.new_empty(sum(share.entries(rank) for share in shares))
        sending.append(_Broadcast(buffer, rank, ranks))
    return sending


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
        for share in shares[i]:
            direction = received[0].new_empty((math.prod(share.shape[:-2]), *share.shape[-2:]))
            for rank, (places, buffer) in enumerate(zip(share.places, received, strict=True)):
                end = taken[rank] + share.entries(rank)
                direction[places] = buffer[taken[rank] : end].reshape(-1, *share.shape[-2:])
                taken[rank] = end
            directions.append(direction.reshape(share.shape))
            del share.found
        shape = _stored_shape(moves[i])
        moves[i].direction = moves[i].stacked_layout.from_operators(tuple(directions), shape)
        yield moves[i]


# Shards


def _exchanged_inplace(moves: Sequence[Move], weight: Tensor | float, keep: bool) -> Iterator[Move]:
    """While directions of one bucket are found, the next travels out and the last one back.

    A rank holds its shards of three buckets of parameters, and those of one that it owns whole.
    """
    sent = answered = None
    for trade in chain(_trades(moves), (None, None)):
        if trade is not None:
            shards = [move.of_shard() for move in trade.moves]
            smooth = [smooth_inplace(shard, weight)[0] for shard in shards]
            trade.send(smooth)
            if keep:
                for shard, momentum in zip(shards, smooth, strict=True):
                    shard.smooth = momentum
        if sent is not None:
            sent[0].answer([_direction(move, whole) for move, whole in sent[0].received()])
        if answered is not None:
            for i, direction in answered[0].returned():
                answered[1][i].direction = direction
                yield answered[1][i]
        answered, sent = sent, None if trade is None else (trade, shards)


def _direction(move: Move, smooth: Tensor) -> Tensor:
    operators = move.layout.to_operators(smooth)
    found = tuple(move.rule.norm.lmo(o, move.scale(o.shape)) for o in operators)
    return move.layout.from_operators(found, tuple(smooth.shape))


def _trades(moves: Sequence[Move]) -> Iterator[_Trade]:
    """Buckets of sharded parameters."""
    owners = math.prod(map(dist.get_world_size, _Trade.ranks_of(moves[0])))
    for bucket in buckets([move.param.numel() for move in moves], owners):
        yield _Trade([moves[i] for i in bucket])


class _Trade:
    """Tensors that are sharded as some parameters, sent to owners; and what these answer.

    Owners are numbered by replica, and in it by rank among the shards. A replica trades what it
    owns, and broadcasts each shard of the answers to the same shard of the other replicas.
    """

    def __init__(self, moves: Sequence[Move]) -> None:
        self.moves = moves
        self._axes = [self._shard_of(move)[0] for move in moves]
        self.ranks = self.ranks_of(moves[0])
        self.like = _like(moves[0])
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
        group, copies = _Trade._shard_of(move)[1], copies_of(move.param)
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
        outgoing = torch.cat([self.like, *(shards[i].flatten() for i in chain(*mine))])
        self._travel(outgoing, self._come, self._gone)

    def received(self) -> Iterator[tuple[Move, Tensor]]:
        """What this rank owns, whole."""
        owned = self._owned[self.replica][self.me]
        sizes = [self._entries(i, rank) for rank in range(self.world) for i in owned]
        pieces = self._arrival().split(sizes)
        for place, i in enumerate(owned):
            parts = [
                pieces[rank * len(owned) + place].reshape(self._shape(i, rank))
                for rank in range(self.world)
            ]
            yield self.moves[i], torch.cat(parts, self._axes[i])

    def answer(self, found: Sequence[Tensor]) -> None:
        """Start sending back what was made of that which was received, in its order."""
        owned = self._owned[self.replica][self.me]
        parts: list[list[Tensor]] = [[] for _ in range(self.world)]
        for i, whole in zip(owned, found, strict=True):
            axis = self._axes[i]
            lengths = shard_sizes(whole.shape[axis], self.world)
            for rank, part in enumerate(whole.split(lengths, axis)):
                parts[rank].append(part.flatten())
        self._travel(torch.cat([self.like, *chain(*parts)]), self._gone, self._come)

    def returned(self) -> Iterator[tuple[int, Tensor]]:
        """The answers for this rank's shards, each with its parameter's number."""
        orders = [list(chain(*owned)) for owned in self._owned]
        sizes = [[self._entries(i, self.me) for i in order] for order in orders]
        buffers = [
            self._arrival() if replica == self.replica else self.like.new_empty(sum(entries))
            for replica, entries in enumerate(sizes)
        ]
        if self.copies is not None:
            sending = [_Broadcast(buffer, i, self.copies) for i, buffer in enumerate(buffers)]
            buffers = [one.wait() for one in sending]
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


def _alike(moves: Sequence[Move]) -> Iterator[list[Move]]:
    """Moves that can be sent together."""
    kinds: dict[Any, list[Move]] = {}
    for move in moves:
        p = move.param
        ranks = _Trade.ranks_of(move) if isinstance(p, DTensor) else (move.copies, move.shards)
        kinds.setdefault((state_dtype(p), p.device, ranks), []).append(move)
    yield from kinds.values()


def _like(move: Move) -> Tensor:
    """An empty tensor in the dtype in which momenta are sent."""
    return torch.empty(0, dtype=state_dtype(move.param), device=move.param.device)


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
        yield from costs(move.rule.norm, of_move, move.param.device.type)


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
