"""The end of a training script, [`finish_run`]: its record, its card, and the Hub.

The recipes end with it. Nothing else in the package calls it.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder

from ..cards.model_card import options_text, update_model_card
from ..cards.report import report
from ..cards.run_record import RunDescription, record_run
from ..optim.presets import optimizer_names
from .arguments import optimizer_name
from .callback import unwrapped

logger = logging.getLogger(__name__)


def finish_run(trainer: Any, *, push_to_hub: bool = False, **description: Any) -> None:
    """Write `normopt_run.json` and the whole model card into `output_dir`; push it, if asked.

    A script calls this after `trainer.save_model()`. With `push_to_hub` here and not in the
    training arguments, nothing asks the network before the model is trained and saved.

    A record or card that cannot be written is a warning.

    Args:
        trainer: a trainer that has trained.
        push_to_hub: whether to push weights, card and picture to `hub_model_id`.
        **description: what only the script knows, the fields of `RunDescription`.

    Raises:
        SystemExit: with one line, if the folder could not be pushed. It stays as it is.
        TypeError: for a missing or unknown part of the description.
        ValueError: if the headline is not among the metrics.
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    try:
        record_run(trainer, RunDescription(**description), _optimizer(trainer))
        update_model_card(folder)
    except OSError as error:  # what was trained stands, and is pushed
        logger.warning("The record and the card of the run are not whole: %r.", error)
    if push_to_hub:
        _push(trainer, folder)


def _push(trainer: Any, folder: Path) -> None:
    """Push a folder to the Hub, or say with which command to do it later."""
    args = trainer.args
    try:
        trainer.init_hf_repo()
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            commit_message="End of training",
            token=args.hub_token,
            revision=args.hub_revision,
            ignore_patterns=["_*", "checkpoint-*"],
        )
    except Exception as error:  # whatever it is, what was trained stands
        repo = args.hub_model_id or folder.name
        later = ["hf", "upload", repo, str(folder), "--exclude", "checkpoint-*"]
        later += ["--private"] if args.hub_private_repo else []
        later += ["--revision", args.hub_revision] if args.hub_revision else []
        what = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise SystemExit(
            f"Nothing was pushed to the Hub: {what}. The model, its card and its picture are in "
            f"{folder}; push them later with: {shlex.join(later)}"
        ) from None


def _optimizer(trainer: Any) -> dict[str, Any]:
    """The optimizer that trained, which need not be the one of the training arguments."""
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
