"""Make the model cards of the recipes, each with AdamW beside it, and the tables of the READMEs.

    python recipes/cards.py token_classification      # an hour and less for each, see --jobs
    python recipes/cards.py --table                   # into README.md and recipes/README.md

`compare.py` compares more optimizers, with more care, and makes no cards.

Every optimizer starts with the same three rates, and goes on while the best of its own is at the
edge; validation data decide. The other seeds run at that rate. Runs that are there are not run
again. At the end the recipe's default runs as a user would run it, its card takes in all results,
and card, picture and record are copied to model_cards.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
RUNS = Path("outputs/compare")  # from the root: commands with relative paths stand in the cards
CARDS = ROOT / "model_cards"
OPTIMIZERS = ("normopt", "adamw_torch")
SEEDS = (42, 43, 44)
LADDER = [digit * 10.0**power for power in range(-5, 0) for digit in (1, 2, 5)]
KEPT = ("README.md", "normopt_norms.png", "normopt_run.json", "normopt.json")

# The rates to start with, and whether a larger metric is better.
RECIPES = {
    "text_classification": ((5e-4, 1e-3, 2e-3), True),
    "token_classification": ((5e-4, 1e-3, 2e-3), True),
    "pretrain_causal_lm": ((2e-3, 5e-3, 1e-2), False),
    "sft_lora": ((1e-3, 2e-3, 5e-3), True),
    "image_classification": ((1e-3, 2e-3, 5e-3), True),
    "audio_classification": ((1e-3, 2e-3, 5e-3), True),
    "translation": ((1e-3, 2e-3, 5e-3), True),
    "summarization": ((1e-3, 2e-3, 5e-3), True),
}


def run(recipe, optim, rate, seed):
    """Run a recipe unless it has been; its record."""
    folder = RUNS / recipe / f"{optim}-{rate:g}-{seed}"
    if not (ROOT / folder / "normopt_run.json").exists():
        argv = ["--output_dir", folder, "--optim", optim, "--learning_rate", f"{rate:g}"]
        argv += ["--seed", seed, "--save_strategy", "no", "--disable_tqdm", "True"]
        argv += ["--eval_strategy", "no", "--logging_strategy", "no"]  # validation at the end only
        start(recipe, argv, ROOT / f"{folder}.log")
    return json.loads((ROOT / folder / "normopt_run.json").read_text())


def start(recipe, argv, log):
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, f"recipes/{recipe}.py", *argv]
    with log.open("w") as output:
        done = subprocess.run([*map(str, command)], cwd=ROOT, stdout=output, stderr=output)
    if done.returncode:
        raise SystemExit(f"{recipe} failed, see {log}: {log.read_text().splitlines()[-1:]}")


def search(recipe, optim, pool):
    """The best rate on the first seed, with a worse one on either side of it."""
    rates, larger_is_better = RECIPES[recipe]
    places = [min(range(len(LADDER)), key=lambda i: abs(LADDER[i] - rate)) for rate in rates]
    values = {}
    while True:
        new = [place for place in places if place not in values]
        records = pool.map(lambda place: run(recipe, optim, LADDER[place], SEEDS[0]), new)
        for place, record in zip(new, records, strict=True):
            values[place] = record["metrics"][f"validation_{record['metric']}"]
            print(f"{recipe} {optim} {LADDER[place]:g}: {values[place]:.4f}", flush=True)
        best = (max if larger_is_better else min)(values, key=values.get)
        if min(values) < best < max(values):
            return LADDER[best]
        places = [best - 1, best + 1]
        if not 0 < best < len(LADDER) - 1:
            raise SystemExit(
                f"{recipe}, {optim}: {LADDER[best]:g} is best, and at the ladder's end."
            )


def compare(recipe, jobs):
    """All runs of a recipe."""
    with ThreadPoolExecutor(jobs) as pool:
        best = {optim: search(recipe, optim, pool) for optim in OPTIMIZERS}
        wanted = [(recipe, optim, best[optim], seed) for optim in OPTIMIZERS for seed in SEEDS]
        list(pool.map(lambda arguments: run(*arguments), wanted))
    print(f"{recipe}: the best rates are {best}", flush=True)


def run_default(recipe):
    """The recipe as users run it."""
    start(recipe, [], ROOT / f"outputs/{recipe}.log")


def publish(recipe):
    """The card of the default run with the results of all others."""
    folder = f"outputs/{recipe}"
    others = sorted(path.parent for path in (ROOT / RUNS / recipe).glob("*/normopt_run.json"))
    others = [path.relative_to(ROOT) for path in others]
    card = [sys.executable, "-m", "hf_normopt", "card", folder, "--compare", *map(str, others)]
    subprocess.run(card, cwd=ROOT, check=True)
    (CARDS / recipe).mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(ROOT / folder / name, CARDS / recipe / name)


def table(recipes="", cards="../model_cards/"):
    """The results of all recipes, from the records of their cards.

    Args:
        recipes: where the scripts are, from the file that shows the table.
        cards: where the cards are.
    """
    lines = [
        "| recipe | test metric | simple method | AdamW | NormOpt | seconds, AdamW / NormOpt |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (_, larger_is_better) in RECIPES.items():
        if not (CARDS / name / "normopt_run.json").exists():
            continue
        record = json.loads((CARDS / name / "normopt_run.json").read_text())
        arrow = "↑" if larger_is_better else "↓"
        best = (max if larger_is_better else min)(record["baselines"].items(), key=itemgetter(1))
        found = {optim: at_the_best_rate(record, optim) for optim in OPTIMIZERS}
        cells = [
            f"[{name}]({recipes}{name}.py)",
            f"[{record['metric']}]({cards}{name}/README.md) {arrow}",
            f"{best[1]:.3g} ({best[0]})",
            *(
                f"{found[o]['mean']:.3g} ± {found[o]['spread']:.2g}, rate {found[o]['rate']:g}"
                for o in reversed(OPTIMIZERS)
            ),
            " / ".join(f"{found[o]['seconds']:.0f}" for o in reversed(OPTIMIZERS)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_the_best_rate(record, optim):
    """Mean and standard deviation over the seeds at the one rate that has several."""
    by_rate = {}
    for run in record["compared"]:
        if run["optimizer"] == optim:
            by_rate.setdefault(run["learning_rate"], []).append(run)
    rate, runs = max(by_rate.items(), key=lambda item: len(item[1]))
    values = [run["test"] for run in runs]
    seconds = min(run["seconds"] for runs in by_rate.values() for run in runs)
    return {"rate": rate, "mean": mean(values), "spread": stdev(values), "seconds": seconds}


def write_tables():
    """Put the table into both READMEs."""
    for file, places in (
        (ROOT / "README.md", ("recipes/", "model_cards/")),
        (ROOT / "recipes" / "README.md", ()),
    ):
        start, end = "<!-- results -->\n", "<!-- end of results -->"
        before, _, rest = file.read_text().partition(start)
        after = rest.partition(end)[2]
        file.write_text(f"{before}{start}{table(*places)}\n{end}{after}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", choices=[[], *RECIPES], metavar="RECIPE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--publish", action="store_true", help="only the default run and its card")
    parser.add_argument("--table", action="store_true", help="only write the table")
    args = parser.parse_args()
    recipes = [] if args.table else args.recipes or list(RECIPES)
    if not args.publish:
        os.environ["OMP_NUM_THREADS"] = "1"
        for recipe in recipes:
            compare(recipe, args.jobs)
        del os.environ["OMP_NUM_THREADS"]
    for recipe in recipes:  # before a file changes: their cards name the commit
        run_default(recipe)
    for recipe in recipes:
        publish(recipe)
    write_tables()


if __name__ == "__main__":
    main()
