"""The dispatch mode under which the twin runs.

[`Watch`] lets every composite operation come down to a few dozen ATen operations, gives their
shapes (`operations.py`), and moves notes (`notes.py`) from what goes in to what comes out. To
support an operation, add a method to `mixing.py` or `products.py`, and its name to `_NOTED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode

from ..norms.layouts import usual_layout
from .follow import (
    choice,
    is_plain,
    is_record,
    mixture,
    note_of,
    selection,
    selection_of,
    tensors_of,
)
from .mixing import GAINS, Mixing
from .notes import Note, Shown
from .operations import evaluate, is_real
from .parts import divided
from .pointwise import COMPARISONS
from .products import ROWS
from .twin import Twin
from .views import COPIES, scattered, table_layout

_SMALL = 3  # matrices of a module whose features go on to the one that called it
_MOST = 200_000  # operations of one pass
_MOST_ASKING = 20_000  # of one whose code asks for more than so many values
_MOST_ASKED = 2000
_SAME = COPIES | {"_unsafe_view", "repeat", "_reshape_alias", "_conj", "view_as_real_copy"}
_POINTWISE = frozenset(
    ("complex", "polar", "real", "imag", "native_dropout", "dropout", "addcmul", "addcdiv", "lerp")
) | {"where", "rsub"}

_RANDOM = ("rand", "normal", "uniform", "exponential", "bernoulli")


class EndlessError(Exception):
    """A pass of more operations than any model needs, or a loop until something converges."""


class Watch(Mixing):
    """Notes what every operation does.

    Args:
        twin: the twin that runs.
    """

    def __init__(self, twin: Twin) -> None:
        super().__init__(twin)
        self.operations = self.asked = 0
        self.aside = False  # whether operations are not the twin's, but our own
        if not twin.notes:
            twin.notes.extend(self._parameters())
        for tensor, note in twin.notes:
            tensor._note = note

    def _parameters(self) -> list[tuple[Any, Note]]:
        """The parameters as they show themselves."""
        found = []
        for tensor in self.twin.module.parameters():
            name = self.twin.names.get(id(tensor))
            if name is not None and is_real(tensor):
                view = torch.empty(tensor.shape, device="meta")
                shown = (Shown(name, tuple(tensor.shape), view),)
                found.append((tensor, Note(shown=shown, fixed=True)))
        return found

    def given(self, values: Any) -> None:
        """Mark floating inputs as activations."""
        for value in tensors_of(values):
            if is_real(value):
                value._note = Note()  # type: ignore[attr-defined]

    def hooks(self) -> Any:
        """A context in which every call of a module is known."""

        def aside(hook: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.aside = True
                try:
                    return hook(*args)
                finally:
                    self.aside = False

            return call

        stack = ExitStack()
        for handle in (
            register_module_forward_pre_hook(aside(self._enter)),
            register_module_forward_hook(aside(self._leave)),
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
        """An argument without its features, which its other users keep."""
        note = note_of(value)
        if note is None or note.index is None:
            return value
        value = value.detach()
        self._end_features(value, note)
        return value

    def _end_features(self, value: Tensor, note: Note) -> None:
        """Features that a module receives or gives are used, and not followed further."""
        self.use(note)
        value._note = replace(note, index=None)  # type: ignore[attr-defined]

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        while self.stack and self.stack.pop() is not module:
            pass  # calls that ended with an exception
        path = self.twin.paths.get(id(module))
        if path and hasattr(module, "config") and hasattr(module, "get_output_embeddings"):
            self.returned(path, output)
        normalises = "norm" in type(module).__name__.lower() and not module._modules
        ends = self._count(module) > _SMALL
        for value in tensors_of(output) if normalises or ends else ():
            note = note_of(value)
            if note is not None and normalises and not note.fixed:
                note = replace(note, last=frozenset())
                value._note = note  # type: ignore[attr-defined]
            if note is not None and ends and note.index is not None:
                self._end_features(value, note)

    def ended(self) -> None:
        """Note of what the pass ended in that not all of it was seen: it will run alone."""
        unfinished = next((m for m in reversed(self.stack) if not is_plain(m)), None)
        path = self.twin.paths.get(id(unfinished), "")
        if path:
            below = f"{path}."
            self.seen.partly |= {name for name in self.seen.uses if name.startswith(below)}

    def _count(self, module: nn.Module) -> int:
        if id(module) not in self.twin.sizes:
            self.twin.sizes[id(module)] = sum(p.ndim > 1 for p in module.parameters())
        return self.twin.sizes[id(module)]

    def returned(self, path: str, output: Any) -> None:
        """Note what made the fields of a model's output."""
        fields = self.seen.fields.setdefault(path, {})
        for key, value in _fields(output):
            makers: frozenset[str] = frozenset()
            for tensor in tensors_of(value):
                note = self.noted(tensor)
                if note is not None:
                    makers |= note.last - self.weights if note.squashed else note.last
                    self.seen.alone |= note.last if len(note.last) == 1 else frozenset()
                    if note.scored:
                        self.seen.scored |= note.last - self.weights
                    self.not_summed(note)
                    if not path and note.fixed:
                        self.record(note, "return")
            fields[key] = fields.get(key, frozenset()) | makers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.aside:
            return func(*args, **kwargs)
        self.operations += 1
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        if self.operations > (_MOST if self.asked < _MOST_ASKED else _MOST_ASKING):
            raise EndlessError(f"forward went on after {self.operations} operations")
        result = evaluate(func, args, kwargs)
        if torch._C._current_autograd_node() is not None:
            return result  # a gradient that forward asks for, as of an energy
        with suppress(Exception):  # an operation that is called otherwise than was thought of
            self.note(func, args, kwargs, result)
        return result

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what an operation gives."""
        name = func.overloadpacket.__name__
        base = name.rstrip("_") if func._schema.is_mutable else name
        if base.startswith(_RANDOM) and isinstance(result, Tensor):
            result._is_noise = True  # type: ignore[attr-defined]
        if base.endswith("_like") or base.startswith("new_"):
            return
        with suppress(RuntimeError):
            self.select(func, base, args, result)
        notes = self.notes_of(tensors_of((args, kwargs)))
        if base == "_to_copy" and is_real(result) and hasattr(args[0], "_compared"):
            result._note = args[0]._compared  # a step function, as of spikes
        if not notes:
            return
        active = [n for n in notes if not n.fixed]
        if base in COMPARISONS and active and isinstance(result, Tensor):
            result._compared = mixture(active)  # type: ignore[attr-defined]
        if func.is_view or base in _SAME:
            return self.view(func, args, kwargs, result)
        method = _NOTED.get(base)
        if method is not Watch.reduced:
            for note in notes:
                self.not_summed(note)
        if method is not None:
            found = method(self, base, args, kwargs, result)
        elif torch.Tag.pointwise in func.tags or base in _POINTWISE:
            found = self.pointwise(base, args, kwargs, result)
        else:
            found = self.anything(base, args, kwargs, result)
        outputs = list(tensors_of(result))
        for i, output in enumerate(outputs):
            if is_real(output):
                part = found if i == 0 or found is None else replace(found, index=None)
                output._note = part  # type: ignore[attr-defined]
        if func._schema.is_mutable and outputs and found is not None and args:
            self.write(args[0], found)

    def select(self, func: Any, base: str, args: tuple[Any, ...], result: Any) -> None:
        """Mark constants that choose rows, as floats: masks, and one-hot vectors."""
        known = [chosen for arg in args if (chosen := selection_of(arg)) is not None]
        chosen = None
        if base == "_to_copy" and not is_real(args[0]):
            chosen = choice(args[0])
        elif base == "scatter" and isinstance(args[3], (int, float)):
            axis = args[1] % args[0].ndim
            chosen = selection(args[0].shape, axis if args[2].shape[axis] == 1 else None)
        elif not known or not isinstance(result, Tensor):
            return
        elif func.is_view or base in _SAME:
            chosen = known[0] if base in COPIES else func(known[0], *args[1:])
        elif base in ("add", "sub", "rsub") and known[0].shape == result.shape:
            chosen = known[0]
        elif base in ("add", "sub", "rsub", "mul"):
            chosen = selection(result.shape)
        if chosen is not None and is_real(result):
            result._selection = chosen

    def write(self, target: Tensor, note: Note) -> None:
        """Something was written into a tensor's memory; others that share it show it."""
        key = target.untyped_storage()._cdata
        self.kept.append(target)
        old = self.written.get(key)
        notes = [note] if old is None else [note, old]
        shown = tuple(scattered(s) for n in notes if n.fixed for s in n.shown)
        fixed, squashed = (all(getattr(n, f) for n in notes) for f in ("fixed", "squashed"))
        self.written[key] = replace(mixture(notes), fixed=fixed, squashed=squashed, shown=shown)

    def finish(self) -> None:
        """Divide each matrix as its features were used."""
        for pieces in self.pieces.values():
            # of one matrix: put together anew, as by a rotation
            if len({self._source(int(piece.min())) for piece in pieces}) == len(pieces):
                for piece in pieces:
                    self._receive(piece)
        self._finish_sums()
        for (name, axis), rows in self.covered.items():
            shape = self.twin.shapes[name]
            size = shape[axis] if axis < len(shape) else 0  # a flat shard tells nothing
            if rows and len(rows) < size <= ROWS and not self._is_matrix(name):
                # a slice as long as the sequence: rows of a table of positions
                is_last = axis == len(shape) - 1
                layout = table_layout(len(shape), {axis}) if is_last else None
                self.seen.uses[name] = {"lookup": layout or usual_layout("embedding", shape)}
        uses = list(self.received.values())
        for name, source in self.sources.items():
            self.seen.matrices[name] = divided(source, uses)

    def _finish_sums(self) -> None:
        """What multiplies features entry by entry only to be summed with them is a matrix."""
        matrices = self.summed.keys() - self.gains
        for name in matrices:
            for how in ("gain", "outer"):
                self.seen.uses[name].pop(how, None)
            self._use(name, "product", self.summed[name])
        for fields in self.seen.fields.values():
            for key, makers in fields.items():
                above = self._above(makers & matrices)
                fields[key] = makers - above - (self.summed.keys() & self.gains)


def _fields(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), value) for key, value in output.items())
    elif hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif is_record(output):
        yield from vars(output).items()
    else:
        yield "output", output


class Lists(TorchFunctionMode):
    """Lists of numbers that index are kept on the CPU, where their values are known."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], str):
            raise TypeError(f"a tensor has no attribute {args[1]!r}")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if _is_list(i) else i for i in index)
            args = (args[0], index, *args[2:])
        return func(*args, **(kwargs or {}))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, (int, bool)) for i in value)


_NOTED: dict[str, Callable[..., Note | None]] = {
    **dict.fromkeys(
        ("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_grouped_mm"),
        Watch.product,
    ),
    "_trilinear": Watch.bilinear,
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), Watch.distance),
    **dict.fromkeys(("convolution", "_convolution", "conv_tbc"), Watch.convolution),
    **dict.fromkeys(GAINS, Watch.normalised),
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
    "_weight_norm": Watch.weight_normalised,
    "_weight_norm_interface": Watch.weight_normalised,
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
