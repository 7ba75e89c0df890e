"""Processes of tests: forked from one that has imported everything, once for all of them."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch.multiprocessing as mp

IMPORTED = ["tests.test_sharding", "transformers.trainer", "datasets", "evaluate", "trl", "sklearn"]


def start(function, *args, world=1):
    """Call `function(rank, *args)` in processes of its own; the first exception is raised here."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(function, args=args, nprocs=world, start_method="forkserver")


def run_script(script, argv, output):
    """Run a script as Python does; what it printed, by way of a file."""
    start(_run_script, str(script), [str(word) for word in argv], str(output))
    return Path(output).read_text()


def _run_script(rank, script, argv, output):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    sys.argv = [script, *argv]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
