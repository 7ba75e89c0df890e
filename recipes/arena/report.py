"""What came out of a comparison: numbers with their uncertainty, and a table.

Differences are paired by seed: the same initial weights and batches under both optimizers. The
interval is Student's, and a contender equals the reference where the whole 90 % interval lies
within a margin that was stated before the runs (two one-sided tests at 5 %).
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from .plan import best_place, rate_at, tuned


@dataclass(frozen=True)
class Paired:
    """A paired difference, contender minus reference.

    Args:
        mean: of the differences.
        low: of the 95 % interval of the mean; as `high`, NaN for fewer than two pairs.
        high: of the interval.
        better: pairs in which the contender is better.
        pairs: in all.
        verdict: "better", "worse", "equal" (within the margin) or "open".
    """

    mean: float
    low: float
    high: float
    better: int
    pairs: int
    verdict: str


def paired(ours, theirs, margin, sign=1.0):
    """Compare two lists of values, one pair for each seed.

    Args:
        ours: of the contender.
        theirs: of the reference.
        margin: of equivalence, in the unit of the values.
        sign: -1 where more is better.
    """
    differences = np.subtract(ours, theirs)
    better = int((sign * differences < 0).sum())
    mean = float(differences.mean())
    if len(differences) < 2 or not np.isfinite(differences).all():
        return Paired(mean, math.nan, math.nan, better, len(differences), "open")
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    near = test.confidence_interval(0.90)
    if high * sign < 0 and low * sign < 0:
        verdict = "better"
    elif high * sign > 0 and low * sign > 0:
        verdict = "worse"
    else:
        verdict = "open"
    if -margin <= near.low and near.high <= margin:
        verdict = "equal"
    return Paired(mean, float(low), float(high), better, len(differences), verdict)


def width(values, tolerance):
    """How many times the largest rate is the least, of those nearly as good as the best.

    Between rates that were tried, the value is a line over the logarithm of the rate.

    Args:
        values: by place, less is better.
        tolerance: of the best, as 0.01.

    Returns:
        The factor, and whether it is only the least that it can be, since it ends where the tried
        rates end.
    """
    best, least = best_place(values), min(values.values())
    limit = least + abs(least) * tolerance
    ends, is_cut = [], False
    for places in (
        [p for p in sorted(values) if p >= best],
        [p for p in sorted(values, reverse=True) if p <= best],
    ):
        end = places[-1]
        for inner, outer in pairwise(places):
            if values[outer] > limit:
                rise = values[outer] - values[inner]
                end = inner + (outer - inner) * (limit - values[inner]) / rise
                break
        else:
            is_cut = True
        ends.append(end)
    return 2 ** ((ends[0] - ends[1]) / 2), is_cut


def share_to_reach(points, target):
    """The share of the steps at which a finished schedule reaches a value.

    Args:
        points: pairs of share and value, less is better.
        target: the value.

    Returns:
        Interpolated over the logarithm of the share; NaN where no run reaches it, or all do.
    """
    points = sorted(points)
    for (a, high), (b, low) in pairwise(points):
        if low <= target < high:
            return a * (b / a) ** ((high - target) / (high - low))
    return math.nan


def rows(plan, known, seconds=None):
    """The comparison, a dict for each contender.

    Args:
        plan: what was compared.
        known: the value of each run by its key.
        seconds: of each run by its key.
    """
    reference = next(iter(plan.contenders))
    tuning = {name: tuned(plan, known, name) for name in plan.contenders}
    fresh = {name: _fresh(plan, known, name) for name in plan.contenders}
    times = {name: _fresh(plan, seconds or {}, name) for name in plan.contenders}
    reference_place = best_place(tuning[reference])
    common = fresh[reference].get(1.0, {})
    made = []
    for name, values in tuning.items():
        place, own = best_place(values), fresh[name].get(1.0, {})
        row = {
            "contender": name,
            "tuning_runs": len(values) * len(plan.tune),
            "rate": rate_at(place),
            "interior": min(values) < place < max(values),
            "tuned": plan.sign * values[place],
            "at_reference_rate": plan.sign * values.get(reference_place, math.nan),
            "width_1": width(values, 0.01),
            "width_5": width(values, 0.05),
            "values": own,
            "seconds": fmean(times[name][1.0].values()) if times[name].get(1.0) else math.nan,
        }
        seeds = sorted(own.keys() & common.keys())
        if own:
            row["mean"] = fmean(own.values())
            row["spread"] = stdev(own.values()) if len(own) > 1 else math.nan
        if seeds and name != reference:
            theirs = [common[s] for s in seeds]
            row["paired"] = paired(
                [own[s] for s in seeds], theirs, plan.margin * abs(fmean(theirs)), plan.sign
            )
        if common and len(fresh[name]) > 1:
            target = plan.sign * fmean(common.values())
            means = {share: plan.sign * fmean(v.values()) for share, v in fresh[name].items()}
            row["steps_to_reference"] = share_to_reach(means.items(), target)
            each = {s: fmean(v.values()) for s, v in times[name].items() if v}
            own_time = each.get(1.0, math.nan) * row["steps_to_reference"]
            row["seconds_to_reference"] = own_time / fmean(times[reference][1.0].values())
        made.append(row)
    return made


def _fresh(plan, known, name):
    """Values on the fresh seeds at the one rate that has most, by share and seed."""
    by_place = defaultdict(lambda: defaultdict(dict))
    for (task, contender, place, seed, share), value in known.items():
        if (task, contender) == (plan.task, name) and seed in plan.fresh:
            by_place[place][share][seed] = value
    return max(by_place.values(), key=lambda v: len(v.get(1.0, {})), default={})


def table(made):
    """The comparison as Markdown."""
    lines = [
        "| optimizer | tuning runs | best rate | tuned | at the reference's rate | range of rates "
        "within 1 % / 5 % | fresh seeds | paired difference | steps / seconds to the reference's "
        "value | seconds |",
        f"|{' --- |' * 10}",
    ]
    for row in made:
        found = row.get("paired")
        cells = [
            f"`{row['contender']}`",
            str(row["tuning_runs"]),
            f"{row['rate']:.2g}" + ("" if row["interior"] else " (at the edge)"),
            f"{row['tuned']:.4g}",
            _number(row["at_reference_rate"]),
            " / ".join(
                f"{'≥ ' * cut}{factor:.1f}" for factor, cut in (row["width_1"], row["width_5"])
            ),
            _with_spread(row),
            paired_text(found) if found else "",
            " / ".join(
                _number(row[key], 2) for key in ("steps_to_reference", "seconds_to_reference")
            )
            if "steps_to_reference" in row
            else "",
            _number(row["seconds"], 3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_text(found):
    """A paired difference in one cell."""
    interval = "" if math.isnan(found.low) else f" ({found.low:+.3g} to {found.high:+.3g})"
    return f"{found.mean:+.3g}{interval}, {found.better} of {found.pairs} better: {found.verdict}"


def _with_spread(row):
    if "mean" not in row:
        return ""
    spread = "" if math.isnan(row["spread"]) else f" ± {row['spread']:.2g}"  # of one seed
    return f"{row['mean']:.4g}{spread}"


def _number(value, digits=4):
    return "" if math.isnan(value) else f"{value:.{digits}g}"
