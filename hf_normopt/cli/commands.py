"""The command line: `main`, the table of its commands, and the short ones among them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..cards.model_card import card_file, update_model_card
from ..cards.run_record import compare_runs
from ..optim.presets import PRESETS
from ..tables import format_table
from .coord_check import add_coord_check_arguments, coord_check
from .find_rate import find_rate
from .inspect import FORMATS, add_inspect_arguments, inspect
from .launch import run
from .scale_rate import add_scale_rate_arguments, scale_rate


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status of the command; 2 when its input cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="hf-normopt", description="An operator norm for each tensor, by its role."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help))
    commands.add_parser("run", help="run a script that nobody edited, with --optim normopt")
    commands.add_parser(
        "find-rate", help="run a script for a few per cent of its steps at several rates"
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        return run(argv[1:])  # all that follows is the script's
    if argv[:1] == ["find-rate"]:
        return find_rate(argv[1:])
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-normopt {args.command}: {str(error).strip()}", file=sys.stderr)
        return 2


def _add_presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="table")


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


def _add_card_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the output_dir of the training, or one of its checkpoints")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="other runs of the same script, whose results the card shall show",
    )


def _card(args: argparse.Namespace) -> int:
    if args.compare:
        compare_runs(card_file(args.folder).parent, args.compare)
    print(update_model_card(args.folder))
    return 0


class Command(NamedTuple):
    """A command of the table.

    Attributes:
        help: its line in `hf-normopt --help`.
        add_arguments: adds its arguments to its parser.
        run: does the work and returns the exit status. A ValueError, OSError or ImportError is
            printed as one line and gives the status 2.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "inspect": Command(
        "show the role and the norm of every parameter; loads no weights",
        add_inspect_arguments,
        inspect,
    ),
    "presets": Command("show the presets", _add_presets_arguments, _presets),
    "coord-check": Command(
        "show whether a learning rate holds when a model becomes wider",
        add_coord_check_arguments,
        coord_check,
    ),
    "scale-rate": Command(
        "say what a rate found on a small model becomes for a large one",
        add_scale_rate_arguments,
        scale_rate,
    ),
    "card": Command(
        "write into the card of a trained model how it was trained", _add_card_arguments, _card
    ),
}
