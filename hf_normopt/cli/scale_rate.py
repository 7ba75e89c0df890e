"""`hf-normopt scale-rate`: a rate that was found on a small model, for a larger one of its kind.

The step of a rule has a size in the norm of its role, and a rate holds where this size does not
depend on width. Where it does, the rate is divided by what it grew. The worst step is one of rank
1, whose entries have one magnitude: c · ones, of which every norm is known,

    size = scale · ‖ones‖ in the role's norm / ‖ones‖ in the rule's norm.

For a rule that has its role's norm the size is the scale. Adam's entries have the size of the rate,
so a matrix gets fan_in of it, and `normopt` with its scale `adamw` √max(in, out) · √(in / out).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from ..norms.operators import MaxColumn, MaxEntry, MaxRow, Norm
from ..optim.groups import kind_of
from ..optim.presets import PRESETS, changed
from ..optim.rules import SCALES, Policy
from ..roles import KINDS, ROLES, ParamSpec, classify
from ..roles.skeletons import skeleton
from ..tables import format_table
from ..trainer.arguments import parse_optim_args, parse_roles

_NORMS = PRESETS["modular"].policy


def add_scale_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `scale-rate`."""
    parser.add_argument(
        "--from", dest="small", required=True, metavar="SMALL", help="as for inspect"
    )
    parser.add_argument("--to", dest="large", required=True, metavar="LARGE")
    parser.add_argument("--rate", type=float, default=1.0, help="found on SMALL (1)")
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="normopt", help="adam for AdamW (normopt)"
    )
    parser.add_argument("--optim_args", default="", metavar="KEY=VALUE,...", help="its options")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--trust_remote_code", "--trust-remote-code", action="store_true")


def scale_rate(args: argparse.Namespace) -> int:
    """Print what a rate that was found on a small model becomes for a large one."""
    options: dict[str, Any] = parse_optim_args(args.optim_args)
    overrides = parse_roles(options.pop("roles", ""))
    policy = changed(PRESETS[args.preset].policy, **options)
    small, large = (
        classify(skeleton(name, trust_remote_code=args.trust_remote_code), overrides)
        for name in (args.small, args.large)
    )
    factors = rate_factors(policy, small, large)
    main = factors.get("linear") or next(iter(factors.values()))
    others = {
        f"lr_{role}": float(f"{factor / main:.3g}")
        for role, factor in factors.items()
        if abs(factor / main - 1) > 0.01
    }
    if args.json:
        found = {"learning_rate": args.rate * main, "optim_args": others, "factors": factors}
        print(json.dumps({"format_version": 1, "preset": args.preset, **found}, indent=1))
        return 0
    rows = [(role, f"{f:.3g}", f"{args.rate * f:.3g}") for role, f in factors.items()]
    print(format_table(("role", "factor", "rate"), rows))
    said = ",".join(f"{name}={value:g}" for name, value in others.items())
    print(f"\nlearning_rate={args.rate * main:.3g}" + (f', optim_args="{said}"' if said else ""))
    return 0


def rate_factors(
    policy: Policy, small: Sequence[ParamSpec], large: Sequence[ParamSpec]
) -> dict[str, float]:
    """What the rate of each role, and of tied tables, is multiplied by: the median over them.

    Args:
        policy: a rule for every role.
        small: the parameters of the model on which the rate was found.
        large: those of the model for which it is asked.

    Raises:
        ValueError: if the models have no role in common.
    """
    sizes = [_sizes(policy, specs) for specs in (small, large)]
    factors = {
        role: statistics.median(sizes[0][role]) / statistics.median(sizes[1][role])
        for role in (*ROLES, *KINDS)
        if role in sizes[0] and role in sizes[1]
    }
    if not factors:
        raise ValueError("The two models have no trainable parameters of one role.")
    return factors


def _sizes(policy: Policy, specs: Sequence[ParamSpec]) -> dict[str, list[float]]:
    """The sizes of all steps at rate 1, by role, or by kind where it has a norm of its own."""
    sizes: dict[str, list[float]] = {}
    for spec in specs:
        rule = policy[kind_of(spec, policy) or spec.role]
        key = kind_of(spec, _NORMS) or spec.role
        norm = _NORMS[key].norm
        operator = spec.layout.to_operators(torch.empty(spec.shape, device="meta"))[0]
        fan_out, fan_in = operator.shape[-2:]
        taps = spec.layout.taps
        step = SCALES[rule.scale](rule.norm, fan_out, fan_in, taps)
        step /= norm_of_ones(rule.norm, fan_out, fan_in)
        size = step * norm_of_ones(norm, fan_out, fan_in) * norm.weight(taps)
        sizes.setdefault(key, []).append(size)
    return sizes


def norm_of_ones(norm: Norm, fan_out: int, fan_in: int) -> float:
    """The norm of a matrix of ones."""
    if isinstance(norm, MaxEntry):
        return 1.0
    if isinstance(norm, MaxColumn):
        return float(norm.norm(torch.ones(fan_out, 1)))
    if isinstance(norm, MaxRow):
        return float(norm.norm(torch.ones(1, fan_in)))
    return math.sqrt(fan_out * fan_in) * norm.unit(fan_out, fan_in)  # it has rank 1
