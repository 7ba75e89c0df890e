"""Norms by role, logged while training."""

from transformers import TrainerCallback


class NormTelemetry(TrainerCallback):
    """Norms by role."""
