"""NormOpt in `Trainer`: a mixin, and a registration of `optim="normopt"` for any trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ..cards.model_card import say_optimizer, update_model_card
from ..cards.report import has_report
from ..optim.optimizer import NormOpt
from ..optim.presets import create_normopt_optimizer, optimizer_names
from ..optim.schedules import BY_METRIC, attach_inplace
from .arguments import optimizer_name, run_schedule, scheduler_name
from .batch import example_batch, making_optimizer_of
from .callback import NormOptCallback, innermost, unwrapped, warn_of_deepspeed
from .door import optimizer_class, warn_of_decay_names
from .telemetry import NormTelemetry
from .trial import begin_trial

logger = logging.getLogger(__name__)


class NormOptMixin:
    """Makes a trainer train with NormOpt: `class MyTrainer(NormOptMixin, Seq2SeqTrainer): ...`.

    It builds NormOpt when `args.optim` is one of its names, or is left at the default of
    `TrainingArguments`; another optimizer that was asked for is the trainer's own business. The
    default's name, written out, cannot be told from the default: a warning says what trains.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    callback_handler: Any
    is_world_process_zero: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if _asks_for_normopt(self.args) and optimizer_name(self.args) not in optimizer_names():
            warn_of_deepspeed(self.args)  # else the callback has done it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer unless there is one, see `Trainer.create_optimizer`."""
        arguments = () if model is None else (model,)  # transformers 5.2 takes none
        chosen = getattr(self, "optimizer_cls_and_kwargs", None) or self.optimizer
        if chosen is not None or not _asks_for_normopt(self.args):
            return super().create_optimizer(*arguments)  # type: ignore[misc]
        _say_what_trains(self.args)
        with _named_normopt(self.args), making_optimizer_of(self):
            super().create_optimizer(*arguments)  # type: ignore[misc]
            if unwrapped(self.optimizer) is None:  # a trainer that asks for no class
                self.optimizer = None
                Trainer.create_optimizer(self, *arguments)  # type: ignore[arg-type]
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Make the scheduler unless there is one, see `Trainer.create_scheduler`.

        Every `lr_scheduler_type` keeps its meaning; roles and presets may have schedules of their
        own, see `hf_normopt/optim/schedules.py`.
        """
        optimizer = optimizer or self.optimizer
        by_step, inner = scheduler_name(self.args) not in BY_METRIC, unwrapped(optimizer)
        if self.lr_scheduler is None and by_step and inner is not None:
            self.lr_scheduler = LambdaLR(optimizer, lambda step: 1.0)
            schedule = run_schedule(self.args, inner)
            attach_inplace(self.lr_scheduler, inner, schedule, num_training_steps)
            self._created_lr_scheduler = True  # or a second train() keeps the exhausted schedule
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the trainer's card, and in it what NormOpt did, see [`update_model_card`]."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        _complete_card(self, _asks_for_normopt(self.args))


class NormOptTrainer(NormOptMixin, Trainer):
    """`transformers.Trainer` with NormOpt."""


class NormOptFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(NormOptFactory, {"lr": 1e-3, "preset": "muon"}))`.

    The keyword arguments are those of [`create_normopt_optimizer`], which the trainer's arguments
    do not change.
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> NormOpt:
        """Make the optimizer for a model."""
        return create_normopt_optimizer(model, **{"inputs": example_batch(), **kwargs})


def register() -> None:
    """Make `TrainingArguments(optim="normopt")` known to transformers; runs on `import hf_normopt`.

    It adds names and takes none away, and does nothing the second time. Each preset is a name of
    its own, such as `normopt_muon`. Every trainer gets [`NormOptCallback`] and [`NormTelemetry`],
    which do nothing for other optimizers; `Trainer.create_model_card` adds what NormOpt did, and
    `Trainer.create_optimizer` lends a batch to find the roles with, and says what does not reach a
    [`NormOptFactory`]; `Trainer.training_step` tells the optimizer the loss, if it wants it.

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
    _make_cards_true()
    _watch_factories()
    _watch_losses()
    callbacks: list[Any] = transformers.trainer.DEFAULT_CALLBACKS
    callbacks += [c for c in (NormOptCallback, NormTelemetry) if c not in callbacks]
    begin_trial()


def _make_cards_true() -> None:
    """Let the cards of a plain Trainer say what NormOpt did, since no callback can."""
    original = Trainer.create_model_card
    if getattr(original, "says_normopt", False):
        return

    @functools.wraps(original)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not isinstance(self, NormOptMixin):  # which does it itself, over TRL's cards too
            _complete_card(self, optimizer_name(self.args) in optimizer_names())

    create_model_card.says_normopt = True  # type: ignore[attr-defined]
    Trainer.create_model_card = create_model_card  # type: ignore[method-assign]


def _watch_factories() -> None:
    """Let a Trainer lend a batch, and say what does not reach a factory."""
    original = Trainer.create_optimizer
    if getattr(original, "watches_normopt", False):
        return

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        chosen, *_ = getattr(self, "optimizer_cls_and_kwargs", None) or (None,)
        if chosen is NormOptFactory and self.optimizer is None and self.args.process_index == 0:
            model = (*args, *kwargs.values(), None)[0]
            warn_of_decay_names(self, self.model if model is None else model)
        with making_optimizer_of(self):
            return original(self, *args, **kwargs)

    create_optimizer.watches_normopt = True  # type: ignore[attr-defined]
    Trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]


def _watch_losses() -> None:
    """Let a Trainer tell NormOpt the loss of each micro-batch."""
    original = Trainer.training_step
    if getattr(original, "watches_normopt", False):
        return

    @functools.wraps(original)
    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        inner = unwrapped(self.optimizer)
        if inner is not None:
            inner.note_loss(loss)
        return loss

    training_step.watches_normopt = True  # type: ignore[attr-defined]
    Trainer.training_step = training_step  # type: ignore[method-assign]


def _complete_card(trainer: Any, asked: bool) -> None:
    """Write into a trainer's card what NormOpt did.

    Args:
        trainer: whose card has just been written.
        asked: whether NormOpt was asked for.
    """
    if not trainer.is_world_process_zero():
        return
    try:
        _write_card(trainer, asked)
    except Exception as error:  # whatever it is, it must not cost a trained model
        logger.warning("The model card does not say what NormOpt did: %r.", error)


def _write_card(trainer: Any, asked: bool) -> None:
    is_ours = unwrapped(trainer.optimizer) is not None
    folder = Path(trainer.args.output_dir)
    if getattr(trainer, "has_normopt_run", False):
        update_model_card(folder)
        return
    if not (asked or is_ours):
        return
    if trainer.optimizer is not None and not is_ours:
        say_optimizer(folder, innermost(trainer.optimizer))  # DeepSpeed made it, or the user
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, NormOptCallback):
            callback.write(folder, trainer.state)  # TRL makes a card with each checkpoint
    if has_report(folder):
        update_model_card(folder)
    else:
        say_optimizer(folder, "NormOpt, which has not trained this model yet")


def _handler(context: Any) -> tuple[type[NormOpt], dict[str, Any]]:
    """What transformers gets: it calls the class with groups of the model's parameters."""
    return optimizer_class(context.args, context.model), {"lr": context.args.learning_rate}


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
    # A pickle names this module, so that a spawned process, which imported nothing, knows the name.
    member.__reduce_ex__ = lambda protocol: (_known_name, (value,))


def _known_name(value: str) -> OptimizerNames:
    return OptimizerNames(value)


@contextlib.contextmanager
def _named_normopt(args: TrainingArguments) -> Iterator[None]:
    """Let arguments say `optim="normopt"` for as long as the optimizer is made."""
    asked = args.optim
    if optimizer_name(args) not in optimizer_names():
        args.optim = OptimizerNames("normopt")
    try:
        yield
    finally:
        args.optim = asked


def _say_what_trains(args: TrainingArguments) -> None:
    name = optimizer_name(args)
    if name not in optimizer_names() and args.process_index == 0:
        logger.warning(
            "NormOpt trains, and not %s: optim=%r is what TrainingArguments have by default, also "
            'where it is written out. optim="normopt" says so; for %s take a Trainer that is not '
            "NormOpt's.",
            name,
            name,
            name,
        )


def _asks_for_normopt(args: TrainingArguments) -> bool:
    name = optimizer_name(args)
    default = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "optim")
    return name in optimizer_names() or name == str(getattr(default, "value", default))
