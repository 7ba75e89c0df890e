"""Learning rate schedules: transformers' shapes, with a factor of its own for each role.

A schedule's text is a name and the options that differ from its defaults:

    linear    cosine/floor:0.1    wsd/decay:0.2/shape:1-sqrt    constant/warmup:100    warmup:0.1

Names are those of `lr_scheduler_type`; `wsd` is warmup-stable-decay with the decay as a fraction of
the run. A text without a name changes the schedule of the run. transformers computes the shapes;
[`attach_inplace`] puts one for each group into one `LambdaLR`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from .presets import PRESETS

# Hägele et al. 2024 (arXiv 2405.18392): with this shape and a decay over a fifth of the run,
# warmup-stable-decay matches the cosine.
_WSD = "warmup_stable_decay"
_WSD_DEFAULTS = {"decay": 0.2, "decay_type": "1-sqrt"}
# Schedules that follow a metric are no function of the step.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")
_NOT_OPTIONS = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

Factor = Callable[[int], float]
"""The factor of the learning rate at a step."""


@dataclass(frozen=True)
class Schedule:
    """A shape, its warm-up and its floor.

    Args:
        name: an `lr_scheduler_type` of transformers; "" for the run's.
        warmup: in steps if at least 1, else as a fraction of the run; None for the run's.
        floor: the fraction of the learning rate at which the shape ends, instead of 0.
        options: `lr_scheduler_kwargs` of the shape. `warmup_stable_decay` also takes `decay`, a
            fraction of the run, in place of `num_decay_steps`.

    Raises:
        ValueError: for an unknown name or option, or a value out of range.
    """

    name: str = ""
    warmup: float | None = None
    floor: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = _options(self.name) if self.name else {"decay", "decay_type"}
        unknown = sorted(self.options.keys() - known)
        if unknown:
            raise ValueError(
                f"The schedule {self.name or 'of the run'!r} has no option {unknown[0]!r}, but "
                f"{', '.join(['warmup', 'floor', *sorted(known)])}."
            )
        for name, value in (("floor", self.floor), ("decay", self.options.get("decay", 0.0))):
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"A schedule's {name} is a fraction in [0, 1], found {value!r}.")
        if self.warmup is not None and not self.warmup >= 0:
            raise ValueError(f"A schedule's warmup is at least 0, found {self.warmup!r}.")

    def __str__(self) -> str:
        """The text that `parse_schedule` reads."""
        warmup = self.warmup if self.name != "constant" else None  # which has none
        options = {"warmup": warmup or None, "floor": self.floor or None, **self.options}
        words = [f"{key}:{value}" for key, value in options.items() if value is not None]
        return "/".join([*([self.name] if self.name else []), *words])

    def over(self, base: Schedule) -> Schedule:
        """This schedule, with its gaps filled from another."""
        if self.name:
            return replace(self, warmup=base.warmup if self.warmup is None else self.warmup)
        return Schedule(
            base.name,
            base.warmup if self.warmup is None else self.warmup,
            self.floor or base.floor,
            {**base.options, **self.options},
        )

    def factor(self, num_training_steps: int, learning_rate: float) -> Factor:
        """The factor as a function of the step.

        Args:
            num_training_steps: the length of the run.
            learning_rate: the unit in which transformers states some floors.
        """
        shape, floor = self._shape(num_training_steps, learning_rate), self.floor
        warmup = warmup_steps(self.warmup or 0, num_training_steps)
        return lambda step: shape(step) if step < warmup else floor + (1 - floor) * shape(step)

    def is_shape_of(self, factor: Factor, num_training_steps: int, learning_rate: float) -> bool:
        """Whether a factor is the one that transformers makes for this schedule."""
        shape = self._shape(num_training_steps, learning_rate)
        if isinstance(shape, partial) and isinstance(factor, partial):
            return shape.func is factor.func and shape.keywords == factor.keywords
        return getattr(shape, "__code__", 0) is getattr(factor, "__code__", 1)

    def _shape(self, num_training_steps: int, learning_rate: float) -> Factor:
        """The factor that transformers makes."""
        warmup = warmup_steps(self.warmup or 0, num_training_steps)
        options = dict(self.options)
        if "decay" in options:
            decay = round(options.pop("decay") * num_training_steps)
            if warmup + decay > num_training_steps:
                raise ValueError(
                    f"The schedule {self} decays over {decay} steps after {warmup} of warm-up; the "
                    f"run has {num_training_steps}."
                )
            options["num_decay_steps"] = decay
        scheduler = get_scheduler(
            self.name,
            torch.optim.SGD([torch.zeros(1)], lr=learning_rate),
            num_warmup_steps=warmup,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs=options,
        )
        shape: Factor = scheduler.lr_lambdas[0]
        return shape


def _options(name: str) -> set[str]:
    """The options of a shape, besides its warm-up and length."""
    functions = {kind.value: function for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if name in BY_METRIC:
        raise ValueError(
            f"The schedule {name!r} follows a metric, not the step, and has no factor per role."
        )
    if name not in functions:
        names = ", ".join(["wsd", *(n for n in functions if n not in BY_METRIC)])
        raise ValueError(f"Unknown schedule {name!r}; expected one of {names}.")
    function: Any = functions[name]
    options = set(inspect.signature(function).parameters) - set(_NOT_OPTIONS)
    return options | {"decay"} if name == _WSD else options


def warmup_steps(warmup: float, num_training_steps: int) -> int:
    """A warm-up in steps, read as `TrainingArguments.get_warmup_steps` does."""
    return int(warmup) if warmup >= 1 else math.ceil(warmup * num_training_steps)


def parse_schedule(text: str) -> Schedule:
    """A schedule from its text, such as `"wsd/decay:0.2/shape:1-sqrt"`.

    Raises:
        ValueError: for an unknown name, option or value.
    """
    first, *rest = text.split("/")
    name, words = ("", [first, *rest]) if ":" in first else (first, rest)
    options: dict[str, Any] = {}
    if name == "wsd":
        name, options = _WSD, dict(_WSD_DEFAULTS)
    for word in words:
        key, separator, value = word.partition(":")
        if not separator or not value:
            raise ValueError(f"Schedule {text!r}: cannot read {word!r}; expected NAME/key:value.")
        options["decay_type" if key == "shape" else key] = _number(value)
    if "num_decay_steps" in options:
        options.pop("decay", None)
    if name == "constant" and "warmup" in options:
        name = "constant_with_warmup"  # the other one ignores it, as in transformers
    try:
        warmup, floor = options.pop("warmup", None), options.pop("floor", 0.0)
        return Schedule(name, warmup, floor, options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Schedule {text!r}: {error}") from None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def create_normopt_scheduler(
    optimizer: torch.optim.Optimizer,
    num_training_steps: int,
    schedule: str = "",
    num_warmup_steps: float = 0,
) -> LambdaLR:
    """The scheduler for a custom training loop; `Trainer` makes the same one by itself.

    Args:
        optimizer: a NormOpt, or accelerate's wrapper of one. Its rules may have schedules.
        num_training_steps: the length of the run.
        schedule: the text of the schedule for roles without one of their own; default: the
            preset's, or "linear".
        num_warmup_steps: in steps if at least 1, else as a fraction of the run.
    """
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    text = schedule or preset_schedule(getattr(optimizer, "optimizer", optimizer)) or "linear"
    base = Schedule("linear", num_warmup_steps)
    attach_inplace(scheduler, optimizer, parse_schedule(text).over(base), num_training_steps)
    return scheduler


def preset_schedule(optimizer: Any) -> str:
    """The text of the schedule of a NormOpt's preset; "" if it has none."""
    preset = PRESETS.get(optimizer.origin.get("preset", ""))
    return preset.schedule if preset else ""


def attach_inplace(
    scheduler: LambdaLR, optimizer: torch.optim.Optimizer, base: Schedule, num_training_steps: int
) -> None:
    """Give every group of the optimizer the factor of its role, and the rate of the current step.

    Factors are plain functions, which checkpoints do not store, so the scheduler of a run with
    other groups can be loaded.

    Args:
        scheduler: made for this optimizer or for its wrapper; keeps its step.
        optimizer: its rules may have schedules of their own.
        base: the schedule of the other rules.
        num_training_steps: the length of the run.
    """
    rate, groups = float(optimizer.defaults["lr"]), optimizer.param_groups
    texts = [group["schedule"] for group in groups]
    made = {
        text: (parse_schedule(text).over(base) if text else base).factor(num_training_steps, rate)
        for text in dict.fromkeys(texts)
    }
    scheduler.lr_lambdas = factors = [made[text] for text in texts]
    scheduler.base_lrs = [group.setdefault("initial_lr", group["lr"]) for group in groups]
    scheduler._last_lr = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, factors, strict=True)
    ]
    for group, rate_now in zip(groups, scheduler._last_lr, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate_now)
        else:
            group["lr"] = rate_now
