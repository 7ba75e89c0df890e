"""From `TrainingArguments` to an optimizer: the one builder behind every door to `Trainer`.

Options come as text in `optim_args="preset=muon,lr_head=2.0"`, or as the typed fields of
[`NormOptArguments`]; both end as keyword arguments of [`create_normopt_optimizer`].
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from .optimizer import NormOpt
from .presets import PRESETS, create_normopt_optimizer, optimizer_names
from .rules import EMA

logger = logging.getLogger(__name__)


@dataclass
class NormOptArguments(TrainingArguments):
    """`TrainingArguments` with typed fields for NormOpt's options.

    Everything here can also be said by `optim_args`, with any `TrainingArguments`.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as in the base class)
        *TrainingArguments._VALID_DICT_FIELDS,
        "lr_multipliers",
        "role_overrides",
    ]

    optim: OptimizerNames | str = field(
        default="normopt", metadata={"help": "The optimizer to use."}
    )
    preset: str | None = field(
        default=None, metadata={"help": f"The preset: one of {', '.join(PRESETS)}."}
    )
    role_overrides: dict | str | None = field(
        default=None,
        metadata={"help": 'Roles by regular expression of names, as JSON: {"REGEX": "head"}.'},
    )
    lr_multipliers: dict | str | None = field(
        default=None,
        metadata={"help": 'Multipliers of the learning rate by role, as JSON: {"head": 2.0}.'},
    )
    momentum: float | None = field(
        default=None, metadata={"help": "Momentum of all roles; 0 is off."}
    )
    nesterov: bool | None = field(
        default=None, metadata={"help": "Nesterov momentum for all roles."}
    )
    scale: str | None = field(
        default=None, metadata={"help": "Scale of all roles: norm, adamw or muon."}
    )


def parse_optim_args(text: str | None) -> dict[str, str]:
    """`"a=1,b=2"` as a dict: transformers' grammar, with errors that show the word.

    Raises:
        ValueError: for a word without exactly one `=`.
    """
    options = {}
    for word in (text or "").replace(" ", "").split(","):
        key, separator, value = word.partition("=")
        if not word:
            continue
        if not separator or "=" in value or not key:
            raise ValueError(
                f"optim_args: cannot read {word!r} in {text!r}; expected key=value,key=value."
            )
        options[key] = value
    return options


def parse_roles(text: str) -> dict[str, str]:
    """`"head:REGEX;embedding:REGEX"` as role by regular expression.

    Raises:
        ValueError: for a word without a `:`.
    """
    overrides = {}
    for word in filter(None, text.split(";")):
        role, separator, pattern = word.partition(":")
        if not separator or not pattern:
            raise ValueError(
                f"roles: cannot read {word!r} in {text!r}; expected role:REGEX;role:REGEX."
            )
        overrides[pattern] = role
    return overrides


def normopt_options(args: TrainingArguments) -> dict[str, Any]:
    """The keyword arguments of [`create_normopt_optimizer`] that training arguments ask for.

    Raises:
        ValueError: if an option cannot be read, or is given twice with different values.
    """
    options: dict[str, Any] = parse_optim_args(args.optim_args)
    if "roles" in options:
        options["overrides"] = parse_roles(options.pop("roles"))
    name = str(getattr(args.optim, "value", args.optim))
    asked = (
        {"preset": optimizer_names()[name]}
        if name in optimizer_names() and name != "normopt"
        else {}
    )
    if isinstance(args, NormOptArguments):
        typed = {key: getattr(args, key) for key in ("momentum", "nesterov", "scale")}
        multipliers: Any = args.lr_multipliers or {}  # a dict by now: the base class reads the JSON
        typed |= {f"lr_{role}": value for role, value in multipliers.items()}
        typed |= {"preset": args.preset, "overrides": args.role_overrides}
        asked |= {
            key: value for key, value in typed.items() if value is not None and key not in asked
        }
    for key, value in asked.items():
        if str(options.setdefault(key, value)) != str(value):
            raise ValueError(
                f"{key} is given twice: {options[key]!r} in optim_args, {value!r} in "
                f"{name} or its field."
            )
    return options


def optimizer_from_arguments(model: nn.Module, args: TrainingArguments) -> NormOpt:
    """Make the optimizer that training arguments ask for, and show its table on the first process.

    `learning_rate` and `weight_decay` mean what they say; `adam_beta1`, `adam_beta2` and
    `adam_epsilon`, where they are not the default, reach the rules that have a statistic.

    Args:
        model: the model to train.
        args: any `TrainingArguments`.
    """
    options = normopt_options(args)
    given = _changed_adam_arguments(args)
    optimizer = create_normopt_optimizer(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, **{**given, **options}
    )
    if args.process_index == 0:
        if given and not any(isinstance(rule.statistic, EMA) for rule in optimizer.policy.values()):
            logger.warning(
                "adam_beta1, adam_beta2 and adam_epsilon have no effect: no rule of the "
                "preset %r has a second "
                "moment. The momentum is the option `momentum` (optim_args).",
                options.get("preset", "normopt"),
            )
        print(f"NormOpt, preset {options.get('preset', 'normopt')}:\n{optimizer}", flush=True)
    return optimizer


def _changed_adam_arguments(args: TrainingArguments) -> dict[str, float]:
    """The Adam arguments that differ from the defaults, under our names."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    names = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps"}
    return {
        ours: getattr(args, theirs)
        for theirs, ours in names.items()
        if getattr(args, theirs) != defaults[theirs]
    }
