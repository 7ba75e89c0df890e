"""Ranks over gloo on this machine: the same run as one process, or a refusal."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hf_normopt import DualNorm, EscapeVelocity, create_normopt_optimizer
from tests.test_optimizer import batches, llama, train


def _rank(rank, folder, function):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        function()
    finally:
        dist.destroy_process_group()


def _fsdp2_is_one_process():
    for options in (
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 1e-2, "weight_decay": 0.1, "preset": "muon"},
        {"lr": 1e-2, "preset": "spectral", "step_size": DualNorm(100.0)},
        {"lr": 1.0, "step_size": EscapeVelocity(1e-4, beta=0.9)},
    ):
        torch.manual_seed(0)
        alone = llama(vocab_size=33)  # does not divide by two
        sharded = copy.deepcopy(alone)
        optimizer = create_normopt_optimizer(sharded, **options)
        fully_shard(sharded)
        for group in optimizer.param_groups:  # as accelerate does, by name
            group["params"] = [sharded.get_parameter(name) for name in group["param_names"]]
        data = [ids % 33 for ids in batches(3)]
        train(alone, create_normopt_optimizer(alone, **options), data)
        train(sharded, optimizer, data)
        for a, b in zip(alone.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(a, b.full_tensor(), rtol=1e-3, atol=1e-5)


def _fsdp1_is_refused():
    for use_orig_params in (True, False):
        wrapped = FullyShardedDataParallel(
            llama(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(ValueError, match=r"FSDP1.*FSDP2"):
            create_normopt_optimizer(wrapped, lr=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("function", [_fsdp2_is_one_process, _fsdp1_is_refused])
def test_two_ranks(tmp_path, function):
    mp.spawn(_rank, args=(str(tmp_path), function), nprocs=2, join=True)
