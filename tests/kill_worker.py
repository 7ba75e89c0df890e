"""Trains in processes that are killed at random moments, and compares with an undisturbed run.

    python tests/kill_worker.py FOLDER SEED

One process imports everything and forks one child for each attempt; a child resumes from the newest
checkpoint that the Trainer takes, deletes those that it refuses, and trains to the end.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # or a forked child waits for threads that it does not have
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from tests.test_trainer import arguments, bert, rows, weights

KILLS = 16
STEPS = 24


def train(folder, saving=None):
    """Train to the end; a byte goes to the pipe `saving` when a checkpoint is begun."""

    class Signalling(Trainer):
        def _save_checkpoint(self, *args):
            if saving is not None:
                os.write(saving, b"s")
            super()._save_checkpoint(*args)

    torch.set_num_threads(1)
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    args = arguments(folder, optim="normopt_muon", max_steps=STEPS, **options)
    while True:
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        try:
            trainer = Signalling(bert(), args, train_dataset=rows())
            trainer.train(resume_from_checkpoint=last)
            break
        except Exception as error:  # a file that was not written to its end raises anything
            if last is None:
                raise
            print(f"refused {Path(last).name}: {type(error).__name__}: {str(error)[:150]}")
            shutil.rmtree(last)
    torch.save(weights(trainer.model), folder / "weights.pt")


def attempt(folder, wait):
    """Train in a child; `wait(pipe)` returns when it is to be killed. Whether it was."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            train(folder, writing)
            status = 0
        sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    wait(reading)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WIFSIGNALED(status)


def main(folder, seed):
    chance = random.Random(seed)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    started = time.monotonic()
    attempt(undisturbed, lambda pipe: os.read(pipe, 1) and to_the_end(pipe))
    length = time.monotonic() - started
    killed = 0

    def anywhere(pipe):
        time.sleep(chance.uniform(0.1, 0.6) * length)

    def while_saving(pipe):
        for _ in range(chance.randint(1, 4)):
            os.read(pipe, 1)
        time.sleep(chance.uniform(0, 0.04))

    for number in range(KILLS):
        if (disturbed / "weights.pt").exists():
            shutil.rmtree(disturbed)  # it got to its end: begin again
        killed += attempt(disturbed, while_saving if number % 2 else anywhere)
    if not (disturbed / "weights.pt").exists():
        attempt(disturbed, to_the_end)
    ours, theirs = (torch.load(f / "weights.pt") for f in (disturbed, undisturbed))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    print(json.dumps({"killed": killed, "equal": same}))


def to_the_end(pipe):
    while os.read(pipe, 1):
        pass
    time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
