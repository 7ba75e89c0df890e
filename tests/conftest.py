import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from matplotlib.figure import Figure

_savefig = Figure.savefig


def pytest_collection_finish():
    """Every Trainer collects garbage; what was imported is none and need not be looked at again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _empty_pictures():
    """A run ends with a picture, which takes longer than the training: save an empty one."""

    def save_an_empty_one(figure, *args, **options):
        _savefig(Figure(figsize=(1, 1)), *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_an_empty_one)
        yield


@pytest.fixture
def pictures(monkeypatch):
    """For tests that look at what is drawn."""
    monkeypatch.setattr(Figure, "savefig", _savefig)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """The models are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
