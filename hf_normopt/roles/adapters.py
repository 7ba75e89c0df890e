"""What PEFT adds to a model, method by method.

Each row of [`PARTS`] was read off the layers of peft 0.21 (`peft/tuners/*/layer.py`): what they
multiply by a tensor, and along which axis. What a later method adds, and no row knows, is a factor
only if its partner says so, and `other` if not. Base weights and copies of them are none of this
file's: `graph.place` says where they stand, and the other matchers what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from ..norms.layouts import Layout, usual_layout
from .graph import Finding, View, canonical_name, owner_layout


@dataclass(frozen=True)
class Part:
    """Tensors that PEFT adds under one name.

    Args:
        name: pattern of the name, from one dot to another.
        role: what they do, or a function that says so.
        reason: what a person reads in the table.
        layout: a pattern or a function; None asks for the role's usual layout.
        kind: sub-role of matrices.
    """

    name: str
    role: str | Callable[[View], str]
    reason: str
    layout: str | Callable[[View], str] | None = None
    kind: str = ""

    def find(self, view: View) -> Finding:
        """The row's answer for one tensor."""
        role = self.role if isinstance(self.role, str) else self.role(view)
        pattern = self.layout(view) if callable(self.layout) else self.layout
        layout = None if pattern is None else Layout(pattern)
        return Finding(role, self.reason, layout, self.kind if role == "linear" else "")


def _kernel(view: View) -> str:
    """PEFT's factors of a kernel are kernels; others of three axes are stacked matrices."""
    axes = len(view.shape)
    is_kernel = axes > 2 and "product" not in view.uses
    if _added(view.owners) is None:
        is_kernel = is_kernel and (axes > 3 or "kernel" in view.uses)
    return "conv" if is_kernel else "linear"


def _factor(view: View) -> str:
    """A module's own layout; raw factors are stored (out, in) by PEFT, either way by others."""
    blocks = getattr(view.owner, "nblocks", 1)
    if blocks > 1:  # lora/variants.py, BlockDiagonalLinear
        return f"(block={blocks} out) in"
    own = owner_layout(view)
    if own is None and _added(view.owners) is None:
        own = view.uses.get("product") or _of_pair(view.leaf, view.owner, view.shape)
    return (own or usual_layout(_kernel(view), view.shape)).pattern


def expert_factor(view: View) -> str:
    """LoRA on one parameter (`target_parameters`), see `ParamWrapper.get_delta_weight`."""
    wrapper = next((m for _, m in view.owners if hasattr(m, "get_delta_factors")), None)
    experts = int(getattr(wrapper, "num_experts", 1))
    if experts == 1:
        return _factor(view)
    towards_input = re.search(r"(^|\.)lora_A\.", view.name)
    return f"(expert={experts} out) in" if towards_input else f"out (in expert={experts})"


def _lily_factor(view: View) -> str:
    path, layer = next((path, m) for path, m in view.owners if hasattr(m, "num_B"))
    return f"(expert={cast(Any, layer).num_B[path.split('.')[1]]} in) out"


def _tucker_factor(view: View) -> str:
    """With a kernel's core beside it, the factor of the output is stored (rank, out)."""
    cores = (getattr(m, name, None) for _, m in view.owners for name in ("hada_t1", "lokr_t2"))
    core = next((core for core in cores if core is not None), None)
    if isinstance(core, nn.ParameterDict):
        core = core.get(view.leaf)
    return "out in" if core is None else "in out"


def _number_or(role: str) -> Callable[[View], str]:
    return lambda view: "scalar" if view.shape == (1,) else role


def _rows(view: View) -> str:
    """Rows are trained of a table, or of the head."""
    layer: Any = next(m for _, m in view.owners if hasattr(m, "get_base_layer"))
    return "embedding" if isinstance(layer.get_base_layer(), nn.Embedding) else "head"


_IN, _OUT = "low-rank factor on the side of the input", "low-rank factor on the side of the output"
_GAIN = "a gain for each output"

PARTS: tuple[Part, ...] = (
    # Low-rank products B A; IN and OUT stand for A and B
    Part("lora_(A|a|down)", _kernel, _IN, expert_factor, "adapter_a"),
    Part("lora_(B|b|up)", _kernel, _OUT, expert_factor, "adapter_b"),
    Part("(hira|delora|adamss|supertuning_lora|lily|peanut)_A", _kernel, _IN, _factor, "adapter_a"),
    Part("(hira|delora|adamss|supertuning_lora|peanut)_B", _kernel, _OUT, _factor, "adapter_b"),
    Part(r"deft_R|osf_svd_params\.[^.]+\.V_low", "linear", _IN, "out in", "adapter_a"),
    Part(r"deft_P|osf_svd_params\.[^.]+\.U_low", "linear", _OUT, "out in", "adapter_b"),
    Part("gralora_A_general|shadow_down", "linear", _IN, "out in", "adapter_a"),
    Part("gralora_B_general|shadow_up", "linear", _OUT, "out in", "adapter_b"),
    Part("gralora_A", "linear", f"{_IN}, by blocks", "block in out", "adapter_a"),
    Part("gralora_B", "linear", f"{_OUT}, by blocks", "block in out", "adapter_b"),
    Part("poly_lora_A", "linear", f"{_IN}, by skills", "split skill in out", "adapter_a"),
    Part("poly_lora_B", "linear", f"{_OUT}, by skills", "split skill in out", "adapter_b"),
    Part("lily_B", "linear", f"{_OUT}, by experts", _lily_factor, "adapter_b"),
    Part(r"glora_[ABC]\.[^.]+\.Xu", "linear", _IN, "out in", "adapter_a"),
    Part(r"glora_[ABC]\.[^.]+\.Xd", "linear", _OUT, "out in", "adapter_b"),
    Part(
        "lora_embedding_A|hira_embedding_A",
        "embedding",
        "low-rank factor of a table: (rank, tokens)",
        "out in",
    ),
    Part("lora_embedding_B|hira_embedding_B", "linear", _OUT, "out in", "adapter_b"),
    Part("prefix_task_cols", "linear", f"{_IN}, by tasks", "task in out", "adapter_a"),
    Part("prefix_task_rows", "linear", f"{_OUT}, by tasks", "task in out", "adapter_b"),
    # LyCORIS: Hadamard and Kronecker products of such products
    Part("hada_w[12]_b|lokr_w[12]_b", "linear", _IN, "out in", "adapter_a"),
    Part("hada_w[12]_a|lokr_w2_a", "linear", _OUT, _tucker_factor, "adapter_b"),
    Part("lokr_w1_a", "linear", _OUT, "out in", "adapter_b"),
    Part("lokr_w1", "linear", "Kronecker factor", "out in"),
    Part("lokr_w2", _kernel, "Kronecker factor"),
    Part("hada_t[12]|lokr_t2", "conv", "core of a factored kernel"),
    # Other matrices
    Part("lily_router", "linear", "chooses experts", "out in", "router"),
    Part(
        "(miss|bone)_block",
        "linear",
        "a matrix that all blocks of the input share",
        lambda view: "in out" if len(view.shape) == 2 else "block out in",
    ),
    # Tables and rows of them
    Part("trainable_tokens_delta", _rows, "rows of a table that are trained"),
    Part("trainable_embedding", "embedding", "a trained cache of keys and values", "in out"),
    Part("adaption_prompt", "embedding", "a prompt for the attention"),
    Part("module_logits", "embedding", "a task's choice of skills, looked up by its number"),
    Part(r"shadow_head\.[^.]+\.weight", "head", "a copy of the head", "out in"),
    # Gains
    Part("lora_magnitude_vector", "norm", f"DoRA magnitude, {_GAIN}"),
    Part(r"lora_E|lora_diag|osf_svd_params\.[^.]+\.S_low", "norm", "a gain for each rank"),
    Part("p?vera_lambda_d|frod_lambda_l", "norm", "a gain for each rank"),
    Part("p?vera_lambda_b|boft_s|road_alpha", "norm", _GAIN),
    Part("ia3_l", "norm", "a gain for each feature"),
    Part("randlora_(lambda|gamma)", "norm", "gains of the entries of random bases"),
    Part(r"psoft_R\.[^.]+\.vector_[ab]", "norm", "a gain for each rank"),
    Part(r"glora_A\.[^.]+\.X", _number_or("norm"), "gain of the weight"),
    Part(r"glora_D\.[^.]+\.X", _number_or("norm"), "gain of the bias"),
    # Biases and single numbers
    Part("beft_bias", "bias", "added to the output"),
    Part(r"glora_C\.[^.]+\.X", _number_or("bias"), "added to the input"),
    Part(r"glora_E\.[^.]+\.X", _number_or("bias"), "added to the bias"),
    Part("delora_lambda|adaption_gate", "scalar", "a single number"),
    # What no norm on operators fits: packed rotations, spectra, sparse entries, vector banks
    Part(r"glora_B\.[^.]+\.X", _number_or("other"), "added to the weight"),
    Part("oft_(embedding_)?R", "other", "skew-symmetric blocks, packed"),
    Part("boft_R", "other", "blocks of which only the skew-symmetric part is used"),
    Part(
        "psoft_R",
        lambda view: "other" if len(view.shape) == 1 else "linear",
        "a map between fixed factors, packed if it is kept orthogonal",
    ),
    Part("hra_u", "other", "Householder vectors, of which only the directions are used"),
    Part("road_theta", "other", "angles of rotations"),
    Part("c3a_kernel", "other", "first rows of circulant blocks"),
    Part("(fourierft|waveft)_spectrum", "other", "coefficients of a spectrum"),
    Part(
        "shira_weight|supertuning_values|frod_lambda_s_values",
        "other",
        "entries of a sparse matrix",
    ),
    Part("vblora_logits_[AB]", "other", "logits that choose vectors of a bank"),
    Part("vblora_vector_bank|unilora_theta_d", "other", "a bank that factors are made of"),
    Part("tinylora_v", "other", "coefficients of fixed matrices"),
    Part("lora_monteclora_sampler", "other", "parameters of a distribution over the factors"),
)

_ROWS = "|".join(f"(?P<row{i}>{part.name})" for i, part in enumerate(PARTS))
_ROW = re.compile(rf"(?:^|\.)(?:{_ROWS})(?:\.|$)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHARED = ("lora_", "hada_", "lokr_")  # other libraries give these names too

# The children of PEFT's modules that hold the base, or a copy of what the base has.
_BASES = {"base_model", "base_layer", "model", "lora_model", "original_module", "modules_to_save"}
_BASES |= {"token_adapter", "ln_tuning_layers", "shadow_backbone", "word_embeddings"}

_SIDE = re.compile(r"(\w+_)(A|B|down|up)(?=\.|$)")
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
_KINDS = {"A": "adapter_a", "B": "adapter_b", "down": "adapter_a", "up": "adapter_b"}


def is_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an adapter library added a module.

    Args:
        name: its name.
        modules: all modules by name.
    """
    part = _part(_NUMBER.sub("*", name))
    parts = name.split(".")
    above = ((".".join(parts[i:]), ".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1))
    added = _added((path, modules[owner]) for path, owner in above)
    return added is not None or (part is not None and part.name.startswith(_SHARED))


def adapter(view: View) -> Finding | None:
    """What PEFT adds: factors, gains, prompts, rotations."""
    added, part = _added(view.owners), _part(_NUMBER.sub("*", view.name))
    own = part is None or not part.name.startswith(_SHARED) or view.uses.keys() == {"lookup"}
    if added is None and own:
        return None
    if view.leaf == "bias":
        return Finding("bias", f"bias of {view.owner_class}")
    if part is not None:
        return part.find(view)
    return _unknown(view, *added) if added else None


@cache
def _part(name: str) -> Part | None:
    """The row for a name; those of a model's layers differ in numbers only, which are folded."""
    row = _ROW.search(name)
    return PARTS[int(cast(str, row.lastgroup).removeprefix("row"))] if row else None


def _unknown(view: View, path: str, layer: nn.Module) -> Finding | None:
    """What no row knows."""
    layout = owner_layout(view)
    if layout is None:
        raw = isinstance(view.owner, (nn.ParameterDict, nn.ParameterList))
        if not raw and not _is_of_peft(view.owner):
            return None  # a table, a normalisation, a recurrent layer like any other
        layout = _of_pair(path, layer, view.shape)
    source = f"{path.split('.')[0]}, added by {type(layer).__module__}"
    if layout is not None:
        side = _SIDE.match(path)
        kind = _KINDS[side[2]] if side and _kernel(view) == "linear" else ""
        return Finding(_kernel(view), source, layout, kind)
    if view.shape in ((), (1,)):
        return Finding("scalar", f"a single number, {source}")
    return Finding("other", f"no row of adapters.py knows {source}")


def _added(owners: Iterable[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
    """What PEFT added: the path below the innermost of PEFT's modules, and that module."""
    for path, owner in owners:
        if _is_of_peft(owner) and (path := canonical_name(path)):
            return None if path.split(".")[0] in _BASES else (path, owner)
    return None


def _is_of_peft(module: nn.Module) -> bool:
    return _comes_from_peft(cast(Hashable, type(module)))


@cache
def _comes_from_peft(cls: Hashable) -> bool:
    return any(base.__module__.startswith("peft.") for base in cast(type, cls).__mro__)


def _of_pair(path: str, layer: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    """How one of two raw factors is stored, from the axis that it shares with the other."""
    side = _SIDE.match(path)
    try:
        name = f"{side[1]}{_OTHER[side[2]]}{path[side.end() :]}" if side else ""
        other = tuple(layer.get_parameter(name).shape)
    except AttributeError:
        return None
    if side is None or len(shape) != 2 or len(other) != 2:
        return None
    a, b = (shape, other) if _KINDS[side[2]] == "adapter_a" else (other, shape)
    fan_in = getattr(layer, "in_features", None)
    readings = {"out in": (a[1], a[0] == b[1]), "in out": (a[0], a[1] == b[0])}
    fits = {
        layout: fan
        for layout, (fan, chained) in readings.items()
        if chained and fan_in in (None, fan)
    }
    return Layout(max(fits, key=lambda layout: fits[layout])) if fits else None  # the rank is small
