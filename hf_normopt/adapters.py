"""What PEFT adds to a model, method by method."""

from __future__ import annotations

import re

from torch import nn

from .graph import Finding, View, owner_layout
from .layouts import Layout, usual_layout

_ADAPTER = re.compile(
    r"(?:^|\.)(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|trainable_tokens_delta)(?:\.|$)"
)


def is_adapter(name: str) -> bool:
    """Whether a module or parameter of this name was added by PEFT."""
    return _ADAPTER.search(name) is not None


def adapter(view: View) -> Finding | None:
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
            return Finding("conv", reason, owner_layout(view))
        return Finding("linear", reason, owner_layout(view) or usual_layout("linear", shape), kind)
    if what == "lora_embedding_A":
        return Finding("embedding", "LoRA factor A of a table: (rank, tokens)", Layout("out in"))
    if what == "lora_embedding_B":
        return Finding(
            "linear", "LoRA factor B of a table: (width, rank)", Layout("out in"), "adapter_b"
        )
    if what == "trainable_tokens_delta":
        return Finding("embedding", "rows of a table that are trained")
    return Finding("norm", "DoRA magnitude, a gain for each output")
