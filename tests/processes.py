"""Processes of tests: forked from one that has imported everything, once for all of them."""

import multiprocessing

import torch.multiprocessing as mp

IMPORTED = ["tests.test_sharding", "tests.ddp_worker"]


def start(function, *args, world=1):
    """Call `function(rank, *args)` in processes of its own; the first exception is raised here."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(function, args=args, nprocs=world, start_method="forkserver")
