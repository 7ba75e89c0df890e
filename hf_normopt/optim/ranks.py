"""What all ranks must agree on before they step: replicas, shards, partitions, the loss."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .agreement import Proposal, Settings, agree, average_inplace, mean_over
from .batches import is_flat
from .guard import Guard
from .moves import Move
from .rules import Policy, Rule, rule_in, smoothed
from .sharding import NEEDS_WHOLE_MATRICES, groups_of, is_alone, replicas, wrappers_of
from .step_sizes import Fixed, StepSize
from .zero import OFFLOADED, Partition, displaced, partition_of, unfit

logger = logging.getLogger(__name__)

RESIZED = (
    "It was resized or replaced afterwards, as by model.resize_token_embeddings: do that first, and"
    " make the optimizer for the model that it leaves."
)


class RankedOptimizer(torch.optim.Optimizer):
    """An optimizer whose ranks find each other, and make sure that all will do the same.

    Attributes:
        policy: a rule for every role in the groups.
        step_size: η.
        observer: see [`NormOpt`](hf_normopt.NormOpt), as all others.
    """

    policy: Policy
    step_size: StepSize
    observer: Callable[[Move, Tensor | float], None] | None = None
    replicas: ProcessGroup | None = None
    guard: Guard | None = None
    _loss: Tensor | float | None = None  # of the coming step, as far as it is known
    _fixed: Mapping[Any, Settings] = {}  # what ranks must have the same, by the groups that step
    _homes: Mapping[str, list[weakref.ref[Tensor]]] = {}  # of each group, what it was made of
    _partitions: Mapping[Tensor, Partition] = {}  # ZeRO's
    _wrappers: list[weakref.ref[DistributedDataParallel]] | None = None
    _is_apart: bool = False  # whether replicas were found to train by themselves
    _has_compared: bool = False
    _has_warned: bool = False
    _ranks: ProcessGroup | None = None  # those that share the work of this step
    _is_watched: bool = False

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """The rule that the policy gives to a group, smoothed where the situation asks for it."""
        rule = rule_in(self.policy, group)
        return smoothed(rule, group["smoothing"]) if group.get("smoothing") else rule

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
                "smoothing": repr(group.get("smoothing")),
            }
        return facts

    @property
    def may_be_flat(self) -> bool:
        """Whether its steps are right for flat tensors too, whatever they are made of."""
        return isinstance(self.step_size, Fixed) and all(
            self.rule_of(group).entrywise for group in self.param_groups
        )

    @property
    def unfit_for_zero(self) -> str:
        """Why its steps cannot be found from ZeRO's partitions; "" if they can."""
        size = self.step_size
        text = "" if isinstance(size, Fixed) else type(size).__name__
        return unfit(self.param_groups, self.rule_of, text)

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
        if not self.needs_loss or (noted is None and is_rehearsal()):
            return None
        if noted is None:
            option = "on_spike" if self.guard is not None else f"step_size={self.step_size}"
            raise RuntimeError(
                f"{option} needs the loss: train with a Trainer, call step(closure), or call "
                "note_loss(loss) before step()."
            )
        params = [p for group in self.param_groups for p in group["params"]]
        return mean_over(noted, groups_of(params, self._ranks), params)


def is_rehearsal() -> bool:
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

    optimizer: weakref.ref[RankedOptimizer] | None = None
    handle: RemovableHandle | None = None

    def __init__(self, optimizer: weakref.ref[RankedOptimizer]) -> None:
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
