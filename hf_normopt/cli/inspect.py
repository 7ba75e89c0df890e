"""`hf-normopt inspect`: the role and the norm of every parameter, from a config alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..cards.files import check_picture
from ..norms.half import NAMES
from ..optim.groups import kind_of, kind_of_product, products
from ..optim.presets import PRESETS
from ..optim.rules import Rule
from ..roles import KINDS, ROLES, ParamSpec, classify
from ..roles.skeletons import skeleton
from ..tables import fold_names, format_table
from ..trainer.arguments import parse_roles
from .cost import cost_report
from .outline import Total, count_roles, tied_names
from .picture import SUFFIXES, save_picture

FORMATS = ("table", "json", "markdown")


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    parser.add_argument(
        "model", help="a local folder, a config.json, or a model id on the Hub; PEFT adapters too"
    )
    parser.add_argument("--format", choices=FORMATS, default="table")
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="normopt", help="whose norms to show"
    )
    parser.add_argument(
        "--roles", default="", metavar="ROLE:REGEX;...", help="override roles by name"
    )
    parser.add_argument(
        "--heads", action="store_true", help="make each attention head an operator of its own"
    )
    parser.add_argument(
        "--cost", action="store_true", help="show how the spectral steps are computed, and the work"
    )
    parser.add_argument(
        "--tokens", type=int, default=8192, help="of a training step, for --cost (8192)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", *NAMES), default="cpu", help="for --cost"
    )
    parser.add_argument("--why", action="store_true", help="show the reason for each role")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw the model with its norms, as .html or .png"
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with status 1 if a parameter is `other`"
    )
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run modelling code that comes with the config",
    )


def inspect(args: argparse.Namespace) -> int:
    """Print the role and the norm of every parameter, and draw them.

    Returns:
        0, or 1 when `--strict` finds a parameter whose role is `other`.
    """
    if args.plot:
        check_picture(args.plot, SUFFIXES)
    policy = PRESETS[args.preset].policy
    model = skeleton(args.model, trust_remote_code=args.trust_remote_code)
    specs = classify(model, parse_roles(args.roles), heads=args.heads)
    pairs = products(specs, policy)
    joined = {spec.name: kind_of_product(spec) for pair in pairs for spec in pair}
    kinds = [joined.get(spec.name) or kind_of(spec, policy) for spec in specs]
    rules = [policy[kind or spec.role] for kind, spec in zip(kinds, specs, strict=True)]
    norms = [str(rule.norm) for rule in rules]
    totals = count_roles(specs, norms)
    if args.plot:
        save_picture(args.plot, f"{type(model).__name__}, preset {args.preset}", specs, norms)
    markdown, others = args.format == "markdown", _others(specs)
    if args.format == "json":
        print(json.dumps(_report(args, type(model).__name__, specs, rules, totals), indent=1))
    else:
        header = ("role", "norm", "tensors", "parameters")
        roles = [_role(spec, kind) for spec, kind in zip(specs, kinds, strict=True)]
        print(_table(specs, roles, norms, pairs, args.why, markdown), end="\n\n")
        print(format_table(header, [total.cells for total in totals], markdown))
        if args.cost:
            print("", cost_report(specs, rules, args.tokens, args.device, markdown), sep="\n")
        if others:
            print(f"\nother: {'; '.join(f'{name}: {reason}' for name, reason in others)}")
    if others and args.strict:
        print(_advice([name for name, _ in others]), file=sys.stderr)
        return 1
    return 0


def _advice(others: Sequence[str]) -> str:
    """What to do about parameters of the role `other`, by their folded names."""
    wish = ";".join(f"ROLE:{name.partition(' (')[0]}" for name in others)
    return (
        f"hf-normopt inspect: the role of {', '.join(others)} is other. "
        f'Give another with --roles "{wish}"; ROLE is one of {", ".join(list(ROLES)[:-1])}.'
    )


def _others(specs: Sequence[ParamSpec]) -> list[tuple[str, str]]:
    """Names and reasons of the parameters of the role `other`, folded over layers."""
    others = [spec for spec in specs if spec.role == "other"]
    reasons = [spec.reason for spec in others]
    names = [_short(spec.name) for spec in others]
    return [(label, reasons[at[0]]) for label, at in fold_names(names, reasons)]


def _table(
    specs: Sequence[ParamSpec],
    roles: Sequence[str],
    norms: Sequence[str],
    pairs: Sequence[tuple[ParamSpec, ParamSpec]],
    why: bool,
    markdown: bool,
) -> str:
    """A row for each parameter, and one for the two factors of a product."""
    of_factor = {spec.name: pair for pair in pairs for spec in pair}
    shown = [
        (spec, role, norm)
        for spec, role, norm in zip(specs, roles, norms, strict=True)
        if spec.name not in of_factor or spec is of_factor[spec.name][0]
    ]
    specs = [spec for spec, _, _ in shown]
    cells = [
        (
            *(
                _of_product(*of_factor[spec.name], role, norm)
                if spec.name in of_factor
                else _of(spec, role, norm)
            ),
            *([spec.reason] if why else []),
        )
        for spec, role, norm in shown
    ]
    labels = [
        spec.factor.product if spec.factor and spec.name in of_factor else _short(spec.name)
        for spec in specs
    ]
    keys = [(row, spec.tied_to is None) for row, spec in zip(cells, specs, strict=True)]
    rows = []
    for label, at in fold_names(labels, keys):
        names = [label, *tied_names([specs[i] for i in at])]
        rows.append((" = ".join(names), *cells[at[0]]))
    header = ("parameter", "role", "norm", "shape", "layout", *(["reason"] if why else []))
    return format_table(header, rows, markdown)


def _role(spec: ParamSpec, kind: str) -> str:
    """A parameter's role and what it is refined to: by the policy, or by itself."""
    kind = kind or spec.kind
    return f"{KINDS[kind]}/{kind}" if kind else spec.role


def _of(spec: ParamSpec, role: str, norm: str) -> tuple[str, ...]:
    return role, norm, " x ".join(map(str, spec.shape)) or "1", str(spec.layout)


def _of_product(a: ParamSpec, b: ParamSpec, role: str, norm: str) -> tuple[str, ...]:
    """What is shown of a product s B A in place of its two factors."""
    shapes = (" x ".join(map(str, spec.shape)) for spec in (b, a))
    assert a.factor is not None
    return role, norm, " · ".join(shapes), f"scale {a.factor.scale:g}"


def _report(
    args: argparse.Namespace,
    class_name: str,
    specs: Sequence[ParamSpec],
    rules: Sequence[Rule],
    totals: Sequence[Total],
) -> dict[str, object]:
    """What `--format json` prints; docs/inspect.md describes it."""
    return {
        "format_version": 1,
        "model": args.model,
        "class": class_name,
        "preset": args.preset,
        "parameters": [
            {
                "name": spec.name,
                "shape": spec.shape,
                "role": spec.role,
                "kind": spec.kind,
                "layout": str(spec.layout),
                "reason": spec.reason,
                "tied_to": spec.tied_to.split(", ") if spec.tied_to else [],
                "product": spec.factor.product if spec.factor else None,
                "norm": str(rule.norm),
                "rule": str(rule),
            }
            for spec, rule in zip(specs, rules, strict=True)
        ],
        "totals": {
            role: {"norms": norms, "tensors": tensors, "parameters": parameters}
            for role, norms, tensors, parameters in totals
        },
    }


def _short(name: str) -> str:
    return name.removesuffix(".weight")
