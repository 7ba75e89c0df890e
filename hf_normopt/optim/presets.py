"""Presets: named policies with their step size. Data, no code: each composes rules and norms.

A new preset is one entry here and one line in `tests/test_presets.py`, which names the reference
that it equals.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from ..norms.operators import Frobenius, Norm, Spectral, TiedTable, operator_norm
from ..norms.product import Product, parse_norm, product_norm
from ..roles import KINDS, ROLES, classify
from .groups import asked_groups, factors_apart, parameter_groups, read_groups
from .guard import parse_guard
from .optimizer import NormOpt
from .rules import EMA, Policy, Rule
from .sharding import check_deepspeed, deepspeed_stage
from .situation import CHOICES, Choice, find_situation, summary, with_choices
from .step_sizes import EscapeVelocity, Fixed, LineSearch, StepSize, parse_step_size
from .zero import shown_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """A policy, its step size, and what a person should know.

    Args:
        description: one line.
        source: where it comes from.
        learning_rate: the recommended range.
        policy: a rule for every role.
        step_size: η.
        schedule: of the learning rate where nobody asks for another, see
            `hf_normopt/optim/schedules.py`; "": the trainer's.
        choices: by what a parameter was before training and its role, see
            `hf_normopt/optim/situation.py`.
    """

    description: str
    source: str
    learning_rate: tuple[float, float]
    policy: Policy
    step_size: StepSize = Fixed()  # noqa: RUF009 (immutable)
    schedule: str = ""
    choices: Mapping[tuple[str, str], Choice] = field(default_factory=dict)


# Building blocks: a rule for matrices and one for what has no shape to speak of.
_ENTRY = operator_norm("l1", "linf")
_MATRICES = ("linear", "conv", "embedding", "head")
_VECTORS = ("norm", "bias", "scalar", "other")


def _uniform(rule: Rule, **others: Rule) -> Policy:
    """One rule for all roles but those named; gains, biases and scalars do not decay."""
    policy = dict.fromkeys(_MATRICES, rule) | dict.fromkeys(_VECTORS, replace(rule, decay=0.0))
    return policy | others


def _by_role(rule: Callable[..., Rule], *, embedding: float = 1.0, head: float = 1.0) -> Policy:
    """The paper's Epilogue: a norm for each role; multipliers for embedding and head."""
    vector = partial(rule, decay=0.0)
    return {
        "linear": rule(operator_norm("rms", "rms")),
        "conv": rule(operator_norm("rms", "rms")),
        "embedding": rule(operator_norm("l1", "rms"), multiplier=embedding),
        "head": rule(operator_norm("rms", "linf"), multiplier=head),
        "norm": vector(_ENTRY),
        "bias": vector(operator_norm("l1", "rms")),
        "scalar": vector(_ENTRY),
        "other": vector(_ENTRY),
    }


def _with_products(policy: Policy) -> Policy:
    """The same, and a low-rank adapter's s B A is one operator: a matrix, or a table's change."""
    return {
        **policy,
        "product": replace(policy["linear"], norm=product_norm(policy["linear"].norm)),
        "table_product": replace(
            policy["embedding"], norm=product_norm(policy["embedding"].norm), multiplier=1.0
        ),
    }


def _with_tied_tables(policy: Policy) -> Policy:
    """The same, and a table that is the head too moves no further than a head may."""
    return {**policy, "tied": replace(policy["embedding"], norm=TiedTable())}


# The momentum of this package's own presets. Why 0.9, and not 0.95 as torch's Muon has:
# docs/results.md, Momentum.
_OWN = partial(Rule, momentum=0.9, nesterov=True)

_ADAM = Rule(_ENTRY, momentum=0.9, statistic=EMA(0.999))
_MUON = Rule(Spectral(method="muon"), scale="muon", momentum=0.95, nesterov=True)
_SHAMPOO = Rule(operator_norm("l2", "l2"), momentum=0.9, statistic=EMA(0.99, 1e-12))
_PRODIGY = Rule(_ENTRY, momentum=0.9, statistic=EMA(0.999, 1e-8, bias_correction=False))
_PAPER = "Bernstein & Newhouse 2024, arXiv 2409.20325"

PRESETS: dict[str, Preset] = {
    "normopt": Preset(
        description="An operator norm for each role, at the learning rates of AdamW.",
        source=f"{_PAPER}, Epilogue; scale: Liu et al. 2025, arXiv 2502.16982",
        learning_rate=(1e-5, 5e-3),
        policy=_with_products(_by_role(partial(_OWN, scale="adamw"))),
        choices=CHOICES,
    ),
    "modular": Preset(
        description="The same norms in their own unit: the rate transfers over width.",
        source=f"{_PAPER}, Epilogue; Large et al. 2024, arXiv 2405.14813",
        learning_rate=(1e-3, 1e-1),
        policy=_with_tied_tables(_with_products(_by_role(_OWN))),
    ),
    "free": Preset(
        description="normopt at a rate that the first steps find: within 2 % of the best rate "
        "from scratch on text, 11 % and more behind it when a pretrained model is fine-tuned.",
        source=f"{_PAPER}, Epilogue; a line search on the cosine of steps and gradients",
        learning_rate=(0.2, 5.0),
        policy=_with_products(_by_role(partial(_OWN, scale="adamw"))),
        step_size=LineSearch(),
        choices=CHOICES,
    ),
    "scion": Preset(
        description="The same norms with radius 50, 3000 for the head (by rows); plain momentum.",
        source="Pethick et al. 2025, Scion, unconstrained, arXiv 2502.07529",
        learning_rate=(1e-5, 2e-3),
        policy=_by_role(partial(Rule, momentum=0.9, multiplier=50.0), embedding=50.0, head=3000.0),
        schedule="wsd/decay:0.284/shape:linear",  # its nanoGPT: 1450 of 5100 steps
    ),
    "muon": Preset(
        description="Orthogonalized momentum for linear layers, AdamW for the rest.",
        source="Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon",
        learning_rate=(3e-4, 2e-2),
        policy=_uniform(_ADAM, linear=_MUON),
    ),
    "adam": Preset(
        description="The first story with its moving averages: AdamW.",
        source=f"{_PAPER}, Story I; torch.optim.AdamW",
        learning_rate=(1e-5, 5e-3),
        policy=_uniform(_ADAM),
    ),
    "shampoo": Preset(
        description="The second story with its moving averages; AdamW for what is no matrix.",
        source=f"{_PAPER}, Story II; Gupta et al. 2018, arXiv 1802.09568",
        learning_rate=(1e-4, 1e-1),
        policy=_uniform(_ADAM, linear=_SHAMPOO, conv=_SHAMPOO),
    ),
    "prodigy": Preset(
        description="The third story with its moving averages: Adam that finds its step size.",
        source=f"{_PAPER}, Story III; Mishchenko & Defazio 2023, arXiv 2306.06101; prodigyopt",
        learning_rate=(0.1, 2.0),
        policy=_uniform(_PRODIGY),
        step_size=EscapeVelocity(beta=math.sqrt(0.999)),
        schedule="cosine",  # prodigyopt's README: a cosine or none
    ),
    "sign": Preset(
        description="The first story, moving averages off: sign descent, without state.",
        source=f"{_PAPER}, Prop. 2 and 3; torch.optim.Adam with betas 0 and eps 0",
        learning_rate=(1e-5, 5e-3),
        policy=_uniform(Rule(_ENTRY)),
    ),
    "spectral": Preset(
        description="The second story, moving averages off: U Vᵀ for matrices, without state.",
        source=f"{_PAPER}, Prop. 5",
        learning_rate=(1e-4, 1e-1),
        policy=_uniform(
            Rule(operator_norm("l2", "l2")),
            **dict.fromkeys(_VECTORS, Rule(_ENTRY, decay=0.0)),
        ),
    ),
    "escape": Preset(
        description="The third story, moving averages off: sign descent at escape velocity.",
        source=f"{_PAPER}, Eq. 28 and 29",
        learning_rate=(0.1, 2.0),
        policy=_uniform(Rule(_ENTRY)),
        step_size=EscapeVelocity(),
    ),
    "signum": Preset(
        description="The sign of the momentum.",
        source="Bernstein et al. 2018, signSGD, arXiv 1802.04434",
        learning_rate=(1e-5, 2e-3),
        policy=_uniform(Rule(_ENTRY, momentum=0.9)),
    ),
    "lion": Preset(
        description="The sign of Nesterov's momentum: Lion with betas 0.95² and 0.95.",
        source="Chen et al. 2023, arXiv 2302.06675",
        learning_rate=(3e-6, 1e-3),
        policy=_uniform(Rule(_ENTRY, momentum=0.95, nesterov=True)),
    ),
    "normalized-sgd": Preset(
        description="Each tensor's momentum over its length.",
        source=f"{_PAPER}, Table 1, the Frobenius norm",
        learning_rate=(1e-3, 1.0),
        policy=_uniform(Rule(Frobenius(), momentum=0.9)),
    ),
}


def optimizer_names() -> dict[str, str]:
    """Names for `TrainingArguments(optim=...)`, and the preset that each stands for."""
    others = [name for name in PRESETS if name != "normopt"]
    return {"normopt": "normopt"} | {f"normopt_{name.replace('-', '_')}": name for name in others}


# Fields of a rule that may be changed by name, for all roles (`momentum=0.9`) or one
# (`lr_head=2.0`).
_FIELDS: dict[str, tuple[str, type]] = {
    "lr": ("multiplier", float),
    "momentum": ("momentum", float),
    "nesterov": ("nesterov", bool),
    "norm": ("norm", Norm),
    "scale": ("scale", str),
    "decay": ("decay", float),
    "schedule": ("schedule", str),
    "statistic": ("statistic", EMA),
}
_STATISTIC_FIELDS = ("beta1", "beta2", "eps")


def create_normopt_optimizer(
    model: nn.Module,
    *,
    lr: float,
    preset: str = "normopt",
    weight_decay: float = 0.0,
    params: Any = None,
    overrides: Mapping[str, str] | None = None,
    inputs: Any = None,
    step_size: StepSize | str | None = None,
    heads: bool | str = False,
    on_mismatch: str = "error",
    momentum_dtype: str = "float32",
    rounding: str = "kahan",
    on_spike: str | None = None,
    situation: str = "auto",
    **changes: Any,
) -> NormOpt:
    """Make the optimizer for a model: find the roles, give each its rule.

    Args:
        model: any module; only parameters with `requires_grad` are trained.
        lr: the learning rate.
        preset: a key of [`PRESETS`].
        weight_decay: decoupled; acts where the rule decays: on matrices, not on gains and biases.
        params: what to train, if not the whole model: parameters or groups of them, as torch's
            optimizers take. A group's `lr` and `weight_decay` hold for its parameters; rules keep
            their multipliers.
        overrides: role by regular expression, see [`classify`](hf_normopt.classify).
        inputs: one example of what `forward` takes, see [`classify`](hf_normopt.classify).
        step_size: in place of the preset's, such as `EscapeVelocity()`, or its text, such as
            `"escape_velocity/per_role:true"`.
        heads: whether each attention head is an operator of its own.
        on_mismatch: what to do with a checkpoint that does not fit, see [`NormOpt`].
        momentum_dtype: how momenta are kept, see [`NormOpt`].
        rounding: how weights in 16 bits take a step, see [`NormOpt`].
        on_spike: what is done about a loss that jumps: `"warn"`, `"skip"` or `"halve"`, also as
            `"skip/multiple:5"`, see `hf_normopt/optim/guard.py`; None: nothing.
        situation: what the model was before training, on which the rates of some roles depend
            (preset `normopt`): "auto": what can be seen; "scratch", "pretrained", or "neutral":
            no role gets another rate. `lr_ROLE` goes before it for that role.
        changes: of the preset's rules. `FIELD=value` changes all roles, `FIELD_ROLE=value` one role
            or kind, where FIELD is `lr` (a multiplier), `momentum`, `nesterov`, `norm`, `scale`,
            `decay`, `schedule` (`"wsd/decay:0.2"`) or `statistic` (the beta of its moving average;
            "none"); `beta1`, `beta2` and `eps` change the rules that have a statistic. Values may
            be text.

    Returns:
        The optimizer; `print` shows its groups.

    Raises:
        ValueError: for an unknown preset or change, values that cannot be read, a model without
            trainable parameters, overrides that match nothing, or a DeepSpeed config that takes the
            matrices apart.

    Example:
        >>> optimizer = create_normopt_optimizer(model, lr=1e-3, lr_head=2.0)  # doctest: +SKIP
    """
    chosen = _preset(preset)
    own_size = parse_step_size(step_size) if isinstance(step_size, str) else step_size
    bits: dict[str, Any] = {"momentum_dtype": momentum_dtype, "rounding": rounding}
    policy = changed(chosen.policy, **changes)
    by_heads = read_option("heads", heads, bool)
    if deepspeed_stage() and (apart := factors_apart(policy)) != policy:
        logger.info("Under ZeRO each factor of a product, such as LoRA's A and B, steps by itself.")
        policy = apart
    with shown_whole(model.parameters()):
        if params is None:
            specs = classify(model, overrides, inputs=inputs, heads=by_heads)
            groups = parameter_groups(model, specs, policy)
        else:
            groups = asked_groups(
                model,
                policy,
                read_groups(params),
                lr=lr,
                overrides=overrides,
                inputs=inputs,
                heads=by_heads,
                decays=[name for name in changes if name.partition("_")[0] == "decay"],
            )
        found = find_situation(model, situation)
        if chosen.choices:
            can_smooth = isinstance(own_size or chosen.step_size, Fixed | LineSearch)
            said = _decided_roles(changes)
            groups = with_choices(groups, found, chosen.choices, policy, said, can_smooth)
        rates: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        optimizer = NormOpt(
            groups,
            policy,
            **rates,
            step_size=own_size or chosen.step_size,
            on_mismatch=on_mismatch,
            **bits,
        )
    _warn_of_absent_roles(changes, groups, policy)
    optimizer.guard = None if on_spike is None else parse_guard(on_spike)
    check_deepspeed(optimizer.unfit_for_zero, optimizer.may_be_flat)
    given = {"overrides": overrides or None, "step_size": own_size, "heads": heads, **bits}
    given |= {"on_spike": on_spike, "situation": situation}
    optimizer.origin = {"preset": preset, **rates, **changes, **_unusual(given)}
    if chosen.choices:
        optimizer.situation = summary(found, groups)
        logger.info("The situation: %s.", optimizer.situation["text"])
    optimizer.made_for = weakref.ref(model)
    optimizer.agree_at_forward(model)
    return optimizer


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        expected = ", ".join(PRESETS)
        raise ValueError(
            f"Unknown preset {name!r}; expected one of {expected}.{_near(name, PRESETS)}"
        )
    return PRESETS[name]


def _unusual(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of [`create_normopt_optimizer`] that are not its defaults."""
    usual = inspect.signature(create_normopt_optimizer).parameters
    return {name: value for name, value in options.items() if value != usual[name].default}


def _warn_of_absent_roles(
    changes: Mapping[str, Any], groups: list[dict[str, Any]], policy: Policy
) -> None:
    present = {group[key] for group in groups for key in ("role", "kind")}
    taken_apart = factors_apart(policy).keys() & {"product", "table_product"}
    for change in changes:
        role = change.partition("_")[2]
        if role and role not in present | taken_apart:
            logger.warning("%s has no effect: no trainable parameter is %r.", change, role)


def _decided_roles(changes: Mapping[str, Any]) -> set[str]:
    """Roles whose rate, norm, scale or statistic an option decides."""
    by_field = {name: name.partition("_") for name in changes}
    if {"norm", "scale", "statistic"} & by_field.keys():
        return set(ROLES)
    fields = ("lr", "norm", "scale", "statistic")
    return {role for field, _, role in by_field.values() if field in fields}


def changed(policy: Policy, **changes: Any) -> Policy:
    """A policy with some fields of its rules replaced, see [`create_normopt_optimizer`].

    Raises:
        ValueError: for an unknown name, a value of the wrong type, or no rule that it concerns.
    """
    policy = dict(policy)
    for name, value in sorted(changes.items(), key=_generality):
        if name in _STATISTIC_FIELDS:
            _change_statistics_inplace(policy, name, read_option(name, value, float))
            continue
        field, _, role = name.partition("_")
        if field not in _FIELDS or (role and role not in policy and role not in KINDS):
            known = [*_FIELDS, *_STATISTIC_FIELDS]
            known += [f"{field}_{role}" for field in _FIELDS for role in (*ROLES, *KINDS)]
            raise ValueError(
                f"Unknown option {name!r}.{_near(name, known)} Options are {', '.join(_FIELDS)}, "
                f"each also for one role or kind ({', '.join((*ROLES, *KINDS))}), as in lr_head, "
                f"and {', '.join(_STATISTIC_FIELDS)}."
            )
        attribute, kind = _FIELDS[field]
        targets = [role] if role else list(policy)
        # Kinds that the preset has a rule for follow their role; a product needs a norm of its own.
        targets += [
            kind
            for kind, of in KINDS.items()
            if of == role and kind in policy
            if field != "norm" or not isinstance(policy[kind].norm, Product)
        ]
        for target in targets:
            rule = policy.get(target) or policy[KINDS[target]]
            policy[target] = replace(rule, **{attribute: read_option(name, value, kind)})
    return policy


def has_statistic(policy: Policy) -> bool:
    """Whether any rule smooths a statistic, so that beta2 and eps mean something."""
    return any(rule.statistic is not None for rule in policy.values())


def _generality(change: tuple[str, Any]) -> int:
    """All roles first, then single roles, then kinds, whatever order they were given in."""
    role = change[0].partition("_")[2]
    return 0 if not role else 2 if role in KINDS else 1


def _change_statistics_inplace(policy: dict[str, Rule], name: str, value: float) -> None:
    if not has_statistic(policy):
        raise ValueError(
            f"{name} has no effect: no rule of this preset has a second moment. The momentum of "
            "its rules is the option momentum."
        )
    for role, rule in policy.items():
        if rule.statistic is None:
            continue
        if name == "beta1":
            policy[role] = replace(rule, momentum=value)
        elif name == "eps":
            policy[role] = replace(rule, statistic=replace(rule.statistic, eps=value))
        elif isinstance(rule.statistic, EMA):
            policy[role] = replace(rule, statistic=replace(rule.statistic, beta=value))


def read_option(name: str, value: Any, kind: type) -> Any:
    """A value, or the text of one, as the type that an option has."""
    if kind is Norm and isinstance(value, str):
        return parse_norm(value)
    if kind is EMA and not isinstance(value, EMA):
        none = value is None or str(value).lower() == "none"
        return None if none else EMA(read_option(name, value, float))
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif kind is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind):
        return value
    raise ValueError(f"Option {name}: expected a {kind.__name__.lower()}, found {value!r}.")


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""
