"""Parameters in groups of the caller's: with a learning rate or a weight decay of their own.

torch's optimizers take parameters, or groups of them. Trainers rely on it: LoRA+ gives a factor
another rate, a trainer leaves some parameters out of the decay, a loss brings parameters along.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..norms.layouts import Layout
from ..norms.product import Product
from ..roles import KINDS, ROLES, ParamSpec, classify
from .checkpoints import some
from .rules import Policy, check_total, rule_in

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
        wishes = _by_options(module, specs, by_id)
        _explain_split_products(wishes.values(), policy)
        for (rate, weight_decay), members in wishes.items():
            options = {} if rate in (None, lr) else {"lr": rate}
            for group in parameter_groups(module, members, policy):
                _add_inplace(found, group, policy, options, weight_decay, decays)
    if not found:
        raise ValueError(
            f"Nothing to train: none of the parameters that NormOpt was given for "
            f"{type(model).__name__} has requires_grad=True."
        )
    return sorted(found.values(), key=_place)


def _by_options(
    module: nn.Module, specs: Iterable[ParamSpec], asked: Mapping[int, Asked]
) -> dict[tuple[float | None, float | None], list[ParamSpec]]:
    """A module's parameters by the rate and the weight decay that are asked for them.

    Args:
        module: that has the parameters.
        specs: of all its parameters.
        asked: what is to be trained, by the `id` of the parameter.
    """
    params = dict(module.named_parameters())
    wishes: dict[tuple[float | None, float | None], list[ParamSpec]] = {}
    for spec in specs:
        one = asked.get(id(params[spec.name]))
        if one is not None:
            wishes.setdefault((one.lr, one.weight_decay), []).append(spec)
    return wishes


def _add_inplace(
    found: dict[tuple[Any, ...], dict[str, Any]],
    group: dict[str, Any],
    policy: Policy,
    options: Mapping[str, Any],
    weight_decay: float | None,
    decays: Iterable[str],
) -> None:
    """Add a group with what was asked for it, to the one of its kind that asks for the same."""
    if weight_decay is not None:
        rule = rule_in(policy, group)
        said = {"decay", f"decay_{group['role']}", f"decay_{group['kind']}"} & set(decays)
        options = {**options, "weight_decay": weight_decay * (rule.decay if said else 1.0)}
    key = (group["role"], group["kind"], *options.items())
    if key not in found:
        found[key] = {**group, **options}
        return
    for name in ("params", "layouts", "scales"):
        if name in group:
            found[key][name] = [*found[key][name], *group[name]]


def _explain_split_products(wishes: Iterable[Sequence[ParamSpec]], policy: Policy) -> None:
    """Warn of products whose factors are asked for with different rates, as LoRA+ has them."""
    wishes = list(wishes)
    together = products([spec for members in wishes for spec in members], policy)
    apart = len(together) - sum(len(products(members, policy)) for members in wishes)
    if apart:
        logger.warning(
            "The factors of %d products, such as LoRA's A and B, are in groups with different "
            "learning rates or weight decays (LoRA+?). Each is stepped by itself at its own rate. "
            "In one group they are stepped as the operator that they make up: its step does not "
            "depend on how it is divided into factors, and such a ratio has no meaning.",
            apart,
        )


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


# Groups by role


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
        raise ValueError(
            f"{type(model).__name__} is wrapped by FSDP1, which flattens parameters. Use FSDP2: "
            'fsdp_config={"version": 2}.'
        )
    check_total(policy, [(spec.role, spec.kind) for spec in specs])
    params = dict(model.named_parameters())
    groups: dict[tuple[int, str, str], dict[str, Any]] = {}

    def add(role: str, kind: str, spec: ParamSpec, layout: Layout) -> dict[str, Any]:
        key = list(ROLES).index(role), role, kind
        empty = {"params": [], "role": role, "kind": kind, "layouts": []}
        group = groups.setdefault(key, empty)
        group["params"].append((spec.name, params[spec.name]))
        group["layouts"].append(str(layout))
        return group

    pairs = products(specs, policy)
    joined = {spec.name for pair in pairs for spec in pair}
    for spec in specs:
        if spec.name not in joined:
            add(spec.role, kind_of(spec, policy), spec, spec.layout)
    for pair in pairs:
        for spec in pair:
            kind = kind_of_product(spec)
            assert spec.factor is not None
            group = add(KINDS[kind], kind, spec, spec.factor.layout)
            scales = group.setdefault("scales", [])
            if spec.factor.side == "B":
                scales.append(spec.factor.scale)
    return [group for _, group in sorted(groups.items())]


def kind_of(spec: ParamSpec, policy: Policy) -> str:
    """The kind whose rule a parameter gets by itself; "" if it gets its role's."""
    kind = "tied" if spec.also_head else spec.kind
    return kind if kind in policy else ""


def kind_of_product(spec: ParamSpec) -> str:
    """The kind of the product of which a parameter is a factor; "" if it is none."""
    if spec.factor is None:
        return ""
    return "table_product" if spec.factor.is_table else "product"


def factors_apart(policy: Policy) -> Policy:
    """The same without rules for products, so that each factor is stepped by itself."""
    return {key: rule for key, rule in policy.items() if not isinstance(rule.norm, Product)}


def products(specs: Iterable[ParamSpec], policy: Policy) -> list[tuple[ParamSpec, ParamSpec]]:
    """The pairs of factors, A and B, that take one step under a policy.

    Both must be trained, and the policy must have a rule for products and none for the factors
    (`adapter_a`, `adapter_b`).
    """
    sides: dict[str, dict[str, ParamSpec]] = {}
    for spec in specs:
        rule = policy.get(kind_of_product(spec))
        if spec.factor is not None and rule is not None and isinstance(rule.norm, Product):
            sides.setdefault(spec.factor.product, {})[spec.factor.side] = spec
    if {"adapter_a", "adapter_b"} & policy.keys():
        return []
    pairs = [(pair["A"], pair["B"]) for pair in sides.values() if len(pair) == 2]
    return [pair for pair in pairs if _chain(*pair)]


def _chain(a: ParamSpec, b: ParamSpec) -> bool:
    """Whether B A is a product of matrices, or of as many pairs of them."""
    shapes = []
    for spec in (a, b):
        assert spec.factor is not None
        if not spec.factor.layout.fits(spec.shape):
            return False
        (operator,) = spec.factor.layout.to_operators(torch.empty(spec.shape, device="meta"))
        shapes.append(operator.shape)
    first, second = shapes
    return first[:-2] == second[:-2] and first[-2] == second[-1]
