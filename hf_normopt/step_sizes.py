"""How far a step goes: η in W ← W - lr · η · multiplier · scale · direction.

A step size is independent of the norms (the paper's third story): any of them goes with any policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class StepSize(Protocol):
    """One global number for each step.

    `needs_dual` tells the optimizer to collect the dual norms of all parameters before it moves
    any.
    """

    needs_dual: bool

    def eta(self, duals: list[Tensor]) -> Tensor | float:
        """η from the dual norms, one scalar for each parameter, scales and multipliers included."""
        ...


@dataclass(frozen=True)
class Fixed:
    """η = 1: the learning rate is the step size."""

    needs_dual = False

    def eta(self, duals: list[Tensor]) -> float:
        """1, whatever the gradients."""
        return 1.0


@dataclass(frozen=True)
class DualNorm:
    """η = (1/λ) Σ_k ‖G_k‖†_k / s_k, the minimiser of the majorised loss (Prop. 1, 3, 5, 7).

    One number for the whole network: under the max over layers of s_l ‖W_l‖_l the dual norm is the
    sum.

    Args:
        sharpness: λ > 0 of L + ⟨G, ΔW⟩ + (λ/2) ‖ΔW‖².
    """

    sharpness: float = 1.0

    needs_dual = True

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise ValueError(f"DualNorm: sharpness must be positive, found {self.sharpness!r}.")

    def eta(self, duals: list[Tensor]) -> Tensor:
        """The sum of the dual norms over the sharpness."""
        return torch.stack(duals).sum() / self.sharpness
