"""The report of a coordinate check as text: `as_text`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..tables import fold_names, format_table
from .coordinates import TIED
from .slopes import QUANTITIES, TOLERANCE

_HEADINGS = {
    "initial": "Outputs before any step, over {over}: the initialisation.",
    "own": "What a parameter's own step does to its outputs, over {over}: the optimizer.",
}
_COLUMNS = {
    "initial": "before any step",
    "own": "own step",
    "change": "all steps",
    "size": "norm of the step",
}


def as_text(report: Mapping[str, Any]) -> str:
    """The tables, the verdicts and the conclusion of a report."""
    widths, depths = (", ".join(map(str, report[key])) for key in ("widths", "depths"))
    rates = " and ".join(f"{rate:g}" for rate in report["rates"])
    parts = [
        f"{report['class']}, {report['optimizer']} {report['optim_args']}".rstrip()
        + f": widths {widths}, depth {depths}, {report['steps']} steps at {rates}.",
        "Exponents over width; 0: does not depend on it.",
        _parameter_table(report),
    ]
    for over in ("width", "depth"):
        for quantity, heading in _HEADINGS.items():
            rows = _role_rows(report, over, quantity)
            if rows:
                header = ("role", "parameters", "median", "worst", "rate", "verdict")
                parts += [heading.format(over=over), format_table(header, rows)]
    return "\n\n".join([*parts, conclusion(report)])


def conclusion(report: Mapping[str, Any]) -> str:
    """Both causes, a sentence each."""
    initial, odd_initial = _dependent(report, "initial")
    own, odd_own = _dependent(report, "own")
    remedy = "" if report["initialisation"] == "fan_in" else " --init shows what is left without."
    begin = (
        f"Initialisation: outputs depend on width before any step ({initial}), whatever the "
        f"optimizer.{remedy}"
        if initial
        else "Initialisation: outputs do not depend on width before any step."
    )
    steps = (
        f"Steps: their effect depends on width ({own}), so a rate found at one width does not hold "
        "at another; hf-normopt scale-rate says what it becomes."
        if own
        else "Steps: their effect does not depend on width, so a learning rate holds."
    )
    return f"{begin}{odd_initial}\n{steps}{odd_own}{_of_tied_tables(report)}"


def _dependent(report: Mapping[str, Any], quantity: str) -> tuple[str, str]:
    """The roles that depend on width at the first rate, and a sentence on others' parameters."""
    rows = [row for row in _rows(report, quantity) if not _is_slower_table(row)]
    roles = [row for row in rows if abs(row["median"]) > TOLERANCE]
    odd = [
        f"{row['worst_name'].removesuffix('.weight')} {row['worst']:+.2f}"
        for row in rows
        if abs(row["worst"]) > TOLERANCE >= abs(row["median"])
    ]
    said = ", ".join(f"{row['role']} {row['median']:+.2f}" for row in roles)
    return said, f" Farthest from their role: {', '.join(odd)}." if odd else ""


def _rows(report: Mapping[str, Any], quantity: str) -> list[Mapping[str, Any]]:
    """What was found of the roles over width at the first rate."""
    where = ("width", quantity, report["rates"][0])
    return [row for row in report["roles"] if (row["over"], row["quantity"], row["rate"]) == where]


def _is_slower_table(row: Mapping[str, Any]) -> bool:
    return row["quantity"] == "own" and row["role"] == TIED and row["median"] < -TOLERANCE


def _of_tied_tables(report: Mapping[str, Any]) -> str:
    """What is no fault: a step that suits the head is a small one where rows are looked up."""
    if not any(map(_is_slower_table, _rows(report, "own"))):
        return ""
    return (
        " The table that is the head too moves as the head may: less, in a wide model, where it is "
        "looked up."
    )


def _role_rows(report: Mapping[str, Any], over: str, quantity: str) -> list[tuple[str, ...]]:
    rates = report["rates"][: 1 if quantity == "initial" else None]
    return [
        (
            row["role"],
            str(row["parameters"]),
            f"{row['median']:+.2f}",
            f"{row['worst']:+.2f}",
            f"{row['rate']:g}" if quantity != "initial" else "any",
            row["verdict"],
        )
        for row in report["roles"]
        if (row["over"], row["quantity"]) == (over, quantity) and row["rate"] in rates
    ]


def _parameter_table(report: Mapping[str, Any]) -> str:
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["parameters"]:
        if row["over"] == "width":
            by_name.setdefault(row["name"].removesuffix(".weight"), []).append(row)
    names = list(by_name)
    rows = []
    for label, at in fold_names(names, [by_name[name][0]["role"] for name in names]):
        members = [by_name[names[i]] for i in at]
        cells = [_median([row[0][quantity] for row in members]) for quantity in QUANTITIES]
        own = _median([row[-1]["own"] for row in members])
        rows.append((label, members[0][0]["role"], *cells[:2], own, *cells[2:]))
    initial, step, *rest = _COLUMNS.values()
    return format_table(("parameter", "role", initial, step, "at 4x", *rest), rows)


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):+.2f}" if known else "-"
