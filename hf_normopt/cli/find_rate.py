"""`hf-normopt find-rate`: short runs of a script that nobody edited, each at another rate."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..cards.files import check_picture, check_place, write_whole
from ..tables import format_table
from ..trainer.trial import Outcome, Trial
from .curves import SUFFIXES

NEAR = 0.02  # of the best loss: rates whose loss is no further are as good
LAST = 0.25  # of the steps: their mean loss is what a rate is judged by
FORMAT_VERSION = 1
# For scripts that begin a report before they make a trainer.
_SILENT = dict.fromkeys(("WANDB_MODE", "COMET_MODE", "SWANLAB_MODE"), "disabled")

_DESCRIPTION = """Run SCRIPT for a few per cent of its steps at several learning rates, each in a
process of its own with the same seed and data, and name the one to use. The script is not edited.
It may take --learning_rate or make its TrainingArguments itself; any optimizer of Trainer will do.
A short run has the whole of the schedule. It ends with its training: nothing is saved, evaluated,
reported or pushed, and output_dir is a temporary folder."""


@dataclass(frozen=True)
class Tried:
    """A rate and what it led to; `power` is that of the factor between rates."""

    power: int
    outcome: Outcome

    @property
    def loss(self) -> float:
        """The mean over the last quarter of the steps; infinite where the run did not get there."""
        losses = self.outcome.losses
        is_whole = not self.outcome.error and len(losses) >= self.outcome.steps
        if not is_whole or not all(map(math.isfinite, losses)):
            return math.inf
        return fmean(losses[-max(1, round(LAST * len(losses))) :])


@dataclass
class Search:
    """What was tried so far; goes to the state file.

    Args:
        asked: the command and the options that must be the same where a search is resumed.
        tried: by power of the factor.
    """

    asked: dict[str, Any]
    tried: dict[int, Tried] = field(default_factory=dict)

    @property
    def best(self) -> int | None:
        """The power with the least loss; None where no rate is stable."""
        stable = [power for power, tried in self.tried.items() if math.isfinite(tried.loss)]
        return min(stable, key=lambda power: self.tried[power].loss, default=None)

    @property
    def near(self) -> list[int]:
        """The best power and its neighbours whose losses are as good, in order."""
        best = self.best
        if best is None:
            return []
        most = self.tried[best].loss + NEAR * abs(self.tried[best].loss)
        is_near = lambda power: power in self.tried and self.tried[power].loss <= most
        low = high = best
        while is_near(low - 1):
            low -= 1
        while is_near(high + 1):
            high += 1
        return list(range(low, high + 1))

    @property
    def chosen(self) -> int | None:
        """The middle of `near`; of two the better one."""
        near = self.near
        middle = near[(len(near) - 1) // 2 : len(near) // 2 + 1]
        return min(middle, key=lambda power: self.tried[power].loss, default=None)

    @property
    def is_at_edge(self) -> bool:
        """Whether the best rate is the largest or the smallest one."""
        return self.best in (min(self.tried), max(self.tried))

    def next(self, first: int, most: int) -> int | None:
        """The next power to try: `first` around 0, then beyond the edge; None: it is done.

        Above a rate that is too large none is tried.
        """
        stable = [power for power in self.tried if math.isfinite(self.tried[power].loss)]
        too_large = min(set(self.tried) - set(stable), default=math.inf)
        for i in range(first):
            power = (i + 1) // 2 * (1 if i % 2 else -1)  # 0, 1, -1, 2, -2
            if power not in self.tried and power < too_large:
                return power
        if len(self.tried) >= most or (self.tried and not self.is_at_edge and stable):
            return None
        if not stable or self.best == min(self.tried):
            return min(self.tried) - 1
        return None if max(self.tried) + 1 >= too_large else max(self.tried) + 1


def find_rate(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: what follows `hf-normopt find-rate`.

    Returns:
        The exit status: 0; 1 where no rate was stable; 2 where the script cannot be run.
    """
    parser = _parser()
    split = 0
    while split < len(argv) and argv[split].startswith("--"):
        split += 1 if "=" in argv[split] else 2
    args = parser.parse_args(argv[:split] if argv[:1] != ["-h"] else argv[:1])
    command = list(argv[split:])
    if not command or (command[0].startswith("-") and command[0] != "-m"):
        parser.error("name a script, or -m and a module, after the options of find-rate")
    try:
        if args.plot:
            check_picture(args.plot, SUFFIXES)
        if args.state:
            check_place(args.state)
        search = _loaded(args, command)
        return _search(args, command, search)
    except (OSError, ValueError, ImportError) as error:
        print(f"hf-normopt find-rate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-normopt find-rate",
        usage="%(prog)s [options] SCRIPT [ARGUMENTS ...]\n"
        "       %(prog)s [options] -m MODULE [ARGUMENTS ...]",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("--steps", type=float, default=0.05, help="of a run; at most 1: as a fraction (0.05)")
    add("--factor", type=float, default=2.0, help="between one rate and the next (2)")
    add("--points", type=int, default=5, help="rates that are tried in any case (5)")
    add("--most", type=int, default=12, help="rates that are tried at most (12)")
    add("--start", type=float, help="the rate in the middle; default: the script's own")
    add("--optim", default="", help="train with it, such as normopt; default: the script's own")
    add("--optim_args", "--optim-args", default="", help="for --optim")
    add("--state", metavar="FILE", help="keep what was found; with the file of before, go on")
    add("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")
    return parser


def _asked(args: argparse.Namespace, command: Sequence[str]) -> dict[str, Any]:
    if not (args.steps > 0 and args.factor > 1 and args.points > 0):
        raise ValueError("--steps and --points must be positive, --factor above 1.")
    names = ("steps", "factor", "start", "optim", "optim_args")
    return {"command": list(command), **{name: getattr(args, name) for name in names}}


def _loaded(args: argparse.Namespace, command: Sequence[str]) -> Search:
    """The search of the state file, or a new one.

    Raises:
        ValueError: if the file is of another search.
    """
    asked = _asked(args, command)
    if not args.state or not os.path.exists(args.state):
        return Search(asked)
    try:
        content = json.loads(Path(args.state).read_text())
        version, before, rows = (content[key] for key in ("find_rate_version", "asked", "tried"))
        tried = {row["power"]: Tried(row["power"], Outcome(**row["outcome"])) for row in rows}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{args.state} is no state of find-rate, and is left alone.") from None
    others = [key for key in asked if asked[key] != before.get(key)]
    if version != FORMAT_VERSION or others:
        raise ValueError(
            f"{args.state} is of another search ({', '.join(others) or 'another version'}: "
            f"{', '.join(repr(before.get(key)) for key in others)}). Name another file, or give "
            "the same arguments."
        )
    return Search(asked, tried)


def _save(search: Search, path: str | None) -> None:
    if path:
        rows = [asdict(search.tried[power]) for power in sorted(search.tried)]
        content = {"find_rate_version": FORMAT_VERSION, "asked": search.asked, "tried": rows}
        write_whole(Path(path), f"{json.dumps(content)}\n".encode())


def _search(args: argparse.Namespace, command: Sequence[str], search: Search) -> int:
    with tempfile.TemporaryDirectory(prefix="find-rate-") as folder:
        while (power := search.next(args.points, args.most)) is not None:
            if len(search.tried) >= args.points:
                print("The best rate is at the edge: one more.", flush=True)
            trial = Trial(
                outcome=str(Path(folder, f"{power}.json")),
                folder=str(Path(folder, f"{power}")),
                factor=args.factor**power,
                **{name: search.asked[name] for name in ("steps", "start", "optim", "optim_args")},
            )
            tried = Tried(power, _outcome(trial, command, args.factor, search))
            search.tried[power] = tried
            _save(search, args.state)
            print(f"{tried.outcome.rate:.3g}: {_loss_text(tried)}", flush=True)
    print(f"\n{_table(search)}\n\n{_verdict(search)}")
    if args.plot:
        _draw(search, args.plot)
    return 0 if search.chosen is not None else 1


def _outcome(trial: Trial, command: Sequence[str], factor: float, search: Search) -> Outcome:
    """Run the script once.

    Raises:
        ValueError: if it did not train, at a rate that is not above all others.
    """
    log = Path(f"{trial.folder}.log")
    environment = {**os.environ, "PYTHONHASHSEED": "0", **_SILENT}
    with log.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "hf_normopt", "run", *command],
            env=environment | trial.environment(),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if os.path.exists(trial.outcome):
        outcome = Outcome(**json.loads(Path(trial.outcome).read_text()))
        if outcome.losses or search.tried:
            return outcome
    said = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise ValueError(
        f"the script ended with status {done.returncode}, and no Trainer.train() made a step. It "
        f"said:\n{said}"
    )


def _loss_text(tried: Tried) -> str:
    outcome = tried.outcome
    if math.isfinite(tried.loss):
        return f"{tried.loss:.4g}"
    if outcome.error:
        return f"failed at step {len(outcome.losses) + 1}: {outcome.error.splitlines()[0][:80]}"
    if not all(map(math.isfinite, outcome.losses)):
        return f"not finite at step {len(outcome.losses)}"
    return f"ended at step {len(outcome.losses)}"


def _table(search: Search) -> str:
    rows = []
    for power in sorted(search.tried):
        tried = search.tried[power]
        losses = tried.outcome.losses
        notes = {search.best: "least loss", search.chosen: "use this"}
        note = notes.get(power) or (f"within {NEAR:.0%}" if power in search.near else "")
        first = f"{losses[0]:.4g}" if losses else ""
        rows.append((f"{tried.outcome.rate:.4g}", first, _loss_text(tried), note))
    return format_table(("learning rate", "first loss", "loss at the end", ""), rows)


def _verdict(search: Search) -> str:
    chosen = search.chosen
    if chosen is None:
        return (
            "No rate is stable. Look at the data and the loss first, or begin lower with --start."
        )
    outcome, near = search.tried[chosen].outcome, search.near
    low, high = (search.tried[power].outcome.rate for power in (near[0], near[-1]))
    text = (
        f"Use a learning rate of {outcome.rate:.4g} with {outcome.optimizer}. Judged by the mean "
        f"loss of the last quarter of {outcome.steps} steps ({outcome.total} in the script), in a "
        "schedule that ends with them."
    )
    if low < high:
        text += f" From {low:.4g} to {high:.4g} it is within {NEAR:.0%} of the best."
    if search.tried[chosen].loss >= fmean(outcome.losses[:3]):
        text += " But the loss fell at none of the rates: more --steps may tell more."
    if search.is_at_edge:
        text += (
            " The best rate is at the edge of what was tried: a larger --most, or another --start, "
            "tells more."
        )
    above = search.tried.get(near[-1] + 1)
    if above is not None and not math.isfinite(above.loss):
        text += f" {above.outcome.rate:.4g} is too large."
    return text


def _draw(search: Search, path: str) -> None:
    """Losses over rates, and over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    over_rates, over_steps = figure.subplots(1, 2)
    stable = [t for _, t in sorted(search.tried.items()) if math.isfinite(t.loss)]
    over_rates.plot([t.outcome.rate for t in stable], [t.loss for t in stable], marker="o")
    for _, tried in sorted(search.tried.items()):
        over_steps.plot(tried.outcome.losses, label=f"{tried.outcome.rate:.3g}")
        if not math.isfinite(tried.loss):
            over_rates.axvline(tried.outcome.rate, color="tab:red", linestyle=":")
    over_rates.set(xscale="log", xlabel="learning rate", ylabel="loss at the end")
    over_steps.set(xlabel="step", ylabel="loss", yscale="log")
    over_steps.legend(fontsize="small")
    figure.savefig(path, dpi=110)
