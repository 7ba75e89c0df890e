"""Parameters in groups of the caller's: with a learning rate or a weight decay of their own.

torch's optimizers take parameters, or groups of them. Trainers rely on it: LoRA+ gives a factor
another rate, a trainer leaves some parameters out of the decay, a loss brings parameters along.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..roles import ROLES, classify
from .checkpoints import some
from .optimizer import parameter_groups
from .rules import Policy, policy_key

logger = logging.getLogger(__name__)

_KNOWN = {"params", "param_names", "lr", "weight_decay"}


@dataclass(frozen=True)
class Asked:
    """A parameter, and what its group asks for it; None: what the optimizer says."""

    param: Tensor
    name: str = ""
    lr: float | None = None
    weight_decay: float | None = None


def read_groups(params: Any) -> list[Asked]:
    """Parameters, pairs of name and parameter, or groups of either, as torch's optimizers take.

    Raises:
        TypeError: for anything else.
        ValueError: if a parameter stands twice.
    """
    groups = _as_groups(params)
    unknown = sorted({str(key) for group in groups for key in group.keys() - _KNOWN})
    if unknown:
        logger.warning(
            "Groups of parameters have %s, which NormOpt does not read: a group may have lr and "
            "weight_decay.",
            ", ".join(unknown),
        )
    asked = [one for group in groups for one in _members(group)]
    if len({id(one.param) for one in asked}) < len(asked):
        raise ValueError("A parameter stands twice in the groups that NormOpt was given.")
    return asked


def _as_groups(params: Any) -> list[Mapping[str, Any]]:
    if isinstance(params, (Tensor, nn.Module, str, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(
            "NormOpt takes an iterable of parameters or of groups, each a dict with 'params'; "
            f"found {type(params).__name__}."
        )
    groups = list(params)
    if not any(isinstance(group, Mapping) for group in groups):
        return [{"params": groups}]
    for group in groups:
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"A group is a dict with 'params'; found {type(group).__name__}.")
    return groups


def _members(group: Mapping[str, Any]) -> Iterator[Asked]:
    options = {
        key: float(group[key]) for key in ("lr", "weight_decay") if group.get(key) is not None
    }
    members = group["params"]
    for member in [members] if isinstance(members, Tensor) else members:
        name, param = member if isinstance(member, tuple) else ("", member)
        if not isinstance(param, Tensor):
            raise TypeError(f"A group's params are parameters; found {type(param).__name__}.")
        yield Asked(param, name, **options)


def asked_groups(
    model: nn.Module,
    policy: Policy,
    asked: Iterable[Asked],
    *,
    lr: float,
    overrides: Mapping[str, str] | None = None,
    inputs: Any = None,
    heads: bool = False,
    decays: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Groups for [`NormOpt`](hf_normopt.NormOpt) of the parameters that a caller lists, no others.

    A group's `lr` takes the place of the optimizer's; the rule's multiplier remains. Its
    `weight_decay` is taken at its word, times the rule's `decay` where an option changed that.

    Args:
        model: to which the parameters belong. One that does not belong to it gets its role from
            its name and shape; a matrix is `other` then, unless an override says more.
        policy: a rule for every role.
        asked: what is to be trained; frozen parameters are left out.
        lr: the optimizer's.
        overrides: role by regular expression.
        inputs: one example of what the model's `forward` takes.
        heads: whether each attention head is an operator of its own.
        decays: the names of the options that changed a rule's `decay`.

    Raises:
        ValueError: if there is nothing to train.
    """
    by_id = {id(one.param): one for one in asked if one.param.requires_grad}
    own = {id(param) for param in model.parameters()}
    outside = _holder([one for key, one in by_id.items() if key not in own], model)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for module, patterns in _parts(model, outside, overrides or {}):
        specs = classify(module, patterns, inputs=inputs if module is model else None, heads=heads)
        for group in parameter_groups(module, specs, policy) if specs else ():
            rule = policy[policy_key(policy, group["role"], group["kind"])]
            said = {"decay", f"decay_{group['role']}", f"decay_{group['kind']}"} & set(decays)
            for pair, layout in zip(group["params"], group["layouts"], strict=True):
                if id(pair[1]) not in by_id:
                    continue
                one = by_id[id(pair[1])]
                options = {} if one.lr in (None, lr) else {"lr": one.lr}
                if one.weight_decay is not None:
                    options["weight_decay"] = one.weight_decay * (rule.decay if said else 1.0)
                key = (group["role"], group["kind"], *options.items())
                made = {**group, "params": [], "layouts": [], **options}
                members = found.setdefault(key, made)
                members["params"].append(pair)
                members["layouts"].append(layout)
    if not found:
        raise ValueError(
            f"Nothing to train: none of the parameters that NormOpt was given for "
            f"{type(model).__name__} has requires_grad=True."
        )
    return sorted(found.values(), key=_place)


def _place(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """As `parameter_groups` has them; last those with a rate of their own, which no log shows."""
    role = list(ROLES).index(group["role"])
    return "lr" in group, role, group["kind"], "weight_decay" in group


def _parts(
    model: nn.Module, outside: nn.Module | None, overrides: Mapping[str, str]
) -> Iterator[tuple[nn.Module, Mapping[str, str]]]:
    """The modules to classify, each with the overrides that concern it."""
    if outside is None:
        yield model, overrides
        return
    known, foreign = (
        {p for p in overrides if any(re.search(p, name) for name, _ in module.named_parameters())}
        for module in (model, outside)
    )
    yield model, {p: role for p, role in overrides.items() if p in known or p not in foreign}
    yield outside, {p: role for p, role in overrides.items() if p in foreign}


def _holder(params: list[Asked], model: nn.Module) -> nn.Module | None:
    """A module that has parameters under their names, for those that no module shows us."""
    if not params:
        return None
    root = nn.Module()
    names = [one.name or f"outside_{i}" for i, one in enumerate(params)]
    if len(set(names)) < len(names):
        raise ValueError(f"Parameters of no module have a name twice: {some(set(names))}.")
    for name, one in zip(names, params, strict=True):
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner._parameters[leaf] = one.param  # type: ignore[assignment]  # any tensor is trained
    logger.warning(
        "%d of the parameters to train are not of %s: %s. Their roles come from their names and "
        'shapes; optim_args="roles=ROLE:REGEX", or overrides, corrects them.',
        len(params),
        type(model).__name__,
        some(set(names)),
    )
    return root
