"""Features and parameters, followed from operation to operation: the base of [`Watch`]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from ..norms.layouts import Layout
from .graph import is_matrix
from .notes import LARGEST, Note, Shown, essential, is_batch, narrowed, reshaped
from .operations import is_real
from .parts import Source
from .seen import Seen
from .twin import Twin
from .views import COPIES, RESHAPES, moved_parameter, picked_layout, table_layout

_SUMS = 64  # sums of features that are remembered


class Follower(TorchDispatchMode):
    """What is known of tensors, and what was done with parameters and features.

    Args:
        twin: the twin that runs.
    """

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin, self.seen = twin, Seen()
        self.sources: dict[str, Source] = {}
        self.received: dict[Any, Tensor] = {}
        self.sums: list[tuple[Tensor, Tensor]] = []
        self.written: dict[int, Note] = {}
        self.covered: dict[tuple[str, int], set[int]] = {}
        self.pieces: dict[int, list[Tensor]] = {}  # written into one memory, by its address
        self.summed: dict[str, Layout] = {}  # gains whose products were summed along features
        self.gains: set[str] = set()  # whose products were used otherwise
        self.weights: set[str] = set()  # matrices whose outputs weigh others, after a softmax
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.kept: list[Any] = []  # whose storages' addresses are keys of `written`
        self.stack: list[nn.Module] = []

    def noted(self, value: Any) -> Note | None:
        """What is noted of a tensor, with what was written into its memory."""
        note = note_of(value)
        if self.written and isinstance(value, Tensor):
            other = self.written.get(value.untyped_storage()._cdata)
            if other is not None and other is not note:
                if note is None:
                    return other
                both = mixture([note, other])
                return replace(note, makers=both.makers, last=both.last)
        return note

    def view(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Move a note as an operation moves entries."""
        note = self.noted(args[0])
        outputs = result if isinstance(result, (list, tuple)) else [result]
        if note is None:
            return
        indices = self._moved_index(func, note, args, kwargs, outputs)
        shown = [moved_parameter(s, func, args, kwargs, outputs) for s in note.shown]
        times = [(moved_parameter(s, func, args, kwargs, outputs), n) for s, n in note.times]
        for i, output in enumerate(outputs):
            if is_real(output):
                parts = tuple(part for s in shown if (part := s[i]) is not None)
                factors = tuple((part, n) for s, n in times if (part := s[i]) is not None)
                index = indices[i] if output.numel() else None
                output._note = replace(note, shown=parts, index=index, times=factors)

    def _moved_index(
        self, func: Any, note: Note, args: Any, kwargs: Any, outputs: Any
    ) -> list[Tensor | None]:
        none: list[Tensor | None] = [None] * len(outputs)
        if note.index is None:
            return none
        name = func.overloadpacket.__name__
        if name in ("view_as_real", "view_as_complex"):
            return self._complex(name, note, outputs)
        if name in COPIES:
            return [note.index]
        if name == "as_strided" and tuple(args[1]) != tuple(note.index.shape):
            self.use(note)
            return none
        if name == "as_strided":
            return [note.index]
        try:
            if name in RESHAPES:
                return [self._reshaped(note, tuple(outputs[0].shape))]
            moved = func(note.index, *args[1:], **kwargs)
            return list(moved) if isinstance(moved, (list, tuple)) else [moved]
        except RuntimeError:
            self.use(note)
            return none

    def _reshaped(self, note: Note, shape: tuple[int, ...]) -> Tensor | None:
        assert note.index is not None
        index = reshaped(note.index, shape)
        if index is None:
            self.use(note)
        return index

    def _complex(self, name: str, note: Note, outputs: Any) -> list[Tensor | None]:
        index = note.index
        assert index is not None
        if name == "view_as_complex":
            self.pairs.append((index[..., 0], index[..., 1]))
            return [index[..., 0]]
        for real, imaginary in reversed(self.pairs):
            if real.shape == index.shape and are_same(essential(real), essential(index)):
                return [torch.stack([real, imaginary], -1)]
        return [None]

    def notes_of(self, values: Iterable[Any]) -> list[Note]:
        """What is noted of those of some tensors of which anything is."""
        return [note for note in map(self.noted, values) if note is not None]

    def record_fixed(self, notes: Iterable[Note], how: str) -> None:
        """Note what is done with the parameters among some operands."""
        for note in notes:
            if note.fixed:
                self.record(note, how)

    def record(self, note: Note, how: str, layouts: Mapping[str, Layout] | None = None) -> None:
        """Note what is done with the parameters that a tensor shows."""
        for shown in note.shown:
            final = how if how == "place" and shown.expanded else shown.how or how
            layout = (layouts or {}).get(shown.name)
            if final == "spread" and how != "sum":  # noise that is not added is as any activation
                final = how
            if final == "inverse":  # what is added is a rate, where the parameter is a time
                final = "rate" if how == "sum" else how
            if how == "sum" and shown.inner:  # of a product of parameters, as of a covariance
                final = "packed"
            if final == "scatter":
                final, layout = ("packed", None) if how == "product" else ("place", None)
            elif final == "untracked":
                final, layout = ("packed" if how in ("product", "kernel") else how), None
            elif shown.picked and not (how in ("product", "kernel") and layout is not None):
                final, layout = "lookup", picked_layout(shown)
            elif shown.how and how not in ("product", "kernel"):
                layout = None
            elif final == "place" and _is_right(shown):
                final, layout = "product", table_layout(len(shown.shape), shown.inner)
            self._use(shown.name, final, layout)

    def _use(self, name: str, how: str, layout: Layout | None = None) -> None:
        uses = self.seen.uses.setdefault(name, {})
        if how == "product" and {str(layout), str(uses.get(how))} == {"in out", "out in"}:
            uses["transposed"] = layout
        if uses.get(how) is None:
            uses[how] = layout
        callers = (m for m in reversed(self.stack) if not is_plain(m))
        if caller := next(callers, None):
            self.seen.where.setdefault(name, type(caller).__name__)

    def not_summed(self, note: Note) -> None:
        """Something else than a sum along features receives products with these gains."""
        self.gains |= {shown.name for shown, _ in note.times}

    def use(self, note: Note | None) -> None:
        """Something that is no view receives these features."""
        if note is not None and note.index is not None:
            index = narrowed(note.index)
            if index.numel() <= LARGEST:
                self._receive(essential(index))

    def _receive(self, index: Tensor) -> None:
        received = [index]
        if self.sums and index.numel():
            for left, right in reversed(self.sums):
                beside = [_beside(one, left, right) for one in received]
                received += [
                    b for b in beside if b is not None and not any(are_same(b, r) for r in received)
                ]
                if len(received) > 8:
                    break
        for one in received:
            key = (tuple(one.shape), hash(one.contiguous().numpy().tobytes()))
            self.received.setdefault(key, one)

    def both(self, left: Tensor, right: Tensor, summed: bool) -> Tensor | None:
        """Features after an operation between entries of two tensors of one shape."""
        if left is right or (
            left.shape == right.shape and are_same(essential(left), essential(right))
        ):
            return left
        one, other = essential(left), essential(right)
        if not summed or one.numel() != other.numel() or len(self.sums) > _SUMS:
            self._receive(one)
            self._receive(other)
            return None
        features, order = one.flatten().sort()
        self.sums.append((features, other.flatten()[order]))
        return left

    def rotated(self, pieces: list[Tensor]) -> list[Tensor]:
        """The features of two halves that were rotated into each other: a - b and a + b."""
        if len(pieces) == 2 and are_same(essential(pieces[0]), essential(pieces[1])):
            for left, right in reversed(self.sums):
                other = _beside(pieces[0], left, right)
                if other is not None:
                    return [pieces[0], other]
        return pieces

    def _source_of(self, shown: Shown, outs: list[int], fan: int, layout: Layout) -> Source:
        """The numbers of a matrix's features, which are given out when it is first seen."""
        known = self.sources.get(shown.name)
        if known is None:
            start = max((source.stop for source in self.sources.values()), default=0)
            sizes = tuple(shown.shape[j] for j in outs)
            known = Source(start, start + math.prod(sizes), fan, str(layout), sizes)
            self.sources[shown.name] = known
        return known

    def _source(self, number: int) -> str | None:
        for name, source in self.sources.items():
            if source.start <= number < source.stop:
                return name
        return None

    def _is_matrix(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.twin.module.get_submodule(path)
        except AttributeError:
            return False
        if isinstance(owner, nn.MultiheadAttention):
            return leaf.endswith("proj_weight")
        return leaf == "weight" and is_matrix(owner)


def _is_right(shown: Shown) -> bool:
    """Whether a parameter is the W of a product x W of parameters."""
    axes = shown.axes()
    return bool(shown.inner) and len(axes) > 1 and bool(axes[-1]) and not axes[-2]


def note_of(value: Any) -> Note | None:
    """What is noted of a tensor, if anything."""
    return getattr(value, "_note", None) if isinstance(value, Tensor) else None


def selection_of(value: Any) -> Tensor | None:
    """Of constants that choose rows a tensor that has a stride along an axis of one-hot vectors.

    That of a mask has none.
    """
    return getattr(value, "_selection", None)


def selection(shape: torch.Size, axis: int | None = None) -> Tensor:
    """The same for one-hot vectors along an axis, or a mask."""
    sizes = [size if d == axis else 1 for d, size in enumerate(shape)]
    return torch.empty(sizes, device="meta").expand(shape)


def choice(values: Tensor) -> Tensor | None:
    """The same for integers and booleans; None if they are no choice."""
    if values.is_meta or not values.ndim or not 0 < values.numel() <= LARGEST:
        return None
    if values.dtype != torch.bool and bool(((values != 0) & (values != 1)).any()):
        return None
    last = values.ndim - 1
    one_hot = values.shape[last] > 1 and bool((values.sum(last) == 1).all())
    return selection(values.shape, last if one_hot else None)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one matrix or table, whatever its class is called."""
    return not module._modules and isinstance(module, (nn.Linear, nn.Embedding, Conv1D, _ConvNd))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in what an operation or a module gives."""
    yield from _leaves(value, 0)


def _leaves(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth < 6:
        if isinstance(value, Mapping):
            for item in value.values():
                yield from _leaves(item, depth + 1)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from _leaves(item, depth + 1)
        elif is_record(value):
            for item in vars(value).values():
                yield from _leaves(item, depth + 1)


def is_record(value: Any) -> bool:
    """Whether a value is an object that holds others, such as a dataclass or a distribution."""
    return hasattr(value, "__dict__") and not (callable(value) or isinstance(value, Tensor))


def mixture(notes: list[Note]) -> Note:
    """What is known of a mixture of some tensors: the matrices that made them."""
    return Note(
        makers=frozenset().union(*(note.makers for note in notes)),
        last=frozenset().union(*(note.last for note in notes)),
    )


def are_same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of numbers are equal, their shapes too."""
    return left.shape == right.shape and torch.equal(left, right)


def _beside(features: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """What is added to some features, None if they are not all in the sum; `left` is sorted."""
    if not features.numel() or not left[0] <= features.min() <= features.max() <= left[-1]:
        return None
    at = torch.searchsorted(left, features.contiguous())
    return right[at] if torch.equal(left[at], features) else None


def expanded_to(index: Tensor, shape: Iterable[int]) -> Tensor | None:
    """Numbers of features, broadcast to a shape; None if they cannot be."""
    try:
        return index.expand(tuple(shape))
    except RuntimeError:
        return None


def along(numbers: Tensor, axis: int, shape: torch.Size) -> Tensor | None:
    """Numbers of features in a tensor that has them along one axis; None if they do not fit."""
    if shape[axis] != len(numbers):
        return None
    sizes = [len(numbers) if d == axis else 1 for d in range(len(shape))]
    return numbers.view(sizes).expand(shape)


def resized_to(index: Tensor, shape: torch.Size) -> Tensor | None:
    """Numbers of features where other axes have new sizes, as of pooling."""
    if index.ndim != len(shape):
        return None
    for d, size in enumerate(shape):
        if index.shape[d] != size:
            if not is_batch(index, d):
                return None
            index = index.narrow(d, 0, 1)
    return expanded_to(index, shape)
