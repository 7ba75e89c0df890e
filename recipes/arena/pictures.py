"""Pictures of a comparison."""

from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from .plan import best_place, rate_at, tuned


def draw(plan, rows, known, quantity, file):
    """Value over rate, training loss over steps and seconds, and paired values.

    Args:
        plan: what was compared.
        rows: of the file of results, of this task.
        known: the value of each run by its key.
        quantity: what is compared.
        file: where the picture goes.
    """
    figure, axes = plt.subplots(1, 4, figsize=(20, 4.5), constrained_layout=True)
    reference = next(iter(plan.contenders))
    for name in plan.contenders:
        values = tuned(plan, known, name)
        if not values:
            continue
        color = _over_rate(axes[0], plan, known, name, values)
        own = [r for r in rows if r["contender"] == name and r["place"] == best_place(values)]
        own = [r for r in own if r["share"] == 1 and r["curve"]]
        for axis, key in ((axes[1], "step"), (axes[2], "cpu_seconds")):
            for row in own:
                points = [(p[key], p["loss"]) for p in row["curve"]]
                axis.plot(*zip(*points, strict=True), color=color, alpha=0.5)
        _dots(axes[3], plan, known, name, reference, color)
    axes[0].set(xscale="log", xlabel="learning rate", ylabel=f"{quantity}, tuning seeds")
    axes[1].set(xlabel="step", ylabel="training loss")
    axes[2].set(xlabel="processor seconds of training", ylabel="training loss")
    axes[3].set(xlabel=f"{quantity} of {reference}", ylabel=f"{quantity}, same seed")
    axes[0].legend(fontsize="small")
    figure.suptitle(plan.task)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def _over_rate(axis, plan, known, name, values):
    """A line through the means, a band from the least to the greatest; its color."""
    finite = {p: v for p, v in values.items() if np.isfinite(v)}
    rates = [rate_at(p) for p in finite]
    (line,) = axis.plot(rates, [plan.sign * v for v in finite.values()], "o-", label=name)
    seeds = [
        [known.get((plan.task, name, p, seed, 1.0), np.nan) for seed in plan.tune] for p in finite
    ]
    if seeds:
        axis.fill_between(
            rates, np.min(seeds, 1), np.max(seeds, 1), color=line.get_color(), alpha=0.2
        )
    return line.get_color()


def _dots(axis, plan, known, name, reference, color):
    """A dot for each fresh seed; below the diagonal the value is less than the reference's."""
    by_seed = {}
    for (_, contender, _, seed, share), value in known.items():
        if seed in plan.fresh and share == 1 and contender in (name, reference):
            by_seed.setdefault(seed, {}).setdefault(contender, []).append(value)
    pairs = [
        (fmean(found[reference]), fmean(found[name]))
        for found in by_seed.values()
        if reference in found and name in found
    ]
    if pairs:
        axis.plot(*zip(*pairs, strict=True), "o", color=color)
        ends = [min(x for x, _ in pairs), max(x for x, _ in pairs)]
        axis.plot(ends, ends, color="gray", linewidth=0.5)
