"""NormOpt: steepest descent under a norm for each role, in one step().

    W ← (1 - lr · η · weight_decay) · W - lr · η · multiplier · scale · direction

The direction is the LMO of the role's norm at the smoothed gradient, or, where the rule has a
statistic, the smoothed gradient over the norm's smoothed statistic. η comes from the step size; a
group's `weight_decay` is the optimizer's times the rule's `decay`.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..norms.layouts import Layout, usual_layout
from ..roles.graph import canonical_name
from ..tables import fold_names, format_table
from .batches import is_flat, moves_of
from .checkpoints import ON_MISMATCH, described, matched, some
from .exchange import directed_inplace, dual_norms
from .moves import Move
from .precision import (
    check_precision,
    is_low,
    loaded_compensation,
    loaded_momentum,
    packed,
    state_dtype,
    unpacked,
)
from .ranks import RankedOptimizer, is_rehearsal
from .rules import Policy, check_total, rule_in
from .sharding import (
    divided_among,
    total,
)
from .step_sizes import Fixed, StepSize
from .zero import matched_flat
from .zero_moves import is_partitioned, partitioned_inplace, whole_moves

logger = logging.getLogger(__name__)


class NormOpt(RankedOptimizer):
    """Steepest descent under the norm that a policy gives to each group's role.

    Args:
        groups: parameter groups, each a dict with `params` (parameters, or pairs of name and
            parameter) and `role`, and optionally `kind`, `layouts` (a text for each parameter;
            default: the role's usual one), `lr`, `weight_decay`, `factor`, which multiplies the
            rule's multiplier, `smoothing`, the beta of an [`EMA`](hf_normopt.EMA) of the norm's
            statistic where the rule has none (both go on from checkpoints); and `scales` where the
            parameters are factors A, B, A, B, ... of products s B A: s of each.
            [`parameter_groups`] makes them for a model.
        policy: a rule for every role in the groups.
        lr: the learning rate, which a schedule may change; rules have multipliers of it.
        weight_decay: decoupled: W shrinks by lr · η · weight_decay · rule.decay in each step.
        step_size: η: [`Fixed`], or a number that depends on all gradients.
        on_mismatch: what to do with a checkpoint that does not fit: "error", or "reset": parameters
            that it does not know under the same name, shape and rule start without state.
        momentum_dtype: how momenta are kept: "float32", "bfloat16", or "8bit", which needs torchao.
        rounding: how weights in 16 bits take a step: "kahan", for two more bytes a weight,
            "stochastic" (bfloat16 only), or "nearest", which loses steps below a weight's last bit.

    Attributes:
        origin: the arguments of `create_normopt_optimizer` that made it, for records.
        situation: what `create_normopt_optimizer` found the model to be, and chose, for records.
        made_for: the model that it was made for, if there was one, by a weak reference.
        replicas: the ranks that hold the same parameters and gradients and share the work; those of
            accelerate's DDP if it is not set.
        observer: called with each [`Move`] and η before the move is made; for telemetry.
        guard: what is done about a loss that jumps, if anything; it needs to know the loss.

    Each parameter's state is one momentum buffer; none where the rule's momentum is 0; and the
    norm's statistic where the rule has one. Groups hold plain data only. Under a sparse gradient
    only its rows are moved where neither momentum nor weight decay moves others and the norm allows
    it; else it is made dense.

    Raises:
        ValueError: for a negative learning rate, a role without a rule, complex parameters, two
            parameters of one name, layouts that do not fit, or an unknown `on_mismatch`.
    """

    origin: Mapping[str, Any] = {}
    situation: Mapping[str, Any] = {}
    made_for: weakref.ref[nn.Module] | None = None
    _sums: dict[torch.device, Tensor] | None = None  # of gradients, see `note_inplace`

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
        rounding: str = "kahan",
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
        step_size.check(map(self.rule_of, self.param_groups))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see the class; fills in what it leaves out."""
        group = {"kind": "", **param_group}
        if "role" not in group:
            raise ValueError(f"A group needs a role; found {', '.join(sorted(param_group))}.")
        pairs = self._named(group["params"])
        bits = {key: group.get(key, self.defaults[key]) for key in ("momentum_dtype", "rounding")}
        check_precision([p for _, p in pairs], **bits)
        rule = rule_in(self.policy, group)  # without what a situation chose
        shapes = [tuple(p.shape) for _, p in pairs]
        layouts = group.get("layouts") or [usual_layout(group["role"], shape) for shape in shapes]
        if len(layouts) != len(pairs):
            raise ValueError(
                f"Group {group['role']!r}: {len(pairs)} parameters, {len(layouts)} layouts."
            )
        by_name = [str(layout) for layout in layouts]
        for shape, layout in dict.fromkeys(zip(shapes, by_name, strict=True)):
            # complain now, not at the step
            Layout(layout).to_operators(torch.empty(shape, device="meta"))
        group |= {
            "params": pairs,
            "param_names": [name for name, _ in pairs],  # torch leaves it out of an empty group
            "param_shapes": shapes,
            "layouts": by_name,
            "scales": group.get("scales", []),
            "rule": str(rule) if self.step_size == Fixed() else f"{rule}; {self.step_size}",
            "multiplier": rule.multiplier * group.get("factor", 1.0),
            "own": [key for key in ("lr", "weight_decay") if key in group],
            "schedule": rule.schedule,
            "label": self._label(group),
            "memory": {},
            "guard": {},
            "steps": 0,
            "resets": [],
            "state_texts": {},
        }
        group.setdefault("weight_decay", self.defaults["weight_decay"] * rule.decay)
        self._homes = {**self._homes, group["label"]: [weakref.ref(p) for _, p in pairs]}
        super().add_param_group(group)

    def _named(self, params: Any) -> list[tuple[str, Tensor]]:
        """Parameters of a new group with their names, which no other one has."""
        params = [params] if isinstance(params, Tensor) else list(params)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        pairs = [
            p if isinstance(p, tuple) else (f"param_{len(taken) + i}", p)
            for i, p in enumerate(params)
        ]
        names = Counter(map(canonical_name, (*taken, *(name for name, _ in pairs))))
        if twice := {name for name, count in names.items() if count > 1}:
            raise ValueError(
                f"Two parameters are named {some(twice)}. Checkpoints match parameters by name: "
                "give each one its own, as in (f'encoder.{name}', p)."
            )
        for name, p in pairs:
            if p.is_complex():
                raise ValueError(f"{name} is complex ({p.dtype}); NormOpt takes real parameters.")
        return pairs

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
            self.note_loss(None)
            self.note_loss(loss)

        self._agree()
        noted = self._taken_loss()
        self._count_inplace()
        self._sums = self._sums or {}
        groups, guard = self.param_groups, self.guard
        if noted is not None and self.step_size.needs_loss:
            groups[0]["memory"]["loss"] = noted
        if guard is not None and noted is not None:
            admits = guard.admits_inplace(groups[0]["guard"], float(noted), self.steps)
            groups = groups if admits else []
        for scope in [[group] for group in groups] if self.step_size.per_role else [groups]:
            if scope:
                self._step_inplace(scope)
        return loss

    def _step_inplace(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of groups that share one η, whose memory is in the first of them."""
        size, memory, watched = self.step_size, groups[0]["memory"], self._is_watched
        moves = [
            move
            for group in groups
            for move in moves_of(group, self.rule_of(group), self.state, self._ranks, self._sums)
        ]
        for move in moves:
            move.partition = self._partitions.get(move.param)
        eta = weight = size.weight(memory)
        if size.needs_directions:
            moves = list(directed_inplace(moves, weight, weight, keep=True, full=watched))
        known = size.known(memory)
        if known is not None:
            eta = known
        elif moves:
            eta = self._eta(moves, weight, memory)
        if self.guard is not None:
            eta = eta * self.param_groups[0]["guard"].get("factor", 1.0)
        directed: Iterable[Move] = moves
        if not size.needs_directions:
            unit = size.weight(memory)
            flat = [move for move in moves if is_partitioned(move)]
            rest = [move for move in moves if not is_partitioned(move)]
            directed = chain(
                partitioned_inplace(flat, weight, unit, watched),
                directed_inplace(rest, weight, unit, keep=watched, full=watched),
            )
        for move in directed:
            if watched:
                is_partition = move.partition is not None
                for whole in whole_moves(move) if is_partition else move.whole_operators():
                    if self.observer is not None:  # else another rank's
                        self.observer(whole, eta)
            move.apply_inplace(eta, self.steps)

    def _eta(
        self, moves: list[Move], weight: Tensor | float, memory: dict[str, Any]
    ) -> Tensor | float:
        """Measure the moves, and advance η."""
        size = self.step_size
        single = [one for move in moves for one in move.each()]
        seen = [size.observe(one, weight) for one in single]
        parts = [  # of (dual norm, sums)
            (torch.cat([sums.new_zeros(1), sums]), one.shards or divided_among(one.param))
            for one, (sums, _) in zip(single, seen, strict=True)
        ]
        length = len(parts[0][0])
        if size.needs_directions:
            duals: Iterable[Any] = ((one.dual() * size.share(one), one.shards) for one in single)
        else:
            wanted = [
                (one, of) for one, (_, of) in zip(single, seen, strict=True) if of is not None
            ]
            duals = dual_norms(*zip(*wanted, strict=True)) if wanted else ()
        parts += [(nn.functional.pad(dual[None], (0, length - 1)), ranks) for dual, ranks in duals]
        measured = total(parts)
        eta = size.advance_inplace(memory, measured[0], measured[1:])
        if size.known(memory) is not None:  # the last of its measurements
            for one in single:
                one.state.pop("anchor", None)
        return eta

    def _count_inplace(self) -> None:
        """Count the step, unless it is torch's rehearsal that creates the state."""
        rates = [group["lr"] for group in self.param_groups]
        # A rehearsal's rates are 0, and no tensors of another device, which is not asked.
        moves = any((isinstance(rate, Tensor) and not rate.is_cpu) or rate for rate in rates)
        if moves or not is_rehearsal():
            for group in self.param_groups:
                parts = [self._partitions.get(p) for p in group["params"][:1]]
                # ZeRO 3 takes them away and back, in one part or several.
                group["steps"] += any(part is None or part.is_first for part in parts)

    def warn_of_gradients(self) -> None:
        """Warn if gradients had entries that are NaN or infinite since this was last called.

        It waits for the device. The Trainer calls it when it logs; `state_dict` does too.
        """
        notes = list((self._sums or {}).values())
        if any(bool(note.isnan()) for note in notes):
            logger.warning(
                "Some gradients had entries that are NaN or infinite since this was last looked "
                "at. They counted as 0. If it goes on, the loss or a weight is not finite."
            )
            torch._foreach_zero_(notes)

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
    def spikes(self) -> list[str]:
        """Where the loss jumped, and what was done about it."""
        return list(self.param_groups[0]["guard"].get("events", []))

    def state_dict(self) -> dict[str, Any]:
        """The state, with a description of it by which a load checks that it is what was saved."""
        self.warn_of_gradients()
        state_dict = super().state_dict()
        if any(map(is_flat, self.param_groups)):  # which have no names
            return state_dict
        texts = described(state_dict["state"])
        for group in state_dict["param_groups"]:
            group["state_texts"] = {
                name: texts.get(number, "no state")
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
                parameters, was made under other rules, or is not what was saved; nothing is changed
                then.
                Under `on_mismatch="reset"` these parameters start without state instead.
        """
        if "state" in state_dict:
            states = {number: unpacked(one) for number, one in state_dict["state"].items()}
            state_dict = {**state_dict, "state": {i: one for i, one in states.items() if one}}
        if any(map(is_flat, self.param_groups)):  # DeepSpeed's business, but for the rules
            groups = matched_flat(state_dict["param_groups"], self.param_groups)
            state_dict = {**state_dict, "param_groups": groups}
        else:
            state_dict, self.complaints = matched(
                state_dict, self.param_groups, self.on_mismatch, self.step_size.per_role
            )
        self._fixed = {}
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
                        self.state[p][key] = loaded_compensation(value, p)
                elif key != "step" and isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, state_dtype(p), copy=True)
        if self.complaints:
            for group in self.param_groups:
                self.step_size.restart_inplace(group["memory"], self.state.values())

    def __getstate__(self) -> dict[str, Any]:
        own = ("policy", "step_size", "on_mismatch", "origin", "situation", "complaints", "guard")
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
