"""What the module graph cannot tell: how single architectures fuse, stack and transpose their maps.

Each row of [`FUSED`] was read off the architecture's modelling source. A new row names the class
that multiplies by the tensor, the tensor's name under it, and how its axes are to be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fused:
    """A tensor that holds several maps.

    Args:
        owner: pattern of the class name of the module that uses the tensor.
        path: name of the tensor's module under the owner, "" for a parameter of its own.
        axis: how the fused axis is read, given the owner; replaces `out` in weight and bias.
        reason: what a person reads in the table.
    """

    owner: str
    path: str
    axis: Callable[[Any], str]
    reason: str


FUSED: tuple[Fused, ...] = (
    # query, key, value; in cross-attention key and value only
    Fused(
        r"GPT2Attention",
        "c_attn",
        lambda attention: f"(part={attention.c_attn.nf // attention.embed_dim} out)",
        "maps of the attention side by side",
    ),
    Fused(r"ModernBertAttention", "Wqkv", lambda _: "(part=3 out)", "query, key and value fused"),
    Fused(r"ModernBertMLP", "Wi", lambda _: "(part=2 out)", "input and gate fused"),
)


def fused_axis(owner: Any, path: str) -> Fused | None:
    """The row for a module's path under its owner, if there is one."""
    name = type(owner).__name__
    return next((row for row in FUSED if row.path == path and re.fullmatch(row.owner, name)), None)
