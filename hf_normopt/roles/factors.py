"""Parameters that are factors of one operator: the A and B of a low-rank adapter s B A."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..norms.layouts import Layout
from .adapters import expert_factor
from .graph import View, canonical_name


@dataclass(frozen=True)
class Factor:
    """A factor of a product s B A that is one operator.

    Attributes:
        product: the product's name, which both factors have.
        side: "A", of shape (rank, in), or "B", of shape (out, rank).
        scale: s.
        layout: how the stored tensor is read as that matrix.
        is_table: whether the columns of B A are looked up, as in an embedding.
    """

    product: str
    side: str
    scale: float
    layout: Layout
    is_table: bool = False


# LoRA's forward pass adds scaling · B A x under these variants, or takes W₀ + scaling · B A for a
# direction.
_PLAIN_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant", "DoraConv1dVariant"}
_PLAIN_VARIANTS |= {"DoraConv2dVariant", "DoraConv3dVariant", "ALoraLinearVariant"}

_FACTOR = re.compile(r"lora_(embedding_)?([AB])(?:\.(.+?))??(?:\.weight)?$")


def factor_of(view: View) -> Factor | None:
    """Which factor of which product s B A a parameter is; None if it is none that we know.

    Known are LoRA's of PEFT, and modules that hold `lora_A`, `lora_B`, `lora_alpha` and `scaling`.
    """
    path, layer = next((row for row in view.owners if hasattr(row[1], "lora_alpha")), ("", None))
    match = _FACTOR.match(path)
    if match is None or hasattr(layer, "lora_E"):  # AdaLoRA: B diag(E) A
        return None
    name = match[3] or ""
    scaling = getattr(layer, "scaling", None)
    scale = scaling.get(name) if isinstance(scaling, Mapping) else scaling
    variant = getattr(layer, "lora_variant", {}).get(name)
    if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        return None
    if variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        return None
    layout = _operators_of(view, match[2])
    if layout is None:
        return None
    owner = canonical_name(view.name.removesuffix(path))
    product = ".".join(filter(None, (owner, "lora", name)))
    return Factor(product, match[2], float(scale), layout, is_table=bool(match[1]))


def _operators_of(view: View, side: str) -> Layout | None:
    """How a factor is read as a matrix: a convolution's taps belong to its input."""
    if len(view.shape) == 2:
        layout = Layout(expert_factor(view))
    elif len(view.shape) > 2 and (side == "A" or set(view.shape[2:]) == {1}):
        layout = Layout("out " + " ".join(f"in{i}" for i in range(len(view.shape) - 1)))
    else:
        return None
    return None if "block" in layout.pattern else layout
