"""Run a script with optimizers that `TrainingArguments` do not have, and record how it goes.

`launch(script, argv, file)` runs the script as `python SCRIPT ARGV` does, except that `optim` may
be `arena_muon` or `arena_prodigy`, with options in `optim_args`. Whatever the trainer logs goes
into the file, with the wall and processor seconds of training up to then, evaluations left out.
"""

import json
import runpy
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
import transformers
from prodigyopt import Prodigy
from torch.optim import AdamW, Muon
from transformers import TrainerCallback
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.training_args import OptimizerNames

import hf_normopt
from hf_normopt.trainer.arguments import parse_optim_args
from hf_normopt.trainer.trainer import _add_member


class MuonAndAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the hidden matrices, fused AdamW at a rate of its own for the rest.

    Args:
        model: whose linear layers Muon takes, as `hf_normopt.classify` finds them.
        lr: of Muon, whose updates have the RMS of AdamW's.
        weight_decay: of both; biases and gains have none.
        aux: AdamW's rate over Muon's.
        beta2: AdamW's.
    """

    def __init__(self, model, lr, weight_decay, aux=1.0, beta2=0.999):
        roles = {spec.name: spec.role for spec in hf_normopt.classify(model)}
        params = {name: p for name, p in model.named_parameters() if name in roles}
        hidden = {n: p for n, p in params.items() if roles[n] == "linear" and p.ndim == 2}
        rest = [p for name, p in params.items() if name not in hidden]
        by_decay = {decay: [p for p in rest if (p.ndim > 1) == bool(decay)] for decay in (1, 0)}
        groups = [
            {"params": part, "weight_decay": weight_decay * decay}
            for decay, part in by_decay.items()
            if part
        ]
        self.parts = [AdamW(groups, lr=lr * aux, betas=(0.9, beta2), fused=True)]
        if hidden:
            options = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.insert(0, Muon(list(hidden.values()), **options))
        super().__init__([dict(group) for group in self._groups()], {})

    def _groups(self):
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for mine, theirs in zip(self.param_groups, self._groups(), strict=True):
            theirs["lr"] = mine["lr"]
        on_cpu = self.param_groups[0]["params"][0].is_cpu
        # CPUs without bfloat16 units would do its iteration 40 to 100 times slower.
        with (
            patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone) if on_cpu else nullcontext()
        ):
            for part in self.parts:
                part.step()


def _muon(context):
    options = {
        key: float(value) for key, value in parse_optim_args(context.args.optim_args).items()
    }
    model = context.model

    class OfModel(MuonAndAdamW):
        """A class, as the trainer expects, which is given groups and takes the model."""

        def __init__(self, params, **settings):
            super().__init__(model, **settings)

    settings = {"lr": context.args.learning_rate, "weight_decay": context.args.weight_decay}
    return OfModel, {**settings, **options}


def _prodigy(context):
    """With what its README advises for a decaying schedule with warm-up."""
    options = {
        key: float(value) for key, value in parse_optim_args(context.args.optim_args).items()
    }
    usual = {"use_bias_correction": True, "safeguard_warmup": True}
    settings = {"lr": context.args.learning_rate, "weight_decay": context.args.weight_decay}
    return Prodigy, {**usual, **settings, **options}


HANDLERS = {"arena_muon": _muon, "arena_prodigy": _prodigy}


class Recorder(TrainerCallback):
    """Notes what is logged, and when."""

    rows: ClassVar[list] = []  # of all trainers of a run

    def __init__(self):
        self.wall = self.cpu = 0.0
        self._since = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = self._since or (time.perf_counter(), time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        self._stop()
        control.should_log |= state.global_step == state.max_steps

    def _stop(self):
        if self._since is not None:
            wall, cpu = self._since
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu
        self._since = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        times = {"step": state.global_step, "seconds": self.wall, "cpu_seconds": self.cpu}
        self.rows.append({**times, **numbers})


def launch(script, argv, file):
    """Run a script as its own program, and write what it logged.

    Args:
        script: the path of a script that makes a `Trainer`.
        argv: what follows its name on the command line.
        file: gets the rows as JSON, at the end.
    """
    for name, handler in HANDLERS.items():
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
        _OPTIMIZER_HANDLERS[OptimizerNames(name)] = handler
    transformers.trainer.DEFAULT_CALLBACKS.append(Recorder)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:  # recipes end with sys.exit(main())
        if end.code:
            raise
    Path(file).write_text(json.dumps(Recorder.rows))
