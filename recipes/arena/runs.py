"""Runs of a comparison: made in processes that share the work, kept in one file of JSON lines.

A run that somebody makes is held by a lock that ends with its process, so that a killed comparison
goes on where it was.
"""

import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from .plan import missing

ROOT = Path(__file__).parent.parent.parent
LOG_EVERY = 20  # parts of a run whose training loss is recorded
QUIET = (
    *("--disable_tqdm", "True", "--report_to", "none", "--logging_strategy", "steps"),
    *("--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", str(1 / LOG_EVERY)),
)
TYPED = {"weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps"}
TYPED |= {"lr_scheduler_type", "max_grad_norm"}
OPTIMS = {"adamw": "adamw_torch_fused", "muon": "arena_muon", "prodigy": "arena_prodigy"}
OPTIMS |= {"lion": "lion_32bit"}  # of bitsandbytes


@dataclass(frozen=True)
class Task:
    """A recipe with arguments.

    Args:
        name: in the file of results.
        recipe: a script beside `compare.py`, without its ending.
        argv: its arguments.
        horizon: multiplies its steps.
    """

    name: str
    recipe: str
    argv: tuple[str, ...] = ()
    horizon: float = 1.0

    @property
    def script(self):
        """The path of the recipe."""
        return ROOT / "recipes" / f"{self.recipe}.py"

    def steps(self, share=1.0):
        """The steps of a run: those asked for, or the recipe's own, times the horizon."""
        if "--max_steps" in self.argv:
            own = int(self.argv[self.argv.index("--max_steps") + 1])
        else:
            own = int(re.search(r"max_steps=(\d+)", self.script.read_text()).group(1))
        return max(1, round(own * self.horizon * share))


def arguments(task, run, folder):
    """The command line of a run."""
    name, _, options = run.contender.partition(":")
    given = dict(word.split("=", 1) for word in options.split(",") if word)
    argv = [*task.argv, *QUIET, "--output_dir", str(folder), "--seed", str(run.seed)]
    argv += ["--max_steps", str(task.steps(run.share)), "--optim", OPTIMS.get(name, name)]
    argv += ["--learning_rate", f"{run.rate:g}"]
    rest = ",".join(f"{k}={v}" for k, v in given.items() if k not in TYPED)
    for key in TYPED & given.keys():
        argv += [f"--{key}", given[key]]
    return [*argv, "--optim_args", rest] if rest else argv


class Results:
    """All results of comparisons, in a file of JSON lines that processes add to.

    Args:
        file: need not exist.
    """

    def __init__(self, file):
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def rows(self, kind="contender"):
        """Every result, or every plan; a line that was cut off is left out.

        Args:
            kind: the field that tells: "contender" or "plan".
        """
        rows = []
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return [row for row in rows if kind in row]

    def values(self, task, quantity):
        """The value of each run of a task by its key; infinite where training diverged."""
        fields = ("task", "contender", "place", "seed", "share")
        return {
            tuple(row[field] for field in fields): value_of(row, quantity)
            for row in self.rows()
            if row["task"] == task
        }

    def state(self, plan, quantity):
        """Note a plan before its runs.

        Args:
            plan: the comparison.
            quantity: what is compared.

        Raises:
            SystemExit: if the margin of equivalence was another one before.
        """
        row = {"task": plan.task, "quantity": quantity, "plan": asdict(plan)}
        row = json.loads(json.dumps(row))
        before = [r for r in self.rows("plan") if r["task"] == plan.task]
        if before and before[0]["plan"]["margin"] != plan.margin:
            raise SystemExit(
                f"{plan.task}: the margin was {before[0]['plan']['margin']:g} when the first run "
                f"was made, and cannot become {plan.margin:g}. Take another name for the task."
            )
        if row not in before:
            self.add(row)

    def add(self, row):
        """Add a result, on a line of its own."""
        with FileLock(f"{self.file}.lock"):
            text = self.file.read_bytes() if self.file.exists() else b""
            with self.file.open("ab") as file:
                file.write(
                    b"\n" * (text[-1:] not in (b"", b"\n")) + json.dumps(row).encode() + b"\n"
                )

    def claim(self, run):
        """A context that holds a run, at most as long as this process; None if another has it."""
        folder = self.file.parent / "locks"
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / re.sub(r"[^\w.=-]+", "_", "-".join(map(str, run.key()))))
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            return None


def value_of(row, quantity):
    """A metric of the last split, or of the validation data where it has none."""
    metrics = row["metrics"]
    value = metrics.get(f"validation_{quantity}", metrics.get(quantity))
    return math.inf if value is None or not math.isfinite(value) else value


def compare(plan, task, results, quantity, make=None):
    """Make what is missing, in this process, until nothing is.

    Args:
        plan: the comparison.
        task: what its runs are.
        results: where they are kept.
        quantity: what is compared.
        make: a function of task and run that gives a result; default: [`train`].
    """
    make = make or train
    results.state(plan, quantity)
    bar = tqdm(desc=plan.task, unit="run")
    while runs := missing(plan, known := results.values(plan.task, quantity)):
        bar.total, bar.n = len(known) + len(runs), len(known)
        bar.refresh()
        for run in runs:
            lock = results.claim(run)
            if lock is None:
                continue
            with lock:
                if run.key() in results.values(plan.task, quantity):
                    continue
                bar.set_postfix_str(f"{run.contender} {run.rate:g} seed {run.seed}")
                results.add({**asdict(run), "rate": run.rate, **make(task, run, results)})
            break
        else:
            time.sleep(1)  # others make all of them
    bar.close()


def train(task, run, results):
    """Make a run in a process of its own; what it gave."""
    name = re.sub(r"[^\w.=-]+", "_", f"{run.contender}-{run.rate:g}-{run.seed}-{run.share:g}")
    folder = results.file.parent / run.task / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    argv, log = arguments(task, run, folder), folder.parent / f"{name}.log"
    from .launch import launch  # here, so that each run finds in memory what it will import

    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    process = context.Process(target=_in_child, args=(launch, task.script, argv, folder, log))
    process.start()
    process.join()
    text = log.read_text() if log.exists() else ""
    if process.exitcode:
        if "Input contains NaN" in text:  # scikit-learn's word for predictions that diverged
            return {"metrics": {}, "curve": [], "steps": task.steps(run.share)}
        raise SystemExit(f"{run} failed, see {log}: {text.splitlines()[-1:]}")
    record = json.loads((folder / "normopt_run.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    fields = ("step", "seconds", "cpu_seconds", "loss")
    curve = [{key: round(row[key], 4) for key in fields} for row in rows if "loss" in row]
    for large in folder.glob("**/*.safetensors"):
        large.unlink()
    return {
        "steps": record["steps"],
        "metrics": record["metrics"],
        "metric": record["metric"],
        "seconds": rows[-1]["seconds"],
        "cpu_seconds": rows[-1]["cpu_seconds"],
        "curve": curve,
        "recipe": task.recipe,
        "argv": list(task.argv),
        "commit": record["commit"],
        "hardware": record["hardware"],
        "python": platform.python_version(),
    }


def _in_child(launch, script, argv, folder, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    try:
        launch(script, argv, folder / "rows.json")
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
