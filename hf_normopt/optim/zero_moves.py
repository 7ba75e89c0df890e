"""The step of a ZeRO partition: each piece of a parameter has one owner, which finds its direction.

The owner is a rank that has a large part of the piece, of these the one with the least work. Under
the stages 1 and 2 it mostly has all of it and nothing is sent; a parameter that lies across the end
of a partition goes to its owner, and its direction comes back, by all-to-all. Under stage 3 all do.
Momenta and weights stay divided as ZeRO has them.

A direction over smoothed lengths of rows needs nothing of a row but its length, to which each rank
adds the squares of its own entries. So these sums are all that is sent, and every rank keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..norms.layouts import Layout
from .batches import PART, SMALL
from .exchange import buckets, costs, direction_of, operator_shapes
from .moves import Move, kept, over_moments, smooth_inplace
from .precision import is_low, state_dtype
from .rules import Rule
from .zero import Partition, Piece

_layout = cache(Layout)


def is_partitioned(move: Move) -> bool:
    """Whether a move is of a partition, and asks for whole parameters or rows."""
    return move.partition is not None and not move.rule.entrywise


def partitioned_inplace(
    moves: Sequence[Move], weight: Tensor | float, unit: Tensor | float, watched: bool
) -> Iterator[Move]:
    """Find the directions of partitions.

    Args:
        moves: of flat tensors, advanced by this.
        weight: of the gradients.
        unit: the sum of the weights in this step, for the statistic's eps.
        watched: whether the moves are wanted whole, with `smooth`; else they come in parts.
    """
    for move in moves:
        is_smoothed = move.rule.statistic is not None
        found = (
            _over_rows_inplace(move, weight, unit) if is_smoothed else _parts_inplace(move, weight)
        )
        if not watched:
            for _, part in found:
                yield part
            continue
        move.smooth = torch.zeros_like(move.param, dtype=state_dtype(move.param))
        move.direction = torch.zeros_like(move.smooth)
        for places, part in found:
            for at, one in zip(places, part.each(), strict=True):
                move.smooth[at], move.direction[at] = one.smooth, one.direction
        yield move


def whole_moves(move: Move) -> Iterator[Move]:
    """The moves of a partition's parameters, for who looks on: all ranks gather them."""
    partition = move.partition
    assert partition is not None
    flats = (move.param, move.gradients[0], move.smooth, move.direction)
    for number, name in enumerate(partition.names):
        p, gradient, smooth, direction = partition.gathered(number, flats)
        whole = replace(
            move,
            params=[p],
            gradients=[gradient],
            states=[partition.notes[number]],
            layout=_layout(partition.layout(number, move.rule)),
            names=[name],
            partition=None,
        )
        whole.smooth, whole.direction = smooth, direction
        yield whole


def _parts_inplace(move: Move, weight: Tensor | float) -> Iterator[tuple[list[slice], Move]]:
    """Parts of the flat tensor with their directions, and where they are in it.

    What this rank has whole is found while the first of what is sent travels.
    """
    partition = move.partition
    assert partition is not None
    plan = _plan(partition, move.rule)
    trades = (_Trade(move, some, owners) for some, owners in plan.sent)
    ahead = next(trades, None)
    if ahead is not None:
        ahead.send_inplace(weight)
    for pieces in plan.here:
        part, places = _part(move, pieces)
        shape = pieces[0].shape if part.alone else (len(pieces), *pieces[0].shape)
        part.smooth = smooth_inplace(part, weight)[0]
        part.direction = direction_of(part, part.smooth.reshape(shape)).reshape(part.smooth.shape)
        yield places, part
    while ahead is not None:
        now, ahead = ahead, next(trades, None)
        if ahead is not None:
            ahead.send_inplace(weight)
        now.answer()
        yield from now.returned()


def _over_rows_inplace(
    move: Move, weight: Tensor | float, unit: Tensor | float
) -> Iterator[tuple[list[slice], Move]]:
    """This rank's entries of each parameter over their rows' smoothed lengths, and their places."""
    partition, rule, statistic = move.partition, move.rule, move.rule.statistic
    assert partition is not None
    assert statistic is not None
    rows = [shape[0] for shape in partition.shapes]
    sums = torch.zeros(sum(rows), dtype=state_dtype(partition.flat), device=partition.flat.device)
    parts = []
    for number, own in enumerate(sums.split(rows)):
        stretch = _Stretch(partition, number, rule)
        if stretch.size:
            part, places = _part(move, [stretch.piece])
            part.smooth, grad = smooth_inplace(part, weight)
            moments = rule.norm.moments(stretch.operator(grad))["second_moment"]
            own[stretch.rows] = moments.flatten().to(own.dtype)
            parts.append((stretch, moments.shape, places, part))
    dist.all_reduce(sums, group=partition.ranks)
    state = move.state
    if "second_moment" not in state:
        state["second_moment"] = torch.zeros_like(sums)
        state["step"] = torch.zeros((), dtype=torch.float32, device=sums.device)
    step = state["step"].add_(1)
    squares = statistic.update_inplace(state["second_moment"], sums, step).split(rows)
    for stretch, shape, places, part in parts:
        m = stretch.operator(part.smooth)
        own = squares[stretch.piece.number][stretch.rows].reshape(shape)
        ratio = over_moments(rule, m, {"second_moment": own}, step, unit).mul_(part.scale(m.shape))
        part.direction = stretch.entries(ratio)
        yield places, part


class _Stretch:
    """What a rank has of a parameter: whole rows, and parts of the first and last of them."""

    def __init__(self, partition: Partition, number: int, rule: Rule) -> None:
        shape, spans = partition.shapes[number], tuple(partition.spans[number])
        self.piece = Piece(number, 0, shape, partition.layout(number, rule), spans)
        self.layout = _layout(self.piece.layout)
        row = math.prod(shape) // shape[0]
        start, stop = spans[partition.rank]
        self.size = stop - start
        self.rows = slice(start // row, -(-stop // row))
        self.shape = (self.rows.stop - self.rows.start, *shape[1:])
        self.ends = start - self.rows.start * row, self.rows.stop * row - stop  # that others have

    def operator(self, entries: Tensor) -> Tensor:
        """The rows as an operator, with zeros for what other ranks have."""
        (operator,) = self.layout.to_operators(pad(entries, self.ends).reshape(self.shape))
        return operator

    def entries(self, operator: Tensor) -> Tensor:
        """This rank's entries of an operator of the rows."""
        rows = self.layout.from_operators((operator,), self.shape).flatten()
        return rows[self.ends[0] : self.ends[0] + self.size]


@dataclass
class _Plan:
    """What a rank does with a partition in each step."""

    here: list[list[Piece]]  # that it has whole; small ones of one shape together
    sent: list[tuple[list[Piece], list[int]]]  # buckets of the others, and their owners


def _plan(partition: Partition, rule: Rule) -> _Plan:
    """Made once for a partition, whose rule stays."""
    if partition.plan is None:
        pieces, world = partition.pieces(rule), partition.world
        owners = owners_of(pieces, [_work(piece, rule, partition.flat) for piece in pieces], world)
        alike: dict[Any, list[list[Piece]]] = {}
        for number, piece in enumerate(pieces):
            if piece.holder != partition.rank:
                continue
            numel = math.prod(piece.shape)
            is_alone = numel > SMALL or is_low(partition.flat)
            runs = alike.setdefault(number if is_alone else (piece.layout, *piece.shape), [[]])
            if (len(runs[-1]) + 1) * numel > PART and runs[-1]:
                runs.append([])
            runs[-1].append(piece)
        sent = [(p, owner) for p, owner in zip(pieces, owners, strict=True) if p.holder is None]
        sizes = [math.prod(piece.shape) for piece, _ in sent]
        found = [[sent[i] for i in bucket] for bucket in buckets(sizes, world)]
        partition.plan = _Plan(
            [run for runs in alike.values() for run in runs],
            [([p for p, _ in bucket], [owner for _, owner in bucket]) for bucket in found],
        )
    return partition.plan


def owners_of(pieces: Sequence[Piece], works: Sequence[float], world: int) -> list[int]:
    """The owner of each piece: the largest work first, each to who has least.

    A piece goes to its holder, else to a rank that has half as much of it as any at least.
    """
    loads, owners = [0.0] * world, [0] * len(pieces)
    for i in sorted(range(len(pieces)), key=lambda i: (pieces[i].holder is None, -works[i])):
        sizes = [pieces[i].size(rank) for rank in range(world)]
        near = [rank for rank in range(world) if 2 * sizes[rank] >= max(sizes)]
        holder = pieces[i].holder
        owners[i] = min(near, key=lambda rank: loads[rank]) if holder is None else holder
        loads[owners[i]] += works[i]
    return owners


def _work(piece: Piece, rule: Rule, flat: Tensor) -> float:
    shapes = operator_shapes(_layout(piece.layout), piece.shape)
    return sum(costs(rule.norm, shapes, flat.device.type))


def _part(move: Move, pieces: Sequence[Piece]) -> tuple[Move, list[slice]]:
    """The move of this rank's entries of pieces, which have one shape and layout."""
    partition, whole = move.partition, kept(move, 0)
    assert partition is not None
    places = [partition.at(piece) for piece in pieces]
    part = replace(
        move,
        params=[move.param[at] for at in places],
        gradients=[move.gradients[0][at] for at in places],
        states=[{key: value[at] for key, value in whole.items()} for at in places],
        layout=_layout(pieces[0].layout),
        names=move.names * len(places),
        whole=move.param,
        at=places[0],
        partition=None,
    )
    return part, places


class _Trade:
    """Pieces that go to their owners, and the directions that come back."""

    def __init__(self, move: Move, pieces: Sequence[Piece], owners: Sequence[int]) -> None:
        assert move.partition is not None
        self.move, self.partition = move, move.partition
        self.rank, self.world = self.partition.rank, self.partition.world
        self.by_owner = [
            [piece for piece, owner in zip(pieces, owners, strict=True) if owner == rank]
            for rank in range(self.world)
        ]
        self.gone = [sum(piece.size(self.rank) for piece in owned) for owned in self.by_owner]
        self.owned = self.by_owner[self.rank]
        self.come = [sum(piece.size(rank) for piece in self.owned) for rank in range(self.world)]

    def send_inplace(self, weight: Tensor | float) -> None:
        """Advance the momenta of this rank's entries, and start sending them."""
        self.parts = [
            _part(self.move, [piece])
            for owned in self.by_owner
            for piece in owned
            if piece.size(self.rank)
        ]
        for part, _ in self.parts:
            part.smooth = smooth_inplace(part, weight)[0]
        self._travel([part.smooth for part, _ in self.parts], self.come, self.gone)

    def answer(self) -> None:
        """Find the directions of what this rank owns, and start sending them back."""
        sizes = [piece.size(rank) for rank in range(self.world) for piece in self.owned]
        arrived = self._arrival().split(sizes)
        parts: list[list[Tensor]] = [[] for _ in range(self.world)]
        for i, piece in enumerate(self.owned):
            smooth = torch.cat(arrived[i :: len(self.owned)]).reshape(piece.shape)
            one = replace(self.move, layout=_layout(piece.layout))
            found = direction_of(one, smooth).flatten()
            for rank, (start, stop) in enumerate(piece.spans):
                parts[rank].append(found[start:stop])
        self._travel([one for some in parts for one in some], self.gone, self.come)

    def returned(self) -> Iterator[tuple[list[slice], Move]]:
        """This rank's entries with their directions, and where they are in the flat tensor."""
        directions = self._arrival().split([part.param.numel() for part, _ in self.parts])
        for (part, places), direction in zip(self.parts, directions, strict=True):
            part.direction = direction
            yield places, part

    def _travel(self, tensors: Sequence[Tensor], come: list[int], gone: list[int]) -> None:
        flat = self.partition.flat
        empty = torch.empty(0, dtype=state_dtype(flat), device=flat.device)
        self._outgoing = torch.cat([empty, *tensors])
        self._arriving = empty.new_empty(sum(come))
        self._work = dist.all_to_all_single(
            self._arriving, self._outgoing, come, gone, group=self.partition.ranks, async_op=True
        )

    def _arrival(self) -> Tensor:
        self._work.wait()
        del self._outgoing
        return self._arriving
