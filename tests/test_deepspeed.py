"""DeepSpeed itself, on processes of the CPU. It is no dependency: the extra `deepspeed` has it."""

import importlib.util

import pytest
import torch

from tests.processes import start
from tests.test_optimizer import llama
from tests.test_sharding import free_port
from tests.zero_worker import SAVED, rank_of, refuse, train

pytestmark = [
    pytest.mark.slow,
    # Its import in this process would set what all other tests run under.
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, path):
    """One process, without DeepSpeed."""
    return run(tmp_path_factory.mktemp("alone"), 1, None, None, path)


def run(folder, world, stage, checkpoint, path):
    args = (str(folder), world, stage, checkpoint, path)
    start(rank_of, world, free_port(), train, *args, world=world)
    return torch.load(folder / "run.pt")


def same(found, expected):
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for row, other in zip(found["logs"], expected["logs"], strict=True):
        assert row.keys() - {"epoch"} == other.keys() - {"epoch"}
        for key in ("loss", "grad_norm", "weight_norm/linear", "relative_update/linear"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
        assert row["certificate/linear"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("stage", "then"), [(1, 2), (2, 1), (3, 3)])
def test_zero_trains_as_one_process_does_also_when_resumed(tmp_path, alone, path, stage, then):
    """The stages 1 and 2 read each other's checkpoints."""
    same(run(tmp_path, 2, stage, None, path), alone)
    same(run(tmp_path, 2, then, str(tmp_path / f"checkpoint-{SAVED}"), path), alone)


def test_what_cannot_be_done_is_refused_on_every_rank(tmp_path):
    start(rank_of, 2, free_port(), refuse, str(tmp_path), 2, 2, world=2)
