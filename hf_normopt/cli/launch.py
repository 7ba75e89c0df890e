"""`hf-normopt run`: run an unedited script that can then say `optim="normopt"`."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

_SITE = str(Path(__file__).resolve().parent.parent / "_site")

USAGE = """usage: hf-normopt run SCRIPT [ARGUMENTS ...]
       hf-normopt run -m MODULE [ARGUMENTS ...]

Run a Python script or module as `python` does, with NormOpt known to transformers, so that it
takes --optim normopt. So do the Python processes that it starts: SCRIPT may be a launcher such as
trl. Where a launcher keeps the environment from them: accelerate launch -m hf_normopt run
SCRIPT ..., torchrun -m hf_normopt run SCRIPT ..."""


def run(argv: Sequence[str]) -> int:
    """Run a script or a module as the main program of this process.

    Changes `sys.argv`, `sys.path` and, for the processes that the script starts, `PYTHONPATH`.

    Args:
        argv: what follows `hf-normopt run`.

    Returns:
        The exit status: 0, or 2 when there is nothing to run.

    Raises:
        BaseException: whatever the script raises, `SystemExit` included.
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
        _reach_children_inplace()
        sys.argv = [target, *arguments]
        sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return 0
    if not os.path.exists(target):
        print(f"hf-normopt run: there is no {target}.", file=sys.stderr)
        return 2
    _reach_children_inplace()
    sys.argv = [target, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(target))  # python follows links
    runpy.run_path(target, run_name="__main__")
    return 0


def _reach_children_inplace() -> None:
    """Register NormOpt in Python processes that inherit the environment (see `_site`)."""
    known = os.environ.get("PYTHONPATH")
    others = known.split(os.pathsep) if known else []  # "" is none; an empty part is the cwd
    folders = [_SITE, *(folder for folder in others if folder != _SITE)]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
