"""DeepSpeed's ZeRO: which entries of which parameters a rank's flat partitions hold.

ZeRO lays the parameters of a group end to end and gives each rank an equal stretch of the whole
(stages 1 and 2), or of each parameter (stage 3). The optimizer sees its stretch alone, one flat
tensor of one group at a time. But ZeRO leaves on every parameter of the model where its entries
have gone: `_hp_mapping` and `_dp_group` (stages 1 and 2, and DeepSpeed's BF16_Optimizer), or
`_z3_optimizer` (stage 3). From these a [`Partition`] is made at the first step, and compared with
the weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..norms.layouts import Layout, usual_layout
from ..roles.graph import canonical_name
from .checkpoints import IDENTITY, OWN
from .precision import state_dtype
from .rules import Rule

ROWS = 2**18  # entries of a piece, where rows do not need each other

UNKNOWN = (
    "DeepSpeed has flattened {name} in a way that NormOpt does not know: {what}. Please report it "
    "with the version of DeepSpeed and its config. ZeRO stage 0 and FSDP2 are right."
)

OFFLOADED = (
    "The optimizer's partitions are offloaded, to where the ranks cannot exchange what a norm "
    "needs. Remove offload_optimizer from the DeepSpeed config."
)
OTHERWISE = (
    'FSDP2: TrainingArguments(fsdp=True, fsdp_config={"version": 2}), on the command line '
    """--fsdp true --fsdp_config '{"version": 2}', or accelerate launch --use_fsdp """
    "--fsdp_version 2. DDP and ZeRO stage 0 are right too, and under ZeRO the presets with a fixed "
    "step size and without a statistic of matrices."
)

Span = tuple[int, int]  # the first of some consecutive entries, and the one after the last


class Place(NamedTuple):
    """Where a rank has entries of a parameter."""

    span: Span  # of the parameter
    offset: int  # of the first of them in the flat tensor


@dataclass(frozen=True)
class Piece:
    """What has a direction of its own: a parameter, or rows that do not need its other rows."""

    number: int  # of the parameter in the partition
    start: int  # its first entry in the parameter
    shape: tuple[int, ...]
    layout: str
    spans: tuple[Span, ...]  # by rank: of its own entries

    @property
    def holder(self) -> int | None:
        """The rank that has all of it, if one has."""
        whole = (0, math.prod(self.shape))
        return self.spans.index(whole) if whole in self.spans else None

    def size(self, rank: int) -> int:
        """The number of entries that a rank has."""
        start, stop = self.spans[rank]
        return stop - start


@dataclass
class Partition:
    """A flat tensor: what one rank has of the parameters of a group, or of some of them."""

    flat: Tensor
    ranks: ProcessGroup
    is_first: bool  # of the flat tensors into which a group is made
    params: list[weakref.ref[Tensor]]
    names: list[str]
    shapes: list[tuple[int, ...]]
    layouts: list[str]
    places: list[Place]
    notes: list[dict[str, Any]] = field(default_factory=list)  # of each parameter, for observers
    spans: list[list[Span]] = field(default_factory=list)  # of each parameter, by rank
    plan: Any = None  # see `zero_moves.py`

    @property
    def world(self) -> int:
        """The number of ranks."""
        return dist.get_world_size(self.ranks)

    @property
    def rank(self) -> int:
        """This one."""
        return dist.get_rank(self.ranks)

    @property
    def is_offloaded(self) -> bool:
        """Whether the flat tensor lies where the ranks cannot send."""
        return self.flat.device.type not in {of.type for of in self.ranks._device_types}

    def meet_inplace(self) -> None:
        """Learn what the other ranks have, once.

        Raises:
            RuntimeError: on every rank, if a parameter is not there just once.
        """
        if self.spans:
            return
        mine = torch.tensor([place.span for place in self.places], device=self.flat.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(everyone, mine, group=self.ranks)
        by_rank = [[(start, stop) for start, stop in spans.tolist()] for spans in everyone]
        self.spans = [list(spans) for spans in zip(*by_rank, strict=True)]
        self.notes = [{} for _ in self.names]
        for name, shape, spans in zip(self.names, self.shapes, self.spans, strict=True):
            if not _covers(spans, math.prod(shape)):
                what = f"the ranks have its entries {spans}, of {math.prod(shape)}"
                raise RuntimeError(UNKNOWN.format(name=name, what=what))

    def pieces(self, rule: Rule) -> list[Piece]:
        """All parameters, cut where their rows do not need each other."""
        return [piece for number in range(len(self.names)) for piece in self._pieces(number, rule)]

    def layout(self, number: int, rule: Rule) -> str:
        """How a rule reads a parameter."""
        if rule.of_entries:
            return str(usual_layout("other", (1,) * len(self.shapes[number])))
        return self.layouts[number]

    def at(self, piece: Piece) -> slice:
        """Where the flat tensor has this rank's entries of a piece."""
        (first, _), offset = self.places[piece.number]
        start, stop = piece.spans[self.rank]
        shift = offset + piece.start - first
        return slice(start + shift, stop + shift)

    def gathered(self, number: int, flats: Sequence[Tensor]) -> Tensor:
        """The entries of a parameter in flat tensors of this form, stacked: on every rank."""
        (start, stop), offset = self.places[number]
        shape = self.shapes[number]
        size = len(flats), math.prod(shape)
        whole = torch.zeros(size, dtype=state_dtype(self.flat), device=self.flat.device)
        for row, flat in zip(whole, flats, strict=True):
            row[start:stop] = flat[offset : offset + stop - start]
        dist.all_reduce(whole, group=self.ranks)
        return whole.reshape(len(flats), *shape)

    def _pieces(self, number: int, rule: Rule) -> list[Piece]:
        shape, spans = self.shapes[number], self.spans[number]
        layout = self.layout(number, rule)
        divides = rule.scale != "muon" and Layout(layout).axis(0) in rule.norm.independent
        rows = shape[0] if shape and divides else 1
        row = math.prod(shape) // rows
        ends = [end for span in spans for end in span]
        cuts = {end // row for end in ends} | {-(-end // row) for end in ends}
        if rows > 1:
            cuts |= {*range(0, rows, max(1, ROWS // row))}
        edges = sorted(cuts | {0, rows})
        return [
            Piece(
                number,
                start * row,
                (stop - start, *shape[1:]) if rows > 1 else shape,
                layout,
                tuple(_common(span, (start * row, stop * row)) for span in spans),
            )
            for start, stop in pairwise(edges)
        ]


def partition_of(
    flat: Tensor, group: Mapping[str, Any], params: Sequence[Tensor | None]
) -> Partition | None:
    """A flat tensor of a group as a partition; None where ZeRO left no word on any parameter.

    Args:
        flat: from the group.
        group: of the optimizer.
        params: those of which the group was made.
    """
    rows = zip(group["param_names"], params, group["param_shapes"], group["layouts"], strict=True)
    found = [(*row, where) for row in rows if (where := _where(row[1], flat)) is not None]
    own = [row for row in found if row[-1].flat is flat and math.prod(row[2])]
    if not own:
        return None
    names, tensors, shapes, layouts, wheres = zip(*own, strict=True)
    return Partition(
        flat,
        wheres[0].ranks,
        is_first=wheres[0].order == min(where.order for *_, where in found),
        params=[weakref.ref(p) for p in tensors],
        names=[canonical_name(name) for name in names],
        shapes=[tuple(shape) for shape in shapes],
        layouts=list(layouts),
        places=[where.place for where in wheres],
    )


class _Where(NamedTuple):
    """What ZeRO has said of a parameter."""

    flat: Tensor
    order: int  # of the flat tensor
    ranks: ProcessGroup
    place: Place


def _where(p: Tensor | None, flat: Tensor) -> _Where | None:
    """Where ZeRO put a parameter; None where it did not, as where it is frozen."""
    known: Any = p
    if getattr(known, "_z3_optimizer", None) is not None:
        return _where_in_stage_3(known)
    if getattr(known, "_dp_group", None) is None:
        return None
    mapping = getattr(known, "_hp_mapping", None)
    place = Place((0, 0), 0)
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        place = Place((here.start, here.start + here.numel), there.start)
    return _Where(flat, 0, known._dp_group, place)


def _where_in_stage_3(p: Any) -> _Where | None:
    zero = p._z3_optimizer
    position = zero.grad_position.get(zero.get_param_id(p))
    if position is None:
        return None
    index, offset, length = position
    begin = dist.get_rank(p.ds_process_group) * length
    span = min(begin, p.ds_numel), min(begin + length, p.ds_numel)
    flat = zero.fp32_partitioned_groups_flat[index]
    return _Where(flat, index, p.ds_process_group, Place(span, offset))


def displaced(partition: Partition) -> str:
    """What is wrong with a partition: its entries are not those of the weights; "" if they are."""
    for name, weight, (span, offset) in zip(
        partition.names, partition.params, partition.places, strict=True
    ):
        p: Any = weight()
        length = span[1] - span[0]
        shard = getattr(p, "ds_tensor", None)
        weights = p.detach().flatten()[slice(*span)] if shard is None else shard[:length]
        if len(weights) < length:  # on a disk
            continue
        here = partition.flat.detach()[offset : offset + length]
        there = weights.to(here.device)
        if not torch.equal(here.to(there.dtype).nan_to_num(), there.nan_to_num()):
            return UNKNOWN.format(name=name, what="the partition has other entries than the weight")
    return ""


def unfit(
    groups: Sequence[Mapping[str, Any]],
    rule_of: Callable[[Mapping[str, Any]], Rule],
    step_size: str,
) -> str:
    """Why an optimizer cannot step with partitions; "" if it can.

    Args:
        groups: of the optimizer.
        rule_of: the rule of a group.
        step_size: "" if it is fixed.
    """
    if step_size:
        return (
            f"ZeRO steps one group after the other, and the step size {step_size} depends on all. "
            f"Use a fixed step size, or {OTHERWISE}"
        )
    for group in groups:
        rule = rule_of(group)
        if rule.entrywise:
            continue
        if not rule.norm.independent:
            return (
                f"The factors of {group['label']} step together, and ZeRO partitions each. "
                f'Use optim_args="norm_product=rms->rms,norm_table_product=l1->rms", or {OTHERWISE}'
            )
        tensors = zip(map(Layout, group["layouts"]), group["param_shapes"], strict=True)
        if rule.statistic is not None and not all(rule.smooths_rows(*one) for one in tensors):
            return (
                f"The rule of {group['label']} [{rule}] keeps a statistic of whole matrices, which "
                f"ZeRO has no place for. Use a preset without one, or {OTHERWISE}"
            )
        if group["momentum_dtype"] == "8bit":
            return (
                f"The momenta of {group['label']} are in blocks of 8 bits, which partitions would "
                f'cut. Use momentum_dtype="float32" or "bfloat16", or {OTHERWISE}'
            )
    return ""


@contextmanager
def shown_whole(params: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters that `deepspeed.zero.Init` has divided show their shapes.

    Their entries are those of memory on the CPU that nobody has written: it is asked for, not used.
    """
    divided: list[Any] = [p for p in params if tuple(getattr(p, "ds_shape", p.shape)) != p.shape]
    kept = [p.data for p in divided]
    try:
        for p in divided:
            p.data = torch.empty(tuple(p.ds_shape), dtype=p.dtype, device="cpu")
        yield
    finally:
        for p, data in zip(divided, kept, strict=True):
            p.data = data


def matched_flat(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A checkpoint's groups, of flat tensors, with the identity and the choices of the present.

    DeepSpeed matches flat tensors by their place, so that all that makes them up must be the same.

    Raises:
        ValueError: naming the first difference.
    """
    for key in IDENTITY:
        found, own = (
            [
                [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
                for value in (group.get(key) for group in some)
            ]
            for some in (saved, groups)
        )
        if found != own:
            before, now = _first_difference(found, own)
            raise ValueError(
                f"The optimizer's checkpoint does not fit: in {key} it has {before} "
                f"where this run has {now}. DeepSpeed's checkpoints go on with the same model, "
                "preset, options and overrides only; start anew from the model's weights otherwise."
            )
    return [
        {**before, **{key: group[key] for key in (*IDENTITY, *OWN)}}
        for before, group in zip(saved, groups, strict=True)
    ]


def _first_difference(found: list[list[str]], own: list[list[str]]) -> tuple[str, str]:
    if len(found) != len(own):
        return f"{len(found)} groups", f"{len(own)}"
    before, now = next((a, b) for a, b in zip(found, own, strict=True) if a != b)
    if len(before) != len(now):
        return f"{len(before)} parameters", f"{len(now)}"
    return next((f"[{a}]", f"[{b}]") for a, b in zip(before, now, strict=True) if a != b)


def _covers(spans: Sequence[Span], numel: int) -> bool:
    """Whether spans follow each other from the first entry to the last."""
    end = 0
    for start, stop in spans:
        if start < stop:
            if start != end:
                return False
            end = stop
    return end == numel


def _common(span: Span, other: Span) -> Span:
    """The entries that two spans share, counted from the second's first."""
    start, stop = max(span[0], other[0]), min(span[1], other[1])
    return (start - other[0], stop - other[0]) if start < stop else (0, 0)
