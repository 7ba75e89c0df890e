"""One run of `hf-normopt find-rate`: a script's own training, shortened, that leaves nothing.

The command says in the environment what the run is to be. The first `Trainer.train` of the process
makes it, writes what came out, and ends the process: what the script does after its training does
not happen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..cards.files import write_whole
from .arguments import optimizer_name
from .callback import innermost
from .telemetry import NormTelemetry

VARIABLE = "HF_NORMOPT_TRIAL"
# Steps of a short run, unless the script's has fewer: the loss of fewer says little.
FEWEST = 20
# What trainers, models and tokenizers have.
_SAVING = ("save", "save_model", "save_pretrained", "save_state", "push_to_hub")
_REPORTERS = "transformers.integrations.integration_utils"


@dataclass(frozen=True)
class Trial:
    """What a run is to be.

    Args:
        outcome: the file that [`Outcome`] goes to, as JSON.
        folder: stands in for the script's `output_dir`.
        factor: of the learning rate.
        steps: the length, in steps if above 1, else as a fraction of the script's own.
        start: the learning rate that `factor` multiplies; None: the script's.
        optim: in place of the script's; "": the script's.
        optim_args: for `optim`.
    """

    outcome: str
    folder: str
    factor: float
    steps: float
    start: float | None = None
    optim: str = ""
    optim_args: str = ""

    def environment(self) -> dict[str, str]:
        """The variable that hands it to the process."""
        return {VARIABLE: json.dumps(dataclasses.asdict(self))}


@dataclass
class Outcome:
    """What came out of a run.

    Attributes:
        rate: the learning rate.
        optimizer: what trained, for people.
        steps: how many the run was to have.
        total: how many the script's own has.
        losses: of each step.
        error: what ended the run early; "": nothing.
    """

    rate: float = 0.0
    optimizer: str = ""
    steps: int = 0
    total: int = 0
    losses: list[float] = field(default_factory=list)
    error: str = ""


def begin_trial() -> None:
    """Make the trainers of this process short, if the environment says so; else do nothing."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    trial = Trial(**json.loads(text))
    made, built = TrainingArguments.__post_init__, Trainer.__init__

    @functools.wraps(made)
    def post_init(self: TrainingArguments) -> None:
        made(self)
        _quiet_inplace(self, trial)  # scripts look into output_dir before they make a trainer

    @functools.wraps(built)
    def init(self: Trainer, model: Any = None, args: Any = None, *more: Any, **named: Any) -> None:
        if args is not None:
            _quiet_inplace(args, trial)  # again: the script may have changed them
        built(self, model, args, *more, **named)

    train = Trainer.train

    @functools.wraps(train)
    def short(self: Trainer, *args: Any, **kwargs: Any) -> None:
        _run(self, functools.partial(train, self), trial)

    TrainingArguments.__post_init__ = post_init  # type: ignore[method-assign]
    Trainer.__init__ = init  # type: ignore[method-assign]
    Trainer.train = short  # type: ignore[assignment]


def _quiet_inplace(args: TrainingArguments, trial: Trial) -> None:
    """Let a training write, save, evaluate and report nothing that anybody keeps."""
    args.output_dir = trial.folder
    args.report_to = []
    args.push_to_hub = False
    args.save_strategy = SaveStrategy.NO
    args.load_best_model_at_end = False
    args.eval_on_start = False
    args.eval_delay = math.inf  # the strategy stays, which callbacks ask for
    args.logging_strategy = IntervalStrategy.STEPS
    args.logging_steps = 1
    args.logging_nan_inf_filter = False


class _Enough(BaseException):
    """The run is over; not to be caught by who catches errors."""


class _Losses(TrainerCallback):
    """Keeps the loss of each step; ends the run after the last, or where one is not finite.

    It stands before the script's own callbacks, which may save what they find at the end of an
    epoch or a training.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the loss."""
        if "loss" in (logs or {}):
            loss = float(logs["loss"])  # type: ignore[index]
            self._outcome.losses.append(loss)
            if not math.isfinite(loss) or len(self._outcome.losses) >= self._outcome.steps:
                raise _Enough

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a run that somebody else has ended."""
        if control.should_training_stop:
            raise _Enough

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run."""
        raise _Enough


def _run(trainer: Any, train: Any, trial: Trial) -> None:
    """Train, write the outcome, and end the process."""
    outcome, args = Outcome(), trainer.args
    _quiet_inplace(args, trial)
    try:
        _take_rate_inplace(trainer, trial, outcome)
        _shorten_inplace(trainer, trial, outcome)
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, NormTelemetry) or type(callback).__module__ == _REPORTERS:
                trainer.remove_callback(callback)
        trainer.callback_handler.callbacks.insert(0, _Losses(outcome))
        _save_nothing_inplace(trainer)
        with contextlib.suppress(_Enough):
            train()
        trainer.accelerator.wait_for_everyone()
    except Exception as error:  # the user's code: a rate may be too large for it
        traceback.print_exc()
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.optimizer = f"{optimizer_name(args)} ({innermost(trainer.optimizer)})"
    if args.process_index == 0:
        write_whole(Path(trial.outcome), json.dumps(dataclasses.asdict(outcome)).encode())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(bool(outcome.error))


def _save_nothing_inplace(trainer: Any) -> None:
    """Let callbacks of the script's own, too, save and push nothing between the steps."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    for owner in map(type, (trainer, trainer.model, trainer.processing_class)):
        for name in _SAVING:
            if hasattr(owner, name):
                setattr(owner, name, nothing)
    torch.save = nothing


def _take_rate_inplace(trainer: Any, trial: Trial, outcome: Outcome) -> None:
    """Multiply the learning rate, wherever the script gives it."""
    args = trainer.args
    if trial.optim:
        args.optim, args.optim_args = OptimizerNames(trial.optim), trial.optim_args or None
    own = float(args.learning_rate)
    given = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if trainer.optimizer is not None:
        own = float(trainer.optimizer.param_groups[0].get("initial_lr", own))
        own = own or float(trainer.optimizer.param_groups[0]["lr"])
    elif given is not None and "lr" in given[1]:
        own = float(given[1]["lr"])
    outcome.rate = (own if trial.start is None else trial.start) * trial.factor
    factor = outcome.rate / own
    args.learning_rate *= factor
    if given is not None and "lr" in given[1]:
        trainer.optimizer_cls_and_kwargs = given[0], {**given[1], "lr": outcome.rate}
    if trainer.optimizer is not None:
        for group in trainer.optimizer.param_groups:
            for key in {"lr", "initial_lr"} & group.keys():
                group[key] = group[key] * factor
    if trainer.lr_scheduler is not None and hasattr(trainer.lr_scheduler, "base_lrs"):
        rates = trainer.lr_scheduler.base_lrs
        trainer.lr_scheduler.base_lrs = [rate * factor for rate in rates]


def _shorten_inplace(trainer: Any, trial: Trial, outcome: Outcome) -> None:
    """Let the training have fewer steps, with the whole of its schedule."""
    count = trainer.set_initial_training_values

    @functools.wraps(count)
    def counted(args: TrainingArguments, *more: Any) -> Any:
        if outcome.total:  # a second try, with smaller batches
            return count(args, *more)
        outcome.total = int(count(args, *more)[-1])
        asked = trial.steps if trial.steps > 1 else math.ceil(trial.steps * outcome.total)
        outcome.steps = min(outcome.total, max(round(asked), FEWEST if trial.steps <= 1 else 2))
        share = outcome.steps / outcome.total
        if args.warmup_steps >= 1:
            args.warmup_steps = max(1, round(args.warmup_steps * share))
        options: Any = args.lr_scheduler_kwargs
        args.lr_scheduler_kwargs = {
            key: max(1, round(value * share))
            if key.startswith("num_") and "steps" in key
            else value
            for key, value in dict(options or {}).items()
        }
        args.max_steps = outcome.steps
        return count(args, *more)

    trainer.set_initial_training_values = counted
