"""The command `hf-normopt`: presets, inspect with its picture and cost, card, run, find-rate.

A new command is a function in `commands.py`. Nothing imports this room.
"""

from .commands import main

__all__ = ["main"]
