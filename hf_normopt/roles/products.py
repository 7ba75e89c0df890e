"""Products with parameters: matrices, convolutions, attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..norms.layouts import Layout, usual_layout
from .follow import along, mixture, resized_to, selection_of, tensors_of
from .notes import Note, Shown, essential
from .pointwise import Pointwise
from .views import is_token, kernel_layout, product_layout, table_layout, unsqueezed

ROWS = 1 << 16  # of a table that may be cut to the length of a sequence


class Products(Pointwise):
    """Notes what is multiplied, and along which axes."""

    def product(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """Matrix products: mm, bmm, and those that add."""
        if not (name.startswith("add") or name == "baddbmm"):
            return self._product(args[0], args[1], result)
        found, bias = self._product(args[1], args[2], result), self.noted(args[0])
        if bias is not None and bias.fixed and found.fixed:
            return self._combined("add", [found, bias], result)
        if bias is not None and bias.fixed:
            self._beside(bias, "sum", [found], result)
        elif bias is not None and not found.fixed:
            return self._active("add", [found, bias], result, True)
        return found

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Note:
        a, b = self.noted(left), self.noted(right)
        known, constant = (a, right) if b is None else (b, left)
        if known is not None and self._is_scaled(known, left, constant):
            return self._combined("mul", [known], result, [constant])
        if known is not None and known.squashed and self.noted(constant) is None:
            self.use(known)
            return Note(makers=known.makers, last=known.last)  # a mean of constants
        # Constants are activations: positions, frequencies.
        a, b = a or Note(), b or Note()
        if right.ndim == 1:  # mv, dot
            right, b = right.unsqueeze(-1), unsqueezed(b, -1)
        if left.ndim == 1:
            left, a = left.unsqueeze(0), unsqueezed(a, 0)
        chosen = selection_of(left)
        if b.fixed and chosen is not None and chosen.stride(left.ndim - 1):
            return self._chosen(b, right.ndim - 2)
        if a.fixed and b.fixed and a.shown and all(len(s.shape) == 1 for s in a.shown):
            self.record(a, "place")  # a code times a matrix, which may make other parameters
            a = Note()
        if a.fixed and b.fixed:
            a, b = self._as_activations(a, b)
        if a.fixed and b.fixed:
            return self._of_parameters(a, b, result)
        for note, kept in ((a, left.ndim - 2), (b, right.ndim - 1)):
            tokens = [is_token(s, kept) and not self._is_matrix(s.name) for s in note.shown]
            if note.fixed and tokens and all(tokens):
                self.record(note, "place")
                return self._activations(
                    Note() if note is a else a, Note() if note is b else b, result
                )
        if not (a.fixed or b.fixed) and bool(a.shown) != bool(b.shown):
            a, b = replace(a, fixed=bool(a.shown)), replace(b, fixed=bool(b.shown))  # modulated
        if a.fixed:
            return self._weighted(a, b, (left.ndim - 1, left.ndim - 2), result)
        if b.fixed:
            return self._weighted(b, a, (right.ndim - 2, right.ndim - 1), result)
        return self._activations(a, b, result)

    def _is_scaled(self, note: Note, left: Tensor, constant: Tensor) -> bool:
        """Whether a product multiplies single numbers, such as frequencies by times."""
        stored = any(self._is_matrix(shown.name) for shown in note.shown)
        return note.fixed and not stored and left.shape[-1] == 1 and self.noted(constant) is None

    def _chosen(self, table: Note, rows: int) -> Note:
        """One-hot vectors times a table: its rows are looked up."""
        plain = [s for s in table.shown if s.view.ndim > rows and not s.how]
        for shown in plain:
            self._use(shown.name, "lookup", table_layout(len(shown.shape), shown.axes()[rows]))
        return Note()

    def bilinear(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """Products of two activations with a stack of matrices."""
        left, weight, right = (self.noted(arg) or Note() for arg in args[:3])
        self.use(left)
        self.use(right)
        layouts = {s.name: Layout("out in1 in2") for s in weight.shown if len(s.shape) == 3}
        self.record_fixed([left, right], "place")
        self.record(weight, "product", layouts)
        for maker in layouts:
            self.seen.feeds.setdefault(maker, set()).update(left.makers | right.makers)
        return Note(makers=frozenset(layouts), last=frozenset(layouts))

    def distance(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """Distances of rows to those of a table are, but for lengths, products with them."""
        x, table = (self.noted(arg) or Note() for arg in args[:2])
        axes = (args[1].ndim - 2, args[1].ndim - 1)
        if x.fixed and not table.fixed:
            x, table = table, x
        if not table.fixed or x.fixed:
            for note in (x, table) if x.fixed and table.fixed else ():  # points among themselves
                self.record(note, "place")
            return self._activations(x, table, result)
        plain = [s for s in table.shown if s.start is None and s.given is None]
        transposed = tuple(s.moved(s.view.mT) for s in plain if s.view.ndim > 1)
        return self._weighted(replace(table, shown=transposed), x, axes, result)

    def _as_activations(self, a: Note, b: Note) -> tuple[Note, Note]:
        """Of two parameters, one may stand for activations: it was looked up, or repeated."""
        for one, other in ((a, b), (b, a)):
            rows = bool(one.shown) and all(s.picked for s in one.shown)
            if rows and not any(s.picked for s in other.shown):
                self.record(one, "lookup")
                return (Note(), b) if one is a else (a, Note())
            repeated = any(s.expanded for s in one.shown)
            stored = any(self._is_matrix(s.name) for s in other.shown)
            if (repeated and not any(s.expanded for s in other.shown)) or (
                stored and not any(self._is_matrix(s.name) for s in one.shown)
            ):
                self.record(one, "place")
                active = Note()
                return (active, b) if one is a else (a, active)
        return a, b

    def _of_parameters(self, a: Note, b: Note, result: Tensor) -> Note:
        """A product of parameters: what it is will be seen later."""
        shown = []
        for note, side in ((a, 0), (b, 1)):
            for one in note.shown:
                if one.start is not None or one.view.ndim < 2:
                    continue
                contracted = one.view.ndim - 1 - side  # of W x the last, of x W the one before
                inner = frozenset(one.axes()[contracted])
                view = one.view.select(contracted, 0)
                view = view.unsqueeze(contracted)
                given = None
                if one.given is not None:
                    given = tuple(() if i == contracted else x for i, x in enumerate(one.given))
                try:
                    view = view.expand(result.shape)
                except RuntimeError:
                    continue
                shown.append(replace(one, view=view, inner=one.inner | inner, given=given))
        return Note(shown=tuple(shown), fixed=True)

    def _weighted(self, weight: Note, x: Note, axes: tuple[int, int], result: Tensor) -> Note:
        """Activations times parameters.

        Args:
            weight: of the parameters.
            x: of the activations.
            axes: the contracted axis of the parameters, and the one that stays.
            result: the product.
        """
        self.use(x)
        contracted, kept = axes
        layouts, source = {}, None
        for shown in weight.shown:
            layout, outs = product_layout(shown, contracted, kept)
            if layout is None:
                continue
            layouts[shown.name] = layout
            self._cover(shown, contracted, kept)
            if shown.divided:
                self.seen.divided.setdefault(shown.name, dict(shown.divided))
            if not shown.how and outs and (source is None or shown.entries() > source[0].entries()):
                source = (shown, outs)
        how = "kernel" if x.patches and any(len(s.shape) > 2 for s in weight.shown) else "product"
        if how == "kernel":
            layouts = {s.name: usual_layout("conv", s.shape) for s in weight.shown}
        mixed = _mixed(weight, contracted, kept, result) if x.squashed else ()
        self.record(weight, "mixture" if mixed else how, layouts)
        makers = frozenset(
            s.name
            for s in weight.shown
            if (not s.how and any(s.axes()[kept : kept + 1]))
            or (s.name in layouts and not s.how and not s.inner)
        )
        makers = makers or frozenset(s.name for s in weight.shown if not s.how)
        for maker in makers:
            self.seen.feeds.setdefault(maker, set()).update(x.makers)
            if x.head_size:
                self.seen.head_sizes.setdefault(maker, x.head_size)
        index = None
        if source is not None:
            index = self._features(weight, source[0], axes, layouts, result)
        stacked = any("stack" in str(layout) for layout in layouts.values())
        return Note(makers=makers, last=makers, index=index, stacked=stacked, shown=mixed)

    def _cover(self, shown: Shown, contracted: int, kept: int) -> None:
        """Note which entries along each stored axis were multiplied by."""
        if shown.given is not None or shown.start is not None:
            return
        divided = {j for j, _ in shown.divided}
        for d in (contracted, kept):
            axes = shown.axes()[d]
            if len(axes) == 1 and axes[0] not in divided and not (shown.picked or shown.how):
                seen = self.covered.setdefault((shown.name, axes[0]), set())
                if len(seen) < shown.shape[axes[0]] <= ROWS:
                    seen.update(shown.numbers([d], [axes[0]]).tolist())

    def _features(
        self,
        weight: Note,
        source: Shown,
        axes: tuple[int, int],
        layouts: Mapping[str, Layout],
        result: Tensor,
    ) -> Tensor | None:
        """Numbers of the features that a product with parameters gives, in its shape."""
        contracted, kept = axes
        pieces: list[tuple[int, Tensor]] = []
        for shown in weight.shown:
            if shown.how or shown.name not in layouts:
                continue
            _, outs = product_layout(shown, contracted, kept)
            if not outs or (shown.start is None and shown is not source):
                continue
            layout = layouts[shown.name]
            known = self._source_of(shown, outs, shown.view.shape[contracted], layout)
            if known.pattern != str(layout):
                return None
            at = shown.start[1] if shown.start is not None and shown.start[0] == kept else 0
            pieces.append((at, known.start + shown.numbers([kept], outs)))
        if not pieces:
            return None
        pieces.sort(key=lambda piece: piece[0])
        # x W gives the features last, W x before the rest; there is no rest of a vector.
        axis = result.ndim - 1 if contracted < kept or result.ndim == 1 else result.ndim - 2
        return along(torch.cat([piece for _, piece in pieces]), axis, result.shape)

    def _activations(self, a: Note, b: Note, result: Tensor) -> Note:
        """A product of activations: weights of an attention times values, or a comparison."""
        self.use(a)
        self.use(b)
        if a.squashed == b.squashed:
            return self._later(a, b)
        weights, values = (a, b) if a.squashed else (b, a)
        if weights.share:
            self.weights |= weights.makers
        size = result.shape[-1] if a.squashed else 0
        return Note(makers=values.makers, last=values.last, head_size=size)

    def _later(self, a: Note, b: Note) -> Note:
        """Of two products of equal rank, what was made from the other, or made at all."""
        for one, other in ((a, b), (b, a)):
            before = self._above(one.makers)
            if one.makers and (other.makers <= before or self._is_between(one, other)):
                return Note(makers=one.makers, last=one.last)
        return Note()

    def _is_between(self, one: Note, other: Note) -> bool:
        """Whether a matrix stands between two activations that were made alike: x W y."""
        feeds, shapes = self.seen.feeds, self.twin.shapes
        before = frozenset().union(*(feeds.get(name, set()) for name in one.makers))
        left, right = (
            Counter((shapes.get(name), frozenset(feeds.get(name, ()))) for name in names)
            for names in (before, other.makers)
        )
        return left == right and bool(left) and not before & other.makers

    def _above(self, makers: frozenset[str]) -> set[str]:
        """The matrices whose outputs reach some others."""
        above: set[str] = set()
        todo = list(makers)
        while todo:
            new = self.seen.feeds.get(todo.pop(), set()) - above
            above |= new
            todo += new
        return above

    def attention(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """A fused attention: queries, keys, values."""
        notes = [self.noted(value) for value in args[:3]]
        for note in notes:
            self.use(note)
        known = [note for note in notes if note is not None]
        self.record_fixed(known, "place")
        mask = next(
            (v for v in (*args[3:], kwargs.get("attn_mask")) if isinstance(v, Tensor)), None
        )
        self.record_fixed(self.notes_of([mask]), "sum")
        return replace(
            mixture([notes[2]] if notes[2] is not None else []),
            head_size=next(tensors_of(result)).shape[-1],
        )

    def convolution(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Convolutions of any number of axes."""
        x, weight = self.noted(args[0]), self.noted(args[1])
        bias = self.noted(args[2]) if len(args) > 2 else None
        if x is not None and x.fixed:
            self.record(x, "place")
            x = Note()
        modulated = weight is not None and not weight.fixed and bool(weight.shown)
        if weight is None or not (weight.fixed or modulated):
            self.use(x)
            return mixture([n for n in (x, weight) if n is not None])
        depthwise = name != "conv_tbc" and args[1].shape[1] == 1 and args[8] == args[0].shape[1]
        layouts = {}
        transposed = name != "conv_tbc" and bool(args[6])
        groups = 1 if name == "conv_tbc" else int(args[8])
        for shown in weight.shown:
            layout = kernel_layout(name, shown, transposed, 1 if modulated else groups)
            if layout is not None:
                layouts[shown.name] = layout
        self.record(weight, "kernel", layouts)
        makers = frozenset(s.name for s in weight.shown if not s.how)
        for maker in makers:
            self.seen.feeds.setdefault(maker, set()).update(x.makers if x is not None else ())
        index = self._channels(weight, x, depthwise, groups, transposed, layouts, args, result)
        found = Note(makers=makers, last=makers, index=index)
        if bias is not None and bias.fixed:
            axis = 1 if name != "conv_tbc" else result.ndim - 1
            self.record(bias, "sum")
            if index is not None and not depthwise and index.shape[axis] > 1:
                self._link(bias, essential(index))
        return found

    def _channels(
        self,
        weight: Note,
        x: Note | None,
        depthwise: bool,
        groups: int,
        transposed: bool,
        layouts: Mapping[str, Layout],
        args: Any,
        result: Tensor,
    ) -> Tensor | None:
        """Numbers of the channels that a convolution gives."""
        if depthwise and x is not None and x.index is not None and groups == result.shape[1]:
            return resized_to(x.index, result.shape)
        self.use(x)
        plain = [s for s in weight.shown if s.name in layouts and not s.how and s.given is None]
        if groups > 1 or len(plain) != 1 or len(plain[0].view.shape) != args[1].ndim:
            return None
        shown, out = plain[0], 1 if transposed else 0
        axes = list(shown.axes()[out])
        if not axes:
            return None
        known = self._source_of(shown, axes, args[0].shape[1], layouts[shown.name])
        return along(known.start + shown.numbers([out], axes), 1, result.shape)


def _mixed(weight: Note, contracted: int, kept: int, result: Tensor) -> tuple[Shown, ...]:
    """Matrices or kernels of which each row of a product takes its own weighted mean."""
    mixed = []
    for shown in weight.shown:
        axes = shown.axes()
        others = tuple(range(1, len(shown.shape)))
        if shown.start is not None or shown.given is not None or shown.how or len(others) < 2:
            continue
        if axes[contracted] == (0,) and axes[kept] == others:
            view = shown.view.select(contracted, 0).unsqueeze(contracted).expand(result.shape)
            mixed.append(replace(shown, view=view))
    return tuple(mixed)
