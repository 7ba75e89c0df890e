"""What becomes of a step whose loss jumps."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

ACTIONS = ("warn", "skip", "halve")
WINDOW = 32  # losses that make up the running range
FEWEST = 8  # losses without which there is no range


@dataclass(frozen=True)
class Guard:
    """Meets a loss that is not finite, or above its running range by a multiple of that range.

    The range is that of the last 32 losses; with fewer than 8 only a loss that is not finite is a
    jump. A jump enters the range as if it had stopped at the limit, so that a loss which stays at a
    new level is soon taken for usual.

    Args:
        action: "warn"; "skip": weights and momenta stay as they are; or "halve": this step, unless
            the loss is not finite, and all later ones go half as far, and the range begins anew.
        multiple: of the range, counted from its lower end.

    Raises:
        ValueError: for another action, or a multiple that is not above 1.
    """

    action: str
    multiple: float = 3.0

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"on_spike must be {' or '.join(ACTIONS)}, found {self.action!r}.")
        if not 1 < self.multiple < math.inf:
            raise ValueError(f"on_spike: the multiple must be above 1, found {self.multiple!r}.")

    def __str__(self) -> str:
        """The text that `parse_guard` reads."""
        return self.action if self.multiple == 3 else f"{self.action}/multiple:{self.multiple:g}"

    def limit(self, losses: Sequence[float]) -> float:
        """The loss above which it is a jump."""
        if len(losses) < FEWEST:
            return math.inf
        low, high = min(losses), max(losses)
        return low + self.multiple * (high - low)

    def admits_inplace(self, memory: dict[str, Any], loss: float, step: int) -> bool:
        """Whether the step is to be made; `factor` of the memory says how far.

        Args:
            memory: plain data, kept in the checkpoint: `losses`, `factor`, and `events`.
            loss: of this step, the same on all ranks.
            step: its number.
        """
        losses = memory.setdefault("losses", [])
        limit, is_finite = self.limit(losses), math.isfinite(loss)
        is_jump = not (is_finite and loss <= limit)
        if is_finite:
            losses.append(min(loss, limit))
            del losses[:-WINDOW]
        if not is_jump:
            return True
        what = {"warn": "a warning", "skip": "not made", "halve": "steps halved"}[self.action]
        above = f", above {limit:.4g}" if is_finite else ""
        event = f"step {step}: loss {loss:.4g}{above}: {what}"
        memory.setdefault("events", []).append(event)
        logger.warning("The loss jumped at %s (on_spike=%s).", event, self)
        if self.action == "halve":
            memory["factor"] = memory.get("factor", 1.0) / 2
            losses.clear()
            return is_finite
        return self.action == "warn"


def parse_guard(text: str) -> Guard:
    """A guard from its text, such as `"halve"` or `"skip/multiple:5"`.

    Raises:
        ValueError: for an unknown action, field or value.
    """
    action, *words = text.split("/")
    options = {}
    for word in words:
        key, _, value = word.partition(":")
        try:
            options[{"multiple": key}[key]] = float(value)
        except (KeyError, ValueError):
            raise ValueError(
                f"on_spike: cannot read {word!r} in {text!r}; expected ACTION/multiple:NUMBER."
            ) from None
    return Guard(action, **options)
