"""Small example inputs for `forward`, made from its signature and the config.

    args, kwargs = normalise(inputs)        # what a user passed: floats become empty ones on meta
    for args, kwargs in candidates(model):  # the likeliest first

Integers are real (token numbers, grids and lengths steer the code); floating tensors are empty, on
meta. Batches have two rows, texts a few tokens, images and sounds the size that the config asks
for. What an argument of a known name holds is told in `makers`; of modules without a config, the
widths of their own parameters are tried.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .fields import Fields
from .follow import tensors_of
from .makers import Case, arguments
from .namesakes import named, namesake, of_rows, taken
from .twin import steers, unwrapped

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

ROWS = 2

# Other choices, tried one after the other when the first ones do not run.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"rows": 1},
    {"features_last": True},
    {"codebooks": "last"},
    {"codebooks": "rows"},
    {"features_last": "channel"},
    {"length": 64},
    {"frames": True},
    {"separators": True},
    {"large": True},
    {"side": 256},
    {"patches": 32},  # as many proposals as there are queries, and windows of any usual count
    {"length": 256},
    {"length": 64, "features_last": True, "large": True},
    {"features_last": True, "channel": True},
)


def candidates(model: nn.Module, *, device: str = "meta") -> Iterator[Inputs]:
    """Positional and keyword arguments for `forward`, the likeliest first."""
    model = base_model(model)
    if hasattr(getattr(model, "config", None), "to_dict"):
        seen: list[str] = []
        for choices in VARIANTS:
            kwargs = _tried(Case(model, device, **choices))
            shapes = str({key: getattr(value, "shape", value) for key, value in kwargs.items()})
            if kwargs and shapes not in seen:
                seen.append(shapes)
                yield (), kwargs
        yield from itertools.islice(_from_widths(model, device), 8)
        return
    yield from _from_widths(model, device)


def _tried(case: Case) -> dict[str, Any]:
    """The arguments of a case; none if its choices do not fit the config."""
    try:
        return arguments(case) or {}
    except Exception:  # configs hold anything
        return {}


def base_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers and adapters."""
    model = unwrapped(model)
    inner = getattr(model, "get_base_model", None)
    return unwrapped(inner()) if callable(inner) else model


_COUNTS = re.compile(r"tokens\D{0,20}(\d+)\D+?features\D{0,20}(\d+)", re.IGNORECASE | re.DOTALL)


def with_places(model: nn.Module, kwargs: Mapping[str, Any], said: str) -> dict[str, Any] | None:
    """The inputs with as many places for features as the model said that it has.

    Args:
        model: the model.
        kwargs: its inputs.
        said: what it raised.
    """
    found = _COUNTS.search(said)
    ids = kwargs.get("input_ids")
    if found is None or ids is None:
        return None
    tokens, features = map(int, found.groups())
    kind = next((k for k in ("video", "audio", "image") if k in said.lower()), "image")
    rows = len(ids)
    count = features // rows
    if count in (0, tokens // rows) or count > 20_000:
        return None
    return _tried(Case(base_model(model), "meta", rows=rows, **{f"{kind}_tokens": count}))


# ------------------------------------------------------------- modules without a config


def _from_widths(model: nn.Module, device: str) -> Iterator[Inputs]:
    """Arguments for a module of which only its parameters are known, the likeliest first.

    What the first argument may be is read from the modules in the order of their definition: a
    table takes token numbers, a convolution images, a matrix activations of its width.
    """
    case = Case(model, device)
    required = [name for name, needed in case.parameters.items() if needed]
    names = required or list(case.parameters)[:1]
    count = sum(name not in case.by_keyword for name in names) if names else 1
    for first in _first_arguments(model, names[0] if names else "", device):
        rest = [_further(model, name, first) for name in names[1:]]
        kwargs = {}
        if "position_embeddings" in set(case.parameters) - set(names) and case.config is not None:
            kwargs["position_embeddings"] = _further(model, "position_embeddings", first)
        rests = [rest, *named(rest, first)]
        for values in (v for rest in rests for v in _of_all_kinds(model, first, rest)):
            by_name = dict(zip(names[count:], values[count:], strict=True))
            yield tuple(values[:count]), by_name | kwargs


def with_fields(model: nn.Module, device: str = "meta") -> Iterator[Inputs]:
    """Arguments whose first one has fields, as a batch has."""
    names = [name for name, needed in Case(model, device).parameters.items() if needed]

    def of(first: Tensor) -> Fields:
        def make(name: str) -> Any:
            if re.search(r"^(n|num)_", name):
                return ROWS
            if _IDS.search(name) or _IMAGE.search(name):
                return next(_first_arguments(model, name, device), first)
            return _further(model, name, first)

        return Fields(make)

    for first in _first_arguments(model, "", device):
        yield (of(first), *(_further(model, name, first) for name in names[1:])), {}


def with_labels(model: nn.Module, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with labels that `forward` may take, and then without."""
    args, kwargs = inputs
    names = list(Case(model, "meta").parameters)[len(args) :]
    labels = [n for n in names if n not in kwargs and re.search(r"label|target", n)]
    first = next(tensors_of(inputs), None)
    if labels and first is not None:
        for axes in range(1, min(first.ndim, 2) + 1):
            zeros = torch.zeros(first.shape[:axes], dtype=torch.int64)
            yield args, kwargs | dict.fromkeys(labels, zeros)
    yield inputs


def _of_all_kinds(model: nn.Module, first: Tensor, rest: list[Any]) -> Iterator[list[Any]]:
    """Arguments, where those whose name says nothing are like the first, texts or vectors."""
    yield [first, *rest]
    if rest and not first.is_floating_point():  # one number for each row
        yield [of_rows(value) for value in (first, *rest)]
    alike = [value is first for value in rest]
    if not any(alike):
        return
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if first.is_floating_point() and table is not None:  # texts beside images
        ids = torch.arange(ROWS * 8).view(ROWS, 8) % table.num_embeddings
        yield [first, *(ids if same else v for v, same in zip(rest, alike, strict=True))]
        yield [ids, *rest]
    # vectors of other widths: styles, conditions
    widths = {m.in_features: None for m in model.modules() if isinstance(m, nn.Linear)}
    for width in list(widths)[:4]:
        other = torch.empty(ROWS, width, device=first.device)
        yield [first, *(other if value is first else value for value in rest)]


_LABELS = re.compile(
    r"^(?!x_).*(label|target|class|cls|^y$|^t$|step|idx|index|type|depth|expert|which)"
)
_IDS = re.compile(r"ids$|^idx|token|word|^text")
_IMAGE = re.compile(r"^im(g|age)s?$|pixel")
_FRAMES = re.compile(r"video|frames|clip")
_SOUND = re.compile(r"^(wav|audio|sound|speech|signal)")
_NUMBERS = re.compile(r"num|cont|dense|feat|wav|audio|xyz|coord|point")
_COLOURS = 4  # channels of an image, at most
_NAMED = 4  # shapes that the module of the argument's name takes
_FEW = 12  # shapes that one module takes which are tried before all that others take


def _first_arguments(model: nn.Module, name: str, device: str) -> Iterator[Tensor]:
    shapes: dict[tuple[int, ...], None] = {}
    raw = [
        parameter.shape
        for module in model.modules()
        if not type(module).__module__.startswith("torch.nn.modules")
        or isinstance(module, (nn.ParameterList, nn.ParameterDict))
        for parameter in module.parameters(recurse=False)
    ]
    tables = [n for buffer in model.buffers() if buffer.ndim > 1 for n in buffer.shape]
    sizes = [n for n in (*tables, *(n for s in raw for n in s)) if 1 < n <= 512]
    lengths = list(dict.fromkeys([8, 4, *sizes]))[:6]
    sides = [*[32, *_sides(model, raw)][:5], 224, 28, 8]
    takes_ids = _IDS.search(name) is not None
    taken = [
        list(_taken(module, lengths, sides, raw))
        for module in ([] if takes_ids else sorted(model.modules(), key=_is_inside))
    ]
    for few in (slice(0, _FEW), slice(_FEW, None)):
        shapes |= dict.fromkeys(shape for its in taken for shape in its[few])
    if (own := namesake(model, name)) is not None and own is not model:
        shapes = dict.fromkeys(list(_taken(own, lengths, sides, raw))[:_NAMED]) | shapes
    if _IMAGE.search(name) and not isinstance(own, nn.Linear):
        shapes = {(ROWS, 3, n, n): None for n in sides} | shapes
    flat = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if flat is not None and _FRAMES.search(name):
        shapes = {(ROWS, 4, flat.in_channels, n, n): None for n in sides} | shapes
    if _SOUND.search(name):
        shapes = {(ROWS, 1, 1600): None, (ROWS, 1600): None} | shapes
    ids = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)
    tokens = [torch.arange(ROWS * n).view(ROWS, n) % ids for n in lengths]
    first = next((m for m in model.modules() if not m._modules and m._parameters), None)
    first_is_table = isinstance(first, (nn.Embedding, nn.EmbeddingBag))
    if takes_ids or (first_is_table and not _NUMBERS.search(name)):
        yield from tokens
        tokens = []
    for shape in list(shapes)[:40]:
        yield torch.empty(shape, device=device)
    yield from tokens


def _is_inside(module: nn.Module) -> bool:
    """Whether a module takes activations, unlike a kernel with a colour's channels."""
    return not (isinstance(module, nn.modules.conv._ConvNd) and module.in_channels <= _COLOURS)


def _sides(model: nn.Module, raw: list[torch.Size]) -> list[int]:
    """Sides of images that raw parameters fit: patches of them, and positions of all patches."""
    patches = [s[-1] for s in raw if len(s) == 4 and s[-1] > 3]
    kinds = (nn.Conv2d, nn.Conv3d)
    strides = {m.stride[-1] for m in model.modules() if isinstance(m, kinds)} | set(patches)
    counts = {n - token for s in raw for n in s for token in (0, 1)}
    grids = [math.isqrt(n) for n in counts if n > 3 and math.isqrt(n) ** 2 == n]
    fits = [grid * stride for stride in strides if stride > 1 for grid in grids]
    return list(dict.fromkeys([*sorted(n for n in fits if n <= 512), *(16 * n for n in patches)]))


def _taken(
    module: nn.Module, lengths: list[int], sides: list[int], raw: list[torch.Size]
) -> Iterator[tuple[int, ...]]:
    """Shapes of what a module takes by itself."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = len(module.kernel_size)
        if dims == 3:  # videos
            counts = dict.fromkeys(n for s in raw for n in sorted(s) if 1 < n <= 32)
            frames = [*(n * module.stride[0] for n in list(counts)[:3]), 8]
            for count, side in itertools.product(dict.fromkeys(frames), sides[:4]):
                yield (ROWS, module.in_channels, count, side, side)
            return
        strided = [s[-1] * module.stride[-1] for s in raw if len(s) == dims + 2]
        sides = sides if dims == 2 else [32, *lengths]
        for side in dict.fromkeys([*strided, *sides]):
            yield (ROWS, module.in_channels, *[side] * dims)
        return
    if module._modules and not any(True for _ in module.parameters(recurse=False)):
        return
    widths: list[int] = []
    for name in ("in_features", "input_size", "embed_dim", "num_features", "num_channels"):
        if isinstance(width := getattr(module, name, None), int):
            widths.append(width)
    if isinstance(module, nn.LayerNorm):
        widths.append(module.normalized_shape[-1])
    lists = (nn.ParameterList, nn.ParameterDict)
    if isinstance(module, lists) or not type(module).__module__.startswith("torch.nn.modules"):
        for parameter in module.parameters(recurse=False):
            if len(parameter.shape) >= 4 and parameter.shape[-1] == parameter.shape[-2]:
                yield (ROWS, parameter.shape[-3], sides[0], sides[0])
                if len(parameter.shape) == 5:
                    yield (ROWS, parameter.shape[1], *[sides[0]] * 3)
            widths += [*parameter.shape[-1:], *parameter.shape[:-1]]
    for width in dict.fromkeys(widths):
        yield (ROWS, lengths[0], width)
        yield (ROWS, width)
        for length in lengths[1:]:
            yield (ROWS, length, width)


def _further(model: nn.Module, name: str, first: Tensor) -> Any:
    """An argument after the first, by its name; activations like the first if it says nothing."""
    rows = first.shape[0]
    config = getattr(model, "config", None)
    if config is not None and name == "position_embeddings":
        size = _rotated(config)
        return tuple(torch.empty(rows, first.shape[1], size, device=first.device) for _ in "cs")
    if config is not None and "mask" in name:
        return None
    if "mask" in name:
        channels = first.ndim == 3 and any(isinstance(m, nn.Conv1d) for m in model.children())
        shape: tuple[int, ...] = first.shape[:2]
        if channels:
            shape = (rows, 1, first.shape[-1])
        if first.ndim == 4:  # of the patches of an image
            strides = [m.stride[-1] for m in model.modules() if isinstance(m, nn.Conv2d)]
            shape = (rows, (first.shape[-1] // max(strides, default=1)) ** 2)
        return torch.ones(shape, dtype=torch.bool)
    if re.search(r"edge_index|edges", name):  # of a graph: from which node, to which
        return torch.zeros(2, rows, dtype=torch.int64)
    if re.search(r"^batch$|_batch$", name):  # of a graph's nodes: in which graph they are
        return torch.zeros(first.shape[0], dtype=torch.int64)
    if _LABELS.search(name):
        return torch.zeros(rows, dtype=torch.int64)
    if re.search(r"sigma|snr|noise_level|^dones?$|terminal", name):
        return torch.empty(rows, device=first.device)
    if re.search(r"^adj|laplacian", name):  # of a graph whose nodes come before features
        nodes = first.shape[-2] if first.ndim > 1 else rows
        return torch.empty(nodes, nodes, device=first.device)
    if re.search(r"(^|_)cat|sparse", name):  # categories, one for each table
        tables = [len(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
        return torch.zeros(rows, max(tables, default=1), dtype=torch.int64)
    if re.search(r"length|lens$", name):
        return torch.full((rows,), first.shape[1])
    keys = list(_keys(model))
    if keys and re.search(r"task|name|head|lang|domain|key|mode|which", name):
        return keys[0]
    if re.search(r"task|domain|lang|speaker|_id$", name):
        return torch.zeros(rows, dtype=torch.int64)
    return taken(namesake(model, name), name, first)


def _keys(model: nn.Module) -> Iterator[str]:
    """Names in dictionaries of modules or parameters; those of the last one come first."""
    for module in reversed(list(model.modules())):
        if isinstance(module, (nn.ModuleDict, nn.ParameterDict)):
            yield from module
        plain = [v for k, v in vars(module).items() if isinstance(v, dict) and k[0] != "_"]
        for held in reversed(plain):
            if held and all(isinstance(value, nn.Module) for value in held.values()):
                yield from (key for key in held if isinstance(key, str))


def _rotated(config: Any) -> int:
    """Size of the part of a head that a rotation of positions moves."""
    for name in ("qk_rope_head_dim", "head_dim"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    width, heads = (getattr(config, n, 0) for n in ("hidden_size", "num_attention_heads"))
    known = isinstance(width, int) and isinstance(heads, int) and heads > 0
    return width // heads if known else 64


def normalise(inputs: Any) -> Inputs:
    """Arguments of `forward` from what a user passes, without floating values.

    Args:
        inputs: a tuple or list of positional, or a mapping of keyword arguments; one tensor is
            one positional argument.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(inputs, Tensor):
        return (without_values(inputs),), {}
    if isinstance(inputs, Mapping):
        return (), {str(key): without_values(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(without_values(value) for value in inputs), {}
    raise TypeError(
        f"inputs is a {type(inputs).__name__}; pass a tuple of positional or a mapping of keyword "
        "arguments of forward."
    )


def without_values(value: Any) -> Any:
    """The value with empty floating tensors on meta and copies of integers on the CPU."""
    if isinstance(value, Tensor):
        if steers(value) and not value.is_meta:
            return value.detach().to("cpu", copy=True)
        if value.layout is not torch.strided:
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, Mapping):
        return {key: without_values(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(without_values(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(without_values(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for one in dataclasses.fields(value):
            object.__setattr__(copied, one.name, without_values(getattr(value, one.name)))
        return copied
    return value
