"""A twin of a model, on which `forward` may run without a trace on the original.

    with undisturbed(model) as twin:
        twin.module(*args, **kwargs)    # parameters and floating buffers are on meta
        twin.names[id(parameter)]       # the original's name of a parameter or buffer of the twin
        twin.paths[id(module)]          # the original's name of a module of the twin
        twin.alike["layers.7.fc.weight"]  # "layers.1.fc.weight": was run in its place, if it was
        twin.dropped                    # modules of which hooks were left out

Modules, their dictionaries, and what their attributes refer to are copied; parameters and
floating tensors become empty ones on meta with the same shape, dtype and strides. What `forward`
sets, registers or counts is set on the twin. Integer and boolean buffers keep their values, on the
CPU, since they steer the code. Wrappers (`DistributedDataParallel`, `torch.compile`) are taken off.

While the context lasts, random states are kept to be restored, and nothing is printed, logged or
warned.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import re
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .quiet import no_global_hooks, quiet, random_states

# The one module inside each wrapper that runs it and adds nothing.
_INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
# Where accelerate keeps the `forward` that it wrapped; the first is the innermost.
_WRAPPED_FORWARDS = ("_original_forward", "_old_forward")
_NOT_COPIED = ("_hf_hook", "_compiled_call_impl", *_WRAPPED_FORWARDS)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OTHER_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
# Larger integer tensors are packed weights, and larger containers data.
_LARGEST_INTEGERS = 1 << 22
_LARGEST_CONTAINER = 10_000
# How far to follow objects that are no modules.
_DEPTH = 5
# Names of attributes that hold a layer's place among its equals.
_INDEX = re.compile(r"(^|_)(i|n|idx|index|id|number|num|depth)$")


@dataclass
class Twin:
    """A copy of a model that runs on meta, and the way back to the original's names.

    Attributes:
        module: the copy of the model, without wrappers, in evaluation mode.
        shapes: by name, the shape of each parameter.
        names: by `id`, the original's first name of each parameter and buffer of the copy.
        paths: by `id`, the original's first name of each module of the copy.
        alike: for the parameters of a layer that may be skipped, those of the layer that ran.
        dropped: names of the modules whose forward hooks the copy does not have.
        copies: by the original's `id`, each object that was copied; it keeps the ids valid.
        spent: operations of the passes over the model, or over what it did not reach.
        notes: the parameters of the copy, and what is noted of them before a pass.
        sizes: by `id`, the number of matrices in a module of the copy.
    """

    module: nn.Module
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    alike: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    copies: dict[int, Any] = field(default_factory=dict, repr=False)
    spent: int = 0
    notes: list[tuple[Any, Any]] = field(default_factory=list, repr=False)
    sizes: dict[int, int] = field(default_factory=dict, repr=False)


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, repeated: bool = False) -> Iterator[Twin]:
    """A twin of the model; while the context lasts nothing global changes for good.

    Args:
        model: any module, wrapped or not. It is only read.
        repeated: whether to run all of many equal layers. If not, the first two and the last of
            each kind in a list run, and each other one returns the output of the second as long
            as it is called with arguments of the same shapes (`Twin.alike`).
    """
    with quiet(), random_states(), no_global_hooks(), torch.no_grad():
        yield twin(model, repeated=repeated)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers of `torch.compile`, DDP, FSDP and checkpointing."""
    while inner := next(
        (
            module._modules.get(_INNER[c.__name__])
            for c in type(module).__mro__
            if c.__name__ in _INNER
        ),
        None,
    ):
        module = inner
    return module


def twin(model: nn.Module, *, repeated: bool = False) -> Twin:
    """A twin of the model (`undisturbed` also keeps global states)."""
    copier = _Copier(model)
    result = Twin(copier(unwrapped(model)), dropped=copier.dropped, copies=copier.memo)
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        result.shapes[name] = tuple(tensor.shape)
        if id(tensor) in copier.memo:
            result.names.setdefault(id(copier.memo[id(tensor)]), name)
    for path, module in model.named_modules():
        if id(module) in copier.memo:
            result.paths.setdefault(id(copier.memo[id(module)]), path)
    if not repeated:
        for path, module in model.named_modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 3:
                _skip_repeated_inplace(module, path, copier.memo, result)
    return result


class _Copier:
    """Copies modules and what they refer to; each object once."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.memo: dict[int, Any] = {}
        self.kept: list[Any] = []  # ids in memo stay valid as long as these live
        self.dropped: list[str] = []

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """The copy of a value; the value itself if it refers to nothing of a model."""
        if value is None or isinstance(value, (str, int, float, bytes, type, torch.dtype)):
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.remember(value, _empty_like(value))
        if depth >= _DEPTH:
            return value
        if isinstance(value, (list, tuple, dict, set, frozenset, deque)):
            return self.container(value, depth + 1)
        if isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
            return self.callable(value, depth + 1)
        if isinstance(value, weakref.ref):
            return weakref.ref(self(value(), depth)) if value() is not None else value
        return self.object(value, depth + 1)

    def remember(self, value: Any, copy: Any) -> Any:
        self.kept.append(value)
        self.memo[id(value)] = copy
        return copy

    def module(self, module: nn.Module) -> nn.Module:
        inner = unwrapped(module)
        if inner is not module:
            return self.remember(module, self(inner))
        if isinstance(module, torch.jit.ScriptModule):
            return self.remember(module, _Opaque())
        copy = object.__new__(type(module))
        self.remember(module, copy)
        state = module.__dict__
        unpacked = _unpacked(module)
        if unpacked is not None:  # a quantised matrix: neither its data nor its shape is that
            self.remember(module._parameters["weight"], unpacked[0])
        # first what is registered, so that attributes refer to it
        for key in ("_parameters", "_buffers", "_modules"):
            copy.__dict__[key] = type(state[key])()
            for name, value in state[key].items():
                copy.__dict__[key][name] = self(value)
        for key, value in state.items():
            if key in _HOOKS or key in _OTHER_HOOKS:
                copy.__dict__[key] = self.hooks(module, key)
            elif key not in copy.__dict__ and key not in _NOT_COPIED and key != "forward":
                copy.__dict__[key] = self(value)
        copy.__dict__["_compiled_call_impl"] = None
        copy.__dict__["training"] = False
        if "gradient_checkpointing" in state:
            copy.__dict__["gradient_checkpointing"] = False
        forward = next((state[k] for k in (*_WRAPPED_FORWARDS, "forward") if k in state), None)
        if unpacked is not None:
            forward = types.MethodType(unpacked[1], copy)
            copy.__dict__["forward"] = forward
        elif forward is not None:
            copy.__dict__["forward"] = self(forward)
        return copy

    def hooks(self, module: nn.Module, key: str) -> dict[int, Callable]:
        """The hooks that belong to the model; those of its user are not called."""
        hooks = module.__dict__[key]
        own = {n: self(h) for n, h in hooks.items() if key in _HOOKS and self.belongs(h)}
        path = self.paths.get(id(module))
        left_out = key in _HOOKS and len(own) < len(hooks)
        if left_out and path is not None and path not in self.dropped:
            self.dropped.append(path)
        return type(hooks)(own)

    def belongs(self, hook: Any) -> bool:
        """Whether a hook computes a weight (torch's own) or is a method of a module."""
        while isinstance(hook, functools.partial):
            hook = hook.func
        if id(getattr(hook, "__self__", None)) in self.paths:
            return True
        homes = [c.__module__ for c in type(hook).__mro__] + [getattr(hook, "__module__", "") or ""]
        return any(h.startswith(("torch.nn.utils.", "transformers.utils.output")) for h in homes)

    def container(self, value: Any, depth: int) -> Any:
        if len(value) > _LARGEST_CONTAINER or type(value).__name__ == "mappingproxy":
            return value
        try:
            return self.filled(value, depth)
        except Exception:  # a container of its own class, which cannot be made anew
            return value

    def filled(self, value: Any, depth: int) -> Any:
        if isinstance(value, tuple):
            items = [self(item, depth) for item in value]
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, (set, frozenset)):
            return self.remember(value, type(value)(self(item, depth) for item in value))
        if isinstance(value, defaultdict):
            copy: Any = defaultdict(value.default_factory)
        elif isinstance(value, deque):
            copy = deque(maxlen=value.maxlen)
        else:
            copy = type(value)()
        self.remember(value, copy)
        if isinstance(value, dict):
            for key, item in value.items():
                copy[self(key, depth)] = self(item, depth)
        else:
            copy.extend(self(item, depth) for item in value)
        return copy

    def callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, types.MethodType):
            owner, function = self(value.__self__, depth), self(value.__func__, depth)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            func, args, keywords = (self(part, depth) for part in parts)
            return functools.partial(func, *args, **keywords)
        if eager := value.__dict__.get("_torchdynamo_orig_callable"):
            return self(eager, depth)  # torch.compile(forward)
        return self.closure(value, depth)

    def closure(self, function: types.FunctionType, depth: int) -> Any:
        """The function over copies of what it closes over."""
        held = {}
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                held[id(cell)] = cell.cell_contents
        if not any(self.refers(value) for value in held.values()):
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copy = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
        )
        copy.__kwdefaults__, copy.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        self.remember(function, copy)
        for old, new in zip(function.__closure__ or (), cells, strict=True):
            if id(old) in held:
                new.cell_contents = self(held[id(old)], depth)
        return copy

    def refers(self, value: Any, depth: int = 0) -> bool:
        """Whether a value that a function closes over leads to a module or a tensor."""
        if isinstance(value, (nn.Module, Tensor)):
            return True
        if depth >= _DEPTH:
            return False
        inside: Any = ()
        if isinstance(value, types.MethodType):
            inside = (value.__self__,)
        elif isinstance(value, functools.partial):
            inside = (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, (list, tuple, set)) and len(value) < 1000:
            inside = value
        elif isinstance(value, dict) and len(value) < 1000:
            inside = value.values()
        elif isinstance(value, types.FunctionType):
            inside = [c.cell_contents for c in value.__closure__ or () if _is_full(c)]
        return any(self.refers(item, depth + 1) for item in inside)

    def object(self, value: Any, depth: int) -> Any:
        """The copy of a plain object such as a config; others are shared."""
        cls = type(value)
        plain = (
            hasattr(value, "__dict__")
            and not isinstance(value, (types.ModuleType, BaseException, torch._C.ScriptObject))
            and cls.__reduce_ex__ is object.__reduce_ex__
            and cls.__reduce__ is object.__reduce__
            and cls not in copyreg.dispatch_table
            and cls.__new__ is object.__new__
        )
        if not plain:
            return value
        copy = object.__new__(cls)
        self.remember(value, copy)
        for key, item in value.__dict__.items():
            copy.__dict__[key] = self(item, depth)
        return copy


class _Opaque(nn.Module):
    """In place of a TorchScript module, which has no Python to run."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("A TorchScript module cannot be observed.")


def _is_full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _unpacked(module: nn.Module) -> tuple[nn.Parameter, Callable] | None:
    """An empty weight in place of a packed one, and what multiplies by it; None if it is plain."""
    for cls, names in _MATRICES.items():
        if isinstance(module, cls):
            weight = module._parameters.get("weight")
            shape = tuple(int(getattr(module, name)) for name in names)
            if weight is None or (weight.is_floating_point() and tuple(weight.shape) == shape):
                return None
            empty = torch.empty(shape, device="meta")
            return nn.Parameter(empty, requires_grad=False), cls.forward
    return None


# Modules whose weight may be packed, with the attributes that tell its shape.
_MATRICES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nx", "nf"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
}


def _empty_like(tensor: Tensor) -> Tensor:
    """An empty tensor on meta; a copy on the CPU of integers that steer the code."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        empty = torch.empty(0, device="meta")
    elif steers(tensor) and not isinstance(tensor, nn.Parameter):
        empty = integers(tensor)
    elif tensor.layout is not torch.strided:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=False)
    if isinstance(tensor, nn.Buffer):
        return nn.Buffer(empty, persistent=getattr(tensor, "persistent", True))
    return empty


def steers(tensor: Tensor) -> bool:
    """Whether a tensor's values may decide what the code does: few integers or booleans."""
    kinds = tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.is_quantized
    return not kinds and tensor.numel() <= _LARGEST_INTEGERS


def integers(tensor: Tensor) -> Tensor:
    """The values on the CPU; of a tensor without values, positions if it is (..., n > 1)."""
    if not tensor.is_meta:
        return tensor.detach().to("cpu", copy=True)
    if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.dtype == torch.int64:
        return torch.arange(tensor.shape[1]).unsqueeze(0)
    value = torch.ones if tensor.ndim == 0 else torch.zeros  # a stride, more often than a count
    return value(tensor.shape, dtype=tensor.dtype)


# ------------------------------------------------------------------------------ equal layers


def _skip_repeated_inplace(
    layers: nn.Module, path: str, memo: dict[int, Any], result: Twin
) -> None:
    """Let the layers of a kind between its second and its last return what the second returned."""
    kinds: dict[Any, list[str]] = {}
    for name, layer in layers._modules.items():
        if layer is not None and layer._modules:  # heads and gates are single modules
            kinds.setdefault(structure(layer), []).append(name)
    for alike in kinds.values():
        if len(alike) < 4:
            continue
        model = layers._modules[alike[1]]
        second = memo[id(model)]
        seen: dict[Any, Any] = {}
        second.__dict__["forward"] = functools.partial(_record, second.forward, seen)
        for name in alike[2:-1]:
            original = layers.get_submodule(name)
            skipped = memo[id(original)]
            skipped.__dict__["forward"] = functools.partial(_replay, skipped.forward, seen)
            prefix = f"{path}." if path else ""
            for leaf, _ in original.named_parameters(remove_duplicate=False):
                result.alike[f"{prefix}{name}.{leaf}"] = f"{prefix}{alike[1]}.{leaf}"


def _record(forward: Callable, seen: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    seen[_call(args, kwargs)] = output
    return output


def _replay(forward: Callable, seen: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
    call = _call(args, kwargs)
    return seen[call] if call in seen else forward(*args, **kwargs)


def _call(*arguments: Any) -> Any:
    """What two calls of the same shape have in common, as a key."""
    return tuple(_shape(value) for value in arguments)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_shape(item) for item in value))
    if isinstance(value, dict):
        return tuple((str(key), _shape(item)) for key, item in value.items())
    return value if isinstance(value, (str, bool, int, type(None))) else type(value).__name__


def structure(module: nn.Module) -> Any:
    """What layers of one kind have in common, as a key: classes, shapes, plain attributes."""
    tensors = [*module._parameters.items(), *module._buffers.items()]
    shapes = tuple((n, None if t is None else (tuple(t.shape), t.dtype)) for n, t in tensors)
    plain = tuple(
        (key, _plain(key, value))
        for key, value in module.__dict__.items()
        if not key.startswith("_") or isinstance(value, (int, str))
    )
    children = tuple(
        (name, None if child is None else structure(child))
        for name, child in module._modules.items()
    )
    return (type(module), shapes, plain, children)


def _plain(key: str, value: Any) -> Any:
    """An attribute as far as it may change what a layer does; its own index does not."""
    if isinstance(value, (str, bool, type(None))):
        return value
    if isinstance(value, int):
        return "index" if _INDEX.search(key) else value
    if isinstance(value, (list, tuple)) and len(value) < 100:
        return tuple(_plain(key, item) for item in value)
    return type(value).__name__
