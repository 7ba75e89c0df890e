"""NormOpt: steepest descent under a norm for each role, in one step().

    W ← (1 - lr · weight_decay) · W - lr · η · multiplier · scale · direction

The direction is the LMO of the role's norm at the smoothed gradient, or, where the rule has a
statistic, the smoothed gradient over the norm's smoothed statistic. η comes from the step size; a
group's `weight_decay` is the optimizer's times the rule's `decay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layouts import Layout, usual_layout
from .roles import ROLES, ParamSpec, canonical_name
from .rules import SCALES, Policy, Rule, bias_correction, complaint, policy_key
from .step_sizes import Fixed, StepSize
from .tables import format_table

# What a group is, as opposed to its options (lr, weight_decay, ...), which checkpoints may change.
_IDENTITY = ("param_names", "param_shapes", "role", "kind", "rule", "layouts")


class NormOpt(torch.optim.Optimizer):
    """Steepest descent under the norm that a policy gives to each group's role.

    Args:
        groups: parameter groups, each a dict with `params` (parameters, or pairs of name and
        parameter)
            and `role`, and optionally `kind`, `layouts` (one text for each parameter; default: the
            role's usual one), `lr`, `weight_decay`. [`parameter_groups`] makes them for a model.
        policy: a rule for every role in the groups.
        lr: the learning rate; the schedule's, equal for all groups. Rules have multipliers of it.
        weight_decay: decoupled: W shrinks by lr · weight_decay · rule.decay in each step.
        step_size: η: [`Fixed`], or a number that depends on all gradients.

    Each parameter's state is one momentum buffer, in float32 at least; none where the rule's
    momentum is 0; and the norm's statistic where the rule has one. Groups hold plain data only.

    Raises:
        ValueError: for a negative learning rate, a role without a rule, complex parameters, layouts
        that
            do not fit.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        policy: Policy,
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        step_size: StepSize = Fixed(),  # noqa: B008 (immutable)
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a finite number >= 0, found {value!r}.")
        groups = list(groups)
        if not all(isinstance(group, Mapping) and "role" in group for group in groups):
            raise ValueError(
                "NormOpt takes parameter groups, each a dict with 'params' and 'role'. "
                "For a model use "
                "create_normopt_optimizer(model, lr=...), which finds the roles."
            )
        missing = {group["role"] for group in groups if group.get("kind") not in policy} - set(
            policy
        )
        if missing:
            raise complaint(policy, {group["role"] for group in groups})
        self.policy = dict(policy)
        self.step_size = step_size
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see the class; fills in what it leaves out."""
        group = dict(param_group)
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        offset = sum(len(other["params"]) for other in self.param_groups)
        pairs = [
            p if isinstance(p, tuple) else (f"param_{offset + i}", p) for i, p in enumerate(params)
        ]
        for name, p in pairs:
            if p.is_complex():
                raise ValueError(f"{name} is complex ({p.dtype}); NormOpt takes real parameters.")

        role, kind = group["role"], group.setdefault("kind", "")
        rule = self.policy[policy_key(self.policy, role, kind)]
        shapes = [tuple(p.shape) for _, p in pairs]
        layouts = group.get("layouts") or [usual_layout(role, shape) for shape in shapes]
        if len(layouts) != len(pairs):
            raise ValueError(
                f"Group {role!r} has {len(pairs)} parameters and {len(layouts)} layouts."
            )
        for (_, p), layout in zip(pairs, layouts, strict=True):
            Layout(str(layout)).to_operators(torch.empty(p.shape, device="meta"))  # complains early
        group |= {
            "params": pairs,
            "param_names": [name for name, _ in pairs],  # torch leaves it out of an empty group
            "param_shapes": shapes,
            "layouts": [str(layout) for layout in layouts],
            "rule": str(rule),
            "multiplier": rule.multiplier,
        }
        group.setdefault("weight_decay", self.defaults["weight_decay"] * rule.decay)
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: if a parameter no longer has the shape it had when it was added.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        moves: Iterable[_Move] = self._moves()
        duals: list[Tensor] = []
        if self.step_size.needs_dual:
            moves = list(moves)
            duals = [move.dual() for move in moves]
        if duals or not self.step_size.needs_dual:
            eta = self.step_size.eta(duals)
            for move in moves:
                move.apply_inplace(eta)
        return loss

    def _moves(self) -> Iterator[_Move]:
        """The direction of every parameter with a gradient; momenta and statistics advance."""
        for group in self.param_groups:
            rule = self.policy[policy_key(self.policy, group["role"], group["kind"])]
            for i, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                if tuple(p.shape) != tuple(group["param_shapes"][i]):
                    raise RuntimeError(
                        f"{group['param_names'][i]} had the shape "
                        f"{tuple(group['param_shapes'][i])} when the "
                        f"optimizer was made, and has {tuple(p.shape)} now. FSDP1 and "
                        "DeepSpeed ZeRO flatten "
                        "parameters, and a norm needs the whole matrix: use DDP or FSDP2 "
                        '(fsdp_config={"version": 2}).'
                    )
                grad = p.grad.to_dense() if p.grad.is_sparse else p.grad
                grad = grad.to(torch.promote_types(p.dtype, torch.float32))
                smooth = _momentum(rule, grad, self.state[p])
                direction = _direction(
                    rule, Layout(group["layouts"][i]), smooth, grad, self.state[p]
                )
                yield _Move(p, smooth, direction, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: by name, and only if every parameter still has the rule it had.

        Raises:
            ValueError: if the checkpoint is another optimizer's, or misses or adds parameters, or
            was made
                under other rules; nothing is changed then.
        """
        state_dict = self._by_name(state_dict)
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict[
            "state"
        ].items():  # torch has cast these to the parameter's dtype
            for key, value in saved.items():
                if isinstance(value, Tensor) and self.state[params[i]][key].dtype != value.dtype:
                    self.state[params[i]][key] = value.to(params[i].device, copy=True)

    def _by_name(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict in this optimizer's order, with this optimizer's identity."""
        saved: dict[str, tuple[int, dict[str, Any]]] = {}
        for group in state_dict["param_groups"]:
            if not all(key in group for key in _IDENTITY):
                raise ValueError(
                    "This checkpoint was not written by NormOpt: its groups have "
                    f"{', '.join(sorted(group))}; "
                    f"expected {', '.join(_IDENTITY)} among them. Resume with the "
                    "optimizer that wrote it, or "
                    "start from the model's weights alone."
                )
            for name, index in zip(group["param_names"], group["params"], strict=True):
                saved[canonical_name(name)] = (index, group)

        own = [canonical_name(name) for group in self.param_groups for name in group["param_names"]]
        if saved.keys() != set(own):
            raise ValueError(
                "The checkpoint's parameters are not this model's. Only in the checkpoint: "
                f"{_some(saved.keys() - set(own))}. Only in the model: "
                f"{_some(set(own) - saved.keys())}."
            )
        groups, state, index = [], {}, 0
        for group in self.param_groups:
            names = [canonical_name(name) for name in group["param_names"]]
            for i, name in enumerate(names):
                number, before = saved[name]
                if before["rule"] != group["rule"]:
                    raise ValueError(
                        f"{name} was trained under the rule [{before['rule']}] "
                        f"({before['role']}) and would go on "
                        f"under [{group['rule']}] ({group['role']}). Resume with the same "
                        "preset, options and "
                        "overrides, or start from the model's weights alone."
                    )
                if number in state_dict["state"]:
                    state[index + i] = state_dict["state"][number]
            options = saved[names[0]][1] if names else group
            identity = {key: group[key] for key in _IDENTITY}
            groups.append({**options, **identity, "params": list(range(index, index + len(names)))})
            index += len(names)
        return {**state_dict, "state": state, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "policy": self.policy, "step_size": self.step_size}

    def __repr__(self) -> str:
        rows = [
            (
                g["role"] + (f"/{g['kind']}" if g["kind"] else ""),
                str(self.policy[policy_key(self.policy, g["role"], g["kind"])].norm),
                f"{len(g['params']):,}",
                f"{sum(math.prod(shape) for shape in g['param_shapes']):,}",
                f"{float(g['lr'] * g['multiplier']):.3g}",
                f"{g['weight_decay']:g}",
            )
            for g in self.param_groups
        ]
        return format_table(("role", "norm", "tensors", "parameters", "lr", "weight decay"), rows)


@dataclass
class _Move:
    """One parameter's update, not yet made."""

    param: Tensor
    smooth: Tensor
    direction: Tensor
    group: dict[str, Any]

    def dual(self) -> Tensor:
        """This parameter's part of the network's dual norm (Prop. 7)."""
        return (self.smooth * self.direction).sum() * self.group["multiplier"]

    def apply_inplace(self, eta: Tensor | float) -> None:
        lr = self.group["lr"]
        if self.group["weight_decay"]:
            self.param.mul_(1 - lr * self.group["weight_decay"])
        self.param.sub_(self.direction * (lr * eta * self.group["multiplier"]))


def parameter_groups(
    model: nn.Module, specs: Sequence[ParamSpec], policy: Policy
) -> list[dict[str, Any]]:
    """Groups for [`NormOpt`]: one for each rule, in the order of `ROLES`, the main matrices first.

    Args:
        model: the model that `specs` describe.
        specs: from [`classify`](hf_normopt.classify).
        policy: kinds with a rule of their own get a group of their own.

    Raises:
        ValueError: if there is nothing to train, or a role without a rule.
    """
    if not specs:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: all of them have "
            "requires_grad=False. "
            "Unfreeze some, or add an adapter."
        )
    missing = {spec.role for spec in specs if spec.kind not in policy} - set(policy)
    if missing:
        raise complaint(policy, {spec.role for spec in specs})
    params = dict(model.named_parameters())
    roles = list(ROLES)
    by_rule: dict[tuple[int, str, str], list[ParamSpec]] = {}
    for spec in specs:
        kind = spec.kind if spec.kind in policy else ""
        order = roles.index(spec.role) if spec.role in roles else len(roles)
        by_rule.setdefault((order, spec.role, kind), []).append(spec)
    return [
        {
            "params": [(spec.name, params[spec.name]) for spec in members],
            "role": role,
            "kind": kind,
            "layouts": [str(spec.layout) for spec in members],
        }
        for (_, role, kind), members in sorted(by_rule.items(), key=lambda item: item[0])
    ]


def _momentum(rule: Rule, grad: Tensor, state: dict[str, Any]) -> Tensor:
    """The exponential moving average of the gradients, or its Nesterov form."""
    if not rule.momentum:
        return grad
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    buffer = state["momentum_buffer"].lerp_(grad, 1 - rule.momentum)
    return grad.lerp(buffer, rule.momentum) if rule.nesterov else buffer


def _direction(
    rule: Rule, layout: Layout, smooth: Tensor, grad: Tensor, state: dict[str, Any]
) -> Tensor:
    """Scale · direction, operator by operator, in the stored layout."""
    if rule.statistic is not None:
        state["step"] = state.get("step", torch.zeros((), device=grad.device)) + 1
    directions = []
    for i, (m, g) in enumerate(
        zip(layout.to_operators(smooth), layout.to_operators(grad), strict=True)
    ):
        fan_out, fan_in = m.shape[-2:]
        scale = SCALES[rule.scale](rule.norm, fan_out, fan_in, layout.taps) / layout.taps
        directions.append(
            scale
            * (
                rule.norm.lmo(m)
                if rule.statistic is None
                else _over_statistic(rule, m, g, state, i)
            )
        )
    return layout.from_operators(tuple(directions), tuple(smooth.shape))


def _over_statistic(rule: Rule, m: Tensor, g: Tensor, state: dict[str, Any], piece: int) -> Tensor:
    """The momentum over the norm's statistic; `piece` numbers the operators of one tensor."""
    statistic = rule.statistic
    assert statistic is not None
    moments = {}
    for name, moment in rule.norm.moments(g).items():
        key = f"{name}_{piece}" if piece else name
        if key not in state:
            state[key] = torch.zeros_like(moment)
        moments[name] = statistic.update_inplace(state[key], moment, state["step"])
    if statistic.bias_correction:
        m = m / bias_correction(rule.momentum, state["step"])
    return rule.norm.precondition(m, moments, statistic.eps)


def _some(names: set[str]) -> str:
    """A few names, for an error."""
    shown = ", ".join(sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown or "none"
