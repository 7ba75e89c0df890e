"""`hf-normopt coord-check`: does a learning rate keep its meaning when a model becomes wider?

Two causes are told apart. Outputs that depend on width before any step come of the initialisation;
what a parameter's own step does to its outputs comes of the optimizer.
"""

from __future__ import annotations

import argparse
import json
import sys

from ..cards.files import check_picture
from ..optim.presets import PRESETS, optimizer_names
from ..trainer.arguments import parse_optim_args
from .coordinates import Measurement
from .curves import SUFFIXES, save_curves
from .slopes import Run, results
from .trials import Choice, Trial
from .verdicts import as_text
from .widths import family


def add_coord_check_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coord-check`."""
    parser.add_argument(
        "model", help="as for inspect; or a class of transformers, for its default config"
    )
    parser.add_argument("--widths", type=int, nargs="+", help="hidden sizes to compare")
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[2], help="layers; several are compared (2)"
    )
    parser.add_argument("--preset", choices=list(PRESETS), help="the same as --optim normopt_NAME")
    parser.add_argument("--optim", default="normopt", help="as in TrainingArguments (normopt)")
    parser.add_argument("--optim_args", default="", metavar="KEY=VALUE,...", help="its options")
    parser.add_argument("--rate", type=float, help="once and four times; the preset's middle")
    parser.add_argument("--steps", type=int, default=3, help="on one batch (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", action="store_true", help="begin with a deviation of 1/sqrt(fan_in)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", metavar="FILE", help="draw the activations over width")
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")


def coord_check(args: argparse.Namespace) -> int:
    """Train a few steps at each width, and print what depends on it."""
    if args.picture:
        check_picture(args.picture, SUFFIXES)
    if args.steps < 1 or min(args.depths) < 1:
        raise ValueError("--steps and --depths are numbers from 1.")
    models = family(args.model, trust_remote_code=args.trust_remote_code)
    widths, depths = sorted(set(args.widths or models.widths())), sorted(set(args.depths))
    if len(widths) < 2:
        raise ValueError(f"--widths takes two or more to compare, found {widths}.")
    choice = Choice(_name(args), parse_optim_args(args.optim_args))
    trial = Trial(models, choice, args.steps, args.seed, args.init)
    rate = args.rate or choice.rate
    runs = [
        Run(width, depth, lr, _measured(trial, width, depth, lr))
        for lr in (rate, 4 * rate)
        for width, depth in [(w, depths[0]) for w in widths] + [(widths[0], d) for d in depths[1:]]
    ]
    report = {
        "format_version": 1,
        "model": args.model,
        "class": models.model_class.__name__,
        "optimizer": choice.name,
        "optim_args": args.optim_args,
        "initialisation": "fan_in" if args.init else "own",
        "steps": args.steps,
        "seed": args.seed,
        **results(runs),
    }
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    if args.picture:
        save_curves(args.picture, f"{report['class']}, {choice.name}", runs)
    return 0


def _name(args: argparse.Namespace) -> str:
    if not args.preset:
        return args.optim
    return next(name for name, preset in optimizer_names().items() if preset == args.preset)


def _measured(trial: Trial, width: int, depth: int, rate: float) -> Measurement:
    found = trial.run(width, depth, rate)
    losses = " ".join(f"{loss:.4g}" for loss in found.losses)
    print(f"width {width}, depth {depth}, rate {rate:g}: loss {losses}", file=sys.stderr)
    return found
