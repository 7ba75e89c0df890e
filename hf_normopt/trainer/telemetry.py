"""Norms by role through `Trainer.log`: to the console, TensorBoard, W&B, trackio, `log_history`.

`register()` adds it to every trainer. It does nothing under other optimizers;
`optim_args="telemetry=false"` or `trainer.remove_callback(NormTelemetry)` turns it off.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ..cards.plot import PICTURE, is_picture, save_run
from ..optim.optimizer import NormOpt
from .arguments import wants_telemetry
from .callback import unwrapped
from .gauge import Gauge

logger = logging.getLogger(__name__)


class NormTelemetry(TrainerCallback):
    """Logs what the step did to each role, in the role's own norm, whenever the loss is logged.

    The keys are `quantity/role`, see `gauge.py`. At the end of training it draws the run as
    `normopt_norms.png` in `output_dir`, if matplotlib is installed.
    """

    def __init__(self) -> None:
        self._optimizer: NormOpt | None = None
        self._gauge = Gauge()
        self._watched = 0  # the last step that was measured
        self._epoch = 0  # steps per epoch

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the optimizer."""
        inner = unwrapped(optimizer)
        self._optimizer = inner if inner is not None and wants_telemetry(args) else None
        if self._optimizer is None:  # leave the data alone: asking for a length may load them
            return
        self._gauge = Gauge()
        try:
            self._epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        except TypeError:  # data without a length: one epoch
            self._epoch = state.max_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the step if it will be logged."""
        step = state.global_step + 1
        if self._optimizer is None:
            return
        if self._is_logged(step, args, state):
            self._gauge.start()
            self._watched, self._optimizer.observer = step, self._gauge.observe
        else:
            self._optimizer.observer = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the norms to the logs, for later callbacks and for `log_history`."""
        if self._optimizer is None or logs is None or self._watched != state.global_step:
            return
        if any(key.startswith("eval_") for key in logs):
            return
        norms = self._gauge.read(self._optimizer)
        logs.update(norms)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(norms)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the run."""
        if self._optimizer is None:
            return
        self._optimizer.observer = None
        measured = [row for row in state.log_history if any("weight_norm" in key for key in row)]
        if len(measured) > 1 and state.is_world_process_zero:
            self._draw(Path(str(args.output_dir)) / PICTURE, state)

    def _draw(self, path: Path, state: TrainerState) -> None:
        """Draw the run; a failure is a warning and never costs the trained model."""
        try:
            if os.path.lexists(path) and not is_picture(path):
                raise FileExistsError("another file has its name, and is left as it is")
            save_run(path, state.log_history)
        except ModuleNotFoundError:
            logger.info("matplotlib is not installed: no %s.", PICTURE)
        except Exception as error:
            logger.warning("There is no picture of the run, %s: %r.", path, error)

    def _is_logged(self, step: int, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether a step is the last one, or one after which `DefaultFlowCallback` logs."""
        if step == state.max_steps or (step == 1 and args.logging_first_step):
            return True
        if args.logging_strategy == IntervalStrategy.STEPS:
            return step % state.logging_steps == 0
        return args.logging_strategy == IntervalStrategy.EPOCH and step % self._epoch == 0
