"""The whole model card of a run, written from `normopt_run.json` (see `run_record.py`).

`model_card.py` adds the section on NormOpt, where NormOpt trained the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..tables import format_table
from .run_record import splits

HYPERPARAMETERS = "The following hyperparameters were used during training:\n"  # as transformers


def run_card(record: Mapping[str, Any]) -> ModelCard:
    """The card of a run, without the section on NormOpt."""
    final, value = record["final_split"], _final_value(record)
    name = f"`{final}_{record['metric']}`"
    results = [("this model", f"{value:.4f}")]
    results += [(what, f"{score:.4f}") for what, score in record["baselines"].items()]
    parts = [
        f"# {record['title']}",
        f"A model for {record['task']}, {_origin(record)} on {record['dataset']} in "
        f"{record['steps']:,} steps: {name} is {value:.4f}.",
        "## Results",
        f"On the {final} data, next to what a simple method reaches ({name}):",
        format_table(("", f"{final} {record['metric']}"), results, markdown=True),
        _all_metrics(record),
        *_comparison(record),
        "## Data",
        record["data"],
        "## Limits",
        record["limits"],
        *_training(record),
        *_evaluations(record),
    ]
    return ModelCard(f"---\n{_metadata(record).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _metadata(record: Mapping[str, Any]) -> ModelCardData:
    return ModelCardData(
        language=record["language"],
        license=record["license"],
        library_name=record["library_name"],
        tags=["generated_from_trainer"],
        base_model=None if record["base_model_is_local"] else record["base_model"],
        datasets=record["dataset_id"],
        metrics=[record["metric"]],
        pipeline_tag=record["task"],
        model_name=record["title"],
        eval_results=[
            EvalResult(
                task_type=record["task"],
                dataset_type=record["dataset_id"] or record["dataset"],
                dataset_name=record["dataset"],
                dataset_split=record["final_split"],
                metric_type=record["metric"],
                metric_value=round(_final_value(record), 4),
            )
        ],
    )


def _final_value(record: Mapping[str, Any]) -> float:
    """The headline result of a run."""
    return float(record["metrics"][f"{record['final_split']}_{record['metric']}"])


def _origin(record: Mapping[str, Any]) -> str:
    base = record["base_model"]
    if base is None:
        return "trained from scratch"
    if record["base_model_is_local"]:
        return f"fine-tuned from the local model `{base}`"
    return f"fine-tuned from [{base}](https://huggingface.co/{base})"


def _training(record: Mapping[str, Any]) -> list[str]:
    seconds = record["seconds"]
    facts = {
        "command": f"`{record['command']}`",
        "commit": record["commit"],
        "hardware": record["hardware"],
        "training took": f"{seconds:.0f} s, evaluation during it included" if seconds else None,
    }
    hyperparameters = record["hyperparameters"].items()
    return [
        "## Training",
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value),
        HYPERPARAMETERS + "\n".join(f"- {key}: {value}" for key, value in hyperparameters),
    ]


def _all_metrics(record: Mapping[str, Any]) -> str:
    """Validation and test side by side, without metrics about speed."""
    metrics, columns = record["metrics"], splits(record)
    rows = [
        (name, *(_number(metrics.get(f"{split}_{name}")) for split in columns))
        for name in _metric_names(record)
    ]
    return format_table(("", *columns), rows, markdown=True)


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


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _comparison(record: Mapping[str, Any]) -> list[str]:
    """The results of other runs with the same number of steps, by optimizer and rate."""
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
            *(_mean_and_range([run[split] for run in runs]) for split in splits(record)),
        )
        for (optimizer, args, rate), runs in sorted(groups.items())
    ]
    header = ("optimizer", "learning rate", "seeds", *splits(record))
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
