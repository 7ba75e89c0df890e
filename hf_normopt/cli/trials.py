"""One optimizer on one architecture at several widths: `Choice` and `run_trial`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from ..optim.initialization import init_by_fan_in_inplace
from ..optim.presets import PRESETS, create_normopt_optimizer, optimizer_names
from ..roles import classify
from ..trainer.arguments import parse_roles
from .coordinates import Measurement, example_batch, measure
from .widths import Family

_NORMS = PRESETS["modular"].policy  # measure a step by role, whatever made it
_OTHERS = PRESETS["adam"].learning_rate


@dataclass(frozen=True)
class Choice:
    """An optimizer by its name in `TrainingArguments`, with its `optim_args`."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def overrides(self) -> dict[str, str] | None:
        """Roles by regular expression, if the options have any."""
        return parse_roles(self.options.get("roles", "")) or None

    @property
    def rate(self) -> float:
        """The middle of the range that its preset recommends."""
        preset = optimizer_names().get(self.name)
        low, high = PRESETS[preset].learning_rate if preset else _OTHERS
        return float(f"{math.sqrt(low * high):.1g}")

    def make(self, model: nn.Module, lr: float, inputs: Any) -> torch.optim.Optimizer:
        """The optimizer of a model, without weight decay.

        Raises:
            ValueError: for a name that transformers does not know, or options it cannot read.
        """
        preset = optimizer_names().get(self.name)
        if preset is not None:
            options: dict[str, Any] = {"preset": preset, **self.options}
            options.pop("roles", None)
            return create_normopt_optimizer(
                model, lr=lr, overrides=self.overrides, inputs=inputs, **options
            )
        trained: Any = model
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, optim=self.name, learning_rate=lr, report_to="none", use_cpu=True
            )
            args.optim_args = ",".join(f"{k}={v}" for k, v in self.options.items()) or None
            optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, trained)
        return optimizer_class(model.parameters(), **options, weight_decay=0.0)


@dataclass(frozen=True)
class Trial:
    """What is the same for all widths.

    Args:
        family: the architecture.
        choice: the optimizer.
        steps: how many.
        seed: of weights and batch.
        fan_in: whether linear maps begin with a standard deviation of 1/√fan_in.
    """

    family: Family
    choice: Choice
    steps: int = 3
    seed: int = 0
    fan_in: bool = False

    def run(self, width: int, depth: int, rate: float) -> Measurement:
        """Train the architecture at one width, depth and rate, and measure it."""
        model = self.family.build(width, depth, self.seed).eval()  # no dropout
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()  # as it normalizes when it is trained
        batch, loss = example_batch(model, self.seed)
        specs = classify(model, self.choice.overrides, inputs=batch)
        if self.fan_in:
            init_by_fan_in_inplace(model, self.choice.overrides, inputs=batch)
        optimizer = self.choice.make(model, rate, batch)
        return measure(model, loss, optimizer, specs, _NORMS, self.steps)
