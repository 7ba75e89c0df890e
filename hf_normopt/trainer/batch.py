"""An example batch from the trainer's data, for the pass that finds the roles."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch.utils.data import IterableDataset

from ..roles.quiet import random_states

logger = logging.getLogger(__name__)

_TRAINER: ContextVar[Any] = ContextVar("trainer", default=None)


@contextlib.contextmanager
def making_optimizer_of(trainer: Any) -> Iterator[None]:
    """In this context, [`example_batch`] uses this trainer's data."""
    token = _TRAINER.set(trainer)
    try:
        yield
    finally:
        _TRAINER.reset(token)


def example_batch() -> Any:
    """The collator's batch of the first two rows of the training set.

    Random states stay as they were. An iterable data set is never read.

    Returns:
        The batch; None outside of [`making_optimizer_of`] or if no batch could be made.
    """
    trainer = _TRAINER.get()
    data = getattr(trainer, "train_dataset", None)
    if data is None or isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        return None
    try:
        with random_states():
            rows = [data[i] for i in range(min(2, len(data)))]
            collate = trainer.data_collator
            if rows and isinstance(rows[0], dict):
                collate = trainer._get_collator_with_removed_columns(collate, "training")
            return collate(rows) if rows else None
    except Exception as error:  # data and collators are the user's, and may raise anything
        logger.info("No batch could be made to find the roles with: %r.", error)
        return None
