"""`normopt_run.json`: what a script tells of its run through [`finish_run`].

`report.py` records what NormOpt did. This file records what only the script knows, with any
optimizer, so that runs can be compared. `run_card.py` writes the model card from it.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modelcard import extract_hyperparameters_from_trainer

from .report import json_object, read_versioned, write_json

RUN_FILE = "normopt_run.json"
RUN_VERSION = 1


@dataclass(kw_only=True)
class RunDescription:
    """What only the script knows of its run.

    Args:
        title: of the card.
        task: a pipeline tag of the Hub, such as `text-classification`.
        metrics: what `trainer.evaluate` returned, with the prefixes `validation` and, where there
            are test data, `test`.
        metric: the headline: the card shows `test_<metric>`, or `validation_<metric>` without test
            data.
        dataset: its name for readers.
        dataset_id: its id on the Hub, if the data come from there. A local folder has none.
        data: Markdown: what the data are, how many rows, where they come from, their licence.
        baselines: the headline of simple methods on the same data, by name.
        limits: Markdown: what the model is not good for.
        base_model: an id on the Hub or a folder; None if the model was trained from scratch.
        language: of the data, as ISO 639-1; a list for several.
        license: of the model, as the Hub writes it.
        library_name: the library that loads the model, `transformers` or `peft`.

    Raises:
        ValueError: if the headline is not among the metrics.
    """

    title: str
    task: str
    metrics: Mapping[str, Any]
    metric: str
    dataset: str
    dataset_id: str | None = None
    data: str
    baselines: Mapping[str, float]
    limits: str
    base_model: str | None = None
    language: str | list[str] | None = None
    license: str | None = None
    library_name: str = "transformers"

    def __post_init__(self) -> None:
        self.metrics = dict(self.metrics)
        self.baselines = {name: float(value) for name, value in self.baselines.items()}
        headline = f"{self.final_split}_{self.metric}"
        if headline not in self.metrics:
            raise ValueError(f"The metrics are {', '.join(self.metrics)}, and not {headline}.")

    @property
    def final_split(self) -> str:
        """The split whose headline the card shows."""
        return "test" if any(key.startswith("test_") for key in self.metrics) else "validation"


def record_run(trainer: Any, description: RunDescription, optimizer: Mapping[str, Any]) -> None:
    """Write `normopt_run.json` into the trainer's `output_dir`.

    Args:
        trainer: a trainer that has trained.
        description: what the script knows.
        optimizer: what trained: `optimizer`, `optim_args` and `learning_rate`.

    Raises:
        OSError: if it cannot be written, or something else has its name.
    """
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    hyperparameters["weight_decay"] = trainer.args.weight_decay
    base, dataset_id = description.base_model, description.dataset_id
    is_local = base is not None and Path(base).is_dir()
    record = {
        "run_version": RUN_VERSION,
        **asdict(description),
        **optimizer,
        "dataset_id": None if dataset_id and Path(dataset_id).exists() else dataset_id,
        "final_split": description.final_split,
        "base_model": Path(base).name if base is not None and is_local else base,
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
        "commit": commit_of_script(),
        "hardware": _hardware(trainer),
        "compared": [],
    }
    write_run(folder, record)
    trainer.has_normopt_run = True  # from now on its cards are written from the record


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
    """Copy the results of other runs of the same script into a run's record.

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
        names = {split: f"{split}_{found['metric']}" for split in splits(record)}
        values = {split: found["metrics"].get(name) for split, name in names.items()}
        compared.append({**{key: found[key] for key in keys}, **values})
    record["compared"] = compared
    write_run(folder, record)


def splits(record: Mapping[str, Any]) -> list[str]:
    """The splits that a card shows: validation, and test where there is one."""
    return list(dict.fromkeys(("validation", record["final_split"])))


def _setting(record: Mapping[str, Any]) -> dict[str, Any]:
    """What runs must have in common to be compared."""
    keys = ("task", "dataset", "metric", "base_model", "steps")
    free = ("optimizer", "learning_rate", "seed", "eval_batch_size", "total_eval_batch_size")
    others = {key: value for key, value in record["hyperparameters"].items() if key not in free}
    return {**{key: record[key] for key in keys}, **others}


def _command() -> str:
    """The command of this process, without the interpreter's folder and without tokens."""
    interpreter, *words = sys.orig_argv
    for i, word in enumerate(words):
        flag, equals, _ = word.partition("=")
        if flag.endswith("_token") and flag.startswith("--"):
            place, kept = (i, f"{flag}=") if equals else (i + 1, "")
            words[place : place + 1] = [f"{kept}..."]
    return shlex.join([Path(interpreter).name.rstrip("0123456789."), *words])


def commit_of_script() -> str | None:
    """The commit of the script's repository, and whether files were changed since."""
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
