"""NormOpt: steepest descent under a norm for each role, in one step().

    W ← (1 - lr · η · weight_decay) · W - lr · η · multiplier · scale · direction

The direction is the LMO of the role's norm at the smoothed gradient, or, where the rule has a
statistic, the smoothed gradient over the norm's smoothed statistic. η comes from the step size; a
group's `weight_decay` is the optimizer's times the rule's `decay`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .checkpoints import ON_MISMATCH, describe, matched, some
from .exchange import directed_inplace, dual_norms
from .graph import canonical_name
from .layouts import Layout, usual_layout
from .moves import Move, apply_inplace, is_flat, may_be_flat, moves_of
from .precision import (
    check_precision,
    is_low,
    loaded_momentum,
    new_compensation,
    packed,
    state_dtype,
    unpacked,
)
from .roles import ROLES, ParamSpec
from .rules import Policy, Rule, check_total, policy_key
from .sharding import (
    NEEDS_WHOLE_MATRICES,
    agree,
    divided_among,
    groups_of,
    hold_the_same,
    local,
    replicas,
    total,
)
from .step_sizes import Fixed, StepSize
from .tables import fold_names, format_table

logger = logging.getLogger(__name__)


class NormOpt(torch.optim.Optimizer):
    """Steepest descent under the norm that a policy gives to each group's role.

    Args:
        groups: parameter groups, each a dict with `params` (parameters, or pairs of name and
            parameter) and `role`, and optionally `kind`, `layouts` (a text for each parameter;
            default: the role's usual one), `weight_decay`. [`parameter_groups`] makes them for a
            model.
        policy: a rule for every role in the groups.
        lr: the learning rate, which a schedule may change; rules have multipliers of it.
        weight_decay: decoupled: W shrinks by lr · η · weight_decay · rule.decay in each step.
        step_size: η: [`Fixed`], or a number that depends on all gradients.
        on_mismatch: what to do with a checkpoint that does not fit: "error", or "reset": parameters
            that it does not know under the same name, shape and rule start without state.
        momentum_dtype: how momenta are kept: "float32", "bfloat16", or "8bit", which needs torchao.
        rounding: how weights in 16 bits take a step: "nearest", which loses steps below a weight's
            last bit, "stochastic" (bfloat16 only), or "kahan", for two more bytes a weight.

    Attributes:
        origin: the arguments of `create_normopt_optimizer` that made it, for records.
        replicas: the ranks that hold the same parameters and gradients and share the work; those of
            accelerate's DDP if it is not set.
        observer: called with each [`Move`] and η before the move is made; for telemetry.

    Each parameter's state is one momentum buffer; none where the rule's momentum is 0; and the
    norm's statistic where the rule has one. Groups hold plain data only. Under a sparse gradient
    only its rows are moved where neither momentum nor weight decay moves others and the norm allows
    it; else it is made dense.

    Raises:
        ValueError: for a negative learning rate, a role without a rule, complex parameters, two
            parameters of one name, layouts that do not fit, or an unknown `on_mismatch`.
    """

    origin: Mapping[str, Any] = {}
    observer: Callable[[Move, Tensor | float], None] | None = None
    replicas: ProcessGroup | None = None
    _are_same: bool | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        policy: Policy,
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        step_size: StepSize = Fixed(),  # noqa: B008 (immutable)
        on_mismatch: str = "error",
        momentum_dtype: str = "float32",
        rounding: str = "nearest",
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not isinstance(value, (int, float, Tensor)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, found {value!r}.")
        if on_mismatch not in ON_MISMATCH:
            raise ValueError(
                f"on_mismatch must be {' or '.join(ON_MISMATCH)}, found {on_mismatch!r}."
            )
        groups = list(groups)
        if not all(isinstance(group, Mapping) and "role" in group for group in groups):
            raise ValueError(
                "NormOpt takes parameter groups, each a dict with 'params' and 'role'. For a "
                "model use create_normopt_optimizer(model, lr=...), which finds the roles."
            )
        check_total(policy, [(group["role"], group.get("kind", "")) for group in groups])
        self.policy = dict(policy)
        self.step_size = step_size
        self.on_mismatch = on_mismatch
        self.complaints: list[str] = []  # about the last checkpoint, under "reset"
        bits = {"momentum_dtype": momentum_dtype, "rounding": rounding}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **bits})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see the class; fills in what it leaves out."""
        group = {"kind": "", **param_group}
        if "role" not in group:
            raise ValueError(f"A group needs a role; found {', '.join(sorted(param_group))}.")
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        pairs = [
            p if isinstance(p, tuple) else (f"param_{len(taken) + i}", p)
            for i, p in enumerate(params)
        ]
        names = [canonical_name(name) for name in taken] + [canonical_name(n) for n, _ in pairs]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"Two parameters are named {some(twice)}. Checkpoints match parameters "
                "by name: give "
                "each one its own, as in (f'encoder.{name}', p)."
            )
        for name, p in pairs:
            if p.is_complex():
                raise ValueError(f"{name} is complex ({p.dtype}); NormOpt takes real parameters.")

        bits = {key: group.get(key, self.defaults[key]) for key in ("momentum_dtype", "rounding")}
        check_precision([p for _, p in pairs], **bits)
        rule = self.rule_of(group)
        shapes = [tuple(p.shape) for _, p in pairs]
        layouts = group.get("layouts") or [usual_layout(group["role"], shape) for shape in shapes]
        if len(layouts) != len(pairs):
            raise ValueError(
                f"Group {group['role']!r}: {len(pairs)} parameters, {len(layouts)} layouts."
            )
        for shape, layout in zip(shapes, layouts, strict=True):  # complain now, not at the step
            Layout(str(layout)).to_operators(torch.empty(shape, device="meta"))
        group |= {
            "params": pairs,
            "param_names": [name for name, _ in pairs],  # torch leaves it out of an empty group
            "param_shapes": shapes,
            "layouts": [str(layout) for layout in layouts],
            "rule": str(rule) if self.step_size == Fixed() else f"{rule}; {self.step_size}",
            "multiplier": rule.multiplier,
            "schedule": rule.schedule,
            "label": self._label(group),
            "memory": {},
            "steps": 0,
            "resets": [],
            "state_texts": {},
        }
        group.setdefault("weight_decay", self.defaults["weight_decay"] * rule.decay)
        super().add_param_group(group)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that the policy gives to a group."""
        return self.policy[policy_key(self.policy, group["role"], group["kind"])]

    def _label(self, group: Mapping[str, Any]) -> str:
        """What logs and cards call a group: `linear`, `linear/router`; `linear/2` for a second."""
        label = f"{group['role']}/{group['kind']}" if group["kind"] else str(group["role"])
        identity = group["role"], group["kind"]
        same = sum((other["role"], other["kind"]) == identity for other in self.param_groups)
        return f"{label}/{same + 1}" if same else label

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is one.

        Raises:
            RuntimeError: if a parameter no longer has the shape it had when it was added; nothing
                is moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._agree()
        self._count_inplace()
        groups = self.param_groups
        for scope in [[group] for group in groups] if self.step_size.per_role else [groups]:
            self._step_inplace(scope)
        return loss

    def _step_inplace(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of groups that share one η, whose memory is in the first of them."""
        size, memory, watched = self.step_size, groups[0]["memory"], self.observer is not None
        moves = [
            move
            for group in groups
            for move in moves_of(group, self.rule_of(group), self.state, self._ranks)
        ]
        eta = weight = size.weight(memory)
        if size.needs_directions:
            moves = list(directed_inplace(moves, weight, weight, keep=True, whole=watched))
        if moves and not isinstance(size, Fixed):
            eta = self._eta(moves, weight, memory)
        directed: Iterable[Move] = moves
        if not size.needs_directions:
            unit = size.weight(memory)
            directed = directed_inplace(moves, weight, unit, keep=watched, whole=watched)
        for move in directed:
            if self.observer is not None:
                for one in move.each():
                    self.observer(one, eta)
            apply_inplace(move, eta, self.steps)

    def _eta(
        self, moves: list[Move], weight: Tensor | float, memory: dict[str, Any]
    ) -> Tensor | float:
        """Measure the moves, and advance η."""
        size = self.step_size
        single = [one for move in moves for one in move.each()]
        seen = [size.observe(one, weight) for one in single]
        parts = [  # of (dual norm, sums)
            (torch.cat([sums.new_zeros(1), sums]), divided_among(one.param))
            for one, (sums, _) in zip(single, seen, strict=True)
        ]
        length = len(parts[0][0])
        if size.needs_directions:
            duals: Iterable[Any] = ((one.dual(), one.shards) for one in single)
        else:
            duals = dual_norms(single, [tensor for _, tensor in seen if tensor is not None])
        parts += [(nn.functional.pad(dual[None], (0, length - 1)), ranks) for dual, ranks in duals]
        measured = total(parts)
        return size.advance_inplace(memory, measured[0], measured[1:])

    def _agree(self) -> None:
        """Find the ranks that share the work, and make sure that all will do the same.

        Raises:
            RuntimeError: on every rank, if any has a parameter that it cannot move.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._ranks = self._replicas(params)
        groups = groups_of(params, self._ranks)
        found = agree(params, groups, self._complaint())
        for p, has_gradient in zip(params, found, strict=True):
            if has_gradient and p.grad is None:  # another rank has one
                p.grad = torch.zeros_like(p)

    def _replicas(self, params: list[Tensor]) -> ProcessGroup | None:
        ranks = self.replicas or replicas()
        if ranks is None or not params:
            return None
        if self._are_same is None:
            text = str(
                [(g["param_names"], g["param_shapes"], g["rule"]) for g in self.param_groups]
            )
            self._are_same = hold_the_same(text, ranks, local(params[0]).device)
            if not self._are_same:
                logger.warning("The ranks train different models: each computes all of its step.")
        return ranks if self._are_same else None

    def _count_inplace(self) -> None:
        """Count the step, unless it is torch's rehearsal that creates the state: all is 0."""
        rates = [group["lr"] for group in self.param_groups]
        # A rehearsal's rates are no tensors of another device, which is not asked.
        moves = any((isinstance(rate, Tensor) and not rate.is_cpu) or rate for rate in rates)
        if moves or any(
            p.grad is not None and p.grad.any() for g in self.param_groups for p in g["params"]
        ):
            for group in self.param_groups:
                group["steps"] += bool(group["params"])  # ZeRO 3 takes them away and back

    @property
    def steps(self) -> int:
        """The number of steps of this run, those before its checkpoint included."""
        return max(group["steps"] for group in self.param_groups)

    @steps.setter
    def steps(self, number: int) -> None:
        for group in self.param_groups:
            group["steps"] = number

    @property
    def resets(self) -> list[str]:
        """Where the run went on from a checkpoint that did not fit, and in what way."""
        resets: list[str] = self.param_groups[0]["resets"]
        return resets

    @property
    def may_be_flat(self) -> bool:
        """Whether its steps are right for ZeRO's flat partitions of parameters too."""
        return isinstance(self.step_size, Fixed) and all(
            may_be_flat(group, self.rule_of(group)) for group in self.param_groups
        )

    def _complaint(self) -> str:
        """What is wrong with the parameters' shapes; "" if nothing is."""
        for group in self.param_groups:
            if is_flat(group) and self.may_be_flat:
                continue
            made, now = len(group["param_names"]), len(group["params"])
            if made != now:
                return (
                    f"The group {group['role']} had {made} parameters when the optimizer was made, "
                    f"and has {now} now. {NEEDS_WHOLE_MATRICES}"
                )
            for name, p, shape in zip(
                group["param_names"], group["params"], group["param_shapes"], strict=True
            ):
                if p.grad is not None and tuple(p.shape) != tuple(shape):
                    return (
                        f"{name} had the shape {tuple(shape)} when the optimizer was made, and "
                        f"has {tuple(p.shape)} now. {NEEDS_WHOLE_MATRICES}"
                    )
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The state, with a description of it by which a load checks that it is whole."""
        state_dict = super().state_dict()
        if any(map(is_flat, self.param_groups)):  # which have no names
            return state_dict
        for group in state_dict["param_groups"]:
            group["state_texts"] = {
                name: describe(state_dict["state"], number)
                for name, number in zip(group["param_names"], group["params"], strict=True)
            }
        state = state_dict["state"]
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        state_dict["state"] = {
            i: packed(state.get(i, {}), p, group["momentum_dtype"])
            for i, (p, group) in enumerate(pairs)
        }
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint: by name, and only if every parameter still has the rule it had.

        Raises:
            ValueError: if the checkpoint is another optimizer's, misses, adds or reshapes
                parameters, was made under other rules, or is not whole; nothing is changed then.
                Under `on_mismatch="reset"` these parameters start without state instead.
        """
        if "state" in state_dict:
            states = {number: unpacked(one) for number, one in state_dict["state"].items()}
            state_dict = {**state_dict, "state": {i: one for i, one in states.items() if one}}
        if any(map(is_flat, self.param_groups)):  # DeepSpeed's business, but for the rules
            found, own = (
                [g.get("rule") for g in gs]
                for gs in (state_dict["param_groups"], self.param_groups)
            )
            if found != own:
                raise ValueError(f"The checkpoint was made under the rules {found}, not {own}.")
        else:
            state_dict, self.complaints = matched(state_dict, self.param_groups, self.on_mismatch)
        super().load_state_dict(state_dict)
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict["state"].items():  # torch has cast it to the parameter's dtype
            p, group = pairs[i]
            for key, value in saved.items():
                if key == "momentum_buffer":
                    self.state[p][key] = loaded_momentum(value, p, group["momentum_dtype"])
                elif key == "compensation":
                    del self.state[p][key]
                    if group["rounding"] == "kahan" and is_low(p):
                        self.state[p][key] = new_compensation(p).copy_(value)
                elif key != "step" and isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, state_dtype(p), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("policy", "step_size", "on_mismatch", "origin", "complaints")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __repr__(self) -> str:
        rows = [
            (
                group["role"] + (f"/{group['kind']}" if group["kind"] else ""),
                str(self.rule_of(group).norm),
                f"{len(group['params']):,}",
                f"{sum(math.prod(shape) for shape in group['param_shapes']):,}",
                f"{float(group['lr'] * group['multiplier']):.3g}",
                f"{group['weight_decay']:g}",
            )
            for group in self.param_groups
        ]
        header = ("role", "norm", "tensors", "parameters", "lr", "weight decay")
        unknown = [n for g in self.param_groups if g["role"] == "other" for n in g["param_names"]]
        if not unknown:
            return format_table(header, rows)
        names = ", ".join(label for label, _ in fold_names(unknown))
        return (
            f"{format_table(header, rows)}\nother: {names}. hf-normopt inspect --why tells why; "
            'optim_args="roles=ROLE:REGEX" corrects.'
        )


def parameter_groups(
    model: nn.Module, specs: Sequence[ParamSpec], policy: Policy
) -> list[dict[str, Any]]:
    """Groups for [`NormOpt`]: one for each rule, in the order of `ROLES`, the main matrices first.

    Args:
        model: the model that `specs` describe.
        specs: from [`classify`](hf_normopt.classify).
        policy: kinds with a rule of their own get a group of their own.

    Raises:
        ValueError: if there is nothing to train, a role without a rule, or flattened parameters.
    """
    if not specs:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: all of them have "
            "requires_grad=False. Unfreeze some, or add an adapter."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is wrapped by FSDP1. {NEEDS_WHOLE_MATRICES}")
    check_total(policy, [(spec.role, spec.kind) for spec in specs])
    params = dict(model.named_parameters())
    by_rule: dict[tuple[int, str, str], list[ParamSpec]] = {}
    for spec in specs:
        kind = spec.kind if spec.kind in policy else ""
        by_rule.setdefault((list(ROLES).index(spec.role), spec.role, kind), []).append(spec)
    return [
        {
            "params": [(spec.name, params[spec.name]) for spec in members],
            "role": role,
            "kind": kind,
            "layouts": [str(spec.layout) for spec in members],
        }
        for (_, role, kind), members in sorted(by_rule.items(), key=lambda item: item[0])
    ]
