"""What the spectral oracle costs for a model, by the work that `orthogonalize` plans."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..norms.half import device_of
from ..norms.operators import Spectral
from ..norms.orthogonalize import Plan, plan
from ..optim.batches import ACCELERATED, PART, SMALL
from ..optim.rules import Rule
from ..roles import ParamSpec
from ..tables import format_table

MATRICES = ("linear", "conv", "head")  # roles whose parameters every token is multiplied by

# Of what a data sheet says: large products in 16 bits, copies, and a whole training step.
PRODUCTS, COPIES, TRAINING = 0.7, 0.85, 0.4
BYTES = 88
"""Read and written for an entry besides products, in float32 where not said otherwise: its gradient
is added up (4) and cleaned (8), momentum (12), Nesterov's form (12), two lengths (8), to 16 bits
(6), scaled there (4), to 32 (6), scaled (8), and the weight with its decay (20)."""
CALLS, CALL = 70, 6e-6
"""Calls for the tensors that move together, and the seconds that PyTorch takes for one."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step on a device: the greater of what it does and what it is told to do.

    Attributes:
        products: of its products.
        memory: of all else.
        calls: of Python, which tells it what to do.
        training: of forward and backward pass.
    """

    products: float
    memory: float
    calls: float
    training: float

    @property
    def step(self) -> float:
        """The optimizer's."""
        return max(self.products + self.memory, self.calls)

    @property
    def share(self) -> float:
        """The optimizer's of a training step."""
        return self.step / (self.step + self.training)


Planned = Counter[tuple[tuple[int, ...], Plan]]


def planned_operators(specs: Sequence[ParamSpec], rules: Sequence[Rule], device: str) -> Planned:
    """How many operators there are of each shape, and how their polar factors are computed."""
    planned: Planned = Counter()
    for spec, rule in zip(specs, rules, strict=True):
        if isinstance(rule.norm, Spectral) and rule.statistic is None:
            for operator in spec.layout.to_operators(torch.empty(spec.shape, device="meta")):
                shape = tuple(operator.shape[-2:])
                chosen = plan(shape, torch.float32, device, rule.norm.method)
                planned[shape, chosen] += math.prod(operator.shape[:-2])
    return planned


def predict(
    specs: Sequence[ParamSpec], rules: Sequence[Rule], tokens: int, device: str
) -> Prediction | None:
    """Seconds of a step with float32 weights; None for a device of which nothing is known."""
    known = device_of(device)
    if known is None:
        return None
    products = 0.0
    for (_, chosen), count in planned_operators(specs, rules, device).items():
        rate = known.float16 if chosen.method == "float16" else known.float32
        products += count * chosen.work / (PRODUCTS * rate)
    alike = Counter((spec.shape, rule) for spec, rule in zip(specs, rules, strict=True))
    moves, entries = 0, 0
    for (shape, _), count in alike.items():
        size = max(1, math.prod(shape))
        together = PART // size if size <= SMALL * ACCELERATED else 1
        moves += math.ceil(count / max(1, together * ACCELERATED)) if together else count
        entries += count * size
    training = _training(specs, tokens) / (TRAINING * known.float16)
    memory = entries * BYTES / (COPIES * known.bandwidth)
    return Prediction(products, memory, moves * CALLS * CALL, training)


def _training(specs: Sequence[ParamSpec], tokens: int) -> float:
    """Operations of forward and backward pass.

    6 for each token and parameter of a matrix (Kaplan et al. 2020, arXiv 2001.08361, section 2.1);
    attention scores are left out.
    """
    return 6.0 * sum(math.prod(spec.shape) for spec in specs if spec.role in MATRICES) * tokens


def cost_report(
    specs: Sequence[ParamSpec], rules: Sequence[Rule], tokens: int, device: str, markdown: bool
) -> str:
    """A table of operators with their method and work, and the share of a training step."""
    planned = planned_operators(specs, rules, device)
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
    training = _training(specs, tokens)
    share = work / (work + training) if work else 0.0
    table = format_table(("operators", "shape", "method", "GFLOP"), rows, markdown)
    found = (
        f"{table}\n\n"
        f"oracle: {work / 1e9:,.3f} GFLOP a step; forward and backward of {tokens:,} tokens: "
        f"{training / 1e9:,.0f} GFLOP; predicted share of a training step: "
    )
    by_time = predict(specs, rules, tokens, device)
    if by_time is None:
        return f"{found}{share:.1%}"
    return f"{found}{by_time.share:.1%}\n\n{told(by_time, device)}"


def told(by_time: Prediction, device: str) -> str:
    """A prediction in words."""
    parts = (by_time.step, by_time.products, by_time.memory, by_time.calls, by_time.training)
    step, products, memory, calls, training = (f"{1e3 * seconds:,.1f}" for seconds in parts)
    return (
        f"on {device}, by its data sheet: a step takes {step} ms (products {products} and memory "
        f"{memory}, or calls {calls} if they are more), forward and backward {training} ms."
    )
