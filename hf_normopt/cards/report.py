"""`normopt.json`: how a model was trained, beside every checkpoint and model.

`model_card.py` writes the card from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..optim.optimizer import NormOpt
from ..optim.presets import PRESETS
from ..optim.step_sizes import StepSize, format_step_size
from ..version import __version__
from .files import write_whole

FILE_NAME = "normopt.json"
FORMAT_VERSION = 1


def report(
    optimizer: NormOpt,
    schedule: str = "",
    log_history: Sequence[Mapping[str, Any]] = (),
    max_steps: int = 0,
) -> dict[str, Any]:
    """The optimizer, its options and its results, as plain data.

    Args:
        optimizer: the optimizer of the run.
        schedule: the text of the run's schedule, for roles without one of their own.
        log_history: from `TrainerState`; gives the last norms.
        max_steps: the planned length of the run; 0 if unknown.
    """
    origin = {key: _plain(value) for key, value in optimizer.origin.items()}
    name = origin.pop("preset", "")
    preset = PRESETS.get(name)
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "hf_normopt": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "preset": {
            "name": name,
            "description": preset.description if preset else "",
            "source": preset.source if preset else "",
        },
        "options": {key: v for key, v in origin.items() if key not in ("lr", "weight_decay")},
        "learning_rate": _common_rate(optimizer),
        "weight_decay": _weight_decay(optimizer),
        "situation": dict(optimizer.situation),
        "step_size": format_step_size(optimizer.step_size),
        "last_step_size": next(
            (row["step_size"] for row in reversed(log_history) if "step_size" in row), None
        ),
        "schedule": schedule,
        "steps": optimizer.steps,
        "resets": list(optimizer.resets),
        "spikes": optimizer.spikes,
        "max_steps": max_steps,
        "roles": [
            _role(optimizer, group, schedule, log_history) for group in optimizer.param_groups
        ],
        "parameters": [row for group in optimizer.param_groups for row in _parameters(group)],
    }


def _parameters(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys = ("param_names", "param_shapes", "layouts")
    return [
        {
            "name": name,
            "shape": list(shape),
            "role": group["role"],
            "kind": group["kind"],
            "layout": layout,
        }
        for name, shape, layout in zip(*(group[key] for key in keys), strict=True)
    ]


def _role(
    optimizer: NormOpt,
    group: Mapping[str, Any],
    schedule: str,
    log_history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    rule = optimizer.rule_of(group)
    label = group["label"]
    norms: dict[str, float] = {}
    for row in log_history:
        for key, value in row.items():
            quantity, _, of = key.partition("/")
            if of == label and quantity != "lr":
                norms[quantity] = value
    return {
        "role": group["role"],
        "kind": group["kind"],
        "label": label,
        "norm": str(rule.norm),
        "rule": group["rule"] + (f", {rule.statistic}" if group.get("smoothing") else ""),
        "tensors": len(group["params"]),
        "parameters": sum(math.prod(shape) for shape in group["param_shapes"]),
        "learning_rate": _rate(group) * group["multiplier"],
        "weight_decay": float(group["weight_decay"]),
        "own": list(group["own"]),
        "schedule": group["schedule"] or schedule,
        "norms": norms,
    }


def _rate(group: Mapping[str, Any]) -> float:
    """The rate that schedules multiply; in a resumed run, the one of the checkpoint."""
    return float(group.get("initial_lr", group["lr"]))


def _common_rate(optimizer: NormOpt) -> float:
    """The learning rate of the groups without one of their own."""
    common = (_rate(group) for group in optimizer.param_groups if "lr" not in group["own"])
    return next(common, float(optimizer.defaults["lr"]))


def _weight_decay(optimizer: NormOpt) -> float:
    """The weight decay of rules with the factor 1; in a resumed run, the one of the checkpoint."""
    for group in optimizer.param_groups:
        rule = optimizer.rule_of(group)
        if rule.decay and "weight_decay" not in group["own"]:
            return float(group["weight_decay"]) / rule.decay
    return float(optimizer.defaults["weight_decay"])


def _plain(value: Any) -> Any:
    """A value that JSON can hold; step sizes and norms as the text of their options."""
    if isinstance(value, StepSize):
        return format_step_size(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def write_report(folder: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write the report into a folder.

    Raises:
        FileExistsError: if another file has its name.
        OSError: if it cannot be written.
    """
    path = Path(folder) / FILE_NAME
    if os.path.lexists(path) and not has_report(folder):
        raise FileExistsError(f"{path} is not a report of hf_normopt: it is left as it is")
    write_json(path, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    write_whole(path, f"{json.dumps(content, indent=1)}\n".encode())


def has_report(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has a report by this package, of any version."""
    content = json_object(Path(folder) / FILE_NAME)
    versions = content.get("versions")
    return "format_version" in content and isinstance(versions, dict) and "hf_normopt" in versions


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file or no object in it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of a folder.

    Raises:
        FileNotFoundError: if it has none.
        ValueError: if it is damaged or of another version.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE_NAME}: it was not trained with hf_normopt, or not by a Trainer "
            "with its callback."
        )
    return read_versioned(path, "format_version", FORMAT_VERSION)


def read_versioned(path: Path, key: str, version: int) -> dict[str, Any]:
    """The object in a JSON file that has its version under a key.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}. Is it whole?") from None
    found = content.get(key) if isinstance(content, dict) else None
    if found != version:
        raise ValueError(
            f"{path} has the {key} {found!r}; this version of hf_normopt reads {version}."
        )
    return content
