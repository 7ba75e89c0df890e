"""What a parameter is, decided by ordered matchers: the first that answers decides."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ..norms.layouts import Layout, usual_layout
from .adapters import adapter
from .architectures import fused_row, is_a, listed_parameter
from .graph import MATRIX, Finding, View, owner_layout, place
from .views import has_several_axes, numbered


def _normalisation(view: View) -> Finding | None:
    """Gain and bias of LayerNorm, RMSNorm, BatchNorm, GroupNorm and their likes."""
    several = has_several_axes(view.shape)
    if "norm" not in view.owner_class.lower() or several or isinstance(view.owner, MATRIX):
        return None
    if any(True for child in view.owner.children() for _ in child.parameters()):
        return None  # a model of that name
    if view.uses.keys() & {"product", "kernel", "lookup"} or view.uses.keys() == {"place"}:
        return None
    added = not type(view.owner).__module__.startswith("torch.") and _uses(view).keys() == {"sum"}
    if "bias" in view.leaf or view.leaf == "beta" or added:
        return Finding("bias", f"bias of {view.owner_class}")
    used = ", used as 1 + weight" if _adds_one(cast(Hashable, type(view.owner))) else ""
    return Finding("norm", f"gain of {view.owner_class}{used}")


@cache
def _adds_one(cls: Hashable) -> bool:
    """Whether a normalisation multiplies by 1 + weight, as Gemma's do; read off its source."""
    try:
        source = inspect.getsource(cast(type, cls))
    except (OSError, TypeError):
        return False
    return re.search(r"\(1(\.0)? \+ self\.weight", source) is not None


def _table(view: View) -> Finding | None:
    """Lookup tables."""
    if not isinstance(view.owner, (nn.Embedding, nn.EmbeddingBag)) or len(view.shape) != 2:
        return None
    reason = f"table of {view.owner_class}"
    also_head = view.head is not None and "get_output" not in view.head
    if also_head:
        reason += f", and the head ({view.head})"
    return Finding("embedding", reason, Layout("in out"), _position(view.name), also_head)


def _position(name: str) -> str:
    """The sub-role of a table of positions."""
    words = r"(^|[._])(pos|rel|wpe|position\w*|relative)([._]|$)|embed_pos"
    return "position" if re.search(words, name) else ""


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
    stored = str(view.uses.get("product") or "").replace("stack", "expert")
    transposed = getattr(view.owner, "is_transposed", stored.split()[1:2] in (["in"], ["in0"]))
    usual = f"expert in {out}" if transposed else f"expert {out} in"
    layout = Layout(stored if "expert" in stored else usual)
    return Finding("linear", f"stacked experts{fused}", layout, "expert")


def _bias(view: View) -> Finding | None:
    """Additive vectors, by name: the one thing for which every library uses the same word."""
    if "offset" in view.uses and view.uses.keys() <= {"offset", "sum"}:
        return Finding("bias", f"added to what {_where(view)} has multiplied")
    if "bias" not in view.leaf or re.search(r"table|position", view.leaf):
        return None
    plain = view.leaf == "bias" and "gain" not in view.uses
    added = {"sum", "lookup"} if len(view.shape) > 1 else {"sum"}
    if view.uses and not plain and not view.uses.keys() & added:
        return None  # it has another use, whatever its name says
    if isinstance(view.owner, (nn.RNNBase, nn.RNNCellBase)):
        reason = f"biases of the gates of {view.owner_class}"
        return Finding("bias", reason, Layout(_gates(view.owner)))
    if isinstance(view.owner, nn.MultiheadAttention) and view.leaf == "in_proj_bias":
        return Finding("bias", "biases of query, key and value", Layout("(part=3 out)"))
    if view.shape in ((), (1,)) and not isinstance(view.owner, MATRIX):
        return Finding("scalar", "a single number")
    looked_up = _uses(view).get("lookup")
    if looked_up and len(view.shape) > 1:
        return Finding("embedding", "biases looked up by an index", looked_up, "position")
    return Finding("bias", f"bias of {view.owner_class}")


def _parametrized(view: View) -> Finding | None:
    """What torch.nn.utils.parametrize and the older weight_norm, spectral_norm keep of a weight."""
    old = re.fullmatch(r"(.+)_(g|v|orig)", view.leaf)
    if isinstance(view.owner, ParametrizationList):
        number = view.leaf.removeprefix("original")
        path, _ = view.owners[2]
        weight = path.split(".")[1]
        kinds = [type(p).__name__ for p in view.owner]
    elif old and hasattr(view.owner, old[1]) and isinstance(view.owner, MATRIX):
        number, weight = {"g": "0", "v": "1", "orig": ""}[old[2]], old[1]
        path, kinds = view.leaf, ["_WeightNorm"]
    else:
        return None
    if number == "0" and "_WeightNorm" in kinds:
        return Finding("norm", "length of a kernel, of weight normalisation")
    outer = view.owners[2:] if isinstance(view.owner, ParametrizationList) else view.owners
    owners = tuple((above.replace(path, weight), module) for above, module in outer)
    name = f"{view.name.removesuffix(path)}{weight}"
    found = _find_first(replace(view, name=name, owners=owners))
    return found and replace(found, reason=f"{found.reason}, reparametrized")


def _matrix(view: View) -> Finding | None:
    """Linear layers and convolutions, heads and routers among them."""
    layout = owner_layout(view)
    if layout is None:
        return None
    if view.head is not None and "transposed" not in view.uses:
        return Finding("head", view.head, layout)
    if isinstance(view.owner, nn.modules.conv._ConvNd):
        return Finding("conv", f"weight of {view.owner_class}", layout)
    looked_up = None if "product" in view.uses else view.uses.get("lookup")
    if looked_up:  # LayoutLMv3 indexes the transpose of a layer's weight
        reason = f"weight of {view.owner_class}, looked up"
        return Finding("embedding", reason, looked_up, _position(view.name))
    return Finding("linear", f"weight of {view.owner_class}", layout, _kind(view))


def _kind(view: View) -> str:
    """The sub-role of a linear map."""
    if _routes(view):
        return "router"
    return "expert" if re.search(r"(^|\.)experts\.", view.name) else ""


def _routes(view: View) -> bool:
    """Whether a matrix chooses experts: a router's own, or a gate beside as many experts."""
    if any(type(owner).__name__.endswith("Router") for _, owner in view.owners[:2]):
        return True
    if len(view.owners) < 2:
        return False
    path, above = view.owners[1]
    experts = getattr(above, "experts", None)
    told = getattr(experts, "num_experts", None)
    count = len(experts) if isinstance(experts, nn.ModuleList) else told
    return path.split(".")[0] in ("gate", "router") and count == view.shape[0]


def _attention(view: View) -> Finding | None:
    """The raw projections of nn.MultiheadAttention."""
    if not isinstance(view.owner, nn.MultiheadAttention) or len(view.shape) != 2:
        return None
    if view.leaf == "in_proj_weight":
        return Finding("linear", "query, key and value fused", Layout("(part=3 out) in"))
    return Finding("linear", f"{view.leaf} of nn.MultiheadAttention", Layout("out in"))


def _recurrent(view: View) -> Finding | None:
    """The gates of nn.LSTM, nn.GRU and nn.RNN, and of their cells."""
    if not isinstance(view.owner, (nn.RNNBase, nn.RNNCellBase)) or len(view.shape) != 2:
        return None
    if view.leaf.startswith("weight_hr"):
        return Finding("linear", f"projection of {view.owner_class}", Layout("out in"))
    layout = Layout(f"{_gates(view.owner)} in")
    return Finding("linear", f"gate matrices of {view.owner_class}", layout)


def _gates(owner: nn.RNNBase | nn.RNNCellBase) -> str:
    mode = getattr(owner, "mode", type(owner).__name__)
    gates = 4 if "LSTM" in mode else 3 if "GRU" in mode else 1
    return f"(gate={gates} out)" if gates > 1 else "out"


def _listed(view: View) -> Finding | None:
    """Raw parameters that have a row in `architectures.py`."""
    for path, owner in view.owners[:2]:
        row = listed_parameter(owner, path)
        if row is not None:
            layout = row.layout(owner) if callable(row.layout) else row.layout
            kind = _kind(view) if row.role == "linear" else ""
            return Finding(row.role, row.reason, Layout(layout) if layout else None, kind)
    return None


# Learned vectors that stand for a token; whatever else a module does, such a name says it.
_TOKEN = re.compile(r"token|embed|(^|_)emb(_|$)|codebook|codevector|latents|probe|(^|_)prompts?$")
# Names that are used for such vectors and for others.
_MAYBE_TOKEN = re.compile(r"position|(^|_)pos(_|$)|quer(y|ies)(_|$)|newline|separator|image_")


def _raw_matrix(view: View) -> Finding | None:
    """Raw parameters that the module multiplies by, or convolves with."""
    layout, looked_up = _stored(view), view.uses.get("lookup")
    if layout is None or not view.shape or "kernel" in view.uses:
        return None
    if "mixture" not in view.uses and view.uses.keys() & {"sum", "place"} and len(view.shape) == 2:
        return Finding("embedding", "vectors that are activations, and are multiplied by")
    if looked_up is not None:
        also_head = view.head is not None
        reason = f"rows looked up by an index, and {'the head' if also_head else 'multiplied by'}"
        return Finding("embedding", reason, looked_up, _position(view.leaf), also_head)
    if view.head is not None and "transposed" not in view.uses:
        return Finding("head", view.head, layout)
    return Finding("linear", f"{view.owner_class} multiplies by it", layout, _kind(view))


def _raw_kernel(view: View) -> Finding | None:
    """Raw parameters that the module convolves with."""
    layout = _uses(view).get("kernel")
    if layout is None:
        return None
    if view.head is not None:
        return Finding("head", view.head, layout)
    return Finding("conv", f"{view.owner_class} convolves with it", layout)


def _token(view: View) -> Finding | None:
    """Raw parameters looked up or placed into the sequence: tokens, positions, latents."""
    uses, kind = _uses(view), _position(view.leaf)
    if "lookup" in uses and (len(view.shape) > 1 or len(uses) == 1):
        return Finding("embedding", "rows looked up by an index", uses["lookup"], kind)
    if math.prod(view.shape) == 1 or re.fullmatch(r"b(_?\d+|_[a-z]+)?", view.leaf):
        return None
    if "sink" in uses:
        return Finding("other", f"stands beside the logits of a softmax in {_where(view)}")
    several = has_several_axes(view.shape)
    if (
        (_TOKEN.search(view.leaf) and uses.keys() <= {"sum", "place", "return"})
        or "place" in uses
        or ("return" in uses and several)
        or (kind and "gain" not in uses)
    ):
        return Finding("embedding", "a learned vector placed into the sequence", None, kind)
    if uses.keys() == {"sum"} and several and not _is_offset(view):
        reason = "a table of vectors that is added to the sequence"
        return Finding("embedding", reason, uses["sum"])
    if _MAYBE_TOKEN.search(view.leaf) and uses.keys() <= {"sum"}:
        return Finding("embedding", "a learned vector placed into the sequence")
    return None


def _is_offset(view: View) -> bool:
    """Whether it is added to several maps, or has all axes but one of the raw matrix before it."""
    path = view.key.removesuffix(view.leaf)
    matrix = view.seen.beside.get(view.key, "")
    other = view.owner._parameters.get(matrix.removeprefix(path))
    if other is None:
        return view.matrix is not None and view.matrix.axis != "out"
    shape = tuple(other.shape)
    return any(shape[:d] + shape[d + 1 :] == view.shape for d in range(len(shape)))


def _single(view: View) -> Finding | None:
    """Raw single numbers: logit scales, gates."""
    if torch.Size(view.shape).numel() == 1:
        return Finding("scalar", "a single number")
    return None


_DECAY = re.compile(r"^A$|A_log|(^|_)decay|log_delta")


def _decay(view: View) -> Finding | None:
    """Rates of state-space models and other recurrences."""
    if "rate" in view.uses:
        return Finding("other", f"a rate, of a recurrence or over positions, in {_where(view)}")
    if not _DECAY.search(view.leaf) or isinstance(view.owner, MATRIX):
        return None
    if "product" in view.uses:
        return None  # a matrix of that name
    return Finding("other", f"{view.leaf} of {view.owner_class}: rates of a recurrence")


def _vector(view: View) -> Finding | None:
    """Raw vectors that multiply, or are added."""
    uses = _uses(view)
    leaf = view.leaf.rpartition(".")[2]
    if "outer" in uses:
        reason = f"{_where(view)} multiplies numbers by it, which become vectors"
        return Finding("linear", reason, uses["outer"])
    if "spread" in uses or "exponent" in uses:
        what = "multiplies noise by it" if "spread" in uses else "raises activations to it"
        return Finding("other", f"{_where(view)} {what}")
    if "gain" in uses and uses.keys() & {"sum", "offset"}:
        return Finding("other", f"{_where(view)} multiplies by it, and adds it")
    if "gain" in uses:
        return Finding("norm", f"{view.owner_class} multiplies by it, entry by entry")
    if uses.keys() & {"sum", "offset"}:
        return Finding("bias", f"{view.owner_class} adds it")
    one_axis = not has_several_axes(view.shape)
    if leaf == "D" or (one_axis and re.search(r"weights?$|gamma|scale|scaling|gain", leaf)):
        return Finding("norm", f"a raw vector named {leaf}: a gain")
    return None


def _by_class(view: View) -> Finding | None:
    """A matrix that did not run, in a class whose name says what its weight is."""
    says = re.search(r"Router$|Gate$|Linear$", view.owner_class)
    if view.uses or view.leaf != "weight" or len(view.shape) != 2 or not says:
        return None
    reason = f"weight of {view.owner_class}, which did not run"
    return Finding("linear", reason, Layout("out in"), _kind(view))


def _uses(view: View) -> dict[str, Layout | None]:
    """What was seen of a parameter, with the layout that this gives."""
    return {
        how: layout
        or (usual_layout(_ROLE_OF_USE[how], view.shape) if how in _ROLE_OF_USE else None)
        for how, layout in view.uses.items()
    }


def _stored(view: View) -> Layout | None:
    """The layout of a raw matrix, as it was seen to be multiplied by."""
    product = view.uses.get("product")
    if product is None:
        return _uses(view).get("product")
    matrix = view.seen.matrices.get(view.key)
    pattern = str(product) if matrix is None else matrix.pattern
    experts = {
        value
        for name, value in vars(view.owner).items()
        if "expert" in name and isinstance(value, int)
    }
    words = pattern.split()
    for axis, count in view.seen.divided.get(view.key, {}).items():
        if count in experts and words[axis] in ("in", "out"):
            words[axis] = f"(expert={count} {words[axis]})"
    if experts or is_a(view.owner, ".*Experts.*"):
        return Layout(" ".join(words).replace("stack", "expert"))
    return Layout(" ".join(_with_chosen(view, words)))


def _with_chosen(view: View, words: list[str]) -> list[str]:
    """The axes, that of experts among them if a matrix nearby gives shares of so many maps."""
    path = view.key.removesuffix(view.leaf).rstrip(".").rpartition(".")[0]
    counts = {n for name, n in view.seen.shares.items() if name.startswith(path)}
    for axis, (word, size) in enumerate(zip(words, view.shape, strict=False)):  # FSDP1 flattens
        if size in counts and re.fullmatch(r"stack|(in|out)\d", word):
            rest = [re.sub(r"\d$", "", other) for other in words]
            return numbered([*rest[:axis], "expert", *rest[axis + 1 :]])
    return words


_ROLE_OF_USE = {"product": "linear", "kernel": "conv", "lookup": "embedding"}


def find(view: View, heads: bool = False) -> Finding:
    """What a parameter is, and how it is divided into maps.

    Args:
        view: the parameter under one of its names.
        heads: whether each attention head is an operator of its own.
    """
    for matcher in MATCHERS:
        found = matcher(view)
        if found is not None:  # an adapter's rows say how it is stored
            return found if matcher is adapter else _divided(view, found, heads)
    reason = f"no matcher knows {view.leaf} of {view.owner_class}"
    if not view.uses and view.seen.failure:
        reason += f"; forward ended early, give its inputs: {view.seen.failure}"
    return Finding("other", reason)


def _find_first(view: View) -> Finding | None:
    return next(filter(None, (matcher(view) for matcher in MATCHERS)), None)


def _divided(view: View, found: Finding, heads: bool) -> Finding:
    """The layout of a tensor that holds several maps: as the module divides what it gives."""
    layout = found.layout or usual_layout(found.role, view.shape)
    words = str(layout).split()
    if found.role not in ("linear", "conv", "head", "bias") or "out" not in words:
        return found
    out, into, reason = _axes(view, heads)
    if (out, into) == ("out", "in"):
        return found
    words = [{"out": out, "in": into}.get(word, word) for word in words]
    divided = Layout(" ".join(words))
    if not divided.fits(view.shape):
        return found
    return replace(found, layout=divided, reason=f"{found.reason}: {reason}")


def _axes(view: View, heads: bool) -> tuple[str, str, str]:
    """What replaces `out` and `in` in a layout, and why."""
    matrix = view.matrix
    if heads and matrix is not None:
        near = [owner for _, owner in view.owners[:5]]
        near += [child for owner in near[1:4] for child in owner.children()]  # BERT's way
        counts = {n for owner in near for n in _counts(owner)}
        if matrix.heads is not None and any(n in counts for n, _ in matrix.sizes):
            return matrix.heads, "in", f"heads of {_where(view)}"
        size = view.seen.head_sizes.get(view.key, 0)
        if size and matrix.inputs % size == 0 and matrix.inputs // size in counts - {1}:
            return "out", f"(head={matrix.inputs // size} in)", f"heads of {_where(view)}"
    for i, (path, owner) in enumerate(view.owners):
        row = fused_row(owner, place(path).rpartition(".")[0] if i else path)
        if row is not None:
            return row.axis(owner), "in", row.reason
    if matrix is not None and matrix.axis != "out":
        return matrix.axis, "in", f"several maps, as {_where(view)} divides them"
    return "out", "in", ""


def _where(view: View) -> str:
    return view.seen.where.get(view.key, view.owner_class)


def _counts(owner: nn.Module) -> set[int]:
    """Numbers of attention heads that a module's attributes tell."""
    known = vars(owner) | getattr(getattr(owner, "config", None), "__dict__", {})
    return {
        value
        for name, value in known.items()
        if "head" in name and "dim" not in name and isinstance(value, int)
    }


Matcher = Callable[[View], Finding | None]

MATCHERS: tuple[Matcher, ...] = (
    adapter,
    _parametrized,
    _listed,
    _normalisation,
    _table,
    _experts,
    _bias,
    _matrix,
    _attention,
    _recurrent,
    _single,
    _decay,
    _raw_matrix,
    _raw_kernel,
    _token,
    _vector,
    _by_class,
)
