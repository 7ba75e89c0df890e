"""The command line: `hf-normopt inspect MODEL` and `hf-normopt presets`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from .arguments import parse_roles
from .presets import PRESETS
from .roles import ROLES, ParamSpec, classify
from .rules import Policy, Rule, policy_key
from .tables import format_table

_FORMATS = ("table", "json", "markdown")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 2 when the input cannot be used.
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
    inspect.add_argument("--why", action="store_true", help="show the reason for each role")
    inspect.set_defaults(run=_inspect)

    presets = commands.add_parser("presets", help="show the presets")
    presets.add_argument("--format", choices=_FORMATS, default="table")
    presets.set_defaults(run=_presets)

    args = parser.parse_args(argv)
    try:
        print(args.run(args))
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-normopt {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def skeleton(name: str) -> nn.Module:
    """A model on the meta device, from its config alone.

    Args:
        name: a folder with `config.json` or `adapter_config.json`, a config file, or a model id on
            the Hub.

    Raises:
        OSError: if there is no such config.
        ValueError: if transformers has no class for it.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise OSError(f"There is no file or folder {name}.")
    if (Path(name) / "adapter_config.json").exists():
        from peft import PeftConfig, get_peft_model

        adapter = PeftConfig.from_pretrained(name)
        adapter.inference_mode = False
        with torch.device("meta"):
            return get_peft_model(skeleton(adapter.base_model_name_or_path), adapter)
    config = transformers.AutoConfig.from_pretrained(name)
    classes = [
        getattr(transformers, architecture, None) for architecture in config.architectures or []
    ]
    with torch.device("meta"):
        if classes and classes[0] is not None:
            return classes[0](config)
        return transformers.AutoModel.from_config(config)


def _inspect(args: argparse.Namespace) -> str:
    policy = PRESETS[args.preset].policy
    specs = classify(skeleton(args.model), parse_roles(args.roles))
    if args.format == "json":
        return json.dumps([_record(spec, policy) for spec in specs], indent=1)

    folded: dict[tuple[str, ...], int] = {}
    for spec in specs:
        cells: tuple[str, ...] = (
            _folded(spec),
            _role(spec),
            str(_rule(spec, policy).norm),
            _times(spec.shape),
            str(spec.layout),
        )
        cells += (spec.reason,) if args.why else ()
        folded[cells] = folded.get(cells, 0) + 1
    rows = [(name if n == 1 else f"{name} (x{n})", *rest) for (name, *rest), n in folded.items()]
    header = ("parameter", "role", "norm", "shape", "layout", *(("reason",) if args.why else ()))
    markdown = args.format == "markdown"
    return f"{format_table(header, rows, markdown)}\n\n{_totals(specs, policy, markdown)}"


def _totals(specs: list[ParamSpec], policy: Policy, markdown: bool) -> str:
    rows = []
    for role in ROLES:
        members = [spec for spec in specs if spec.role == role]
        if members:
            norms = sorted({str(_rule(spec, policy).norm) for spec in members})
            count = sum(math.prod(spec.shape) for spec in members)
            rows.append((role, ", ".join(norms), f"{len(members):,}", f"{count:,}"))
    return format_table(("role", "norm", "tensors", "parameters"), rows, markdown)


def _presets(args: argparse.Namespace) -> str:
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
        return json.dumps(records, indent=1)
    rows = [
        (name, preset.description, "{:g} to {:g}".format(*preset.learning_rate), preset.source)
        for name, preset in PRESETS.items()
    ]
    return format_table(
        ("preset", "what it is", "learning rate", "source"), rows, args.format == "markdown"
    )


def _record(spec: ParamSpec, policy: Policy) -> dict[str, object]:
    return {
        "name": spec.name,
        "shape": spec.shape,
        "role": spec.role,
        "kind": spec.kind,
        "layout": str(spec.layout),
        "reason": spec.reason,
        "tied_to": spec.tied_to,
        "norm": str(_rule(spec, policy).norm),
        "rule": str(_rule(spec, policy)),
    }


def _rule(spec: ParamSpec, policy: Policy) -> Rule:
    return policy[policy_key(policy, spec.role, spec.kind)]


def _folded(spec: ParamSpec) -> str:
    """The name with layer numbers replaced, and what it is tied to."""
    names = [spec.name] if spec.tied_to is None else [spec.name, spec.tied_to]
    return " = ".join(
        re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight")) for name in names
    )


def _role(spec: ParamSpec) -> str:
    return f"{spec.role}/{spec.kind}" if spec.kind else spec.role


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"
