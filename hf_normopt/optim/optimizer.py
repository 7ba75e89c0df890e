"""NormOpt: steepest descent under a norm for each role, in one step().

    W ← (1 - lr · η · weight_decay) · W - lr · η · multiplier · scale · direction

The direction is the LMO of the role's norm at the smoothed gradient, or, where the rule has a
statistic, the smoothed gradient over the norm's smoothed statistic. η comes from the step size; a
group's `weight_decay` is the optimizer's times the rule's `decay`.
"""

from __future__ import annotations

import logging
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..norms.layouts import Layout, usual_layout
from ..roles.graph import canonical_name
from ..tables import fold_names, format_table
from .agreement import Proposal, Settings, agree, average_inplace, mean_over
from .batches import is_flat, moves_of
from .checkpoints import ON_MISMATCH, described, matched, some
from .exchange import directed_inplace, dual_norms
from .guard import Guard
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
from .rules import Policy, Rule, check_total, policy_key
from .sharding import (
    NEEDS_WHOLE_MATRICES,
    divided_among,
    groups_of,
    is_alone,
    replicas,
    total,
    wrappers_of,
)
from .step_sizes import Fixed, StepSize
from .zero import OFFLOADED, Partition, displaced, matched_flat, partition_of, unfit
from .zero_moves import is_partitioned, partitioned_inplace, whole_moves

logger = logging.getLogger(__name__)

RESIZED = (
    "It was resized or replaced afterwards, as by model.resize_token_embeddings: do that first, and"
    " make the optimizer for the model that it leaves."
)


class NormOpt(torch.optim.Optimizer):
    """Steepest descent under the norm that a policy gives to each group's role.

    Args:
        groups: parameter groups, each a dict with `params` (parameters, or pairs of name and
            parameter) and `role`, and optionally `kind`, `layouts` (a text for each parameter;
            default: the role's usual one), `lr`, `weight_decay`, `factor`, which multiplies the
            rule's multiplier and goes on from checkpoints; and `scales` where the parameters are
            factors A, B, A, B, ... of products s B A: s of each. [`parameter_groups`] makes them
            for a model.
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
    observer: Callable[[Move, Tensor | float], None] | None = None
    replicas: ProcessGroup | None = None
    guard: Guard | None = None
    _loss: Tensor | float | None = None  # of the coming step, as far as it is known
    _sums: dict[torch.device, Tensor] | None = None  # of gradients, see `note_inplace`
    _fixed: Mapping[Any, Settings] = {}  # what ranks must have the same, by the groups that step
    _homes: Mapping[str, list[weakref.ref[Tensor]]] = {}  # of each group, what it was made of
    _partitions: Mapping[Tensor, Partition] = {}  # ZeRO's
    _wrappers: list[weakref.ref[DistributedDataParallel]] | None = None
    _is_apart: bool = False  # whether replicas were found to train by themselves
    _has_compared: bool = False
    _has_warned: bool = False

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
        params = group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        taken = [name for other in self.param_groups for name in other["param_names"]]
        pairs = [
            p if isinstance(p, tuple) else (f"param_{len(taken) + i}", p)
            for i, p in enumerate(params)
        ]
        names = [canonical_name(name) for name in taken] + [canonical_name(n) for n, _ in pairs]
        twice = {name for name, count in Counter(names).items() if count > 1}
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
                partitioned_inplace(flat, weight, watched),
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

    @property
    def needs_loss(self) -> bool:
        """Whether a step depends on the loss."""
        return self.guard is not None or self.step_size.needs_loss

    def note_loss(self, loss: Tensor | float | None) -> None:
        """Add to the loss of the coming step: each micro-batch its share of the mean.

        `step(closure)` and the Trainer do it by themselves.

        Args:
            loss: of this rank; None: begin anew.
        """
        if loss is None:
            self._loss = None
        elif self.needs_loss:
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            self._loss = loss if self._loss is None else self._loss + loss

    def _taken_loss(self) -> Tensor | None:
        """The mean over the ranks of the loss that was noted; None where nobody needs it.

        Raises:
            RuntimeError: if it is needed, and none was noted.
        """
        noted, self._loss = self._loss, None
        if not self.needs_loss or (noted is None and _is_rehearsal()):
            return None
        if noted is None:
            option = "on_spike" if self.guard is not None else f"step_size={self.step_size}"
            raise RuntimeError(
                f"{option} needs the loss: train with a Trainer, call step(closure), or call "
                "note_loss(loss) before step()."
            )
        params = [p for group in self.param_groups for p in group["params"]]
        return mean_over(noted, groups_of(params, self._ranks), params)

    def _agree(self) -> None:
        """Find the ranks that share the work, and make sure that all will do the same.

        Raises:
            RuntimeError: on every rank, if any has a parameter that it cannot move, or if they
                differ in anything that must be equal.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        self._ranks = self._replicas(params)
        displacement = self._find_partitions()
        partitions = [self._partitions[p] for p in params if p in self._partitions]
        groups = groups_of(params, self._ranks, [of.ranks for of in partitions])
        text = self._common_text() if groups else ""
        complaint = displacement or self._complaint()
        own = Proposal(params, complaint, text, self._facts, self.observer is not None)
        if self._ranks is not None:
            partial = any(
                getattr(module(), "find_unused_parameters", False)
                for module in self._wrappers or ()
            )
            own.compares = partial or not self._has_compared
        agreed = agree(own, groups, self._ranks)
        self._is_watched = agreed.is_watched
        self._has_compared |= self._ranks is not None
        if agreed.is_apart:
            logger.warning(
                "The ranks have different weights or gradients, as in local SGD: each computes "
                "its own step from now on, as with other optimizers."
            )
            self._is_apart, self._ranks = True, None
        for p, has_gradient in zip(params, agreed.has_gradient, strict=True):
            is_common = not self._is_apart or isinstance(p, DTensor)
            if has_gradient and p.grad is None and is_common:  # another rank has one
                p.grad = torch.zeros_like(p)
        if self._ranks is not None:
            average_inplace([params[i] for i in agreed.unequal], self._ranks)
        for partition in partitions:
            partition.meet_inplace()

    def _find_partitions(self) -> str:
        """Find ZeRO's partitions among the parameters; return what is wrong with one, or ""."""
        for group in self.param_groups:
            if not is_flat(group):
                continue
            params = [home() for home in self._homes.get(group["label"], ())]
            for flat in group["params"]:
                found = self._partitions.get(flat) or partition_of(flat, group, params)
                if found is None or flat in self._partitions:
                    continue
                if found.is_offloaded:
                    if self.may_be_flat:
                        continue
                    return OFFLOADED
                self._partitions = {**self._partitions, flat: found}
                if not self.may_be_flat and (wrong := displaced(found)):
                    return wrong
        return ""

    def agree_at_forward(self, model: nn.Module) -> None:
        """Let ranks that share a mesh agree before the model's first forward pass.

        Where they train different parameters, the backward pass would end in the transport.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            hook = FirstForward(weakref.ref(self))
            hook.handle = model.register_forward_pre_hook(hook)

    def agree_on_options(self) -> None:
        """Make sure that all ranks of the parameters' meshes have the same options.

        Raises:
            RuntimeError: on every rank, naming the difference.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if groups := groups_of(params, None):
            own = Proposal(params, self._complaint(), self._common_text(), self._facts)
            agree(own, groups, None)

    def _replicas(self, params: list[Tensor]) -> ProcessGroup | None:
        """The ranks that hold the same parameters, unless each is to step by itself."""
        ranks = self.replicas or replicas()
        if ranks is None or self._is_apart:
            return None
        known = [module for of in self._wrappers or () if (module := of()) is not None]
        if self._wrappers is None or len(known) < len(self._wrappers):
            known = wrappers_of(params)
            self._wrappers = [weakref.ref(module) for module in known]
        if self.replicas is None and not known:
            return None  # nobody averages the gradients
        if any(map(is_alone, known)):
            if not self._has_warned:
                logger.warning(
                    "DDP does not average the gradients of every step (no_sync, Join): each rank "
                    "computes its own step."
                )
            self._has_warned = True
            return None
        return ranks

    def _common_text(self) -> str:
        """All that must be equal on the ranks."""
        return str(self._facts())

    def _facts(self) -> Settings:
        key = tuple((group["label"], len(group["params"])) for group in self.param_groups)
        if key not in self._fixed:
            self._fixed = {**self._fixed, key: self._fixed_facts()}
        return {**self._fixed[key], **self._rates()}

    def _fixed_facts(self) -> Settings:
        """What does not change from step to step."""
        begun = max((group["steps"] for group in self.param_groups), default=0)
        facts: Settings = {
            "the optimizer": {
                "step size": str(self.step_size),
                "on_spike": str(self.guard),
                "steps before this run": str(begun),
            }
        }
        for group in self.param_groups:
            rows = zip(
                group["param_names"],
                group["params"] * (len(group["param_names"]) if is_flat(group) else 1),
                group["param_shapes"],
                group["layouts"],
                strict=False,  # their number may be what is wrong
            )
            for name, p, shape, layout in rows:
                facts[name] = {
                    "shape": str(tuple(shape)),
                    "role": group["label"],
                    "rule": group["rule"],
                    "layout": layout,
                    "dtype": str(p.dtype),
                    "momentum_dtype": group["momentum_dtype"],
                    "rounding": group["rounding"],
                    "placements": str(getattr(p, "placements", "")),
                }
        return facts

    def _rates(self) -> Settings:
        """What schedules may change; rates that lie on another device are not asked for."""
        facts: Settings = {}
        for group in self.param_groups:
            lr = group["lr"]
            asked = not isinstance(lr, Tensor) or lr.is_cpu
            facts[f"the group {group['label']}"] = {
                "lr": repr(float(lr)) if asked else "a tensor",
                "weight_decay": repr(group["weight_decay"]),
                "multiplier": repr(group["multiplier"]),
            }
        return facts

    def _count_inplace(self) -> None:
        """Count the step, unless it is torch's rehearsal that creates the state."""
        rates = [group["lr"] for group in self.param_groups]
        # A rehearsal's rates are 0, and no tensors of another device, which is not asked.
        moves = any((isinstance(rate, Tensor) and not rate.is_cpu) or rate for rate in rates)
        if moves or not _is_rehearsal():
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
    def may_be_flat(self) -> bool:
        """Whether its steps are right for flat tensors too, whatever they are made of."""
        return isinstance(self.step_size, Fixed) and all(
            self.rule_of(group).entrywise for group in self.param_groups
        )

    @property
    def spikes(self) -> list[str]:
        """Where the loss jumped, and what was done about it."""
        return list(self.param_groups[0]["guard"].get("events", []))

    @property
    def unfit_for_zero(self) -> str:
        """Why its steps cannot be found from ZeRO's partitions; "" if they can."""
        size = self.step_size
        text = "" if isinstance(size, Fixed) else type(size).__name__
        return unfit(self.param_groups, self.rule_of, text)

    def _complaint(self) -> str:
        """What is wrong with the parameters' shapes; "" if nothing is."""
        for group in self.param_groups:
            is_known = all(flat in self._partitions for flat in group["params"])
            if is_flat(group) and (self.may_be_flat or is_known):
                if not self.may_be_flat and self.unfit_for_zero:
                    return self.unfit_for_zero
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
                    is_flattened = p.ndim == 1 and len(shape) != 1
                    return (
                        f"{name} had the shape {tuple(shape)} when the optimizer was made, and "
                        f"has {tuple(p.shape)} now. "
                        f"{NEEDS_WHOLE_MATRICES if is_flattened else RESIZED}"
                    )
        return ""

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


def _is_rehearsal() -> bool:
    """Whether torch's checkpoint code calls step() to have the state made: gradients, rates are 0.

    So is the first step of a warm-up at a rate of 0, to whoever does not ask the device for the
    gradients.
    """
    frame = sys._getframe()
    while frame.f_code.co_name != "_init_optim_state":
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return True


class FirstForward:
    """A hook that runs once; a copy of the model does without."""

    optimizer: weakref.ref[NormOpt] | None = None
    handle: RemovableHandle | None = None

    def __init__(self, optimizer: weakref.ref[NormOpt]) -> None:
        self.optimizer = optimizer

    def __call__(self, *args: Any) -> None:
        """Agree, and go."""
        if torch.compiler.is_compiling():
            return
        optimizer = self.optimizer() if self.optimizer is not None else None
        if self.handle is not None:
            self.handle.remove()
        self.optimizer = self.handle = None
        if optimizer is not None:
            optimizer.agree_on_options()

    def __getstate__(self) -> dict[str, Any]:
        return {}
