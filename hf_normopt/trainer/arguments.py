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

from ..optim.optimizer import NormOpt
from ..optim.presets import (
    PRESETS,
    create_normopt_optimizer,
    has_statistic,
    optimizer_names,
    read_option,
)
from ..optim.schedules import Schedule, parse_schedule, preset_schedule
from .batch import example_batch

logger = logging.getLogger(__name__)

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}


@dataclass
class NormOptArguments(TrainingArguments):
    """`TrainingArguments` with typed fields for NormOpt's options.

    Everything here can also be said by `optim_args`, with any `TrainingArguments`.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as in the base class)
        *TrainingArguments._VALID_DICT_FIELDS,
        "lr_multipliers",
        "role_overrides",
        "role_schedules",
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
    heads: bool | None = field(
        default=None, metadata={"help": "Make each attention head an operator of its own."}
    )
    step_size: str | None = field(
        default=None, metadata={"help": "The step size, such as escape_velocity/beta:0.99."}
    )
    schedule: str | None = field(
        default=None,
        metadata={"help": "The schedule of all roles, such as wsd/decay:0.2/shape:1-sqrt."},
    )
    role_schedules: dict | str | None = field(
        default=None, metadata={"help": 'Schedules by role, as JSON: {"head": "constant"}.'}
    )
    decay_ratio: float | None = field(
        default=None,
        metadata={"help": "The decay of warmup-stable-decay, as a fraction of the run."},
    )
    on_mismatch: str | None = field(
        default=None,
        metadata={
            "help": "What to do with an optimizer checkpoint that does not fit: error, reset."
        },
    )
    momentum_dtype: str | None = field(
        default=None, metadata={"help": "How momenta are kept: float32, bfloat16 or 8bit."}
    )
    rounding: str | None = field(
        default=None,
        metadata={"help": "How weights in 16 bits take a step: kahan, stochastic or nearest."},
    )
    on_spike: str | None = field(
        default=None,
        metadata={"help": "What to do about a loss that jumps: warn, skip or halve."},
    )
    situation: str | None = field(
        default=None,
        metadata={
            "help": "What the model was before: scratch, pretrained or neutral; default: look."
        },
    )
    telemetry: bool | None = field(
        default=None, metadata={"help": "Log norms by role; on unless false."}
    )


# The fields that are options under the same name.
_PLAIN_FIELDS = (
    *("preset", "momentum", "nesterov", "scale", "heads", "step_size", "schedule"),
    *("on_mismatch", "momentum_dtype", "rounding", "on_spike", "situation", "telemetry"),
)


def parse_optim_args(text: str | None) -> dict[str, str]:
    """`"a=1,b=2"` as a dict: transformers' grammar, with errors that show the word.

    Raises:
        ValueError: for a word without exactly one `=`, or a key that is given twice.
    """
    options: dict[str, str] = {}
    for word in (text or "").replace(" ", "").split(","):
        key, separator, value = word.partition("=")
        if not word:
            continue
        if not separator or "=" in value or not key:
            raise ValueError(
                f"optim_args: cannot read {word!r} in {text!r}; expected key=value,key=value."
            )
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice in {text!r}.")
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


# What the trainer's own arguments, or another option, say.
_SAID_ELSEWHERE = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "overrides": "roles=role:REGEX;role:REGEX",
    "model": "the trainer's model",
}


def normopt_options(args: TrainingArguments) -> dict[str, Any]:
    """The options that training arguments ask for, under the names of `optim_args`.

    They are keyword arguments of [`create_normopt_optimizer`], but for `telemetry`.

    Raises:
        ValueError: if an option cannot be read, or is given twice with different values.
    """
    options: dict[str, Any] = parse_optim_args(args.optim_args)
    for key in options.keys() & _SAID_ELSEWHERE.keys():
        raise ValueError(f"optim_args: {key} is no option; it is said by {_SAID_ELSEWHERE[key]}.")
    if "roles" in options:
        options["overrides"] = parse_roles(options.pop("roles"))

    name = optimizer_name(args)
    sources = [
        (f"optim={name!r}", {} if name == "normopt" else {"preset": optimizer_names().get(name)})
    ]
    if isinstance(args, NormOptArguments):
        typed = {key: getattr(args, key) for key in _PLAIN_FIELDS}
        typed["overrides"] = _dict_field(args, "role_overrides") or None
        for option, name in (("lr", "lr_multipliers"), ("schedule", "role_schedules")):
            by_role = _dict_field(args, name)
            typed |= {f"{option}_{role}": value for role, value in by_role.items()}
        if args.decay_ratio is not None and scheduler_name(args) == _DEFAULTS["lr_scheduler_type"]:
            typed["schedule"] = typed["schedule"] or f"wsd/decay:{args.decay_ratio}"
        sources.append(("the fields of NormOptArguments", typed))
    for source, given in sources:
        for key, value in given.items():
            if value is not None and not _same(options.setdefault(key, value), value):
                raise ValueError(
                    f"{key} is given twice: {value!r} by {source}, and {options[key]!r} before."
                )
    return options


def wants_telemetry(args: TrainingArguments) -> bool:
    """Whether norms are to be logged: unless an option says no."""
    return read_option("telemetry", normopt_options(args).get("telemetry", True), bool)


def trainer_schedule(args: TrainingArguments) -> Schedule:
    """The schedule that `lr_scheduler_type` and its options ask for.

    Raises:
        ValueError: for an option that the schedule does not have.
    """
    name = scheduler_name(args)
    given: Any = args.lr_scheduler_kwargs
    options = dict(given or {})
    typed = args.decay_ratio if isinstance(args, NormOptArguments) else None
    if typed is not None and name != _DEFAULTS["lr_scheduler_type"]:
        options["decay_ratio"] = typed
    if "decay_ratio" in options:
        if name != "warmup_stable_decay":
            raise ValueError(
                f"decay_ratio belongs to lr_scheduler_type='warmup_stable_decay', found {name!r}."
            )
        options["decay"] = float(options.pop("decay_ratio"))
    return Schedule(name, args.warmup_steps, 0.0, options)


def run_schedule(args: TrainingArguments, optimizer: NormOpt) -> Schedule:
    """The schedule of a run: the option's, the trainer's, or where there is none, the preset's."""
    asked = trainer_schedule(args)
    text = optimizer.origin.get("schedule", "")
    if not text and asked.name == _DEFAULTS["lr_scheduler_type"] and not asked.options:
        text = preset_schedule(optimizer)
    return parse_schedule(text).over(asked) if text else asked


def optimizer_name(args: TrainingArguments) -> str:
    """The text of `args.optim`, which is a member of an enum or a string."""
    return str(getattr(args.optim, "value", args.optim))


def scheduler_name(args: TrainingArguments) -> str:
    """The text of `args.lr_scheduler_type`, which is a member of an enum or a string."""
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def _same(a: Any, b: Any) -> bool:
    """Whether two values of an option, each a value or its text, are one."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a).lower() == str(b).lower()


def _dict_field(args: NormOptArguments, name: str) -> dict[str, Any]:
    value = getattr(args, name) or {}
    if not isinstance(value, dict):
        raise ValueError(
            f'{name} takes a dict, or its JSON such as {{"head": 2.0}}; found {value!r}.'
        )
    return value


def optimizer_from_arguments(model: nn.Module, args: TrainingArguments, **changes: Any) -> NormOpt:
    """Make the optimizer that training arguments ask for, and show its table on the first process.

    `learning_rate` and `weight_decay` mean what they say; `adam_beta1`, `adam_beta2` and
    `adam_epsilon`, where they are not the default, reach the rules that have a statistic.

    Args:
        model: the model to train.
        args: any `TrainingArguments`.
        changes: arguments of [`create_normopt_optimizer`] that go before those of `args`.
    """
    options = normopt_options(args)
    options.pop("telemetry", None)
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay, **options, **changes}
    for name, value in options.items():
        if name.partition("_")[0] == "schedule":
            parse_schedule(value)  # complain now, not when training begins
    preset = options.get("preset", "normopt")
    adam = _changed_adam_arguments(args)
    if adam and preset in PRESETS and not has_statistic(PRESETS[preset].policy):
        adam = {}
        if args.process_index == 0:
            logger.warning(
                "adam_beta1, adam_beta2 and adam_epsilon have no effect: no rule of the preset %r "
                "has a second moment. The momentum of its rules is the option momentum "
                "(optim_args).",
                preset,
            )
    options = {**adam, "inputs": example_batch(), **options}
    optimizer = create_normopt_optimizer(model, **options)
    if args.process_index == 0:
        low, high = PRESETS[preset].learning_rate
        if not low / 10 <= options["lr"] <= high * 10:
            logger.warning(
                "learning_rate=%g is far from what the preset %r recommends: %g to %g.",
                options["lr"],
                preset,
                low,
                high,
            )
        said = optimizer.situation.get("text")
        about = f"\nsituation: {said}" if said else ""
        print(f"NormOpt, preset {preset}:\n{optimizer}{about}", flush=True)
    return optimizer


def _changed_adam_arguments(args: TrainingArguments) -> dict[str, float]:
    """The Adam arguments that differ from the defaults, under our names."""
    names = {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_epsilon": "eps"}
    return {
        ours: getattr(args, theirs)
        for theirs, ours in names.items()
        if getattr(args, theirs) != _DEFAULTS[theirs]
    }
