"""NormOpt in `Trainer`: a mixin, and a registration of `optim="normopt"` for any trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from .arguments import optimizer_from_arguments, optimizer_name
from .optimizer import NormOpt
from .presets import optimizer_names


class NormOptMixin:
    """Makes a trainer train with NormOpt: `class MyTrainer(NormOptMixin, Seq2SeqTrainer): ...`.

    It builds NormOpt when `args.optim` is one of its names, or is left at the default of
    `TrainingArguments`; another optimizer that was asked for is the trainer's own business.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer unless there is one, see `Trainer.create_optimizer`."""
        if self.optimizer is None and _asks_for_normopt(self.args):
            self.optimizer = optimizer_from_arguments(
                self.model if model is None else model, self.args
            )
        arguments = () if model is None else (model,)  # transformers 5.2 takes none
        return super().create_optimizer(*arguments)  # type: ignore[misc]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make the scheduler unless there is one, see `Trainer.create_scheduler`.

        Every `lr_scheduler_type` keeps its meaning. `lr_scheduler_kwargs={"decay_ratio": 0.2}`
        gives the decay of `warmup_stable_decay` as a fraction of the run, where transformers asks
        for `num_decay_steps`.
        """
        kwargs = dict(self.args.lr_scheduler_kwargs or {})
        if self.lr_scheduler is None and "decay_ratio" in kwargs:
            ratio = float(kwargs.pop("decay_ratio"))
            warmup = self.args.get_warmup_steps(num_training_steps)
            if self.args.lr_scheduler_type != "warmup_stable_decay":
                raise ValueError(
                    "decay_ratio belongs to lr_scheduler_type='warmup_stable_decay', found "
                    f"{str(self.args.lr_scheduler_type.value)!r}."
                )
            if not 0 <= ratio <= 1 - warmup / max(1, num_training_steps):
                raise ValueError(
                    "decay_ratio is a fraction of the run, in [0, 1] together with the warm-up; "
                    f"found {ratio} and {warmup} of {num_training_steps} steps."
                )
            self.lr_scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=warmup,
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs={
                    "num_decay_steps": round(ratio * num_training_steps),
                    **kwargs,
                },
            )
            self._created_lr_scheduler = True  # or a second train() keeps the exhausted schedule
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]


class NormOptTrainer(NormOptMixin, Trainer):
    """`transformers.Trainer` with NormOpt."""


def register() -> None:
    """Make `TrainingArguments(optim="normopt")` known to transformers; runs on `import hf_normopt`.

    It adds names and takes none away, and does nothing the second time. Each preset is a name of
    its own, such as `normopt_muon`.

    Raises:
        ImportError: if transformers has no registry of optimizers.
    """
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    except ImportError:
        raise ImportError(
            "hf_normopt needs transformers >= 5.2, whose registry makes an optimizer known by "
            "name. Update transformers."
        ) from None
    for name in optimizer_names():
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
        _OPTIMIZER_HANDLERS.setdefault(OptimizerNames(name), _handler)


def _handler(context: Any) -> tuple[Callable[[], Callable[..., NormOpt]], dict[str, Any]]:
    """What transformers gets: it calls what this returns as `factory()(model, **kwargs)`."""
    return (lambda: optimizer_from_arguments), {"args": context.args}


def _add_member(enum: Any, value: str) -> None:
    """One more member of a string enum, as if it stood in its class body."""
    name = value.upper()
    member = str.__new__(enum, value)
    member._name_, member._value_ = name, value
    member.__objclass__, member._sort_order_ = enum, len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    if hasattr(enum, "_hashable_values_"):  # Python 3.12 and later
        enum._hashable_values_.append(value)
    type.__setattr__(enum, name, member)


def _asks_for_normopt(args: TrainingArguments) -> bool:
    name = optimizer_name(args)
    default = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "optim")
    return name in optimizer_names() or name == str(getattr(default, "value", default))
