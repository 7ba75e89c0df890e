"""What the spectral steps of a model cost, from the method that `orthogonalize` would choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from ..norms.operators import Spectral
from ..norms.orthogonalize import Plan, plan
from ..optim.rules import Rule
from ..roles import ParamSpec
from ..tables import format_table

MATRICES = ("linear", "conv", "head")  # roles whose parameters multiply every token


def cost_report(
    specs: Sequence[ParamSpec], rules: Sequence[Rule], tokens: int, device: str, markdown: bool
) -> str:
    """A table of operators with their method and work, and their share of a training step.

    The forward and backward passes take 6 operations per token and matrix parameter (Kaplan et al.
    2020, arXiv 2001.08361, section 2.1), attention scores not counted.
    """
    planned: Counter[tuple[tuple[int, ...], Plan]] = Counter()
    for spec, rule in zip(specs, rules, strict=True):
        if isinstance(rule.norm, Spectral) and rule.statistic is None:
            for operator in spec.layout.to_operators(torch.empty(spec.shape, device="meta")):
                shape = tuple(operator.shape[-2:])
                chosen = plan(shape, torch.float32, device, rule.norm.method)
                planned[shape, chosen] += math.prod(operator.shape[:-2])
    rows = [
        (
            f"{count:,}",
            " x ".join(map(str, shape)),
            chosen.method + (f", {chosen.steps} steps" if chosen.steps else ""),
            f"{count * chosen.work / 1e9:,.3f}",
        )
        for (shape, chosen), count in planned.items()
    ]
    work = sum(count * chosen.work for (_, chosen), count in planned.items())
    parameters = sum(math.prod(spec.shape) for spec in specs if spec.role in MATRICES)
    training = 6.0 * parameters * tokens
    share = work / (work + training) if work else 0.0
    return (
        f"{format_table(('operators', 'shape', 'method', 'GFLOP'), rows, markdown)}\n\n"
        f"oracle: {work / 1e9:,.3f} GFLOP a step; forward and backward of {tokens:,} tokens: "
        f"{training / 1e9:,.0f} GFLOP; predicted share of a training step: {share:.1%}"
    )
