import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
