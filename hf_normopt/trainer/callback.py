"""The callback that serves NormOpt in a plain `Trainer`: schedules by role, checks and reports.

`register()` adds it to every trainer. It does nothing under other optimizers, except to warn if one
trains in place of NormOpt.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..cards.plot import PICTURE, is_picture
from ..cards.report import FILE_NAME, json_object, report, write_report
from ..cards.run_record import RUN_FILE
from ..optim.checkpoints import some
from ..optim.optimizer import NormOpt
from ..optim.presets import optimizer_names
from ..optim.schedules import attach_inplace
from ..optim.sharding import deepspeed_config
from ..optim.situation import remember
from ..optim.step_sizes import DualNorm, Momo
from .arguments import optimizer_name, run_schedule, trainer_schedule
from .bystanders import Bystanders

logger = logging.getLogger(__name__)


def unwrapped(optimizer: Any) -> NormOpt | None:
    """The NormOpt inside accelerate's wrapper; None if it is another optimizer."""
    return next((layer for layer in _layers(optimizer) if isinstance(layer, NormOpt)), None)


def innermost(optimizer: Any) -> str:
    """The class name of the optimizer inside all wrappers."""
    return type(_layers(optimizer)[-1]).__name__


def _layers(optimizer: Any) -> list[Any]:
    """An optimizer and those it wraps, outermost first; copes with wrappers that raise or loop."""
    layers = [optimizer]
    while len(layers) < 10:
        try:
            inner = layers[-1].optimizer
        except Exception:
            break
        if inner is None or any(inner is layer for layer in layers):
            break
        layers.append(inner)
    return layers


class NormOptCallback(TrainerCallback):
    """Attaches schedules, checks resumed runs, warns of surprises and writes `normopt.json`."""

    def __init__(self) -> None:
        self._optimizer: NormOpt | None = None
        self._bystanders: Bystanders | None = None
        self._schedule = ""
        self._has_warned = False  # about a report that could not be written
        # The run's learning rate at a step, if the first group has a schedule of its own.
        self._curve: Callable[[int], float] | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn if DeepSpeed will make its own optimizer."""
        if optimizer_name(args) in optimizer_names():
            warn_of_deepspeed(args)
        if isinstance(model := kwargs.get("model"), nn.Module):
            remember(model)  # FSDP puts other parameters in its place before the optimizer is made
        self._watch_bystanders(**kwargs)  # the user may have passed an optimizer

    def _watch_bystanders(self, optimizer: Any = None, model: Any = None, **kwargs: Any) -> None:
        """Note which parameters a new optimizer leaves out."""
        inner = unwrapped(optimizer)
        # DeepSpeed replaces parameters by copies.
        if inner is None or model is None or deepspeed_config():
            self._bystanders = None
        elif self._bystanders is None or self._bystanders.optimizer is not inner:
            self._bystanders = Bystanders(inner, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check a resumed run, and attach the schedules."""
        self._optimizer = inner = unwrapped(optimizer)
        self._has_warned = False
        self._curve = None
        if inner is None:
            name = optimizer_name(args)
            if name in optimizer_names():
                _warn(
                    args,
                    "optim=%r was asked for, but the trainer trains with %s.",
                    name,
                    innermost(optimizer),
                )
            return
        rate = float(inner.defaults["lr"])
        own = _is_trainers_own(lr_scheduler, optimizer, args, state.max_steps, rate)
        check_progress(inner, lr_scheduler if own else None, state.global_step, args)
        if own:
            schedule = run_schedule(args, inner)
            attach_inplace(lr_scheduler, inner, schedule, state.max_steps)
            self._schedule = str(schedule)
            first = inner.param_groups[0]
            if first["schedule"]:
                factor = schedule.factor(state.max_steps, rate)
                self._curve = lambda step: first["initial_lr"] * factor(step)
        else:
            # inside the wrapper of DeepSpeed or accelerate
            self._schedule = type(getattr(lr_scheduler, "scheduler", lr_scheduler)).__name__
            _warn_of_schedules_without_effect(inner, self._schedule, args)
        _warn_of_surprises(inner, state, args)
        self._watch_bystanders(optimizer, **kwargs)
        if self._bystanders is not None:
            self._bystanders.begin(optimizer, kwargs["model"])

    def _look_around(self, args: TrainingArguments, model: Any = None, **kwargs: Any) -> None:
        if self._bystanders is not None and model is not None:
            _warn_of_bystanders(self._bystanders.added(model), args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the loss of a step that the gradient scaler skipped."""
        if self._optimizer is not None:
            self._optimizer.note_loss(None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of parameters whose gradients no optimizer uses."""
        if self._bystanders is not None:
            _warn_of_bystanders(self._bystanders.with_gradient(), args)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of parameters that were added."""
        self._look_around(args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the run's learning rate; the Trainer logs that of the first group."""
        if self._optimizer is not None:
            self._optimizer.warn_of_gradients()
        self._look_around(args, **kwargs)
        added: dict[str, float] = {}
        if self._curve is not None and logs is not None and "learning_rate" in logs:
            added["learning_rate"] = self._curve(max(0, lr_scheduler.last_epoch - 1))
        if self._optimizer is not None and self._optimizer.guard and "loss" in (logs or {}):
            added["loss_spikes"] = len(self._optimizer.spikes)
        for row in (logs, *state.log_history[-1:]) if added and logs is not None else ():
            row.update(added)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count steps as the trainer does, including those that the gradient scaler skipped."""
        if self._optimizer is not None:
            self._optimizer.steps = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report beside the checkpoint."""
        self._look_around(args, **kwargs)
        self.write(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the report beside the model, and tag the model with `hf-normopt`."""
        model: Any = kwargs.get("model")
        if self._optimizer is not None and hasattr(model, "add_model_tags"):
            model.add_model_tags("hf-normopt")
        self._look_around(args, **kwargs)
        if self._bystanders is not None:
            self._bystanders.end()
        self._forget_earlier_runs(Path(str(args.output_dir)), state)
        self.write(Path(str(args.output_dir)), state)

    def _forget_earlier_runs(self, folder: Path, state: TrainerState) -> None:
        """Delete this package's record and picture of an earlier run in the folder."""
        if self._optimizer is None or not state.is_world_process_zero:
            return
        with contextlib.suppress(OSError):
            if "run_version" in json_object(folder / RUN_FILE):
                (folder / RUN_FILE).unlink()
            if is_picture(folder / PICTURE):
                (folder / PICTURE).unlink()

    def write(self, folder: Path, state: TrainerState) -> None:
        """Write the report if NormOpt trains; a failure is a warning."""
        if self._optimizer is None or not state.is_world_process_zero:
            return
        try:
            if not folder.is_dir():
                return
            now = report(self._optimizer, self._schedule, state.log_history, state.max_steps)
            write_report(folder, now)
        except Exception as error:  # whatever it is, it must not cost a trained model
            if not self._has_warned:
                logger.warning("%s could not be written: %r.", folder / FILE_NAME, error)
            self._has_warned = True


def check_progress(
    optimizer: NormOpt, scheduler: LambdaLR | None, global_step: int, args: TrainingArguments
) -> None:
    """Check that optimizer and scheduler are at the step at which training resumes.

    The Trainer resumes silently from a checkpoint without `optimizer.pt` or `scheduler.pt`.

    Args:
        optimizer: the optimizer, loaded.
        scheduler: the trainer's scheduler; None if it is the user's.
        global_step: the step at which training resumes.
        args: the training arguments.

    Raises:
        ValueError: if they are not, unless `on_mismatch="reset"`.
    """
    if global_step == 0:
        # A second train(), or the next try of auto_find_batch_size, keeps the state while the
        # trainer counts from 0; later checkpoints must agree with that count.
        optimizer.steps = 0
        return
    steps = optimizer.steps
    of_scheduler = global_step if scheduler is None else scheduler.last_epoch
    if args.fp16:  # the gradient scaler skips steps of the schedule
        of_scheduler = global_step if 0 < of_scheduler < global_step else of_scheduler
    if not optimizer.complaints and steps == of_scheduler == global_step:
        return
    what = "; ".join(optimizer.complaints) or _disagreement(steps, of_scheduler)
    if optimizer.on_mismatch != "reset":
        raise ValueError(
            f"Training goes on at step {global_step}, but {what}. Resume from a complete "
            'checkpoint, or continue with on_mismatch="reset" (optim_args, NormOptArguments, '
            "create_normopt_optimizer)."
        )
    if not optimizer.complaints:
        _warn(args, 'Training goes on at step %d, but %s (on_mismatch="reset").', global_step, what)
    optimizer.resets.append(f"at step {global_step}: {what}")
    optimizer.complaints = []
    optimizer.steps = global_step
    if scheduler is not None:
        scheduler.last_epoch = global_step


def _disagreement(steps: int, of_scheduler: int) -> str:
    """Why optimizer and scheduler are not at the step of the Trainer's state."""
    if steps == 0:
        return (
            "the optimizer has no state: optimizer.pt or scheduler.pt is missing "
            "(save_only_model=True writes none)"
        )
    return (
        f"the optimizer has made {steps} steps and the scheduler {of_scheduler}: optimizer.pt, "
        "scheduler.pt and trainer_state.json are not of one checkpoint"
    )


def _is_trainers_own(
    scheduler: Any, optimizer: Any, args: TrainingArguments, num_training_steps: int, rate: float
) -> bool:
    """Whether a scheduler comes from the training arguments and not from the user."""
    if not isinstance(scheduler, LambdaLR) or scheduler.optimizer is not optimizer:
        return False
    factor = scheduler.lr_lambdas[0]
    if factor.__module__ == attach_inplace.__module__:
        return True
    try:
        asked = trainer_schedule(args)
    except ValueError:  # the options are for the user's own scheduler
        return False
    return asked.is_shape_of(factor, num_training_steps, rate)


def warn_of_deepspeed(args: TrainingArguments) -> None:
    """Warn if a DeepSpeed config has an optimizer, which the Trainer uses instead of NormOpt."""
    config: Any = deepspeed_config() or args.deepspeed
    if isinstance(config, str) and config.endswith(".json") and Path(config).is_file():
        config = json.loads(Path(config).read_text())
    if isinstance(config, dict) and "optimizer" in config:
        _warn(
            args,
            "The DeepSpeed config has the section optimizer (%s): DeepSpeed makes that one, and "
            "NormOpt is not used. Remove the section to train with NormOpt.",
            config["optimizer"].get("type"),
        )


def _warn_of_bystanders(names: list[str], args: TrainingArguments) -> None:
    if names:
        _warn(
            args,
            "Not trained: %s. The optimizer was made before they required grad, or before they "
            "were there (unfrozen, added or replaced), and holds none of them; no optimizer of "
            "Trainer would. Let all that is to train require grad when train() begins, and freeze "
            "until its time, in on_train_begin, what starts later; for another train(), as of "
            "another adapter, make a new Trainer.",
            some(set(names)),
        )


def _warn_of_surprises(optimizer: NormOpt, state: TrainerState, args: TrainingArguments) -> None:
    if state.global_step > 0 and optimizer.origin:
        _warn_of_saved_options(optimizer, args)
    size = optimizer.step_size
    if isinstance(size, (DualNorm, Momo)) and args.max_grad_norm:
        _warn(
            args,
            "max_grad_norm=%g changes the step size: %s asks for the size of the gradient, which "
            "is clipped before. max_grad_norm=0 leaves it alone.",
            args.max_grad_norm,
            type(size).__name__,
        )
    kind = AcceleratorState().distributed_type if AcceleratorState._shared_state else None
    if args.fsdp and kind is not DistributedType.FSDP:
        _warn(
            args,
            "fsdp=%s was asked for, but accelerate trains with %s: on CPUs it has no FSDP, and "
            "nothing is sharded.",
            args.fsdp,
            getattr(kind, "value", kind),
        )


def _warn_of_schedules_without_effect(
    optimizer: NormOpt, scheduler: str, args: TrainingArguments
) -> None:
    """Warn if roles have schedules but the scheduler is the user's."""
    wishes = {group["schedule"] for group in optimizer.param_groups} - {""}
    if wishes:
        _warn(
            args,
            "The schedule %s has no effect: the trainer's scheduler is a %s of its own.",
            ", ".join(sorted(wishes)),
            scheduler,
        )


def _warn_of_saved_options(optimizer: NormOpt, args: TrainingArguments) -> None:
    """Warn of rates and decays from the checkpoint that differ from the training arguments."""
    rate, decay = (float(optimizer.defaults[name]) for name in ("lr", "weight_decay"))
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        rule = optimizer.rule_of(group)
        if "lr" not in group["own"]:
            rates[group["label"]] = float(group.get("initial_lr", rate)), rate
        if "weight_decay" not in group["own"]:
            decays[group["label"]] = float(group["weight_decay"]), decay * rule.decay
    for name, asked, found in (("learning_rate", rate, rates), ("weight_decay", decay, decays)):
        others = {label: saved for label, (saved, own) in found.items() if saved != own}
        if others:
            values = ", ".join(f"{value:g}" for value in dict.fromkeys(others.values()))
            _warn(
                args,
                "%s=%g has no effect: the checkpoint's %s goes on for %s, as with every optimizer "
                "of Trainer. A new one needs a new run from the model's weights.",
                name,
                asked,
                values,
                ", ".join(others),
            )


def _warn(args: TrainingArguments, message: str, *values: Any) -> None:
    if args.process_index == 0:
        logger.warning(message, *values)
