"""How far a step goes: η in W ← W - lr · η · multiplier · scale · direction.

A step size is independent of the norms (the paper's third story): any goes with any policy. It is
one number for the whole network, or one for each role:

* [`Fixed`]: η = 1, the learning rate is the step size;
* [`DualNorm`]: η = ‖G‖† / λ, the exact minimiser of the majorised loss (Prop. 1);
* [`Momo`]: η = 1, or less where the loss can fall no further;
* [`EscapeVelocity`]: η grows until the weights have left their start (Prodigy);
* [`LineSearch`]: η is found in the first steps, by what a step does to the gradient along it.

Before a step, `weight` says what its gradients weigh in the moving averages. `observe` measures the
move of each parameter, the optimizer adds the measurements and the dual norms up, over parameters
and ranks, and `advance_inplace` makes of these the next η. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .precision import widened
from .rules import Rule
from .sharding import local


class Move(Protocol):
    """What a step size may see of a parameter's update before it is made."""

    group: dict[str, Any]
    rule: Rule

    @property
    def param(self) -> Tensor:
        """The parameter."""
        ...

    @property
    def state(self) -> dict[str, Any]:
        """What is kept for the parameter."""
        ...

    @property
    def grad(self) -> Tensor:
        """The gradient, not weighted."""
        ...

    def way_inplace(self, stride: int, follows: bool) -> tuple[Tensor, Tensor, Tensor]:
        """⟨g, w_0 - w⟩ and the squares of g and w_0 - w, see `hf_normopt/optim/moves.py`."""
        ...


class StepSize:
    """A step size. `memory` is plain data that is kept in the checkpoint.

    Attributes:
        needs_directions: η depends on the directions of its own step, so that all of them are held
            at once: the memory of the model once more.
        per_role: one number for each role, else one for the network.
        needs_loss: before `advance_inplace`, `memory["loss"]` is the loss at the present weights,
            the mean over the ranks.
    """

    needs_directions: bool = False
    per_role: bool = False
    needs_loss: bool = False

    def check(self, rules: Iterable[Rule]) -> None:
        """Complain about rules that it does not go with.

        Raises:
            ValueError: naming them.
        """

    def weight(self, memory: dict[str, Any]) -> Tensor | float:
        """What gradients weigh in the moving averages: 1, or the η that is known so far."""
        return 1.0

    def observe(self, move: Move, weight: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Measure a parameter's move.

        Returns:
            Sums over the entries that this rank holds, one axis of any length; and the tensor whose
            dual norm is wanted, placed as the parameter is. None: the tensor that the LMO received,
            where `needs_directions`.
        """
        return torch.zeros(0, device=move.param.device), None

    def share(self, move: Move) -> float | Tensor:
        """What multiplies a parameter's part of the dual norm, where `needs_directions`."""
        return 1.0

    def advance_inplace(self, memory: dict[str, Any], dual: Tensor, sums: Tensor) -> Tensor | float:
        """The η of this step.

        Args:
            memory: plain data.
            dual: the network's dual norm (Prop. 7).
            sums: of what was observed, over all parameters and ranks.
        """
        raise NotImplementedError

    def known(self, memory: dict[str, Any]) -> Tensor | float | None:
        """The η of this step where nothing needs to be measured for it; None where it does."""
        return None

    def restart_inplace(self, memory: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
        """Forget what was added up over parameters that are others now; η goes on."""


@dataclass(frozen=True)
class Fixed(StepSize):
    """η = 1: the learning rate is the step size."""

    def known(self, memory: dict[str, Any]) -> float:
        """Always."""
        return 1.0


@dataclass(frozen=True)
class DualNorm(StepSize):
    """η = (1/λ) Σ_k ‖G_k‖†_k / s_k, the minimiser of the majorised loss (Prop. 1, 3, 5, 7).

    Under the max over layers of s_l ‖W_l‖_l the network's dual norm is the sum over layers, with
    1/s_l the rule's scale times its multiplier. With momentum, G is the momentum.

    Args:
        sharpness: λ > 0 of L + ⟨G, ΔW⟩ + (λ/2) ‖ΔW‖².
    """

    sharpness: float = 1.0

    needs_directions = True

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise ValueError(f"DualNorm: sharpness must be positive, found {self.sharpness!r}.")

    def advance_inplace(self, memory: dict[str, Any], dual: Tensor, sums: Tensor) -> Tensor:
        """The dual norm over the sharpness."""
        return dual / self.sharpness


@dataclass(frozen=True)
class Momo(StepSize):
    """η = min(1, (f̄ + ⟨m, w⟩ - F*)₊ / Σ_k lr_k ⟨m_k, d_k⟩): no further than the loss can fall.

    The loss is modelled by the mean of its past linearizations f_i + ⟨g_i, w - w_i⟩, with the
    weights of the momentum m: f̄ is the mean of f_i - ⟨g_i, w_i⟩. Along a step of η the model falls
    by η Σ lr ⟨m, d⟩; for LMOs that is η times the network's dual norm of m (Prop. 7) at their
    rates. The step ends where the model meets F*, below which the loss cannot be. Schaipp et al.
    2024 (arXiv 2305.07583, Momo), under any norm; where the momentum's weights add up to
    1 - β^t, so do those of F*. Weight decay is no part of the model.

    Args:
        least: F*; 0 for cross-entropies.
    """

    least: float = 0.0

    needs_directions = True
    needs_loss = True

    def check(self, rules: Iterable[Rule]) -> None:
        """All rules need one momentum, whose weights the model has."""
        found = {(rule.momentum, rule.nesterov) for rule in rules}
        if len(found) > 1:
            texts = (f"{beta:g}{' (nesterov)' * ahead}" for beta, ahead in sorted(found))
            raise ValueError(
                f"step_size=momo needs one momentum for all roles, found {', '.join(texts)}. The "
                "options momentum=0.9,nesterov=true set that of all."
            )

    def observe(self, move: Move, weight: Tensor | float) -> tuple[Tensor, None]:
        """⟨g, w⟩; the same of what the LMO received; β, whether it looks ahead, and a count."""
        rule, grad = move.rule, local(move.grad)
        weights = local(move.param).to(grad.dtype)
        inner = received = (grad * weights).sum()
        if rule.momentum:
            momentum = widened(local(move.state["momentum_buffer"]), grad.dtype)
            received = (momentum * weights).sum()
        if rule.nesterov:
            received = inner.lerp(received, rule.momentum)
        facts = inner.new_tensor([rule.momentum, rule.nesterov, 1.0])
        return torch.cat([torch.stack([inner, received]), facts]), None

    def share(self, move: Move) -> float | Tensor:
        """The learning rate, which schedules may give to each role."""
        rate: float | Tensor = move.group["lr"]
        return rate

    def advance_inplace(self, memory: dict[str, Any], dual: Tensor, sums: Tensor) -> Tensor:
        """The η that the model allows; a loss that is not finite counts as the last one."""
        inner, received, betas, nesterovs, count = sums
        beta, ahead = betas / count, nesterovs / count
        loss = torch.as_tensor(memory.pop("loss", math.nan)).to(sums)
        loss = memory["last"] = torch.where(loss.isfinite(), loss, memory.get("last", self.least))
        gap = loss - inner
        mean = memory["mean"] = gap.lerp(torch.as_tensor(memory.get("mean", 0.0)).to(sums), beta)
        weight = memory["weight"] = 1 - beta + beta * memory.get("weight", 0.0)
        mean = mean + ahead * (1 - beta) * (gap - mean)
        weight = weight + ahead * (1 - beta) * (1 - weight)
        room = (mean + received - weight * self.least).clamp_min(0)
        return torch.where(dual > 0, (room / dual).clamp_max(1), 1)

    def restart_inplace(self, memory: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
        """Forget the model, which is not of the same parameters any more."""
        memory.clear()


@dataclass(frozen=True)
class EscapeVelocity(StepSize):
    """η grows until the weights escape from their start: Prodigy's idea, for any norm.

        η_{t+1} = max(η_t, r_t / ‖s_t‖†),
        r_t = β r_{t-1} + η_t² ⟨g_t, w_0 - w_t⟩,    s_t = β s_{t-1} + η_t² g_t,

    with the dual norm of the network where Prodigy has ‖·‖_1 (Eq. 22 to 27); β = 0 is the paper's
    EMA-free form (Eq. 28 and 29). The gradients of step t weigh η_t in momenta and statistics. The
    learning rate is 1; a schedule multiplies η.

    Args:
        start: η_0; far below any useful step size.
        beta: memory of r and s; Prodigy takes the root of its β_2.
        variant: "delayed", as printed: w moves by η_t, so that a constant gradient gives
            η / η_0 = 1, 1, 2, 3, 5, 8, ...; or "undelayed", as prodigyopt with betas 0: w moves by
            η_{t+1}, which gives 1, 1, 2, 4, 8, ...
        rule: "ratio" as above, or "cosine": η_{t+1} = η_t (1 + cos θ_t), θ_t the angle of g_t and
            w_0 - w_t, which the paper suggests in closing.
        anchor: what stands for w_0: "start", or with the cosine "last" for w_{t-1}, another of the
            paper's suggestions.
        decrease: let η shrink again, not below `start`, instead of taking the maximum.
        per_role: one η for each role, instead of one for the network.
        stride: keep every stride-th entry of w_0 only, and estimate the inner product from these.
        coefficient: of r, Prodigy's d_coef.
        growth: in step t, η grows by a factor of 1 + growth / t at most, so that a spike late in a
            run cannot double it; 0: without limit.

    Raises:
        ValueError: for a value outside of its range.
    """

    start: float = 1e-6
    beta: float = 0.0
    variant: str = "delayed"
    rule: str = "ratio"
    anchor: str = "start"
    decrease: bool = False
    per_role: bool = False
    stride: int = 1
    coefficient: float = 1.0
    growth: float = 0.0

    def __post_init__(self) -> None:
        choices = {"variant": ("delayed", "undelayed"), "rule": ("ratio", "cosine")}
        choices["anchor"] = ("start", "last")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"EscapeVelocity: {name} must be {' or '.join(allowed)}, found "
                    f"{getattr(self, name)!r}."
                )
        if not self.start > 0 or not 0 <= self.beta < 1 or self.stride < 1:
            raise ValueError(f"start must be > 0, beta in [0, 1), stride >= 1; found {self}.")
        if not self.coefficient > 0 or not self.growth >= 0:
            raise ValueError(f"coefficient must be > 0, growth >= 0; found {self}.")
        if self.anchor == "last" and self.rule == "ratio":
            raise ValueError(
                "EscapeVelocity: anchor='last' goes with rule='cosine'. By Hölder's inequality the "
                "ratio of one step cannot exceed the last η, so it would never grow."
            )

    def weight(self, memory: dict[str, Any]) -> Tensor | float:
        """η_t before the step, η_{t+1} after `advance_inplace`."""
        return memory.get("eta", self.start)

    def observe(self, move: Move, weight: Tensor | float) -> tuple[Tensor, Tensor]:
        """The part of r, for the cosine ⟨g, w_0 - w⟩ and the squares of g and w_0 - w; and s."""
        inner, grad_square, way_square = move.way_inplace(self.stride, self.anchor == "last")
        whole = move.grad
        share: Tensor | float = 1.0
        tensor = whole
        if self.beta:
            share = move.group["lr"] * weight * weight / self.start
            tensor = move.state.setdefault("gradient_sum", torch.zeros_like(whole))
            tensor.mul_(self.beta).add_(whole * share)
        weighted = inner * share
        return torch.stack([weighted, inner, grad_square, way_square]), tensor

    def advance_inplace(self, memory: dict[str, Any], dual: Tensor, sums: Tensor) -> Tensor:
        """Find η_{t+1}; return it, or η_t for the delayed variant."""
        numerator, inner, grad_square, way_square = sums
        eta = torch.as_tensor(self.weight(memory), dtype=sums.dtype, device=sums.device)
        if self.beta:
            numerator = memory["numerator"] = numerator + self.beta * memory.get("numerator", 0.0)
        lengths = (grad_square * way_square).sqrt()
        cosine = memory["cosine"] = torch.where(lengths > 0, inner / lengths, 0)
        if self.rule == "cosine":
            new = eta * (1 + cosine)
        else:
            ratio = self.coefficient * numerator / dual
            new = torch.where(dual > 0, ratio, eta)  # no gradient says nothing
        if self.growth:
            step = memory["steps"] = memory.get("steps", 0) + 1
            new = torch.minimum(new, eta * (1 + self.growth / step))
        memory["eta"] = new.clamp_min(self.start) if self.decrease else torch.maximum(eta, new)
        return eta if self.variant == "delayed" else memory["eta"]

    def restart_inplace(self, memory: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
        """Forget r and s, which are not of the same parameters any more."""
        for key in memory.keys() - {"eta", "steps"}:
            del memory[key]
        for state in states:
            state.pop("gradient_sum", None)


@dataclass(frozen=True)
class LineSearch(StepSize):
    """η is found in the first steps, and stays: a search along the network's own steps.

    A step that is far too small leaves the gradient along it as it was, and one to the line's
    minimum takes it away. So the search looks for the step after which the next gradient's cosine
    with it is half of what it is without a step. Each batch is noisy: log η takes steps whose gain
    falls as 1 / t (Robbins & Monro 1951), first by factors of up to 4, so that it does not matter
    where it starts; η is the mean of log η over the second half, times `reach`.

    The cosine is the network's: no role is left behind, and neither clipping nor the size of a
    batch's gradient matters. During the search a schedule does not act on η, so that a warm-up is
    no second search. Afterwards nothing is measured: no spike can move η.

    Args:
        start: η at first.
        steps: of the search.
        reach: η over what the search finds. Steps to half of the line's slope are short-sighted
            (Wu et al. 2018, arXiv 1803.02021); the measurement is in docs/rate.md.

    Raises:
        ValueError: for a value outside of its range.
    """

    start: float = 1e-6
    steps: int = 32
    reach: float = 3.0

    def __post_init__(self) -> None:
        if not self.start > 0 or not self.reach > 0 or self.steps < 2 * FAST:
            raise ValueError(
                f"LineSearch: start and reach must be > 0, steps >= {2 * FAST}; found {self}."
            )

    def known(self, memory: dict[str, Any]) -> Tensor | float | None:
        """After the search."""
        eta: Tensor | None = memory.get("eta")
        return eta

    def observe(self, move: Move, weight: Tensor | float) -> tuple[Tensor, None]:
        """⟨g, w_0 - w⟩ and the squares over the last step; the rate, and the schedule's first."""
        way = torch.stack(move.way_inplace(1, True))
        rates = (move.group["lr"], move.group.get("initial_lr", move.group["lr"]))
        return torch.cat([way, *(torch.as_tensor(rate).to(way).reshape(1) for rate in rates)]), None

    def advance_inplace(self, memory: dict[str, Any], dual: Tensor, sums: Tensor) -> Tensor:
        """Take a step of the search; its η is such that the schedule cancels."""
        inner, grad_square, way_square, rate, peak = sums
        step, found = memory.get("steps", 0), torch.as_tensor(memory.get("found", self.start))
        found = found.to(sums)
        if step:
            length = (grad_square * way_square).sqrt()
            cosine = memory["cosine"] = torch.where(length > 0, inner / length, 0)
            slope = self._slope_inplace(memory, cosine, step)
            gain = math.log(4) * min(1.0, FAST / step)
            change = torch.where(length > 0, (2 * slope - 1).clamp(-1, 1), 0)
            found = found * torch.exp(gain * change)
        if step > self.steps // 2:
            memory["logs"] = memory.get("logs", 0.0) + found.log()
        if step == self.steps:
            mean = torch.exp(memory["logs"] / (step - step // 2))
            memory.clear()
            memory |= {"steps": step, "eta": self.reach * mean}
            return self.reach * mean
        memory |= {"steps": step + 1, "found": found}
        return torch.where(rate > 0, found * peak / rate, 0)

    @staticmethod
    def _slope_inplace(memory: dict[str, Any], cosine: Tensor, step: int) -> Tensor:
        """The smoothed cosine over its mean so far, mostly of steps that are too small."""
        smooth = memory["smooth"] = (cosine + memory.get("smooth", cosine)) / 2
        memory["sum"] = memory.get("sum", 0.0) + cosine
        return smooth / (memory["sum"] / step).clamp_min(1e-3)

    def restart_inplace(self, memory: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
        """Nothing to do: what was found is of the network."""


FAST = 8  # steps of the search whose gain does not fall yet


STEP_SIZES: dict[str, type[StepSize]] = {
    "fixed": Fixed,
    "dual_norm": DualNorm,
    "momo": Momo,
    "escape_velocity": EscapeVelocity,
    "line_search": LineSearch,
}


def format_step_size(size: StepSize) -> str:
    """The text that `parse_step_size` reads; the representation of another class than ours."""
    names = [name for name, cls in STEP_SIZES.items() if cls is type(size)]
    if not names:
        return repr(size)
    words = [
        f"{f.name}:{getattr(size, f.name)}".lower()
        for f in fields(size)  # type: ignore[arg-type]
        if getattr(size, f.name) != f.default
    ]
    return "/".join([names[0], *words])


def parse_step_size(text: str) -> StepSize:
    """A step size from its text, such as `"escape_velocity/variant:undelayed/per_role:true"`.

    Raises:
        ValueError: for an unknown name, field or value.
    """
    name, *words = text.split("/")
    if name not in STEP_SIZES:
        raise ValueError(f"Unknown step size {name!r}; expected one of {', '.join(STEP_SIZES)}.")
    defaults: Any = STEP_SIZES[name]()
    known: dict[str, type] = {f.name: type(getattr(defaults, f.name)) for f in fields(defaults)}
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition(":")
        if key not in known:
            raise ValueError(
                f"Step size {text!r}: {name} has no field {key!r}, but "
                f"{', '.join(known) or 'none'}."
            )
        try:
            options[key] = _BOOLEANS[value.lower()] if known[key] is bool else known[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"Step size {text!r}: {key} takes a {known[key].__name__}, found {value!r}."
            ) from None
    return STEP_SIZES[name](**options)


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
