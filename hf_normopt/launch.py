"""`hf-normopt run`: a script that nobody edited, with `optim="normopt"` known to it."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = """usage: hf-normopt run SCRIPT [ARGUMENTS ...]
       hf-normopt run -m MODULE [ARGUMENTS ...]

Run a Python script or module as `python` does, with NormOpt known to transformers, so that it
takes --optim normopt. Under a launcher: accelerate launch -m hf_normopt run SCRIPT ...,
torchrun -m hf_normopt run SCRIPT ..."""


def run(argv: Sequence[str]) -> int:
    """Run a script or a module in this process, as the main program.

    Args:
        argv: what follows `hf-normopt run`.

    Returns:
        The exit status: 0; 2 when there is nothing to run. What the script raises, `SystemExit`
        included, is passed on.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    is_module = bool(argv) and argv[0] == "-m"
    target, *arguments = argv[is_module:] or [""]
    if not target or target.startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    if is_module:
        sys.argv = [target, *arguments]
        sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return 0
    if not os.path.exists(target):
        print(f"hf-normopt run: there is no {target}.", file=sys.stderr)
        return 2
    sys.argv = [target, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(target))  # python follows links
    runpy.run_path(target, run_name="__main__")
    return 0
