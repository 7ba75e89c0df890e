"""hf_normopt: an operator norm for each tensor, by its role in the network.

"Old Optimizer, New Norm: An Anthology" (Bernstein & Newhouse 2024, arXiv 2409.20325) for Hugging
Face models:

    model ──classify──▶ table of parameters (role, layout, why)
                              │
                       policy: role ──▶ Rule(norm, scale, momentum, ...)
                              │
                 NormOpt: one step() ──▶  W ← W − step_size · scale · lmo(momentum)

Importing the package makes `TrainingArguments(optim="normopt")` known to transformers.
"""

from .cards.model_card import update_model_card
from .norms.layouts import Layout
from .norms.operators import (
    Frobenius,
    MaxColumn,
    MaxEntry,
    MaxRow,
    Norm,
    Spectral,
    TiedTable,
    operator_norm,
)
from .norms.orthogonalize import orthogonalize
from .optim.initialization import init_by_fan_in_inplace
from .optim.optimizer import NormOpt
from .optim.presets import PRESETS, Preset, create_normopt_optimizer
from .optim.rules import EMA, Accumulate, Policy, Rule
from .optim.schedules import create_normopt_scheduler
from .optim.step_sizes import DualNorm, EscapeVelocity, Fixed, LineSearch, Momo, StepSize
from .roles import ParamSpec, classify
from .trainer.arguments import NormOptArguments
from .trainer.finish import finish_run
from .trainer.telemetry import NormTelemetry
from .trainer.trainer import NormOptFactory, NormOptMixin, NormOptTrainer, register
from .version import __version__

__all__ = [
    "EMA",
    "PRESETS",
    "Accumulate",
    "DualNorm",
    "EscapeVelocity",
    "Fixed",
    "Frobenius",
    "Layout",
    "LineSearch",
    "MaxColumn",
    "MaxEntry",
    "MaxRow",
    "Momo",
    "Norm",
    "NormOpt",
    "NormOptArguments",
    "NormOptFactory",
    "NormOptMixin",
    "NormOptTrainer",
    "NormTelemetry",
    "ParamSpec",
    "Policy",
    "Preset",
    "Rule",
    "Spectral",
    "StepSize",
    "TiedTable",
    "__version__",
    "classify",
    "create_normopt_optimizer",
    "create_normopt_scheduler",
    "finish_run",
    "init_by_fan_in_inplace",
    "operator_norm",
    "orthogonalize",
    "register",
    "update_model_card",
]

register()
