"""The command `hf-normopt`: inspect, presets, find-rate, coord-check, scale-rate, card, run.

A new command is a row in `COMMANDS` of `commands.py`, with its arguments and its function in a file
of its own, as `inspect.py`. No other room imports this one.
"""

from .commands import main

__all__ = ["main"]
