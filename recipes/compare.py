"""Compare optimizers on a recipe, or any script with a Trainer: rates tuned, seeds paired.

    python recipes/compare.py text_classification \
        --contenders adamw@1e-3 adamw:adam_beta2=0.99@1e-3 muon:aux=3@1e-3 normopt@5e-4 \
        -- --max_steps 120

A contender is an optimizer, its options, and the rate to begin around: `adamw` (torch's, fused),
`muon` (torch's, with AdamW for the rest at `aux` times the rate), `prodigy` (prodigyopt), `lion`
(bitsandbytes), or any `optim` of `TrainingArguments`, such as `normopt_modular`. The first is the
reference. All get the same number of rates on the tuning seeds; each one's best is run on fresh
seeds. What follows `--` goes to the recipe.

Results are lines of one file. A comparison that was killed goes on when it is started again, and
the same command in several processes shares the work. The table and a picture come at the end, or
from the file alone by `--report`; `--page` writes those of whole files into a page.
"""

import argparse
import sys
from pathlib import Path

from arena.pictures import draw
from arena.plan import Plan
from arena.report import rows, table
from arena.runs import ROOT, Results, Task, compare

START, END = "<!-- comparisons -->\n", "<!-- end of comparisons -->"


def report(results, task, picture=None):
    """The table of a task as Markdown, from the file of results.

    Args:
        results: the file.
        task: its name.
        picture: where to draw it; None: nowhere.
    """
    stated = [row for row in results.rows("plan") if row["task"] == task]
    plan, quantity = Plan(**merged([row["plan"] for row in stated])), stated[-1]["quantity"]
    own = [row for row in results.rows() if row["task"] == task]
    known = results.values(task, quantity)
    plan.contenders = {n: r for n, r in plan.contenders.items() if any(k[1] == n for k in known)}
    seconds = {
        tuple(row[field] for field in ("task", "contender", "place", "seed", "share")): row[
            "cpu_seconds"
        ]
        for row in own
        if "cpu_seconds" in row
    }
    if picture:
        draw(plan, own, known, quantity, picture)
    one = own[-1]
    about = (
        f"`{one['recipe']}` with `{' '.join(one['argv'])}`, {one['steps']} steps; {quantity}, "
        f"tuning seeds {', '.join(map(str, plan.tune))}, fresh seeds "
        f"{', '.join(map(str, plan.fresh)) or 'none'}, margin {100 * plan.margin:g} %; "
        f"{one['hardware']}, processor seconds; commit {one['commit'][:10]}."
    )
    return f"{about}\n\n{table(rows(plan, known, seconds))}"


def merged(plans):
    """The last of several plans of one task, with the contenders and seeds of all."""
    seeds = {
        field: tuple(sorted({seed for plan in plans for seed in plan[field]}))
        for field in ("tune", "fresh", "shares")
    }
    contenders = {name: rate for plan in plans for name, rate in plan["contenders"].items()}
    first = next(iter(plans[-1]["contenders"]))
    return {**plans[-1], **seeds, "contenders": {first: contenders[first], **contenders}}


def write_page(page, files):
    """Put the tables of files of results into a page, between its two marks."""
    parts = []
    for file in files:
        results = Results(file)
        for task in dict.fromkeys(row["task"] for row in results.rows()):
            parts.append(f"### {task}\n\n{report(results, task)}\n")
    before, _, rest = page.read_text().partition(START)
    page.write_text(f"{before}{START}\n" + "\n".join(parts) + f"\n{END}{rest.partition(END)[2]}")


def read_contenders(words):
    """Names with their options, and the rates to begin around."""
    found = {}
    for word in words:
        name, at, rate = word.rpartition("@")
        try:
            found[name] = float(rate)
        except ValueError:
            at = ""
        if not at or not name:
            raise SystemExit(f"--contenders {word}: expected NAME:OPTION=VALUE,...@RATE.")
    return found


def main():
    argv, own = sys.argv[1:], []
    if "--" in argv:
        argv, own = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("recipe", nargs="?", help="a script in this folder, without its ending")
    add("--contenders", nargs="+", default=["adamw@1e-3", "normopt@1e-3"], metavar="NAME@RATE")
    add("--task", help="the name in the file of results; default: the recipe's, and the horizon")
    add("--tune", type=int, nargs="+", default=[0, 1], help="seeds that choose the rate")
    add("--fresh", type=int, nargs="*", default=[10, 11, 12, 13, 14], help="seeds of the report")
    add("--horizon", type=float, default=1.0, help="multiplies the recipe's steps")
    add("--shares", type=float, nargs="*", default=[], help="also run these shares of the steps")
    add("--quantity", default="loss", help="what is compared, of the validation data")
    add("--more_is_better", action="store_true", help="of the quantity")
    add("--margin", type=float, default=0.01, help="of equivalence, relative")
    add("--coarse", action="store_true", help="only rates a factor of 2 apart")
    add("--most", type=int, default=12, help="rates for each contender, at most")
    add("--file", type=Path, default=ROOT / "outputs/arena/runs.jsonl", help="of results")
    add("--report", action="store_true", help="make no run")
    add("--page", type=Path, nargs="+", metavar="PAGE FILE", help="write files' tables into a page")
    args = parser.parse_args(argv)
    if args.page:
        return write_page(args.page[0], args.page[1:])
    if args.recipe is None:
        parser.error("name a recipe")
    name = args.task or args.recipe + (f"-x{args.horizon:g}" if args.horizon != 1 else "")
    results = Results(args.file)
    if not args.report:
        task = Task(name, args.recipe, tuple(own), args.horizon)
        plan = Plan(
            task=name,
            contenders=read_contenders(args.contenders),
            tune=tuple(args.tune),
            fresh=tuple(args.fresh),
            shares=tuple(args.shares),
            fine=not args.coarse,
            most=args.most,
            margin=args.margin,
            sign=-1.0 if args.more_is_better else 1.0,
        )
        compare(plan, task, results, args.quantity)
    print(report(results, name, args.file.with_name(f"{name}.png")))
    return None


if __name__ == "__main__":
    sys.exit(main())
