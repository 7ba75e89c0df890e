"""What a script tells of its run, `normopt_run.json`, and the model card that is written from it.

`hf_normopt/cards/report.py` has what NormOpt did; this has what only the script knows, and holds
for runs with any optimizer, so that they can be compared.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..tables import format_table
from .report import json_object, read_versioned, write_json

RUN_FILE = "normopt_run.json"
RUN_VERSION = 1
HYPERPARAMETERS = "The following hyperparameters were used during training:\n"  # as transformers


def record_run(trainer: Any, facts: Mapping[str, Any]) -> None:
    """Write `normopt_run.json` into the trainer's `output_dir`.

    Args:
        trainer: that has trained.
        facts: the keyword arguments of [`finish_run`], and optimizer, optim_args, learning_rate.

    Raises:
        ValueError: if the headline is not among the metrics.
    """
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    final = "test" if any(key.startswith("test_") for key in facts["metrics"]) else "validation"
    headline = f"{final}_{facts['metric']}"
    if headline not in facts["metrics"]:
        raise ValueError(f"The metrics are {', '.join(facts['metrics'])}, and not {headline}.")
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    hyperparameters["weight_decay"] = trainer.args.weight_decay
    base = facts["base_model"]
    is_local = base is not None and Path(base).is_dir()
    dataset_id = facts["dataset_id"]
    record = {
        "run_version": RUN_VERSION,
        **facts,
        "dataset_id": None if dataset_id and Path(dataset_id).exists() else dataset_id,
        "final_split": final,
        "base_model": Path(base).name if is_local else base,
        "base_model_is_local": is_local,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "hyperparameters": {key: str(value) for key, value in hyperparameters.items()},
        "evaluations": [
            {key: value for key, value in row.items() if isinstance(value, (int, float))}
            for row in history
            if "eval_loss" in row
        ],
        "seconds": next((row["train_runtime"] for row in history if "train_runtime" in row), None),
        "command": _command(),
        "commit": _commit(),
        "hardware": _hardware(trainer),
        "compared": [],
    }
    write_run(folder, record)
    trainer.has_normopt_run = True  # later cards of this trainer are written from the record


def write_run(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record into a folder.

    Raises:
        FileExistsError: if something else has its name.
        OSError: if it cannot be written.
    """
    path = Path(folder) / RUN_FILE
    if os.path.lexists(path) and "run_version" not in json_object(path):
        raise FileExistsError(f"{path} is not a record of hf_normopt: it is left as it is")
    write_json(path, record)


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record of a folder; None if it has none.

    Raises:
        ValueError: if it is not whole, or of another version.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return None
    return read_versioned(path, "run_version", RUN_VERSION)


def compare_runs(folder: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]]) -> None:
    """Take the results of other runs of the same script into a run's record.

    Raises:
        ValueError: if a folder has no record, or its run was for another task, data set or metric.
    """
    record = read_run(folder)
    if record is None:
        raise ValueError(f"{folder} has no {RUN_FILE}: its script did not call finish_run.")
    compared = []
    for other in others:
        found = read_run(other)
        if found is None:
            raise ValueError(f"{other} cannot be compared: it has no {RUN_FILE}.")
        own, its = _setting(record), _setting(found)
        if differences := [key for key in {**own, **its} if own.get(key) != its.get(key)]:
            what = "; ".join(f"{key} is {its.get(key)}, not {own.get(key)}" for key in differences)
            raise ValueError(f"{other} cannot be compared with {folder}: {what}.")
        keys = ("optimizer", "optim_args", "learning_rate", "seed", "steps", "seconds", "commit")
        names = {split: f"{split}_{found['metric']}" for split in _splits(record)}
        values = {split: found["metrics"].get(name) for split, name in names.items()}
        compared.append({**{key: found[key] for key in keys}, **values})
    record["compared"] = compared
    write_run(folder, record)


def _setting(record: Mapping[str, Any]) -> dict[str, Any]:
    """What runs that are compared have in common."""
    keys = ("task", "dataset", "metric", "base_model", "steps")
    free = ("optimizer", "learning_rate", "seed", "eval_batch_size", "total_eval_batch_size")
    others = {key: value for key, value in record["hyperparameters"].items() if key not in free}
    return {**{key: record[key] for key in keys}, **others}


def final_value(record: Mapping[str, Any]) -> float:
    """The headline result of a run."""
    return float(record["metrics"][f"{record['final_split']}_{record['metric']}"])


def run_card(record: Mapping[str, Any]) -> ModelCard:
    """The card of a run, all but what NormOpt has to say."""
    metric, base, is_local = (record[k] for k in ("metric", "base_model", "base_model_is_local"))
    data = ModelCardData(
        language=record["language"],
        license=record["license"],
        library_name=record["library_name"],
        tags=["generated_from_trainer"],
        base_model=None if is_local else base,
        datasets=record["dataset_id"],
        metrics=[metric],
        pipeline_tag=record["task"],
        model_name=record["title"],
        eval_results=[
            EvalResult(
                task_type=record["task"],
                dataset_type=record["dataset_id"] or record["dataset"],
                dataset_name=record["dataset"],
                dataset_split=record["final_split"],
                metric_type=metric,
                metric_value=round(final_value(record), 4),
            )
        ],
    )
    origin = "trained from scratch" if base is None else f"fine-tuned from {_link(base, is_local)}"
    final = record["final_split"]
    name = f"`{final}_{metric}`"
    results = [("this model", f"{final_value(record):.4f}")]
    results += [(what, f"{value:.4f}") for what, value in record["baselines"].items()]
    seconds = record["seconds"]
    facts = {
        "command": f"`{record['command']}`",
        "commit": record["commit"],
        "hardware": record["hardware"],
        "training took": f"{seconds:.0f} s, evaluation during it included" if seconds else None,
    }
    parts = [
        f"# {record['title']}",
        f"A model for {record['task']}, {origin} on {record['dataset']} in {record['steps']:,} "
        f"steps: {name} is {final_value(record):.4f}.",
        "## Results",
        f"On the {final} data, next to what a simple method reaches ({name}):",
        format_table(("", f"{final} {metric}"), results, markdown=True),
        _all_metrics(record),
        *_comparison(record),
        "## Data",
        record["data"],
        "## Limits",
        record["limits"],
        "## Training",
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value),
        f"{HYPERPARAMETERS}{_hyperparameters(record)}",
        *_evaluations(record),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _link(base: str, is_local: bool) -> str:
    if is_local:
        return f"the local model `{base}`"
    return f"[{base}](https://huggingface.co/{base})"


def _hyperparameters(record: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in record["hyperparameters"].items())


def _all_metrics(record: Mapping[str, Any]) -> str:
    """Validation and test side by side, without what is only about speed."""
    found, splits = record["metrics"], _splits(record)
    rows = [
        (name, *(_number(found.get(f"{split}_{name}")) for split in splits))
        for name in _metric_names(record)
    ]
    return format_table(("", *splits), rows, markdown=True)


def _metric_names(record: Mapping[str, Any]) -> list[str]:
    """The metrics of the final split, without those about speed and size."""
    prefix = f"{record['final_split']}_"
    return [
        key.removeprefix(prefix)
        for key, value in record["metrics"].items()
        if key.startswith(prefix)
        and isinstance(value, (int, float))
        and not key.endswith(("_runtime", "_per_second", "_preparation_time", "_num_tokens"))
    ]


def _splits(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(("validation", record["final_split"])))


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _comparison(record: Mapping[str, Any]) -> list[str]:
    """Runs with the same steps, by optimizer and rate."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for run in record["compared"]:
        key = (run["optimizer"], run["optim_args"], run["learning_rate"])
        groups.setdefault(key, []).append(run)
    if not groups:
        return []
    rows = [
        (
            f"{optimizer} {args}".strip(),
            f"{rate:g}",
            str(len({run["seed"] for run in runs})),
            *(_mean_and_range([run[split] for run in runs]) for split in _splits(record)),
        )
        for (optimizer, args, rate), runs in sorted(groups.items())
    ]
    header = ("optimizer", "learning rate", "seeds", *_splits(record))
    return [
        f"The same script with other optimizers, rates and seeds at the same number of steps, "
        f"{record['metric']}, mean and range over the seeds:",
        format_table(header, rows, markdown=True),
    ]


def _mean_and_range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{mean(known):.4f}"
    return f"{text} ({min(known):.4f} to {max(known):.4f})" if len(known) > 1 else text


def _evaluations(record: Mapping[str, Any]) -> list[str]:
    rows = record["evaluations"]
    if not rows:
        return []
    names = [name for name in _metric_names(record) if f"eval_{name}" in rows[0]]
    cells = [
        (f"{row['step']}", *(_number(row.get(f"eval_{name}")) for name in names)) for row in rows
    ]
    return [
        "On the validation data during training:",
        format_table(("step", *names), cells, markdown=True),
    ]


def _command() -> str:
    """The command of this process, without the interpreter's folder, and without secrets."""
    interpreter, *words = sys.orig_argv
    for i, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag.endswith("_token") and flag.startswith("--"):
            place, kept = (i, f"{flag}=") if equals else (i + 1, "")
            words[place : place + 1] = [f"{kept}..."]
    return shlex.join([Path(interpreter).name.rstrip("0123456789."), *words])


def _commit() -> str | None:
    """The commit of the script's repository, and whether files differ from it."""
    script = Path(sys.argv[0]).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(script.parent), *words]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
        changed = changed or git("status", "--porcelain", str(script))
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}, with uncommitted changes" if changed else commit


def _hardware(trainer: Any) -> str:
    count = trainer.args.world_size
    if torch.cuda.is_available() and not trainer.args.use_cpu:
        return f"{count} x {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}), {count} process{'es' * (count > 1)}, {threads} threads"
