"""What every parameter does: `classify(model)` gives it a role, a layout and a reason.

The matchers at the end of this file are tried in order and the first that answers decides. They
look at the module that owns a parameter, at what transformers' accessors say about the model, and
last at names; never at the number of axes alone. What no matcher knows is `other`, with a reason
that says so.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import fused_axis
from .layouts import Layout, usual_layout

# In the order in which optimizers keep their groups: the main matrices first.
ROLES: dict[str, str] = {
    "linear": "a matrix from activations to activations",
    "conv": "a convolution kernel",
    "embedding": "vectors looked up by an index, or placed into a sequence",
    "head": "the final matrix that makes the task's output",
    "norm": "an elementwise gain",
    "bias": "an additive vector",
    "scalar": "a single number",
    "other": "none of these, or not known",
}

# Sub-roles, for policies that tell them apart, and the role that each refines.
KINDS: dict[str, str] = {
    "router": "linear",
    "expert": "linear",
    "adapter_a": "linear",
    "adapter_b": "linear",
    "position": "embedding",
}


@dataclass(frozen=True)
class ParamSpec:
    """One row of the table: what a parameter is, and why we think so.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: the stored shape.
        role: a key of [`ROLES`].
        kind: a key of [`KINDS`], or "".
        layout: how the stored tensor is read as operators.
        reason: why, for a person to read.
        tied_to: the other names of the same tensor, or None.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    kind: str
    layout: Layout
    reason: str
    tied_to: str | None = None


def classify(model: nn.Module, overrides: Mapping[str, str] | None = None) -> list[ParamSpec]:
    """Find the role and the layout of every trainable parameter.

    Args:
        model: any module: a transformers model, one wrapped by PEFT, a plain one; on any device,
            meta included. Nothing is computed or allocated.
        overrides: role (a key of [`ROLES`] or [`KINDS`]) by regular expression, searched in the
            parameter's name; the first expression that is found decides. A parameter whose layout
            its module determines keeps it, a raw one gets its new role's usual layout.

    Returns:
        One [`ParamSpec`] for each trainable parameter, in the order of `model.named_parameters()`.

    Raises:
        ValueError: for an unknown role, or an override that matches no trainable parameter.
    """
    overrides = _checked(overrides or {})
    graph = _Graph(model)
    specs = []
    for tensor, names in graph.trainable():
        shape, tied_to = tuple(tensor.shape), ", ".join(names[1:]) or None
        found = _overridden(_settled(map(_find, graph.views(tensor, names))), names, overrides)
        layout = found.layout or usual_layout(found.role, shape)
        specs.append(
            ParamSpec(names[0], shape, found.role, found.kind, layout, found.reason, tied_to)
        )
    names = [name for _, aliases in graph.trainable() for name in aliases]
    for pattern in overrides:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"The override {pattern!r} matches none of {len(specs)} trainable parameters; it "
                "is searched as a regular expression in names such as "
                f"{', '.join(near or names[:3])}."
            )
    return specs


def canonical_name(name: str) -> str:
    """A name without what DDP, torch.compile, FSDP and activation checkpointing wrap around it."""
    return _WRAPPERS.sub("", name).rstrip(".")


_WRAPPERS = re.compile(
    r"^(?:module\.|_orig_mod\.)+"
    r"|(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)(?:\.|$)"
)
_PEFT_COPIES = re.compile(r"(?<![^.])(?:base_layer|original_module|modules_to_save\.[^.]+)(?:\.|$)")


def _place(name: str) -> str:
    """Where a module or parameter stands, also if PEFT put a copy or a layer of its own there."""
    return _PEFT_COPIES.sub("", canonical_name(name)).rstrip(".")


def _checked(overrides: Mapping[str, str]) -> dict[str, str]:
    known = [*ROLES, *KINDS]
    for pattern, role in overrides.items():
        if role not in known:
            near = difflib.get_close_matches(role, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Unknown role {role!r} in the override {pattern!r}; expected one of "
                f"{', '.join(known)}.{hint}"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"The override {pattern!r} is no regular expression: {error}."
            ) from None
    return dict(overrides)


@dataclass(frozen=True)
class Finding:
    """A matcher's answer; `layout` None asks for the role's usual one."""

    role: str
    reason: str
    layout: Layout | None = None
    kind: str = ""


@dataclass(frozen=True)
class View:
    """A parameter under one of its names, and what is known about its surroundings."""

    name: str
    shape: tuple[int, ...]
    owners: tuple[tuple[str, nn.Module], ...]  # (path below that owner, owner), the innermost first
    head: str | None  # why the owner is a head, if it is

    @property
    def owner(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.owners[0][1]

    @property
    def leaf(self) -> str:
        """The parameter's name in its owner."""
        return self.owners[0][0]

    @property
    def owner_class(self) -> str:
        """The owner's class name."""
        return type(self.owner).__name__


class _Graph:
    """A model's parameters by all their names, and its heads."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._heads = _heads(self._modules)
        self._names: dict[int, list[str]] = {}
        self._tensors: dict[int, nn.Parameter] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            self._tensors[id(tensor)] = tensor
            self._names.setdefault(id(tensor), []).append(name)

    def trainable(self) -> Iterator[tuple[nn.Parameter, list[str]]]:
        for key, tensor in self._tensors.items():
            if tensor.requires_grad:
                yield tensor, self._names[key]

    def views(self, tensor: nn.Parameter, names: list[str]) -> Iterator[View]:
        for name in names:
            parts = name.split(".")
            owners = tuple(
                (".".join(parts[i:]), self._modules[".".join(parts[:i])])
                for i in range(len(parts) - 1, -1, -1)
            )
            head = self._heads.get(_place(".".join(parts[:-1])))
            yield View(name, tuple(tensor.shape), owners, head)


def _find(view: View) -> Finding:
    """The answer of the first matcher that has one."""
    found = next(filter(None, (matcher(view) for matcher in MATCHERS)), None)
    return found or Finding("other", f"no matcher knows {view.leaf} of {view.owner_class}")


def _settled(findings: Iterable[Finding]) -> Finding:
    """One finding for a tensor with several names; a table that is the head too is an embedding."""
    findings = list(findings)
    best = next((found for found in findings if found.role == "embedding"), findings[0])
    if best.role == "embedding" and any(found.role == "head" for found in findings):
        tie = "and the head: a tied tensor takes the embedding's rule"
        return replace(best, reason=f"{best.reason}, {tie}")
    return best


def _overridden(found: Finding, names: list[str], overrides: Mapping[str, str]) -> Finding:
    for pattern, role in overrides.items():
        if any(re.search(pattern, name) for name in names):
            new = KINDS.get(role, role)
            return Finding(
                role=new,
                reason=f"override {pattern!r} (found: {found.role}, {found.reason})",
                # a table is stored as a head is, not as it is looked up
                layout=None if found.role == "embedding" != new else found.layout,
                kind=role if role in KINDS else "",
            )
    return found


# Heads

_MATRIX = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)
_ADAPTER = re.compile(
    r"(?:^|\.)(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta)(?:\.|$)"
)


def _heads(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why a module is a head, by its place."""
    matrices = {
        _place(name): module
        for name, module in modules.items()
        if isinstance(module, _MATRIX) and not _ADAPTER.search(name)
    }
    inner: dict[str, PreTrainedModel] = {}  # the outermost models that transformers knows
    for name, module in modules.items():
        if isinstance(module, PreTrainedModel) and not _inside(_place(name), set(inner)):
            inner[_place(name)] = module
    heads: dict[str, str] = {}
    for name, model in inner.items():
        heads |= _task_heads(name, model, modules, matrices)

    root = modules[""]
    if not hasattr(root, "peft_config") and not type(root).__module__.startswith("transformers."):
        lists = {_place(name) for name, m in modules.items() if isinstance(m, nn.ModuleList)}
        own = [name for name in matrices if not _inside(name, set(inner))]
        heads |= {
            name: "the last matrix of the model" for name in own[-1:] if not _inside(name, lists)
        }
    return heads


def _task_heads(
    place: str,
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    matrices: Mapping[str, nn.Module],
) -> dict[str, str]:
    """The output embeddings, and the last of the matrices that a task adds to its base model."""
    heads = {}
    output, base = model.get_output_embeddings(), model.base_model
    if output is not None:
        heads = {
            _place(name): "get_output_embeddings()" for name, m in modules.items() if m is output
        }
    custom = not type(model).__module__.startswith("transformers.")
    if not custom and not re.search(r"For[A-Z]|Head", type(model).__name__):
        return heads

    added = [(name, matrix) for name, matrix in matrices.items() if _inside(name, {place})]
    if base is model:  # none of its modules is: only a matrix that is its child is surely added
        children = {f"{place}.{child}".lstrip(".") for child, _ in model.named_children()}
        added = [] if custom else [(name, matrix) for name, matrix in added if name in children]
    else:
        inside = {_place(name) for name, module in modules.items() if module is base}
        added = [(name, matrix) for name, matrix in added if not _inside(name, inside)]
    for i, (name, matrix) in enumerate(added):
        if i + 1 == len(added) or _fans(matrix)[0] != _fans(added[i + 1][1])[1]:
            heads.setdefault(name, f"last matrix after the base model of {type(model).__name__}")
    return heads


def _inside(name: str, modules: set[str]) -> bool:
    return any(not m or name == m or name.startswith(f"{m}.") for m in modules)


def _fans(matrix: nn.Module) -> tuple[int, int]:
    """(fan_out, fan_in) in features or channels."""
    if isinstance(matrix, Conv1D):
        return matrix.nf, matrix.nx
    if isinstance(matrix, nn.Linear):
        return matrix.out_features, matrix.in_features
    assert isinstance(matrix, nn.modules.conv._ConvNd)
    return matrix.out_channels, matrix.in_channels


# Matchers: the first that answers decides


def _adapter(view: View) -> Finding | None:
    """PEFT's LoRA and DoRA factors (peft/tuners/lora/layer.py)."""
    found = _ADAPTER.search(view.name)
    if found is None:
        return None
    what, shape = found[1], view.shape
    if view.leaf == "bias":
        return Finding("bias", f"bias of LoRA factor {what[-1]}")
    if what in ("lora_A", "lora_B"):
        kind = "adapter_a" if what == "lora_A" else "adapter_b"
        reason = f"LoRA factor {what[-1]}"
        wrapper = next((m for _, m in view.owners if hasattr(m, "get_delta_factors")), None)
        experts = int(getattr(wrapper, "num_experts", 1))
        if experts > 1:  # target_parameters: (experts * rank, in) and (out, rank * experts)
            first = f"(expert={experts} out) in"
            layout = Layout(first if what == "lora_A" else f"out (in expert={experts})")
            return Finding("linear", f"{reason} of stacked experts", layout, kind)
        if isinstance(view.owner, nn.modules.conv._ConvNd):
            return Finding("conv", reason, _owner_layout(view))
        return Finding("linear", reason, _owner_layout(view) or usual_layout("linear", shape), kind)
    if what == "lora_embedding_A":
        return Finding("embedding", "LoRA factor A of a table: (rank, tokens)", Layout("out in"))
    if what == "lora_embedding_B":
        return Finding(
            "linear", "LoRA factor B of a table: (width, rank)", Layout("out in"), "adapter_b"
        )
    if what == "trainable_tokens_delta":
        return Finding("embedding", "rows of a table that are trained")
    return Finding("norm", "DoRA magnitude, a gain for each output")


def _normalisation(view: View) -> Finding | None:
    """Gain and bias of LayerNorm, RMSNorm, BatchNorm, GroupNorm and their likes."""
    if "norm" not in view.owner_class.lower() or sum(size > 1 for size in view.shape) > 1:
        return None
    if "bias" in view.leaf or view.leaf == "beta":
        return Finding("bias", f"bias of {view.owner_class}")
    used = ", used as 1 + weight" if _adds_one(cast(Hashable, type(view.owner))) else ""
    return Finding("norm", f"gain of {view.owner_class}{used}")


@cache
def _adds_one(cls: Hashable) -> bool:
    """Whether a normalisation multiplies by 1 + weight, as Gemma's do; read off its source."""
    try:
        return (
            re.search(r"\(1(\.0)? \+ self\.weight", inspect.getsource(cast(type, cls))) is not None
        )
    except (OSError, TypeError):
        return False


def _table(view: View) -> Finding | None:
    """Lookup tables."""
    if not isinstance(view.owner, (nn.Embedding, nn.EmbeddingBag)) or len(view.shape) != 2:
        return None
    kind = "position" if re.search(r"position|embed_pos|(^|\.)wpe\.", view.name) else ""
    return Finding("embedding", f"table of {view.owner_class}", Layout("in out"), kind)


def _fused(view: View) -> Finding | None:
    """Several maps in one tensor, from `architectures.py`."""
    for path, owner in view.owners[1:]:
        row = fused_axis(owner, _place(path.rpartition(".")[0]))
        if row is None:
            continue
        axis = row.axis(owner)
        if "bias" in view.leaf:
            return Finding("bias", f"bias: {row.reason}", Layout(axis))
        plain = _owner_layout(view) or usual_layout("linear", view.shape)
        return Finding("linear", row.reason, Layout(plain.pattern.replace("out", axis)))
    return None


def _experts(view: View) -> Finding | None:
    """Stacked experts; their modules say how they are stored (transformers/integrations/moe.py)."""
    if not view.owner_class.endswith("Experts"):
        return None
    out = "out"
    if view.leaf.startswith("gate_up_proj"):
        out = "(part=2 out)" if getattr(view.owner, "is_concatenated", True) else "(out part=2)"
    fused = ", gate and up fused" if out != "out" else ""
    if "bias" in view.leaf and len(view.shape) == 2:
        return Finding("bias", f"biases of stacked experts{fused}", Layout(f"expert {out}"), "")
    if len(view.shape) != 3:
        return None
    transposed = getattr(view.owner, "is_transposed", False)
    layout = Layout(f"expert in {out}" if transposed else f"expert {out} in")
    return Finding("linear", f"stacked experts{fused}", layout, "expert")


def _bias(view: View) -> Finding | None:
    """Additive vectors, by name: the one thing for which every library uses the same word."""
    if "bias" not in view.leaf or re.search(r"table|position", view.leaf):
        return None
    if isinstance(view.owner, nn.RNNBase):
        return Finding(
            "bias", f"biases of the gates of {view.owner_class}", Layout(_gates(view.owner))
        )
    if isinstance(view.owner, nn.MultiheadAttention) and view.leaf == "in_proj_bias":
        return Finding("bias", "biases of query, key and value", Layout("(part=3 out)"))
    if view.shape in ((), (1,)) and not isinstance(view.owner, _MATRIX):
        return Finding("scalar", "a single number")
    return Finding("bias", f"bias of {view.owner_class}")


def _router(view: View) -> Finding | None:
    """The matrix that chooses experts."""
    if len(view.shape) == 2 and view.owner_class.endswith("Router") and view.leaf == "weight":
        return Finding("linear", f"router {view.owner_class}", Layout("out in"), "router")
    return None


def _matrix(view: View) -> Finding | None:
    """Linear layers and convolutions, heads among them."""
    layout = _owner_layout(view)
    if layout is None:
        return None
    if view.head is not None:
        return Finding("head", view.head, layout)
    role = "conv" if isinstance(view.owner, nn.modules.conv._ConvNd) else "linear"
    return Finding(role, f"weight of {view.owner_class}", layout)


def _owner_layout(view: View) -> Layout | None:
    """The layout of a weight that torch or transformers multiply by themselves."""
    owner, shape = view.owner, view.shape
    if view.leaf not in ("weight", "default") or len(shape) < 2:
        return None
    if isinstance(owner, Conv1D):
        return Layout("in out")
    if isinstance(owner, nn.Linear):
        return Layout("out in")
    if isinstance(owner, nn.modules.conv._ConvNd):
        first, second = ("in", "out") if owner.transposed else ("out", "in")
        groups = f"(group={owner.groups} {first})" if owner.groups > 1 else first
        return Layout(" ".join([groups, second, *(f"tap={size}" for size in shape[2:])]))
    if isinstance(owner, nn.Bilinear):
        return Layout("out in1 in2")
    return None


def _attention(view: View) -> Finding | None:
    """The raw projections of nn.MultiheadAttention."""
    if not isinstance(view.owner, nn.MultiheadAttention) or len(view.shape) != 2:
        return None
    if view.leaf == "in_proj_weight":
        return Finding("linear", "query, key and value fused", Layout("(part=3 out) in"))
    return Finding("linear", f"{view.leaf} of nn.MultiheadAttention", Layout("out in"))


def _recurrent(view: View) -> Finding | None:
    """The gates of nn.LSTM, nn.GRU and nn.RNN."""
    if not isinstance(view.owner, nn.RNNBase) or len(view.shape) != 2:
        return None
    if view.leaf.startswith("weight_hr"):
        return Finding("linear", f"projection of {view.owner_class}", Layout("out in"))
    layout = Layout(f"{_gates(view.owner)} in")
    return Finding("linear", f"gate matrices of {view.owner_class}", layout)


def _gates(owner: nn.RNNBase) -> str:
    gates = {"LSTM": 4, "GRU": 3}.get(owner.mode, 1)
    return f"(gate={gates} out)" if gates > 1 else "out"


def _projector(view: View) -> Finding | None:
    """Gemma 3's image projection, a raw parameter: `torch.matmul(x, weight)`."""
    if (
        view.owner_class == "Gemma3MultiModalProjector"
        and view.leaf == "mm_input_projection_weight"
    ):
        return Finding(
            "linear", "image features to text width, multiplied from the right", Layout("in out")
        )
    return None


def _token(view: View) -> Finding | None:
    """Raw parameters placed into the sequence: class and mask tokens, positions, probes."""
    if not re.search(r"token|embed|probe|position|latents?$|queries$|pos_?emb|^pos$", view.leaf):
        return None
    kind = "position" if re.search(r"pos(ition|_?emb|$)", view.leaf) else ""
    return Finding("embedding", "a learned vector placed into the sequence", None, kind)


def _single(view: View) -> Finding | None:
    """Raw single numbers: logit scales, gates."""
    if torch.Size(view.shape).numel() == 1:
        return Finding("scalar", "a single number")
    return None


def _gain(view: View) -> Finding | None:
    """Raw vectors that multiply: layer scale and its likes."""
    one_axis = sum(size > 1 for size in view.shape) <= 1
    if one_axis and re.search(r"weights?$|weight_g$|gamma|lambda|scale|gain", view.leaf):
        return Finding("norm", f"a raw vector named {view.leaf.rpartition('.')[2]}: a gain")
    return None


Matcher = Callable[[View], Finding | None]

MATCHERS: tuple[Matcher, ...] = (
    _adapter,
    _normalisation,
    _table,
    _fused,
    _experts,
    _bias,
    _router,
    _matrix,
    _attention,
    _recurrent,
    _projector,
    _token,
    _single,
    _gain,
)
