"""The command `hf-normopt`: inspect, presets, coord-check, scale-rate, card, run.

A new command is a function in `commands.py`. Nothing imports this room.
"""

from .commands import main

__all__ = ["main"]
