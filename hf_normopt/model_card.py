"""The part of a model card that says how NormOpt trained the model."""

from __future__ import annotations

import os


def update_model_card(path: str | os.PathLike[str]) -> None:
    """Write what NormOpt did into the card of a model."""
