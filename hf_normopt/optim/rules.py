"""Rules and policies: which norm, scale and momentum each role gets.

A policy reads as the paper's conclusion does:

    {"embedding": Rule(operator_norm("l1", "rms")),
     "linear": Rule(operator_norm("rms", "rms")), ...}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..norms.layouts import Layout
from ..norms.operators import MaxEntry, Norm
from ..norms.product import SpectralProduct

# RMS per entry of a full-rank update under the "adamw" scale, at learning rate 1. With 1, AdamW's
# best learning rate was ours too on four tasks, with fresh heads and from scratch; with Moonlight's
# 0.2 ours was five times AdamW's. The measurement: recipes/measure_scale.md.
ADAMW_RMS = 1.0

# The same for the change of a product s B A. With 0.1 AdamW's best rate for LoRA is ours too, or
# twice ours, at ranks 4, 16 and 64 on three tasks. The measurement: docs/lora.md.
PRODUCT_RMS = 0.1


def _adamw_scale(norm: Norm, fan_out: int, fan_in: int, taps: int) -> float:
    asked = PRODUCT_RMS if isinstance(norm, SpectralProduct) else ADAMW_RMS
    return asked / norm.entry_rms(fan_out, fan_in)


# What multiplies the LMO of each operator; of each tap, if it is a convolution's.
SCALES: dict[str, Callable[[Norm, int, int, int], float]] = {
    # The norm's own unit: the learning rate transfers over width (Large et al. 2024). A step has
    # norm 1, and a convolution's norm is a multiple of its largest tap's: taps for rms inputs, 1
    # for the largest entry, which is why the presets that are made of it equal their references.
    "norm": lambda norm, fan_out, fan_in, taps: 1.0 / norm.weight(taps),
    # Entries of one RMS for every norm and shape, as AdamW's have (Liu et al. 2025, Moonlight).
    "adamw": _adamw_scale,
    # Jordan et al. 2024, Muon; torch.optim.Muon's default.
    "muon": lambda norm, fan_out, fan_in, taps: math.sqrt(max(1, fan_out / fan_in)),
}


@dataclass(frozen=True)
class EMA:
    """A norm's statistic as an exponential moving average: S ← beta S + (1 - beta) moments(g).

    Args:
        beta: in [0, 1); 0 is the statistic of the present gradient alone.
        eps: added to the root of the statistic.
        bias_correction: as Adam: the statistic over 1 - beta^t, the momentum over 1 - momentum^t.
    """

    beta: float
    eps: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        _check_range("EMA.beta", self.beta, 0, 1, open_end=True)
        _check_range("EMA.eps", self.eps, 0)

    def update_inplace(self, statistic: Tensor, moment: Tensor, step: Tensor) -> Tensor:
        """Update the statistic in place and return it as it is to be used at this step."""
        statistic.lerp_(moment, 1 - self.beta)
        return statistic / bias_correction(self.beta, step) if self.bias_correction else statistic


@dataclass(frozen=True)
class Accumulate:
    """A norm's statistic as a sum over all steps (Adagrad, the first Shampoo): S ← S + moments(g).

    Args:
        eps: added to the root of the statistic.
    """

    eps: float = 1e-8

    bias_correction = False

    def __post_init__(self) -> None:
        _check_range("Accumulate.eps", self.eps, 0)

    def update_inplace(self, statistic: Tensor, moment: Tensor, step: Tensor) -> Tensor:
        """Update the statistic in place and return it as it is to be used at this step."""
        return statistic.add_(moment)


@dataclass(frozen=True)
class Rule:
    """How one role is updated: W ← W - lr · multiplier · scale · direction.

    Args:
        norm: the norm under which the step is the steepest descent.
        scale: a key of [`SCALES`].
        multiplier: of the learning rate, for this role.
        momentum: coefficient of the gradient's moving average, in [0, 1); 0 is off.
        nesterov: look one step ahead along the momentum.
        statistic: how the norm's statistic is smoothed over time; None: the direction is the LMO.
        decay: multiplies the weight decay: 1 for matrices, 0 for gains and biases.
        schedule: of this role's learning rate, see `schedules.py`; "": the one of the
            run. No part of the rule's text: like the learning rate it may change from one run to
            the next.

    Raises:
        ValueError: for a value outside of its range, or a norm without the statistic asked for.
    """

    norm: Norm
    scale: str = "norm"
    multiplier: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    statistic: EMA | Accumulate | None = None
    decay: float = 1.0
    schedule: str = ""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"Unknown scale {self.scale!r}; expected one of {', '.join(SCALES)}.")
        _check_range("Rule.multiplier", self.multiplier, 0)
        _check_range("Rule.momentum", self.momentum, 0, 1, open_end=True)
        _check_range("Rule.decay", self.decay, 0)
        if self.statistic is not None:
            try:
                self.norm.moments(torch.zeros(1, 1))
            except NotImplementedError as error:
                raise ValueError(str(error)) from None

    @property
    def of_entries(self) -> bool:
        """Whether a tensor is one vector to it, whatever operators its layout makes of it."""
        return self.norm.of_entries and self.scale != "muon"  # which asks for the operator's shape

    @property
    def entrywise(self) -> bool:
        """Whether an entry's step depends on that entry alone, as Adam's and the sign do."""
        return isinstance(self.norm, MaxEntry) and self.of_entries

    def smooths_rows(self, layout: Layout, shape: Sequence[int]) -> bool:
        """Whether the statistic has one number for each index of a tensor's first axis.

        Then a row of the tensor needs no other rows, as those of a head under rms → linf.

        Args:
            layout: of the tensor.
            shape: of the tensor.
        """
        if self.statistic is None or self.entrywise or self.scale == "muon" or not shape:
            return False
        return _has_moments_of_rows(self.norm, str(layout), tuple(shape))

    def __str__(self) -> str:
        """A stable text, which checkpoints keep and compare."""
        words = [str(self.norm), f"scale {self.scale}"]
        if self.multiplier != 1:
            words.append(f"lr x{self.multiplier!r}")
        if self.momentum:
            words.append(f"momentum {self.momentum!r}" + (" nesterov" if self.nesterov else ""))
        if self.statistic is not None:
            words.append(str(self.statistic))
        if self.decay != 1:
            words.append(f"decay x{self.decay!r}")
        return ", ".join(words)


Policy = Mapping[str, Rule]
"""A rule for every role. A kind (such as "router") may have a rule of its own, which goes first."""


def policy_key(policy: Policy, role: str, kind: str = "") -> str:
    """The key of the rule for a role and kind: the kind if the policy names it, else the role."""
    return kind if kind and kind in policy else role


def rule_in(policy: Policy, group: Mapping[str, Any]) -> Rule:
    """The rule that a policy gives to a group."""
    return policy[policy_key(policy, group["role"], group["kind"])]


@lru_cache
def smoothed(rule: Rule, beta: float) -> Rule:
    """The same rule with a moving average of its norm's statistic.

    Raises:
        ValueError: if the norm has none.
    """
    return replace(rule, statistic=EMA(beta))


def check_total(policy: Policy, roles: Iterable[tuple[str, str]]) -> None:
    """Complain about roles (and kinds) without a rule.

    Raises:
        ValueError: naming both sides.
    """
    pairs = set(roles)
    missing = sorted({role for role, kind in pairs if policy_key(policy, role, kind) not in policy})
    if missing:
        raise ValueError(
            f"The policy has no rule for the role{'s' * (len(missing) > 1)} {', '.join(missing)}. "
            f"The model has {', '.join(sorted({role for role, _ in pairs}))}; the policy has "
            f"rules for {', '.join(sorted(policy)) or 'nothing'}. Add the missing rules, or "
            "override the roles of these parameters."
        )


@lru_cache
def _has_moments_of_rows(norm: Norm, layout: str, shape: tuple[int, ...]) -> bool:
    read = Layout(layout)
    if read.axis(0) not in norm.independent:
        return False
    operators = read.to_operators(torch.empty(shape, device="meta"))
    sizes = [{k: m.numel() for k, m in norm.moments(o).items()} for o in operators]
    return sizes == [{"second_moment": shape[0]}]


def bias_correction(beta: float, step: Tensor) -> Tensor | float:
    """1 - beta^step, to full precision in float32 and without waiting for the device."""
    return -torch.expm1(step * math.log(beta)) if beta else 1.0


def _check_range(
    name: str, value: float, low: float, high: float = math.inf, open_end: bool = False
) -> None:
    below = value < high if open_end else value <= high
    if not (value >= low and below and math.isfinite(value)):
        end = ")" if open_end or high == math.inf else "]"
        raise ValueError(f"{name} must be in [{low:g}, {high:g}{end}, found {value!r}.")
