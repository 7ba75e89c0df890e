"""Global states that a pass leaves as they were: logs, warnings, random numbers, hooks."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules import module as torch_module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning, log line or print; and none counts as said (`warning_once`)."""
    once = {
        name: getattr(logging.Logger, name)
        for name in ("warning_once", "info_once")
        if hasattr(logging.Logger, name)
    }
    disabled = logging.root.manager.disable
    nowhere = io.StringIO()
    try:
        for name in once:
            setattr(logging.Logger, name, lambda *args, **kwargs: None)
        logging.disable(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name, method in once.items():
            setattr(logging.Logger, name, method)


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's CPU generators."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    of_numpy = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(of_numpy)


@contextlib.contextmanager
def no_global_hooks() -> Iterator[None]:
    """Hooks that were registered for all modules are not called."""
    tables = [
        getattr(torch_module, name)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
    ]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)
