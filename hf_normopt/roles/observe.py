"""What `forward` does with every parameter, seen in one pass without arithmetic.

    seen = observe(model, inputs)
    seen.uses["layer.weight"]      # {"product": Layout("out in")}
    seen.matrices["layer.weight"]  # how the module divides what it gives
    seen.fields                    # which matrices made each output last

A twin of the model (`twin.py`) runs under [`Watch`], a dispatch mode that lets every composite
operation come down to a few dozen ATen operations, gives their shapes (`operations.py`), and moves
notes (`notes.py`) from what goes in to what comes out. To support an operation, add a method to
[`Watch`] and its name to `_NOTED`.
"""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers.pytorch_utils import Conv1D

from ..layouts import Layout, usual_layout
from .inputs import candidates, normalise, with_places
from .notes import LARGEST, NONE, Note, Shown, essential, is_batch, narrowed, reshaped
from .operations import evaluate, is_real
from .parts import Matrix, Source, divided
from .twin import Twin, structure, undisturbed, unwrapped

_SMALL = 3  # matrices of a module whose features go on to the one that called it
_ROWS = 1 << 16  # of a table that may be cut to the length of a sequence
_SUMS = 64  # sums of features that are remembered


@dataclass
class Seen:
    """What one pass saw.

    Attributes:
        uses: by parameter, what was done with it: "product", "kernel", "lookup", "gain", "sum",
            "offset" (to a product), "place", "return", "packed", each with the layout that this gives, if any.
        matrices: by parameter, how what a matrix gives is divided.
        beside: by bias, the matrix to whose features it is added.
        divided: by matrix, the number of pieces that a view divided its stored axes into.
        head_sizes: by matrix after an attention, the size of the attention's heads.
        feeds: by matrix, those that made its inputs last.
        fields: by model (its name), for each field of its output the matrices that made it last.
        where: by parameter, the class of the module that used it.
        ran: the parameters that the model's own `forward` reached.
        alike: by parameter of a layer that was skipped, that of the equal layer that ran.
        failure: what ended the pass early, "" if nothing did.
    """

    uses: dict[str, dict[str, Layout | None]] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    divided: dict[str, dict[int, int]] = field(default_factory=dict)
    head_sizes: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, set[str]] = field(default_factory=dict)
    fields: dict[str, dict[str, frozenset[str]]] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    alike: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def update(self, other: Seen) -> None:
        """Add what was seen of modules that ran alone."""
        for name, table in self._tables():
            for key, value in getattr(other, name).items():
                table.setdefault(key, value)
        for key, makers in other.feeds.items():
            self.feeds.setdefault(key, set()).update(makers)
        for path, fields in other.fields.items():
            self.fields.setdefault(path, fields)

    def copy_to_equals(self) -> None:
        """What was seen of a parameter holds for the same one of an equal module that did not run."""
        for name, ran in self.alike.items():
            for _, table in self._tables():
                if ran in table:
                    table.setdefault(name, table[ran])

    def _tables(self) -> list[tuple[str, dict[str, Any]]]:
        names = ("uses", "matrices", "beside", "divided", "head_sizes", "where")
        return [(name, getattr(self, name)) for name in names]


def observe(model: nn.Module, inputs: Any = None) -> Seen:
    """Run a twin of the model once and tell what was seen.

    Modules that `forward` did not reach run alone, on activations of their own width.

    Args:
        model: any module; it is only read.
        inputs: what `forward` takes, see [`inputs.normalise`]; made from its signature if None.
    """
    asked = [] if inputs is None else [normalise(inputs)]
    given = itertools.chain(asked, candidates(model))
    with undisturbed(model) as twin:
        seen = _best(twin, twin.module, "", given)
        seen.alike = twin.alike
        seen.copy_to_equals()
        seen.ran = set(seen.uses)
        _observe_rest_inplace(seen, twin, unwrapped(model))
    return seen


def _best(twin: Twin, module: nn.Module, path: str, given: Iterable[Any], tries: int = 60) -> Seen:
    """What was seen of a module on the first inputs that it takes, or on those that led farthest."""
    best = Seen(failure="no inputs are known for it")
    for args, kwargs in itertools.islice(given, tries):
        for _ in range(3):
            seen = _run(twin, module, path, args, kwargs)
            if not seen.failure:
                return seen
            if len(seen.uses) > len(best.uses) or not best.uses:
                best = seen
            mended = with_places(module, kwargs, seen.failure)
            if mended is None:
                break
            kwargs = mended
    return best


def _run(
    twin: Twin, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Seen:
    watch = Watch(twin)
    try:
        with watch.hooks(), watch, _Lists():
            watch.given((args, kwargs))
            output = module(*args, **kwargs)
        watch.returned(path, output)
        for tensor in _tensors(output):
            watch.use(note_of(tensor))
    except Exception as error:  # foreign code raises anything
        watch.seen.failure = f"{type(error).__name__}: {error} ({_place(error)})"
    watch.finish()
    return watch.seen


def _observe_rest_inplace(seen: Seen, twin: Twin, model: nn.Module) -> None:
    """Run alone what was not reached; of equal modules the first."""
    known: dict[Any, str] = {}
    todo = [("", model)]
    while todo and len(known) < _ALONE:
        path, module = todo.pop(0)
        names = [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        missing = [name for name in names if name not in seen.uses]
        if not missing or not is_worth_running(module):
            continue
        if path and len(missing) == len(names) and not isinstance(module, _CONTAINERS):
            kind = structure(module)
            if kind in known:
                first = known[kind]
                for name in names:
                    seen.alike[name] = first + name.removeprefix(path)
                continue
            copy = twin.copies.get(id(module))
            if copy is not None:
                known[kind] = path
                alone = _best(twin, copy, path, candidates(module), _TRIES)
                seen.update(alone)
                if not alone.failure:
                    continue
        todo[:0] = [
            (f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()
        ]
    seen.copy_to_equals()


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_ALONE = 60  # kinds of modules that run alone
_TRIES = 16  # inputs of such a module


def is_worth_running(module: nn.Module) -> bool:
    """Whether what a module does is told by more than the class of torch that it is of."""
    return any(
        not type(part).__module__.startswith("torch.") and next(part.parameters(), None) is not None
        for part in module.modules()
    )


def _place(error: Exception) -> str:
    """The last line of code that is not this package's or torch's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "hf_normopt" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"


class _Lists(TorchFunctionMode):
    """Lists of numbers that index are kept on the CPU, where their values are known."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if _is_list(i) else i for i in index)
            args = (args[0], index, *args[2:])
        return func(*args, **(kwargs or {}))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, (int, bool)) for i in value)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is one matrix, table or normalisation, whatever its class is called."""
    return not module._modules and isinstance(module, (nn.Linear, nn.Embedding, Conv1D, _ConvNd))


def note_of(value: Any) -> Note | None:
    """What is noted of a tensor, if anything."""
    return getattr(value, "_note", None) if isinstance(value, Tensor) else None


class Watch(TorchDispatchMode):
    """Notes what every operation does.

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
        self.pieces: dict[int, list[Tensor]] = {}  # written into one memory, by its address
        self.covered: dict[tuple[str, int], set[int]] = {}
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.kept: list[Any] = []  # whose storages' addresses are keys of `written`
        self.stack: list[nn.Module] = []
        self.sizes: dict[int, int] = {}
        for tensor in [*twin.module.parameters()]:
            name = twin.names.get(id(tensor))
            if name is not None and is_real(tensor):
                view = torch.empty(tensor.shape, device="meta")
                shown = (Shown(name, tuple(tensor.shape), view),)
                tensor._note = Note(shown=shown, fixed=True)  # type: ignore[attr-defined]

    def given(self, values: Any) -> None:
        """Mark floating inputs as activations."""
        for value in tree_flatten(values)[0]:
            if is_real(value):
                value._note = Note()

    # ------------------------------------------------------------------ modules

    def hooks(self) -> Any:
        """A context in which every call of a module is known."""
        from contextlib import ExitStack

        stack = ExitStack()
        for handle in (
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave),
        ):
            stack.callback(handle.remove)
        return stack

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Features are followed into small modules; others receive them as they are."""
        self.stack.append(module)
        if self._count(module) <= _SMALL + 1:
            return None
        return tuple(self._received(value) if is_real(value) else value for value in args)

    def _received(self, value: Tensor) -> Tensor:
        note = note_of(value)
        if note is None or note.index is None:
            return value
        self.use(note)
        value = value.detach()
        value._note = replace(note, index=None)  # type: ignore[attr-defined]
        return value

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        while self.stack and self.stack.pop() is not module:
            pass  # calls that ended with an exception
        path = self.twin.paths.get(id(module))
        if path and hasattr(module, "config") and hasattr(module, "get_output_embeddings"):
            self.returned(path, output)
        if "norm" in type(module).__name__.lower() and not module._modules:
            for value in _tensors(output):
                note = note_of(value)
                if note is not None and not note.fixed:
                    value._note = replace(note, last=frozenset())  # type: ignore[attr-defined]
        if self._count(module) > _SMALL:
            for value in _tensors(output):
                note = note_of(value)
                if note is not None and note.index is not None:
                    self.use(note)
                    value._note = replace(note, index=None)  # type: ignore[attr-defined]

    def _count(self, module: nn.Module) -> int:
        if id(module) not in self.sizes:
            self.sizes[id(module)] = sum(p.ndim > 1 for p in module.parameters())
        return self.sizes[id(module)]

    def returned(self, path: str, output: Any) -> None:
        """Note what made the fields of a model's output."""
        fields = self.seen.fields.setdefault(path, {})
        for key, value in _fields(output):
            makers: frozenset[str] = frozenset()
            for tensor in _tensors(value):
                note = self.noted(tensor)
                if note is not None:
                    makers |= note.last
                    if not path and note.fixed:
                        self.record(note, "return")
            fields[key] = fields.get(key, frozenset()) | makers

    # ------------------------------------------------------------------ notes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = evaluate(func, args, kwargs)
        try:
            self.note(func, args, kwargs, result)
        except Exception as error:  # an operation that is called otherwise than was thought of
            self.lost(error)
        return result

    def lost(self, error: Exception) -> None:
        """Called where an operation could not be noted."""

    def noted(self, value: Any) -> Note | None:
        """What is noted of a tensor, with what was written into its memory."""
        note = note_of(value)
        if self.written and isinstance(value, Tensor):
            other = self.written.get(value.untyped_storage()._cdata)
            if other is not None and other is not note:
                return other if note is None else replace(note, **_made([note, other]))
        return note

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what an operation gives."""
        name = func.overloadpacket.__name__
        base = name.rstrip("_") if func._schema.is_mutable else name
        values = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        notes = [n for n in map(self.noted, values) if n is not None]
        if not notes:
            return
        if base.endswith("_like") or base.startswith("new_"):
            return None
        if func.is_view or base in _SAME:
            return self.view(func, args, kwargs, result)
        method = _NOTED.get(base)
        if method is not None:
            found = method(self, base, args, kwargs, result)
        elif torch.Tag.pointwise in func.tags or base in _POINTWISE:
            found = self.pointwise(base, args, kwargs, result)
        else:
            found = self.anything(base, args, kwargs, result)
        outputs = list(_tensors(result))
        for i, output in enumerate(outputs):
            if is_real(output):
                part = found if i == 0 or found is None else replace(found, index=None)
                output._note = part
        if func._schema.is_mutable and outputs and found is not None and args:
            self.write(args[0], found)

    def write(self, target: Tensor, note: Note) -> None:
        """Something was written into a tensor's memory; others that share it show it."""
        key = target.untyped_storage()._cdata
        self.kept.append(target)
        old = self.written.get(key)
        made = _made([note] if old is None else [note, old])
        self.written[key] = Note(**made, fixed=note.fixed and (old is None or old.fixed))

    def view(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Move a note as an operation moves entries."""
        note = self.noted(args[0])
        outputs = result if isinstance(result, (list, tuple)) else [result]
        if note is None:
            return
        indices = self._moved_index(func, note, args, kwargs, outputs)
        shown = [_moved(s, func, args, kwargs, outputs) for s in note.shown]
        for i, output in enumerate(outputs):
            if is_real(output):
                parts = tuple(s[i] for s in shown if s[i] is not None)
                index = indices[i] if output.numel() else None
                output._note = replace(note, shown=parts, index=index)

    def _moved_index(
        self, func: Any, note: Note, args: Any, kwargs: Any, outputs: Any
    ) -> list[Tensor | None]:
        none: list[Tensor | None] = [None] * len(outputs)
        if note.index is None:
            return none
        name = func.overloadpacket.__name__
        if name in ("view_as_real", "view_as_complex"):
            return self._complex(name, note, outputs)
        if name in _COPIES:
            return [note.index]
        if name == "as_strided" and tuple(args[1]) != tuple(note.index.shape):
            self.use(note)
            return none
        if name == "as_strided":
            return [note.index]
        try:
            if name in _RESHAPES:
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
            if real.shape == index.shape and _same(essential(real), essential(index)):
                return [torch.stack([real, imaginary], -1)]
        return [None]

    # ------------------------------------------------------------------ uses of parameters

    def record(self, note: Note, how: str, layouts: Mapping[str, Layout] | None = None) -> None:
        """Note what is done with the parameters that a tensor shows."""
        for shown in note.shown:
            final = shown.how or how
            layout = (layouts or {}).get(shown.name)
            if final == "scatter":
                final, layout = ("packed", None) if how == "product" else ("place", None)
            elif shown.picked and not (how in ("product", "kernel") and layout is not None):
                final, layout = "lookup", _picked_layout(shown)
            elif shown.how and how not in ("product", "kernel"):
                layout = None
            self._use(shown.name, final, layout)

    def _use(self, name: str, how: str, layout: Layout | None = None) -> None:
        uses = self.seen.uses.setdefault(name, {})
        if uses.get(how) is None:
            uses[how] = layout
        callers = (m for m in reversed(self.stack) if not is_plain(m))
        if caller := next(callers, None):
            self.seen.where.setdefault(name, type(caller).__name__)

    # ------------------------------------------------------------------ features

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
                    b for b in beside if b is not None and not any(_same(b, r) for r in received)
                ]
                if len(received) > 8:
                    break
        for one in received:
            key = (tuple(one.shape), hash(one.contiguous().numpy().tobytes()))
            self.received.setdefault(key, one)

    def both(self, left: Tensor, right: Tensor, summed: bool) -> Tensor | None:
        """Features after an operation between entries of two tensors of one shape."""
        if left is right or (left.shape == right.shape and _same(essential(left), essential(right))):
            return left
        one, other = essential(left), essential(right)
        if not summed or one.numel() != other.numel() or len(self.sums) > _SUMS:
            self._receive(one)
            self._receive(other)
            return None
        features, order = one.flatten().sort()
        self.sums.append((features, other.flatten()[order]))
        return left

    # ------------------------------------------------------------------ operations

    def pointwise(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Entry by entry: gains, sums, activations."""
        output = next(_tensors(result))
        operands = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        notes = [n for n in map(self.noted, operands) if n is not None]
        if name in ("where", "masked_fill", "fill", "maximum", "minimum", "masked_scatter"):
            if any(n.fixed for n in notes) and not all(n.fixed for n in notes):
                for note in notes:
                    if note.fixed:
                        self.record(note, "place")
                notes = [n for n in notes if not n.fixed]
        active = [n for n in notes if not n.fixed]
        if not active:
            return self._combined(name, notes, output)
        summed = name in _SUMS_OF
        for value, note in zip(operands, map(self.noted, operands), strict=True):
            if note is not None and note.fixed:
                position = next(i for i, v in enumerate(operands) if v is value)
                how = "sum" if summed and not (name.startswith("addc") and position) else "gain"
                self._beside(note, how, active, output)
        found = self._active(name, active, output, summed)
        if name in ("mul", "div"):
            largest = max(v.numel() for v in operands if self._is_active(v))
            modulated = output.numel() > largest or any(n.shown for n in active)
            shown = [s.spread(output.shape) for n in notes for s in n.shown] if modulated else []
            return replace(found, shown=tuple(s for s in shown if s is not None and s.picked == NONE))
        if len(operands) == 1 and active[0].shown:
            return replace(found, shown=active[0].shown)
        return found

    def _is_active(self, value: Tensor) -> bool:
        note = self.noted(value)
        return note is not None and not note.fixed

    def _beside(self, note: Note, how: str, active: list[Note], output: Tensor) -> None:
        """Parameters that multiply activations, or are added to them, entry by entry."""
        index = next((n.index for n in active if n.index is not None), None)
        axis = output.ndim - 1
        if index is not None and index.ndim == output.ndim:
            axes = [d for d in range(index.ndim) if not is_batch(index, d)]
            axis = axes[0] if len(axes) == 1 else axis
            if how == "sum" and len(axes) == 1:
                self._link(note, essential(index))
        if how == "sum" and any(n.stacked for n in active):
            how = "offset"
        layouts = {}
        for shown in note.shown:
            spread = shown.spread(output.shape) if shown.given is None else None
            if spread is not None and spread.start is None and sum(n > 1 for n in shown.shape) > 1:
                features = spread.axes()[axis]
                if features and axis != output.ndim - 1:
                    words = ["out" if j in features else "in" for j in range(len(shown.shape))]
                    layouts[shown.name] = Layout(" ".join(_numbered(words)))
        self.record(note, how, layouts)

    def _link(self, note: Note, index: Tensor) -> None:
        """A vector that is added to the features of a matrix is divided as they are."""
        flat = index.flatten()
        for shown in note.shown:
            if math.prod(shown.shape) == flat.numel() == shown.entries():
                name = self._source(int(flat.min()))
                if name is not None and self.sources[name].size == flat.numel():
                    self.seen.beside.setdefault(shown.name, name)

    def _source(self, number: int) -> str | None:
        for name, source in self.sources.items():
            if source.start <= number < source.stop:
                return name
        return None

    def _active(self, name: str, active: list[Note], output: Tensor, summed: bool) -> Note:
        if len(active) > 1 and name in _PRODUCTS_OF:
            plain = [n for n in active if not n.squashed]
            makers = plain if plain else active
        else:
            makers = active
        index = None
        for note in active:
            if note.index is None:
                continue
            mine = _expanded(note.index, output.shape)
            if mine is None:
                self.use(note)
            elif index is None:
                index = mine
            else:
                index = self.both(index, mine, summed)
        return Note(
            **_made(makers),
            index=index,
            squashed=name in _SQUASHES or all(n.squashed for n in active),
            patches=any(n.patches for n in active),
            head_size=max(n.head_size for n in active),
        )

    def _combined(self, name: str, notes: list[Note], output: Tensor) -> Note:
        """A function of parameters alone; the smaller of two is a gain or an offset of the other."""
        shown: list[Shown] = []
        for note in notes:
            for one in note.shown:
                spread = one.spread(output.shape)
                if spread is not None:
                    shown.append(spread)
        most = max((s.entries() for s in shown), default=0)
        how = "sum" if name in _SUMS_OF else "gain"
        found: dict[str, Shown] = {}
        for one in shown:
            if len(notes) > 1 and one.entries() < most and not one.how and one.start is None:
                one = replace(one, how=how)
            old = found.get(one.name)
            if old is None or (old.how and not one.how) or one.entries() > old.entries():
                found[one.name] = one
        return Note(shown=tuple(found.values()), fixed=True)

    def product(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Matrix products: mm, bmm, and those that add."""
        added = name.startswith("add") or name == "baddbmm"
        left, right = args[1:3] if added else args[:2]
        found = self._product(left, right, result)
        if added and (bias := self.noted(args[0])) is not None and found is not None:
            if bias.fixed and not found.fixed:
                self._beside(bias, "sum", [found], result)
            elif not bias.fixed and not found.fixed:
                found = self._active("add", [found, bias], result, True)
            elif bias.fixed:
                found = self._combined("add", [found, bias], result)
        return found

    def _product(self, left: Tensor, right: Tensor, result: Tensor) -> Note | None:
        a, b = self.noted(left), self.noted(right)
        if right.ndim == 1:  # mv, dot
            right = right.unsqueeze(-1)
            b = _unsqueezed(b)
        if left.ndim == 1:
            left = left.unsqueeze(0)
            a = _unsqueezed(a, 0)
        if a is not None and b is not None and a.fixed and b.fixed:
            a, b = self._settled(a, b)
        if a is not None and b is not None and a.fixed and b.fixed:
            return self._of_parameters(a, b, result)
        a, b = a or Note(), b or Note()  # constants are activations: positions, frequencies
        for note, kept in ((a, left.ndim - 2), (b, right.ndim - 1)):
            tokens = [_is_token(s, kept) and not self._is_matrix(s.name) for s in note.shown]
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

    def _settled(self, a: Note, b: Note) -> tuple[Note, Note]:
        """Of two parameters, one may stand for activations: it is repeated for each row."""
        for one, other in ((a, b), (b, a)):
            repeated = any(s.expanded for s in one.shown)
            stored = any(self._is_matrix(s.name) for s in other.shown)
            if (repeated and not any(s.expanded for s in other.shown)) or (
                stored and not any(self._is_matrix(s.name) for s in one.shown)
            ):
                self.record(one, "place")
                active = Note()
                return (active, b) if one is a else (a, active)
        return a, b

    def _is_matrix(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.twin.module.get_submodule(path)
        except AttributeError:
            return False
        if isinstance(owner, nn.MultiheadAttention):
            return leaf.endswith("proj_weight")
        return leaf == "weight" and isinstance(owner, (nn.Linear, Conv1D, _ConvNd))

    def _of_parameters(self, a: Note | None, b: Note | None, result: Tensor) -> Note:
        """A product of parameters, or of one with constants: what it is will be seen later."""
        shown = []
        for note, side in ((a, 0), (b, 1)):
            for one in note.shown if note is not None else ():
                if one.start is not None or one.view.ndim < 2:
                    continue
                contracted = one.view.ndim - 1 - side  # of W x the last, of x W the one before
                kept = one.view.ndim - 1 if side else one.view.ndim - 2
                inner = frozenset(one.axes()[contracted])
                view = one.view.select(contracted, 0)
                view = view.unsqueeze(contracted if contracted < kept or side else contracted)
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
            layout, outs = _layout(shown, contracted, kept)
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
        self.record(weight, how, layouts)
        makers = frozenset(
            s.name for s in weight.shown if not s.how and any(s.axes()[kept : kept + 1]) or
            (s.name in layouts and not s.how and not s.inner)
        )
        makers = makers or frozenset(s.name for s in weight.shown if not s.how)
        for maker in makers:
            self.seen.feeds.setdefault(maker, set()).update(x.makers)
            if x.head_size:
                self.seen.head_sizes.setdefault(maker, x.head_size)
        index = None
        if source is not None:
            index = self._features(weight, source, contracted, kept, layouts, result, axes)
        stacked = any("stack" in str(layout) for layout in layouts.values())
        return Note(makers=makers, last=makers, index=index, stacked=stacked)

    def _cover(self, shown: Shown, contracted: int, kept: int) -> None:
        """Note which entries along each stored axis were multiplied by."""
        if shown.given is not None or shown.start is not None:
            return
        divided = {j for j, _ in shown.divided}
        for d in (contracted, kept):
            axes = shown.axes()[d]
            if len(axes) == 1 and axes[0] not in divided and not (shown.picked or shown.how):
                seen = self.covered.setdefault((shown.name, axes[0]), set())
                if len(seen) < shown.shape[axes[0]] <= _ROWS:
                    seen.update(shown.numbers([d], [axes[0]]).tolist())

    def _features(
        self,
        weight: Note,
        source: tuple[Shown, list[int]],
        contracted: int,
        kept: int,
        layouts: Mapping[str, Layout],
        result: Tensor,
        axes: tuple[int, int],
    ) -> Tensor | None:
        """Numbers of the features that a product with parameters gives, in its shape."""
        pieces: list[tuple[int, Tensor]] = []
        for shown in weight.shown:
            if shown.how or shown.name not in layouts:
                continue
            _, outs = _layout(shown, contracted, kept)
            if not outs or (shown.start is None and shown is not source[0]):
                continue
            known = self.sources.get(shown.name)
            text = str(layouts[shown.name])
            if known is None:
                start = max((s.stop for s in self.sources.values()), default=0)
                sizes = tuple(shown.shape[j] for j in outs)
                fan = shown.view.shape[contracted]
                known = Source(start, start + math.prod(sizes), int(fan), text, sizes)
                self.sources[shown.name] = known
            elif known.pattern != text:
                return None
            numbers = known.start + shown.numbers([kept], outs)
            at = shown.start[1] if shown.start is not None and shown.start[0] == kept else 0
            pieces.append((at, numbers))
        if not pieces:
            return None
        pieces.sort(key=lambda piece: piece[0])
        numbers = torch.cat([piece for _, piece in pieces])
        last = contracted < kept  # x W gives the features last, W x before the rest
        axis = result.ndim - 1 if last else result.ndim - 2
        if result.ndim == 1:
            axis = 0
        if result.shape[axis] != len(numbers):
            return None
        shape = [len(numbers) if d == axis else 1 for d in range(result.ndim)]
        return numbers.view(shape).expand(result.shape)

    def _activations(self, a: Note, b: Note, result: Tensor) -> Note:
        """A product of activations: weights of an attention times values, or a comparison."""
        self.use(a)
        self.use(b)
        if a.squashed == b.squashed:
            return Note()
        values = b if a.squashed else a
        size = result.shape[-1] if a.squashed else 0
        return Note(makers=values.makers, last=values.last, head_size=size)

    def attention(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """A fused attention: queries, keys, values."""
        for value in args[:3]:
            self.use(self.noted(value))
            note = self.noted(value)
            if note is not None and note.fixed:
                self.record(note, "place")
        values = self.noted(args[2])
        return Note(
            **_made([values] if values is not None else []),
            head_size=next(_tensors(result)).shape[-1],
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
            return Note(**_made([n for n in (x, weight) if n is not None]))
        depthwise = name != "conv_tbc" and args[1].shape[1] == 1 and args[8] == args[0].shape[1]
        layouts = {}
        transposed = name != "conv_tbc" and bool(args[6])
        groups = 1 if name == "conv_tbc" else int(args[8])
        for shown in weight.shown:
            layout = _kernel(name, shown, transposed, 1 if modulated else groups)
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
        self, weight: Note, x: Note | None, depthwise: bool, groups: int, transposed: bool,
        layouts: Mapping[str, Layout], args: Any, result: Tensor,
    ) -> Tensor | None:
        """Numbers of the channels that a convolution gives."""
        if depthwise and x is not None and x.index is not None and groups == result.shape[1]:
            return _resized(x.index, result.shape)
        self.use(x)
        plain = [s for s in weight.shown if s.name in layouts and not s.how and s.given is None]
        if groups > 1 or len(plain) != 1 or len(plain[0].view.shape) != args[1].ndim:
            return None
        shown, out = plain[0], 1 if transposed else 0
        axes = list(shown.axes()[out])
        if not axes:
            return None
        known = self.sources.get(shown.name)
        if known is None:
            start = max((s.stop for s in self.sources.values()), default=0)
            sizes = tuple(shown.shape[j] for j in axes)
            fan = args[0].shape[1]
            text = str(layouts[shown.name])
            known = Source(start, start + math.prod(sizes), int(fan), text, sizes)
            self.sources[shown.name] = known
        numbers = known.start + shown.numbers([out], axes)
        if len(numbers) != result.shape[1]:
            return None
        shape = [len(numbers) if d == 1 else 1 for d in range(result.ndim)]
        return numbers.view(shape).expand(result.shape)

    def normalised(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Normalisations with a gain and an offset."""
        gain, bias = _GAINS[name]
        x = self.noted(args[0])
        for at, how in ((gain, "gain"), (bias, "sum")):
            note = self.noted(args[at]) if at and len(args) > at else None
            if note is not None and note.fixed:
                self.record(note, how)
        if x is None or x.fixed:
            return x and Note(shown=x.shown, fixed=True)
        return replace(x, last=frozenset())

    def lookup(self, name: str, args: Any, kwargs: Any, result: Any) -> Note:
        """Rows of a table by their numbers."""
        note = self.noted(args[0])
        for shown in note.shown if note is not None else ():
            axes = shown.axes()
            rows = axes[0] if axes else ()
            words = ["in" if j in rows else "out" for j in range(len(shown.shape))]
            self._use(shown.name, "lookup", Layout(" ".join(_numbered(words))))
        return Note() if note is None or note.fixed else Note(**_made([note]))

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
        shown = tuple(filter(None, (_picked(s, name, args, dims, result) for s in note.shown)))
        return replace(note, index=index, shown=shown)

    def _picked_index(
        self, name: str, note: Note, args: Any, dims: list[int], result: Tensor
    ) -> Tensor | None:
        index = note.index
        assert index is not None
        known = all(not i.is_meta for i in tree_flatten(args[1:])[0] if isinstance(i, Tensor))
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
            return self._put_together(name, values, notes, dim, result)
        for note in known:
            if note.fixed:
                self.record(note, "place")
        active = [n for n in known if not n.fixed]
        return Note(
            **_made(active),
            index=self._joined_index(name, notes, dim, result),
            squashed=all(n.squashed for n in active),
            head_size=max(n.head_size for n in active),
        )

    def _joined_index(
        self, name: str, notes: list[Note | None], dim: int, result: Tensor
    ) -> Tensor | None:
        indices = [n.index for n in notes if n is not None and n.index is not None]
        if not indices:
            return None
        if name == "cat":
            apart = len({self._source(int(i.min())) for i in indices if i.numel()}) > 1
            same = all(_same(essential(i), essential(indices[0])) for i in indices)
            if (apart or same) and all(is_batch(i, dim) for i in indices):  # along the sequence
                first = indices[0].narrow(dim, 0, 1)
                for other in indices[1:]:
                    other = other.narrow(dim, 0, 1)
                    if other.shape == first.shape:
                        self.both(first, other, summed=True)
                try:
                    return first.expand(result.shape)
                except RuntimeError:
                    return None
        sources = {self._source(int(i.min())) for i in indices if i.numel()}
        if len(indices) == len(notes) and len(sources) == 1:
            join = torch.stack if name == "stack" else torch.cat
            rest = [d for d in range(indices[0].ndim) if name == "stack" or d != dim]
            rest = [d for d in rest if all(is_batch(i, d) for i in indices)]
            return _expanded(join([narrowed(i, rest) for i in indices], dim), result.shape)
        for note in notes:
            self.use(note)
        return None

    def _put_together(
        self, name: str, values: list[Tensor], notes: list[Note | None], dim: int, result: Tensor
    ) -> Note:
        shown: list[Shown] = []
        at = 0
        for value, note in zip(values, notes, strict=True):
            for one in note.shown if note is not None else ():
                if name == "stack":
                    stacked = one.view.unsqueeze(dim) if one.start is None else None
                    if stacked is not None:
                        shown.append(replace(one, view=stacked, start=(dim, at)))
                elif one.start is None:
                    shown.append(replace(one, start=(dim, at)))
            at += value.shape[dim] if name == "cat" and value.ndim else 1
        return Note(shown=tuple(shown), fixed=True)

    def placed(self, name: str, args: Any, kwargs: Any, result: Any) -> Note | None:
        """Entries that are written into a tensor."""
        operands = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        notes = [n for n in map(self.noted, operands) if n is not None]
        target = self.noted(args[0])
        if notes and all(n.fixed for n in notes):
            shown = tuple(
                replace(s, how=s.how or "scatter", view=torch.empty((), device="meta"), given=())
                for n in notes
                for s in n.shown
            )
            whole = name == "copy" and target is None
            return Note(shown=notes[0].shown if whole else shown, fixed=True)
        for note in notes:
            if note.fixed:
                self.record(note, "place")
        for note in notes:
            if note is not target and note.index is not None:
                index = narrowed(note.index)
                if 0 < index.numel() <= LARGEST:
                    key = args[0].untyped_storage()._cdata
                    self.pieces.setdefault(key, []).append(essential(index))
        active = [n for n in notes if not n.fixed]
        return Note(**_made(active))

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
        index = self._reduced_index(note, args, kwargs, next(_tensors(result)))
        return replace(note, index=index, shown=())

    def _reduced_index(self, note: Note, args: Any, kwargs: Any, result: Tensor) -> Tensor | None:
        index = note.index
        if index is None:
            return None
        given = next((a for a in args[1:] if isinstance(a, (list, tuple))), None)
        if given is None and len(args) > 1 and type(args[1]) is int:
            given = [args[1]]
        given = given if given is not None else kwargs.get("dim")
        given = [given] if isinstance(given, int) else given
        dims = sorted({d % index.ndim for d in given}) if given else list(range(index.ndim))
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
        if note is None or note.fixed:
            return note
        self.use(note)
        return replace(note, index=None, squashed="log" not in name)

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
        operands = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
        notes = [n for n in map(self.noted, operands) if n is not None]
        output = next(_tensors(result), None)
        active = [n for n in notes if not n.fixed]
        if not active:
            shown = notes[0].shown if output is not None and len(notes) == 1 else ()
            same = output is not None and output.shape == operands[0].shape
            return Note(shown=shown if same else (), fixed=True)
        for note in notes:
            if note.fixed:
                self.record(note, "other")
        index = None
        for note in active:
            if note.index is None:
                continue
            moved = _resized(note.index, output.shape) if output is not None else None
            if moved is None or len(active) > 1:
                self.use(note)
            else:
                index = moved
        return Note(
            **_made(active),
            index=index,
            head_size=max(n.head_size for n in active),
        )

    # ------------------------------------------------------------------ the end

    def finish(self) -> None:
        """Divide each matrix as its features were used."""
        for pieces in self.pieces.values():
            # of one matrix: put together anew, as by a rotation
            if len({self._source(int(piece.min())) for piece in pieces}) == len(pieces):
                for piece in pieces:
                    self._receive(piece)
        for (name, axis), rows in self.covered.items():
            size = self.twin.shapes[name][axis]
            if rows and len(rows) < size <= _ROWS and not self._is_matrix(name):
                # a slice as long as the sequence: rows of a table of positions
                count = len(self.twin.shapes[name])
                words = ["in" if axis < count - 1 or j == axis else "out" for j in range(count)]
                words[-1] = "in" if axis == count - 1 else "out"
                words = [w if axis < count - 1 or j == axis else "out" for j, w in enumerate(words)]
                self.seen.uses[name] = {"lookup": Layout(" ".join(_numbered(words)))}
        uses = list(self.received.values())
        for name, source in self.sources.items():
            self.seen.matrices[name] = divided(source, uses)


# ---------------------------------------------------------------------- helpers


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in _leaves(value, 0):
        yield leaf


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
        elif hasattr(value, "__dataclass_fields__"):
            for item in vars(value).values():
                yield from _leaves(item, depth + 1)


def _fields(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), value) for key, value in output.items())
    elif hasattr(output, "__dataclass_fields__"):
        yield from vars(output).items()
    elif hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    else:
        yield "output", output


def _made(notes: list[Note]) -> dict[str, frozenset[str]]:
    """Which matrices made, last, what is a mixture of some tensors."""
    return {
        "makers": frozenset().union(*(note.makers for note in notes)),
        "last": frozenset().union(*(note.last for note in notes)),
    }


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _beside(features: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """What is added to some features, None if they are not all in the sum; `left` is sorted."""
    if not features.numel() or not left[0] <= features.min() <= features.max() <= left[-1]:
        return None
    at = torch.searchsorted(left, features.contiguous())
    return right[at] if torch.equal(left[at], features) else None


def _expanded(index: Tensor, shape: Iterable[int]) -> Tensor | None:
    try:
        return index.expand(tuple(shape))
    except RuntimeError:
        return None


def _resized(index: Tensor, shape: torch.Size) -> Tensor | None:
    """Numbers of features where other axes have new sizes, as of pooling."""
    if index.ndim != len(shape):
        return None
    for d, size in enumerate(shape):
        if index.shape[d] != size:
            if not is_batch(index, d):
                return None
            index = index.narrow(d, 0, 1)
    return _expanded(index, shape)


def _unsqueezed(note: Note | None, dim: int = -1) -> Note | None:
    if note is None:
        return None
    shown = tuple(s.moved(s.view.unsqueeze(dim)) for s in note.shown if s.start is None)
    index = None if note.index is None else note.index.unsqueeze(dim)
    return replace(note, shown=shown, index=index)


def _is_token(shown: Shown, kept: int) -> bool:
    """Whether a vector was repeated for each row, as a query that is learned."""
    return shown.expanded and kept < shown.view.ndim and shown.view.shape[kept] == 1


def _numbered(words: list[str]) -> list[str]:
    """Names of axes, with numbers where a name stands for several."""
    return [
        f"{word}{words[:i].count(word)}"
        if words.count(word) > 1 and not word.startswith("tap")
        else word
        for i, word in enumerate(words)
    ]


def _layout(shown: Shown, contracted: int, kept: int) -> tuple[Layout | None, list[int]]:
    """The layout of a parameter that a product contracts, and its axes of outputs."""
    if shown.view.ndim <= max(contracted, kept):
        return None, []
    axes = shown.axes()
    into, outs = set(axes[contracted]), set(axes[kept]) - set(axes[contracted])
    batch = {
        j: shown.view.shape[d]
        for d, js in enumerate(axes)
        if d not in (contracted, kept)
        for j in js
    }
    hidden = set(shown.inner)
    if hidden and into and not outs:
        outs = hidden
    elif hidden and outs and not into:
        into = hidden
    if not into or not outs:
        return None, []
    words = []
    for j in range(len(shown.shape)):
        words.append("in" if j in into else "out" if j in outs else "stack")
    words = _numbered(words)
    for j, count in batch.items():
        if words[j] in ("in", "out"):
            words[j] = f"(stack={count} {words[j]})"
    listed = [] if hidden and outs == hidden else sorted(outs)
    return Layout(" ".join(words)), listed


def _kernel(name: str, shown: Shown, transposed: bool, groups: int) -> Layout | None:
    """The layout of a parameter that is convolved with."""
    if shown.how:
        return None
    axes = shown.axes()
    if name == "conv_tbc":
        order = ["tap", "in", "out"]
    else:
        first = ["in", "out"] if transposed else ["out", "in"]
        order = first + ["tap"] * (len(axes) - 2)
    if len(axes) != len(order):
        return None
    names: dict[int, str] = {}
    for word, js in zip(order, axes, strict=True):
        for j in js:
            names.setdefault(j, word)
    words = []
    for j, size in enumerate(shown.shape):
        word = names.get(j, "tap" if j >= 2 and name != "conv_tbc" else "stack")
        word = f"tap={size}" if word == "tap" else word
        if groups > 1 and word == order[0] and names.get(j) == order[0]:
            word = f"(group={groups} {word})"
        words.append(word)
    try:
        return Layout(" ".join(_numbered(words)))
    except ValueError:
        return None


def _picked_layout(shown: Shown) -> Layout:
    words = ["in" if j in shown.picked else "out" for j in range(len(shown.shape))]
    return Layout(" ".join(_numbered(words)))


def _picked(
    shown: Shown, name: str, args: Any, dims: list[int], result: Tensor
) -> Shown | None:
    """A parameter of which an index picked entries."""
    if shown.start is not None:
        return None
    axes = shown.axes()
    picked = shown.picked | {j for d in dims if d < len(axes) for j in axes[d]}
    given = shown.given
    if name == "gather":
        return replace(
            shown, picked=picked, view=torch.empty(result.shape, device="meta"),
            given=tuple(() if d in dims else axes[d] for d in range(len(axes))),
        )
    rest = [d for d in range(len(axes)) if d not in dims]
    view = shown.view
    for d in sorted(dims, reverse=True):
        view = view.select(d, 0)
    extra = result.ndim - len(rest)
    together = dims == list(range(dims[0], dims[0] + len(dims)))
    at = dims[0] if together else 0
    for _ in range(extra):
        view = view.unsqueeze(at)
    view = view.expand(result.shape)
    if given is not None:
        left = [given[d] for d in rest]
        given = (*left[:at], *[()] * extra, *left[at:])
    return replace(shown, picked=picked, view=view, given=given)


def _moved(
    shown: Shown, func: Any, args: Any, kwargs: Any, outputs: Any
) -> list[Shown | None]:
    """A parameter after a view, for each output."""
    none: list[Shown | None] = [None] * len(outputs)
    name = func.overloadpacket.__name__
    if name in _COPIES:
        return [shown]
    if shown.start is not None or shown.given is not None:
        return _permuted(shown, func, args, kwargs, outputs)
    try:
        if name == "as_strided":
            return [shown] if tuple(args[1]) == tuple(shown.view.shape) else none
        if name in _RESHAPES:
            shape = tuple(outputs[0].shape)
            try:
                moved = shown.moved(shown.view.view(shape))
                return [replace(moved, divided=moved.pieces())]
            except RuntimeError:
                return [_copied(shown, shape)]
        if name == "repeat":
            return [_repeated(shown, outputs[0])]
        moved = func(shown.view, *args[1:], **kwargs)
    except RuntimeError:
        return none
    views = list(moved) if isinstance(moved, (list, tuple)) else [moved]
    expanded = shown.expanded or (
        name == "expand" and views[0].numel() > shown.view.numel()
    )
    return [replace(shown, view=view, expanded=expanded) for view in views]


def _repeated(shown: Shown, output: Tensor) -> Shown | None:
    view = shown.view
    for _ in range(output.ndim - view.ndim):
        view = view.unsqueeze(0)
    try:
        return replace(shown, view=view.expand(output.shape), expanded=True)
    except RuntimeError:
        axes = shown.axes()
        given = tuple([()] * (output.ndim - len(axes)) + axes)
        empty = torch.empty(output.shape, device="meta")
        return replace(shown, view=empty, given=given, expanded=True)


def _copied(shown: Shown, shape: tuple[int, ...]) -> Shown | None:
    """A parameter whose axes were merged in another order than they are stored in."""
    axes, sizes = shown.axes(), list(shown.view.shape)
    given: list[tuple[int, ...]] = []
    i = 0
    for size in shape:
        merged: tuple[int, ...] = ()
        product = 1
        while i < len(sizes) and (product < size or (sizes[i] == 1 and size == 1 and not merged)):
            product *= sizes[i]
            merged += axes[i]
            i += 1
            if product == size:
                break
        if product != size:
            return None
        given.append(merged)
    return replace(shown, view=torch.empty(shape, device="meta"), given=tuple(given))


_MARKS = (2, 3, 5, 7, 11, 13, 17, 19)


def _permuted(
    shown: Shown, func: Any, args: Any, kwargs: Any, outputs: Any
) -> list[Shown | None]:
    """The same for one that is no plain view: it follows where axes go."""
    none: list[Shown | None] = [None] * len(outputs)
    if func.overloadpacket.__name__ not in ("t", "transpose", "permute", "numpy_T"):
        return none
    marks = torch.empty(_MARKS[: shown.view.ndim], device="meta")
    order = [_MARKS.index(size) for size in func(marks, *args[1:], **kwargs).shape]
    start, given = shown.start, shown.given
    if start is not None:
        start = (order.index(start[0]), start[1])
    if given is not None:
        given = tuple(given[d] for d in order)
    view = func(shown.view, *args[1:], **kwargs)
    return [replace(shown, view=view, start=start, given=given)]


_COPIES = frozenset(
    ("clone", "contiguous", "detach", "alias", "lift_fresh", "_to_copy", "lift", "to", "detach_copy")
)
_RESHAPES = frozenset(("_unsafe_view", "view", "reshape", "_reshape_alias"))
_SAME = _COPIES | {"_unsafe_view", "repeat", "_reshape_alias", "_conj", "view_as_real_copy"}
_POINTWISE = frozenset(("complex", "polar", "real", "imag", "native_dropout", "dropout", "addcmul", "addcdiv", "lerp", "where", "rsub"))
_SUMS_OF = frozenset(("add", "sub", "rsub", "addcmul", "addcdiv", "subtract"))
_PRODUCTS_OF = frozenset(("mul", "div", "multiply", "addcmul"))
_SQUASHES = frozenset(("sigmoid", "hardsigmoid", "softmax"))
# Where each normalisation's gain and offset are among its arguments; 0 if there is none.
_GAINS = {
    "native_layer_norm": (2, 3),
    "native_group_norm": (1, 2),
    "native_batch_norm": (1, 2),
    "_native_batch_norm_legit": (1, 2),
    "_native_batch_norm_legit_no_training": (1, 2),
    "cudnn_batch_norm": (1, 2),
    "_batch_norm_with_update": (1, 2),
    "_fused_rms_norm": (2, 0),
}
_NOTED: dict[str, Callable[..., Note | None]] = {
    **dict.fromkeys(
        ("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_grouped_mm"),
        Watch.product,
    ),
    **dict.fromkeys(("convolution", "_convolution", "conv_tbc"), Watch.convolution),
    **dict.fromkeys(_GAINS, Watch.normalised),
    **dict.fromkeys(("embedding", "_embedding_bag", "_embedding_bag_forward_only"), Watch.lookup),
    **dict.fromkeys(("index", "index_select", "gather"), Watch.picked),
    **dict.fromkeys(("cat", "stack"), Watch.joined),
    **dict.fromkeys(
        ("copy", "index_put", "_index_put_impl", "scatter", "scatter_add", "index_add"),
        Watch.placed,
    ),
    **dict.fromkeys(
        ("index_copy", "slice_scatter", "select_scatter", "scatter_reduce", "masked_scatter"),
        Watch.placed,
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "norm", "linalg_vector_norm", "var", "std"),
        Watch.reduced,
    ),
    **dict.fromkeys(("prod", "logsumexp", "var_mean", "median", "nansum"), Watch.reduced),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), Watch.softmax),
    "im2col": Watch.patched,
    "glu": Watch.gated,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
        ),
        Watch.attention,
    ),
}
