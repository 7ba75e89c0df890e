"""Operations that look up, join, place, normalise or reduce."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..norms.layouts import Layout
from .follow import are_same, expanded_to, mixture, resized_to, tensors_of
from .notes import LARGEST, Note, Shown, essential, is_batch, narrowed
from .products import Products
from .views import (
    has_several_axes,
    is_vector,
    numbered,
    picked_parameter,
    scattered,
    table_layout,
)

GAINS = {
    "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "_batch_norm_with_update": (1, 2),
    "_fused_rms_norm": (2, 0),
}


class Mixing(Products):
    """Notes what becomes of entries that are moved, mixed or picked."""

    def normalised(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Normalisations with a gain and an offset."""
        gain, bias = GAINS[name]
        x = self.noted(args[0])
        for at, how in ((gain, "gain"), (bias, "sum")):
            note = self.noted(args[at]) if at and len(args) > at else None
            if note is not None and note.fixed:
                self.record(note, how)
        if x is None or x.fixed:
            return x and Note(shown=x.shown, fixed=True)
        return replace(x, last=frozenset(), decayed=frozenset(), rates=frozenset())

    def weight_normalised(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """A kernel whose lengths are parameters of their own: v and g."""
        v, g = (self.noted(arg) or Note(fixed=True) for arg in args[:2])
        gains = tuple(replace(s, how="gain") for s in g.shown)
        return Note(shown=(*v.shown, *gains), fixed=v.fixed and g.fixed)

    def lookup(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """Rows of a table by their numbers."""
        note = self.noted(args[0])
        for shown in note.shown if note is not None else ():
            rows = next(iter(shown.axes()), ())
            self._use(shown.name, "lookup", table_layout(len(shown.shape), rows))
        return Note() if note is None or note.fixed else mixture([note])

    def picked(self, name: str, args: Any, kwargs: Any, result: Tensor) -> Note | None:
        """Entries by their numbers."""
        note = self.noted(args[0])
        if note is None:
            return None
        if name == "index":
            dims = [d for d, index in enumerate(args[1]) if index is not None]
        else:
            dims = [int(args[1]) % args[0].ndim]
        index = None
        if note.index is not None:
            index = self._picked_index(name, note, args, dims, result)
        shown = tuple(
            filter(None, (picked_parameter(s, name, args, dims, result) for s in note.shown))
        )
        return replace(note, index=index, shown=shown)

    def _picked_index(
        self, name: str, note: Note, args: Any, dims: list[int], result: Tensor
    ) -> Tensor | None:
        index = note.index
        assert index is not None
        known = not any(i.is_meta for i in tensors_of(args[1:]))
        if known and result.numel() <= LARGEST:
            try:
                found = getattr(torch.ops.aten, name)(index, *args[1:])
                return found if found.shape == result.shape else None
            except (RuntimeError, IndexError):
                pass
        self.use(note)
        return None

    def joined(self, name: str, args: Any, kwargs: Any, result: Tensor) -> Note | None:
        """Concatenations."""
        values = [value for value in args[0] if value.numel()]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        dim %= result.ndim
        notes = [self.noted(value) for value in values]
        known = [n for n in notes if n is not None]
        if all(n.fixed for n in known):
            return self._put_together(name, values, notes, dim)
        self.record_fixed(known, "place")
        active = [n for n in known if not n.fixed]
        return replace(
            mixture(active),
            index=self._joined_index(name, notes, dim, result),
            squashed=all(n.squashed for n in active),
            head_size=max(n.head_size for n in active),
            joined=frozenset(s.name for n in known if n.fixed for s in n.shown),
        )

    def _joined_index(
        self, name: str, notes: list[Note | None], dim: int, result: Tensor
    ) -> Tensor | None:
        indices = [n.index for n in notes if n is not None and n.index is not None]
        if not indices:
            return None
        if name == "cat":
            apart = len({self._source(int(i.min())) for i in indices if i.numel()}) > 1
            same = all(are_same(essential(i), essential(indices[0])) for i in indices)
            if (apart or same) and all(is_batch(i, dim) for i in indices):  # along the sequence
                first = indices[0].narrow(dim, 0, 1)
                for other in indices[1:]:
                    other = other.narrow(dim, 0, 1)
                    if other.shape == first.shape:
                        self.both(first, other, summed=True)
                return expanded_to(first, result.shape)
        sources = {self._source(int(i.min())) for i in indices if i.numel()}
        if len(indices) == len(notes) and len(sources) == 1:
            join = torch.stack if name == "stack" else torch.cat
            rest = [d for d in range(indices[0].ndim) if name == "stack" or d != dim]
            rest = [d for d in rest if all(is_batch(i, d) for i in indices)]
            pieces = self.rotated([narrowed(i, rest) for i in indices])
            return expanded_to(join(pieces, dim), result.shape)
        for note in notes:
            self.use(note)
        return None

    def _put_together(
        self, name: str, values: list[Tensor], notes: list[Note | None], dim: int
    ) -> Note:
        shown: list[Shown] = []
        at = 0
        known = [one for note in notes if note is not None for one in note.shown]
        is_bank = any(has_several_axes(one.shape) for one in known)
        for value, note in zip(values, notes, strict=True):
            for one in note.shown if note is not None else ():
                if is_bank and is_vector(one) and value.shape[dim] == 1:  # a row beside others
                    one = replace(one, how="place")
                if one.start is None:
                    view = one.view.unsqueeze(dim) if name == "stack" else one.view
                    shown.append(replace(one, view=view, start=(dim, at)))
            at += value.shape[dim] if name == "cat" and value.ndim else 1
        return Note(shown=tuple(shown), fixed=True)

    def placed(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Entries that are written into a tensor."""
        notes = self.notes_of(tensors_of((args, kwargs)))
        target = self.noted(args[0])
        if notes and all(n.fixed for n in notes):
            shown = tuple(scattered(s) for n in notes for s in n.shown)
            whole = name == "copy" and target is None
            return Note(shown=notes[0].shown if whole else shown, fixed=True)
        self.record_fixed(notes, "place")
        for note in notes:
            if note is not target and note.index is not None:
                index = narrowed(note.index)
                if 0 < index.numel() <= LARGEST:
                    key = args[0].untyped_storage()._cdata
                    self.pieces.setdefault(key, []).append(essential(index))
        active = [n for n in notes if not n.fixed]
        squashed = bool(active) and all(n.squashed for n in active)
        return replace(mixture(active), squashed=squashed)

    def reduced(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Sums, means and norms along axes."""
        note = self.noted(args[0])
        if note is None:
            return None
        if note.fixed:
            if any(s.picked for s in note.shown):
                self.record(note, "lookup")
                return Note()
            return Note(fixed=True)
        dims = _reduced_axes(args, kwargs)
        if name == "sum" and len(dims) < args[0].ndim:
            factors = [found for s, n in note.times if (found := self._summed(s, n, dims, note))]
            if factors:
                return self._contracted(note, factors)
        self.not_summed(note)
        index = self._reduced_index(note, dims, next(tensors_of(result)))
        return replace(note, index=index, shown=(), times=())

    def _summed(
        self, shown: Shown, repeated: frozenset[int], dims: list[int], note: Note
    ) -> tuple[str, Layout] | None:
        """A parameter whose products with activations are summed along their features: a matrix."""
        axes, index = shown.axes(), note.index
        into = {j for d in dims if d < len(axes) for j in axes[d] if shown.shape[j] > 1}
        outs = {j for j, size in enumerate(shown.shape) if size == 1 or j in repeated} - into
        features = (
            [d for d in range(index.ndim) if not is_batch(index, d)]
            if index is not None
            else [len(axes) - 1]
        )
        is_matrix = any(shown.shape[j] > 1 for j in outs)
        if not into or shown.picked or not (is_matrix or set(features) & set(dims)):
            return None
        words = [
            "in" if j in into else "out" if j in outs else "stack" for j in range(len(shown.shape))
        ]
        return shown.name, Layout(" ".join(numbered(words)))

    def _contracted(self, note: Note, factors: list[tuple[str, Layout]]) -> Note:
        """The sum of products with parameters, as a product of matrices gives it."""
        self.use(note)
        for name, layout in factors:
            self.summed.setdefault(name, layout)
            self.seen.feeds.setdefault(name, set()).update(note.makers)
        names = {name for name, _ in factors}
        return Note(makers=note.makers | names, last=note.last | names)

    def _reduced_index(self, note: Note, dims: list[int], result: Tensor) -> Tensor | None:
        index = note.index
        if index is None:
            return None
        if not all(is_batch(index, d) for d in dims):
            self.use(note)
            return None
        keep = result.ndim == index.ndim
        for d in reversed(dims):
            index = index.narrow(d, 0, 1) if keep else index.select(d, 0)
        return index if index.shape == result.shape else None

    def softmax(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Weights that add up to 1."""
        note = self.noted(args[0])
        if note is not None and any(shown.inner for shown in note.shown):
            for shown in note.shown:  # vectors that are compared, as of the nodes of a graph
                self._use(shown.name, "place")
            return Note(squashed=True)
        if note is not None and note.fixed:  # shares of a few layers or features
            shares = [replace(s, how="gain") if is_vector(s) else s for s in note.shown]
            return replace(note, shown=tuple(shares))
        if note is None:
            return None
        for parameter in note.joined:
            self._use(parameter, "sink")
        self.use(note)
        size = args[0].shape[args[1]] if args[0].ndim else 1
        for maker in note.makers if len(note.makers) == 1 and note.index is not None else ():
            if maker in self.sources and self.sources[maker].size == size:
                self.seen.shares.setdefault(maker, size)
        if "log" in name:  # scores, also where a normalisation gave them
            return replace(
                note, index=None, squashed=False, share=False, scored=True, last=note.makers
            )
        return replace(note, index=None, squashed=True, share=True)

    def gated(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """One half times the sigmoid of the other."""
        note = self.noted(args[0])
        if note is None:
            return None
        if note.index is not None:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            for half in note.index.chunk(2, dim):
                self.use(replace(note, index=half))
        return replace(note, index=None, shown=())

    def patched(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Patches of an image as columns."""
        note = self.noted(args[0])
        self.use(note)
        return None if note is None else replace(note, patches=True, index=None)

    def anything(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Operations that no method knows: they mix what they get."""
        operands = list(tensors_of((args, kwargs)))
        notes = self.notes_of(operands)
        output = next(tensors_of(result), None)
        active = [n for n in notes if not n.fixed]
        if not active:
            shown = notes[0].shown if output is not None and len(notes) == 1 else ()
            same = output is not None and output.shape == operands[0].shape
            if not same and any(s.expanded for s in shown):  # repeated for each row, and resized
                self.record(notes[0], "place")
                return Note()
            return Note(shown=shown if same else (), fixed=True)
        self.record_fixed(notes, "other")
        index = None
        for note in active:
            if note.index is None:
                continue
            moved = resized_to(note.index, output.shape) if output is not None else None
            if moved is None or len(active) > 1:
                self.use(note)
            else:
                index = moved
        return replace(
            mixture(active),
            index=index,
            head_size=max(n.head_size for n in active),
        )


def _reduced_axes(args: Any, kwargs: Any) -> list[int]:
    """The axes along which a reduction goes: all of them, if none is named."""
    count = args[0].ndim
    given = next((a for a in args[1:] if isinstance(a, (list, tuple))), None)
    if given is None and len(args) > 1 and type(args[1]) is int:
        given = [args[1]]
    given = given if given is not None else kwargs.get("dim")
    given = [given] if isinstance(given, int) else given
    return sorted({d % count for d in given}) if given and count else list(range(count))
