"""The end of a training script: its record, its card, and the Hub."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder

from ..cards.model_card import options_text, update_model_card
from ..cards.record import record_run
from ..cards.report import report
from ..optim.presets import optimizer_names
from .arguments import optimizer_name
from .callback import unwrapped

logger = logging.getLogger(__name__)


def finish_run(
    trainer: Any,
    *,
    title: str,
    task: str,
    metrics: Mapping[str, Any],
    metric: str,
    dataset: str,
    data: str,
    baselines: dict[str, float],
    limits: str,
    dataset_id: str | None = None,
    base_model: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    library_name: str = "transformers",
    push_to_hub: bool = False,
) -> None:
    """Write `normopt_run.json` and the whole model card into `output_dir`; push it, if asked.

    A script that calls this after `trainer.save_model()` can set `push_to_hub=False` in the
    training arguments and hand the wish to this function: then nothing is asked of the network
    before all is trained and saved.

    Args:
        trainer: that has trained.
        title: of the card.
        task: a pipeline tag of the Hub, such as `text-classification`.
        metrics: what `trainer.evaluate` gave, with the prefixes `validation` and, if there are test
            data, `test`.
        metric: the headline: `test_<metric>`, without test data `validation_<metric>`.
        dataset: its name for readers.
        data: Markdown: what the data are, how many, from where, under which licence.
        baselines: the headline of simple methods on the same data, by their names.
        limits: Markdown: what the model is not good for.
        dataset_id: of the Hub, if the data come from there; a folder is none.
        base_model: an id of the Hub or a folder; None: the model was trained from scratch.
        language: of the data, as ISO 639-1; several as a list.
        license: of the model, as the Hub writes it.
        library_name: which library loads the model: `transformers` or `peft`.
        push_to_hub: whether to push weights, card and picture to `hub_model_id`.

    A record or a card that cannot be written is a warning.

    Raises:
        SystemExit: with one line, if the folder could not be pushed. It stays as it is.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    facts = {
        "title": title,
        "task": task,
        "metrics": dict(metrics),
        "metric": metric,
        "dataset": dataset,
        "dataset_id": dataset_id,
        "data": data,
        "baselines": {name: float(value) for name, value in baselines.items()},
        "limits": limits,
        "base_model": base_model,
        "language": language,
        "license": license,
        "library_name": library_name,
    }
    try:
        record_run(trainer, {**facts, **_optimizer(trainer)})
        update_model_card(folder)
    except OSError as error:  # what was trained stands, and is pushed
        logger.warning("The record and the card of the run are not whole: %r.", error)
    if not push_to_hub:
        return
    try:
        trainer.init_hf_repo()
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            commit_message="End of training",
            token=trainer.args.hub_token,
            revision=trainer.args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*"],
        )
    except Exception as error:  # whatever it is, what was trained stands
        repo = trainer.args.hub_model_id or folder.name
        later = ["hf", "upload", repo, str(folder), "--exclude", "checkpoint-*"]
        later += ["--private"] if trainer.args.hub_private_repo else []
        later += ["--revision", trainer.args.hub_revision] if trainer.args.hub_revision else []
        raise SystemExit(
            f"Nothing was pushed to the Hub: {_first_line(error)}. The model, its card and its "
            f"picture are in {folder}; push them later with: {shlex.join(later)}"
        ) from None


def _optimizer(trainer: Any) -> dict[str, Any]:
    """What trained, which the training arguments need not say."""
    args = trainer.args
    optimizer = unwrapped(trainer.optimizer)
    if optimizer is None:
        options, rate = args.optim_args or "", args.learning_rate
        return {"optimizer": optimizer_name(args), "optim_args": options, "learning_rate": rate}
    content = report(optimizer)
    names = {preset: name for name, preset in optimizer_names().items()}
    return {
        "optimizer": names.get(content["preset"]["name"], "NormOpt with a policy of its own"),
        "optim_args": options_text(content),
        "learning_rate": content["learning_rate"],
    }


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
