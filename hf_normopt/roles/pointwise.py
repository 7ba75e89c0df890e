"""Operations entry by entry: gains, sums, activations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..norms.layouts import Layout
from .follow import Follower, expanded_to, mixture, selection_of, tensors_of
from .notes import NONE, Note, Shown, essential, is_batch
from .views import has_several_axes, is_vector, numbered, table_layout

_SUMS_OF = frozenset(("add", "sub", "rsub", "addcmul", "addcdiv", "subtract"))
_PRODUCTS_OF = frozenset(("mul", "div", "multiply", "addcmul"))
_REPEATS = _PRODUCTS_OF | {"pow"}
_RATES_OF = frozenset(("exp", "pow", "sin", "cos"))  # of what is multiplied by positions
_SQUASHES = frozenset(("sigmoid", "hardsigmoid", "softmax", "exp"))

COMPARISONS = ("gt", "ge", "lt", "le")  # x > a is x - a > 0
_CHOICES = frozenset(("where", "masked_fill", "fill", "maximum", "minimum", "masked_scatter"))


def _is_state(shown: Shown, gated: bool) -> bool:
    """Whether a table, or what gates multiply, was repeated for each row as activations are."""
    return shown.expanded and (gated or has_several_axes(shown.shape))


def _outer(note: Note, times: Iterable[tuple[Shown, frozenset[int]]]) -> dict[str, Layout]:
    """Layouts of matrices along the last axis of which numbers are repeated, to become vectors."""
    found = {}
    names = {shown.name for shown in note.shown}
    for shown, repeated in times:
        longer = [j for j, size in enumerate(shown.shape) if size > 1]
        is_last = any(shown.axes()[-1:])  # no features follow that the numbers have already
        if shown.name in names and len(longer) > 1 and longer[-1] in repeated and is_last:
            words = ["out" if j in repeated else "stack" for j in range(len(shown.shape))]
            found[shown.name] = Layout(" ".join(numbered(words)))
    return found


def _entries(shown: Shown) -> tuple[str, int]:
    """A parameter and the first of its entries that are shown: others belong to another layer."""
    return shown.name, int(shown.view.storage_offset())


def _are_rows(notes: Sequence[Note]) -> bool:
    """Whether rows of a table, by their numbers, and other parameters are among the summands."""
    picked = [all(s.picked and not s.how for s in note.shown) for note in notes if note.shown]
    return any(picked) and not all(picked)


def _is_whole(shown: Shown, repeated: frozenset[int]) -> bool:
    """Whether single numbers were repeated along all axes of a parameter."""
    return {j for j, size in enumerate(shown.shape) if size > 1} <= repeated


def _lies_along(note: Note, features: list[int], output: Tensor) -> bool:
    """Whether tables have entries along several axes of features, such as heads, and no others."""
    found = []
    for shown in note.shown:
        spread = shown.spread(output.shape)
        axes = spread.axes() if spread is not None and spread.start is None else []
        along = {d for d, stored in enumerate(axes) if stored and output.shape[d] > 1}
        found.append(len(along) > 1 and along <= set(features))
    return bool(found) and all(found)


class Pointwise(Follower):
    """Notes what multiplies activations entry by entry, and what is added to them."""

    def pointwise(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Entry by entry: gains, sums, activations."""
        output = next(tensors_of(result))
        operands = list(tensors_of((args, kwargs)))
        notes = self.notes_of(operands)
        if name in _CHOICES and not all(n.fixed for n in notes):
            self.record_fixed(notes, "place")
            notes = [n for n in notes if not n.fixed]
        active = [n for n in notes if not n.fixed]
        if not active and name in _SUMS_OF and _are_rows(notes):
            for note in notes:
                self.record(note, "sum")
            return Note()
        if not active:
            constants = [v for v in operands if self.noted(v) is None and v.numel() > 1]
            return self._combined(name, notes, output, constants)
        summed = name in _SUMS_OF or name in COMPARISONS
        times = self._times(operands, output) if name in ("mul", "multiply") else ()
        for position, value in enumerate(operands):
            its = self.noted(value)
            if its is not None and its.fixed:
                how = "sum" if summed and not (name.startswith("addc") and position) else "gain"
                how = "exponent" if name == "pow" else how
                gated = all(n.squashed for n in active)
                if how == "gain" and any(_is_state(s, gated) for s in its.shown):
                    how = "place"
                outer = _outer(its, times) if how == "gain" else {}
                self._beside(its, "outer" if outer else how, active, output, outer)
        found = self._active(name, self._mixed_in(name, operands, active), output, summed)
        found = self._recurrence(name, notes, active, found)
        if name in ("mul", "multiply", "div"):
            largest = max(v.numel() for v in operands if self._is_active(v))
            modulated = output.numel() > largest or any(n.shown for n in active)
            spread = [s.spread(output.shape) for n in notes for s in n.shown]
            shown = tuple(s for s in spread if s is not None and s.picked == NONE)
            return replace(
                found, shown=shown if modulated else (), times=times or self._kept(operands)
            )
        if len(operands) == 1 and active[0].shown:
            return replace(found, shown=active[0].shown)
        return found

    def _kept(self, operands: list[Tensor]) -> tuple[tuple[Shown, frozenset[int]], ...]:
        """The parameters among factors still, after a product with a number."""
        notes = [self.noted(v) for v in operands if self.noted(v) is not None or v.numel() > 1]
        return notes[0].times if len(notes) == 1 and notes[0] is not None else ()

    def _times(
        self, operands: list[Tensor], output: Tensor
    ) -> tuple[tuple[Shown, frozenset[int]], ...]:
        """The parameters among factors, and their axes along which the other one is repeated."""
        if len(operands) != 2:
            return ()
        found = []
        for one, other in (operands, operands[::-1]):
            note = self.noted(one)
            if note is None or not note.fixed or not self._is_active(other):
                continue
            sizes = [1] * (output.ndim - other.ndim) + list(other.shape)
            for shown in note.shown:
                view = shown.spread(output.shape)
                if view is None or view.start is not None or view.given is not None or view.how:
                    continue
                repeated = (js for js, n in zip(view.axes(), sizes, strict=True) if n == 1)
                found.append((view, frozenset(j for js in repeated for j in js)))
        return tuple(found)

    def _recurrence(self, name: str, notes: list[Note], active: list[Note], found: Note) -> Note:
        """Parameters that multiply what they multiplied before are the rates of a recurrence.

        They do so themselves, or as exponents of their products with activations.
        """
        rates = frozenset().union(*(n.rates for n in active))
        decayed = frozenset().union(*(n.decayed for n in active))
        if name in ("sin", "cos"):
            for shown in (s for n in active for s, repeated in n.times if _is_whole(s, repeated)):
                self._use(shown.name, "rate")  # frequencies, which single numbers are multiplied by
        if name == "exp":
            rates |= {_entries(shown) for n in active for shown, _ in n.times}
            decayed = frozenset()
        elif name in _SQUASHES:
            return found
        if name in ("mul", "multiply", "div"):
            fixed = [s for n in notes if n.fixed for s in n.shown]
            factors = rates | {_entries(s) for s in fixed if not s.picked}
            for parameter, _ in factors & decayed:
                self._use(parameter, "rate")
            decayed |= factors
            rates = rates if len(active) == 1 else frozenset()
        return replace(found, rates=rates, decayed=decayed)

    def _is_active(self, value: Tensor) -> bool:
        note = self.noted(value)
        return note is not None and not note.fixed

    def _beside(
        self,
        note: Note,
        how: str,
        active: list[Note],
        output: Tensor,
        layouts: Mapping[str, Layout] = MappingProxyType({}),
    ) -> None:
        """Parameters that multiply activations, or are added to them, entry by entry."""
        index = next((n.index for n in active if n.index is not None), None)
        axis = output.ndim - 1
        if index is not None and index.ndim == output.ndim:
            axes = [d for d in range(index.ndim) if not is_batch(index, d)]
            axis = axes[0] if len(axes) == 1 else axis
            if how == "sum" and axes:
                self._link(note, essential(index))
            if how == "sum" and output.ndim - len(axes) > 1 and _lies_along(note, axes, output):
                how = "offset"
        if how == "sum" and any(n.stacked or self._are_scaled_alike(n, note) for n in active):
            how = "offset"
        layouts = dict(layouts)
        for shown in note.shown if not layouts else ():
            spread = shown.spread(output.shape) if shown.given is None else None
            if spread is not None and spread.start is None and has_several_axes(shown.shape):
                features = spread.axes()[axis]
                if features and axis != output.ndim - 1:
                    rows = set(range(len(shown.shape))) - set(features)
                    layouts[shown.name] = table_layout(len(shown.shape), rows)
        self.record(note, how, layouts)

    def _are_scaled_alike(self, note: Note, offset: Note) -> bool:
        """Whether activations were multiplied by a table of the shape of what is added to them."""
        shapes = {self.twin.shapes[name] for name, _ in note.decayed}
        return any(s.shape in shapes and has_several_axes(s.shape) for s in offset.shown)

    def _link(self, note: Note, index: Tensor) -> None:
        """A vector that is added to the features of a matrix is divided as they are."""
        flat = index.flatten()
        for shown in note.shown:
            if math.prod(shown.shape) == flat.numel() == shown.entries():
                name = self._source(int(flat.min()))
                if name is not None and self.sources[name].size == flat.numel():
                    self.seen.beside.setdefault(shown.name, name)

    def _mixed_in(self, name: str, operands: list[Tensor], active: list[Note]) -> list[Note]:
        """The factors but for shares of several entries of another, in a mixture."""
        if name not in _PRODUCTS_OF or not all(n.squashed for n in active):
            return active
        factors = [v for v in operands if self._is_active(v)]
        largest = max(v.numel() for v in factors)
        pairs = zip(factors, active, strict=True)
        return [n for v, n in pairs if v.numel() == largest or not n.share]

    def _active(self, name: str, active: list[Note], output: Tensor, summed: bool) -> Note:
        if len(active) > 1 and name in _PRODUCTS_OF:
            plain = [n for n in active if not n.squashed]
            makers = plain if plain else active
            self.weights.update(*(n.makers for n in active if n.share and plain))
        else:
            makers = active
        index = None
        for note in active:
            if note.index is None:
                continue
            mine = expanded_to(note.index, output.shape)
            if mine is None:
                self.use(note)
            elif index is None:
                index = mine
            else:
                index = self.both(index, mine, summed)
        return replace(
            mixture(makers),
            index=index,
            squashed=name in _SQUASHES or all(n.squashed for n in active),
            patches=any(n.patches for n in active),
            head_size=max(n.head_size for n in active),
        )

    def _combined(
        self, name: str, notes: list[Note], output: Tensor, constants: Sequence[Tensor] = ()
    ) -> Note:
        """A function of parameters alone; the smaller of two is a gain or offset of the other.

        One that constants repeat is a gain of these, as of distances, or a token at the places that
        a mask chooses.
        """
        shown: list[Shown] = []
        for note in notes:
            for one in note.shown:
                spread = one.spread(output.shape)
                if spread is not None:
                    shown.append(spread)
        most = max((s.entries() for s in shown), default=0)
        how = "sum" if name in _SUMS_OF else "gain"
        found: dict[str, Shown] = {}
        if any(getattr(value, "_is_noise", False) for value in constants):
            shown = [replace(one, how="spread") if is_vector(one) else one for one in shown]
        if constants and most < output.numel() and name in _REPEATS:
            is_mask = any(selection_of(value) is not None for value in constants)
            repeated = "place" if is_mask else "gain"
            shown = [one if one.how else replace(one, how=repeated) for one in shown]
        tables = len(notes) > 1 and all(has_several_axes(one.shape) for one in shown)
        if tables and name in _SUMS_OF and most < output.numel():  # places of rows and of columns
            shown = [one if one.how else replace(one, how="place") for one in shown]
        if name == "reciprocal":
            shown = [one if one.how else replace(one, how="inverse") for one in shown]
        if name in _RATES_OF and len(notes) == 1:
            shown = [replace(one, how="rate") if one.how == "gain" else one for one in shown]
        for one in shown:
            smaller = one.entries() < most and not one.inner  # factors cover what they multiply to
            if one.how == "spread" and len(notes) > 1:
                one = replace(one, how="")
            if len(notes) > 1 and smaller and not one.how and one.start is None:
                one = replace(one, how=how)
            old = found.get(one.name)
            if old is None or (old.how and not one.how) or one.entries() > old.entries():
                found[one.name] = one
        return Note(shown=tuple(found.values()), fixed=True)
