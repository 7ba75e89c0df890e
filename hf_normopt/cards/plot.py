"""The picture of a run: loss, learning rates and norms by role, from the trainer's log."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_whole

PICTURE = "normopt_norms.png"  # beside the model
_MARK = "drawn by hf_normopt"

# A panel: title, quantities in the log, logarithmic axis.
_PANELS = (
    ("loss", ("loss", "eval_loss"), False),
    ("learning rate", ("lr",), False),
    ("step size: learning rate · η", ("step_size",), True),
    ("cos θ of escape velocity", ("cos_theta",), False),
    ("size of the weights", ("weight_norm",), True),
    ("size of the update / size of the weights", ("relative_update",), True),
    ("dual norm of the gradient", ("dual_norm",), True),
    ("certificate of the LMO", ("certificate",), False),
)

Series = dict[str, tuple[list[float], list[float]]]


def series(log_history: Sequence[Mapping[str, Any]], quantities: Sequence[str]) -> Series:
    """The steps and values of every key `quantity` or `quantity/role` of a log."""
    found: Series = {}
    for row in log_history:
        for key, value in row.items():
            quantity, _, role = key.partition("/")
            if quantity in quantities and isinstance(value, (int, float)):
                steps, values = found.setdefault(role or quantity, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def save_run(path: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]]) -> None:
    """Draw a run into a file.

    Args:
        path: the PNG to write.
        log_history: from `TrainerState`.

    Raises:
        ImportError: without matplotlib.
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    panels = [
        (title, lines, logarithmic)
        for title, quantities, logarithmic in _PANELS
        if (lines := series(log_history, quantities))
    ]
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.5 * columns, 7.5), layout="constrained")
    for place, (title, lines, logarithmic) in enumerate(panels, 1):
        axes = figure.add_subplot(2, columns, place)
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, label=name, marker="." if len(steps) < 20 else None)
        positive = any(value > 0 for _, values in lines.values() for value in values)
        axes.set(title=title, xlabel="step", yscale="log" if logarithmic and positive else "linear")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, metadata={"Description": _MARK})
    write_whole(Path(path), picture.getvalue())


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture that [`save_run`] drew."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK.encode() in file.read(1024)
