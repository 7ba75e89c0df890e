"""The command line: the subcommands of `hf-normopt`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..cards.model_card import card_file, update_model_card
from ..cards.record import compare_runs
from ..optim.presets import PRESETS
from ..optim.rules import Rule, policy_key
from ..roles import ROLES, ParamSpec, classify
from ..roles.skeletons import skeleton
from ..tables import fold_names, format_table
from ..trainer.arguments import parse_roles
from .coord_check import add_coord_check
from .cost import cost_report
from .launch import run
from .picture import Total, check_file, count_roles, save_picture, tied_names
from .scale_rate import add_scale_rate

_FORMATS = ("table", "json", "markdown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0; 1 when `inspect --strict` finds a parameter whose role is `other`; 2
        when the input cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="hf-normopt", description="An operator norm for each tensor, by its role."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser(
        "inspect", help="show the role and the norm of every parameter; loads no weights"
    )
    inspect.add_argument(
        "model", help="a local folder, a config.json, or a model id on the Hub; PEFT adapters too"
    )
    inspect.add_argument("--format", choices=_FORMATS, default="table")
    inspect.add_argument(
        "--preset", choices=list(PRESETS), default="normopt", help="whose norms to show"
    )
    inspect.add_argument(
        "--roles", default="", metavar="ROLE:REGEX;...", help="override roles by name"
    )
    inspect.add_argument(
        "--heads", action="store_true", help="make each attention head an operator of its own"
    )
    inspect.add_argument(
        "--cost", action="store_true", help="show how the spectral steps are computed, and the work"
    )
    inspect.add_argument(
        "--tokens", type=int, default=8192, help="of a training step, for --cost (8192)"
    )
    inspect.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for --cost")
    inspect.add_argument("--why", action="store_true", help="show the reason for each role")
    inspect.add_argument(
        "--plot", metavar="FILE", help="also draw the model with its norms, as .html or .png"
    )
    inspect.add_argument(
        "--strict", action="store_true", help="exit with status 1 if a parameter is `other`"
    )
    inspect.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="run modelling code that comes with the config",
    )
    inspect.set_defaults(run=_inspect)

    presets = commands.add_parser("presets", help="show the presets")
    presets.add_argument("--format", choices=_FORMATS, default="table")
    presets.set_defaults(run=_presets)

    commands.add_parser("run", help="run a script that nobody edited, with --optim normopt")

    card = commands.add_parser(
        "card", help="write into the card of a trained model how it was trained"
    )
    card.add_argument("folder", help="the output_dir of the training, or one of its checkpoints")
    card.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="other runs of the same script, whose results the card shall show",
    )
    card.set_defaults(run=_card)

    add_coord_check(commands)
    add_scale_rate(commands)

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        return run(argv[1:])  # all that follows is the script's
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-normopt {args.command}: {str(error).strip()}", file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    if args.plot:
        check_file(args.plot)
    policy = PRESETS[args.preset].policy
    model = skeleton(args.model, trust_remote_code=args.trust_remote_code)
    specs = classify(model, parse_roles(args.roles), heads=args.heads)
    rules = [policy[policy_key(policy, spec.role, spec.kind)] for spec in specs]
    norms = [str(rule.norm) for rule in rules]
    totals = count_roles(specs, norms)
    if args.plot:
        save_picture(args.plot, f"{type(model).__name__}, preset {args.preset}", specs, norms)
    markdown, others = args.format == "markdown", _others(specs)
    if args.format == "json":
        print(json.dumps(_report(args, type(model).__name__, specs, rules, totals), indent=1))
    else:
        print(_table(specs, norms, args.why, markdown), _totals_table(totals, markdown), sep="\n\n")
        if args.cost:
            print("", cost_report(specs, rules, args.tokens, args.device, markdown), sep="\n")
        if others:
            print(f"\nother: {'; '.join(f'{name}: {reason}' for name, reason in others)}")
    if not (others and args.strict):
        return 0
    wish = ";".join(f"ROLE:{name.partition(' (')[0]}" for name, _ in others)
    print(
        f"hf-normopt inspect: the role of {', '.join(name for name, _ in others)} is other. "
        f'Give another with --roles "{wish}"; ROLE is one of {", ".join(list(ROLES)[:-1])}.',
        file=sys.stderr,
    )
    return 1


def _others(specs: Sequence[ParamSpec]) -> list[tuple[str, str]]:
    """The folded names of what is `other`, and why."""
    others = [spec for spec in specs if spec.role == "other"]
    reasons = [spec.reason for spec in others]
    names = [_short(spec.name) for spec in others]
    return [(label, reasons[at[0]]) for label, at in fold_names(names, reasons)]


def _table(specs: Sequence[ParamSpec], norms: Sequence[str], why: bool, markdown: bool) -> str:
    cells = [
        (
            f"{spec.role}/{spec.kind}" if spec.kind else spec.role,
            norm,
            " x ".join(map(str, spec.shape)) or "1",
            str(spec.layout),
            *([spec.reason] if why else []),
        )
        for spec, norm in zip(specs, norms, strict=True)
    ]
    keys = [(row, spec.tied_to is None) for row, spec in zip(cells, specs, strict=True)]
    rows = []
    for label, at in fold_names([_short(spec.name) for spec in specs], keys):
        names = [label, *tied_names([specs[i] for i in at])]
        rows.append((" = ".join(names), *cells[at[0]]))
    header = ("parameter", "role", "norm", "shape", "layout", *(["reason"] if why else []))
    return format_table(header, rows, markdown)


def _totals_table(totals: Sequence[Total], markdown: bool) -> str:
    rows = [
        (total.role, ", ".join(total.norms), f"{total.tensors:,}", f"{total.parameters:,}")
        for total in totals
    ]
    return format_table(("role", "norm", "tensors", "parameters"), rows, markdown)


def _report(
    args: argparse.Namespace,
    class_name: str,
    specs: Sequence[ParamSpec],
    rules: Sequence[Rule],
    totals: Sequence[Total],
) -> dict[str, object]:
    """What `--format json` prints: described in docs/inspect.md, whose version it carries."""
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
                "norm": str(rule.norm),
                "rule": str(rule),
            }
            for spec, rule in zip(specs, rules, strict=True)
        ],
        "totals": {
            total.role: {
                "norms": total.norms,
                "tensors": total.tensors,
                "parameters": total.parameters,
            }
            for total in totals
        },
    }


def _presets(args: argparse.Namespace) -> int:
    if args.format == "json":
        records = [
            {
                "name": name,
                "description": preset.description,
                "source": preset.source,
                "learning_rate": preset.learning_rate,
                "rules": {role: str(rule) for role, rule in preset.policy.items()},
            }
            for name, preset in PRESETS.items()
        ]
        print(json.dumps(records, indent=1))
        return 0
    rows = [
        (name, preset.description, "{:g} to {:g}".format(*preset.learning_rate), preset.source)
        for name, preset in PRESETS.items()
    ]
    header = ("preset", "what it is", "learning rate", "source")
    print(format_table(header, rows, args.format == "markdown"))
    return 0


def _card(args: argparse.Namespace) -> int:
    if args.compare:
        compare_runs(card_file(args.folder).parent, args.compare)
    print(update_model_card(args.folder))
    return 0


def _short(name: str) -> str:
    return name.removesuffix(".weight")
