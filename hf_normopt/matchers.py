"""What a parameter is, decided by ordered matchers: the first that answers decides."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable
from functools import cache
from typing import cast

import torch
from torch import nn

from .adapters import adapter
from .architectures import fused_axis
from .graph import Finding, View, owner_layout, place
from .heads import MATRIX
from .layouts import Layout, usual_layout


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
        row = fused_axis(owner, place(path.rpartition(".")[0]))
        if row is None:
            continue
        axis = row.axis(owner)
        if "bias" in view.leaf:
            return Finding("bias", f"bias: {row.reason}", Layout(axis))
        plain = owner_layout(view) or usual_layout("linear", view.shape)
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
    if view.shape in ((), (1,)) and not isinstance(view.owner, MATRIX):
        return Finding("scalar", "a single number")
    return Finding("bias", f"bias of {view.owner_class}")


def _router(view: View) -> Finding | None:
    """The matrix that chooses experts."""
    if len(view.shape) == 2 and view.owner_class.endswith("Router") and view.leaf == "weight":
        return Finding("linear", f"router {view.owner_class}", Layout("out in"), "router")
    return None


def _matrix(view: View) -> Finding | None:
    """Linear layers and convolutions, heads among them."""
    layout = owner_layout(view)
    if layout is None:
        return None
    if view.head is not None:
        return Finding("head", view.head, layout)
    role = "conv" if isinstance(view.owner, nn.modules.conv._ConvNd) else "linear"
    return Finding(role, f"weight of {view.owner_class}", layout)


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
    adapter,
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
