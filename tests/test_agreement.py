"""What ranks agree on before a step: all do the same, or all raise and name who differs."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_normopt import DualNorm, create_normopt_optimizer
from hf_normopt.optim import ranks as package
from hf_normopt.optim.agreement import first_difference
from hf_normopt.optim.sharding import gathered
from tests.test_sharding import _all, assert_same, spawn

SIZES = (None, DualNorm(), "escape_velocity")


def made(width=6, frozen=False, reverse=False, **options):
    torch.manual_seed(0)
    layers = {"first": nn.Linear(5, width), "second": nn.Linear(width, 4)}
    if reverse:
        layers = dict(reversed(layers.items()))
    model = Pair(layers)
    model.second.bias.requires_grad_(not frozen)
    options = {"lr": 1e-2, "overrides": {"first": "linear", "second": "head"}, **options}
    return model, create_normopt_optimizer(model, **options)


class Pair(nn.ModuleDict):
    def forward(self, x):
        return self["second"](self["first"](x).tanh())


def sharded(model, optimizer):
    fully_shard(model)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]


def backward(model, seed=0):
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(3, 5, generator=generator)).square().mean().backward()


def ready(how, **options):
    model, optimizer = made(**options)
    if how == "fsdp":
        sharded(model, optimizer)
    else:
        optimizer.replicas = dist.group.WORLD
    return model, optimizer


def assert_replicas(model):
    for name, p in model.named_parameters():
        whole = gathered(p.detach())
        everyone = [torch.empty_like(whole) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, whole)
        assert all(torch.equal(other, whole) for other in everyone), name


def _one_rank_watches():
    for how in ("ddp", "fsdp"):
        for size in SIZES:
            model, optimizer = ready(how, step_size=size)
            plain, other = ready(how, step_size=size)
            seen = []
            if dist.get_rank() == 0:
                optimizer.observer = lambda move, eta, seen=seen: seen.append(
                    (type(move.param), move.param.shape, gathered(move.grad).sum())
                )
            for seed in range(2):
                for one, its in ((model, optimizer), (plain, other)):
                    backward(one, seed)
                    its.step()
            assert len(seen) == (8 if dist.get_rank() == 0 else 0)
            assert all(kind is not type(None) and len(shape) for kind, shape, _ in seen)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(gathered(p), gathered(q))
            assert_replicas(model)


DIFFERENT = {
    "rule": {"preset": "muon"},
    "step size": {"step_size": DualNorm()},
    "lr 0.02; on rank 0 it has 0.01": {"lr": 2e-2},
    "rule .*lr x2.0": {"lr_head": 2.0},
    "role linear; on rank 0 it has head": {"overrides": {".": "linear"}},
    "weight_decay 0.1; on rank 0 it has 0.0": {"weight_decay": 0.1},
    "momentum_dtype bfloat16": {"momentum_dtype": "bfloat16"},
    "order": {"reverse": True},
    "second.bias is not trained; on rank 0 it is": {"frozen": True},
}


def _who_differs_is_named_on_every_rank():
    for how in ("ddp", "fsdp"):
        for text, options in DIFFERENT.items():
            common = {"overrides": {".": "linear"}} if text == "order" else {}
            own = options if dist.get_rank() == 1 else {}
            model, optimizer = ready(how, **common, **own)
            with pytest.raises(RuntimeError, match=f"^On rank 1: .*{text}"):
                _step(model, optimizer)
    model, optimizer = ready("ddp", width=6 + dist.get_rank())
    with pytest.raises(RuntimeError, match=r"On rank 1: first\.weight .*shape \(7, 5\)"):
        _step(model, optimizer)


def _step(model, optimizer):
    backward(model)
    optimizer.step()


def _rates_are_compared_at_every_step():
    for how in ("ddp", "fsdp"):
        for key in ("lr", "weight_decay", "multiplier"):
            model, optimizer = ready(how)
            _step(model, optimizer)
            optimizer.param_groups[-1][key] = 0.5
            _step(model, optimizer)
            if dist.get_rank() == 1:
                optimizer.param_groups[-1][key] = 0.25
            with pytest.raises(RuntimeError, match=f"On rank 1: .*{key} 0.25; on rank 0 .*0.5"):
                _step(model, optimizer)
    model, optimizer = ready("ddp")
    _step(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _step(model, optimizer)
    _, again = ready("ddp")
    if dist.get_rank() == 1:
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="On rank 1: the optimizer has steps before this run 2"):
        again.step()
    if dist.get_rank() == 0:
        extra = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [("extra", extra)], "role": "bias"})
    with pytest.raises(RuntimeError, match="On rank 1: extra is not trained"):
        _step(model, optimizer)


def _ranks_that_end_early_join():
    """As under AdamW: each rank steps by itself, and the last rank's weights are everybody's."""
    model, optimizer = made()
    wrapped = DistributedDataParallel(model)
    optimizer.replicas = dist.group.WORLD
    _step(wrapped, optimizer)
    with Join([wrapped]):
        for _ in range(3 - dist.get_rank()):
            _step(wrapped, optimizer)
    assert_replicas(model)


def _local_sgd(how):
    """Each rank makes the steps of one process with its own data."""
    me = dist.get_rank()
    alone, single = made()
    model, optimizer = made()
    wrapped = DistributedDataParallel(model)
    optimizer.replicas = dist.group.WORLD
    if how == "no_sync":
        with wrapped.no_sync():
            for i in range(3):
                backward(wrapped, 10 * i + me)
                optimizer.step()
    else:  # past DDP
        for i in range(3):
            backward(model, 10 * i + me)
            optimizer.step()
    for i in range(3):
        backward(alone, 10 * i + me)
        single.step()
    for p, q in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p)


def _ddp_shares_again_after_accumulation():
    model, optimizer = made()
    wrapped = DistributedDataParallel(model)
    optimizer.replicas = dist.group.WORLD
    for _ in range(2):
        with wrapped.no_sync():
            backward(wrapped, dist.get_rank())
        wrapped(torch.ones(2, 5) * dist.get_rank()).sum().backward()
        optimizer.step()
        assert optimizer._ranks is not None
    assert_replicas(model)


class Two(nn.Module):
    """Of which a batch uses one part."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)])

    def forward(self, x, which):
        return sum(self.parts[i](x) for i in which).square().mean()


def _gradients_that_ddp_has_not_averaged_are():
    """The last part of a batch uses a layer on no rank, an earlier one did on some, or on all."""
    for users in ((0,), (0, 1)):
        torch.manual_seed(0)
        model = Two()
        optimizer = create_normopt_optimizer(model, lr=1e-2, overrides={".": "linear"})
        optimizer.replicas = dist.group.WORLD
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        me = dist.get_rank()
        for i in range(3):
            optimizer.zero_grad()
            x = torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * i + me))
            with wrapped.no_sync():
                wrapped(x, [0, 1, 2] if me in users else [0, 1]).backward()
            wrapped(x, [0, 1]).backward()
            local = model.parts[2].weight.grad
            mean = torch.zeros(4, 5) if local is None else local.clone()
            dist.all_reduce(mean)
            optimizer.step()
            assert optimizer._ranks is not None
            torch.testing.assert_close(model.parts[2].weight.grad, mean / 2)
            assert_replicas(model)


def _without_ddp_accelerate_shares_nothing():
    """Nobody averages the gradients: the ranks may even train other models."""
    original, package.replicas = package.replicas, lambda: dist.group.WORLD
    try:
        model, optimizer = made(width=6 + dist.get_rank())
        _step(model, optimizer)
        assert optimizer._ranks is None
        model, optimizer = made()
        wrapped = DistributedDataParallel(model)
        _step(wrapped, optimizer)
        assert optimizer._ranks is not None
    finally:
        package.replicas = original


def _the_hook_goes_and_is_not_copied():
    model, optimizer = made()
    assert model._forward_pre_hooks
    twin = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    for one in (model, twin):
        backward(one)
    assert not model._forward_pre_hooks
    reference = weakref.ref(optimizer)
    del optimizer
    assert reference() is None


def _ranks_meet_a_jump_alike():
    for how in ("ddp", "fsdp"):
        model, optimizer = ready(how, on_spike="skip")
        before = {}
        for i in range(11):
            is_jump = i == 9
            before = {name: gathered(p.detach()).clone() for name, p in model.named_parameters()}
            backward(model, i)
            rank_sees_it = is_jump and dist.get_rank() == 1
            optimizer.note_loss(100.0 if rank_sees_it else 1.0 + i % 2)
            optimizer.step()
            for name, p in model.named_parameters():
                assert torch.equal(gathered(p.detach()), before[name]) == is_jump, (how, i, name)
        assert_replicas(model)
        assert optimizer.spikes == ["step 10: loss 51, above 4: not made"]


def _the_cap_of_momo_is_that_of_all():
    for how in ("ddp", "fsdp"):
        alone, one = made(step_size="momo")
        model, optimizer = ready(how, step_size="momo")
        for i in range(6):
            backward(alone, i)
            backward(model, i)
            one.note_loss(0.01)
            one.step()
            optimizer.note_loss(0.02 * dist.get_rank())  # 0.01 in the mean
            optimizer.step()
        assert_same(alone, model, how)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    spawn(
        tmp_path,
        _all,
        2,
        _one_rank_watches,
        _who_differs_is_named_on_every_rank,
        _rates_are_compared_at_every_step,
        _ranks_that_end_early_join,
        _ddp_shares_again_after_accumulation,
        _gradients_that_ddp_has_not_averaged_are,
        _without_ddp_accelerate_shares_nothing,
        _the_hook_goes_and_is_not_copied,
        _local_sgds,
        _ranks_meet_a_jump_alike,
        _the_cap_of_momo_is_that_of_all,
    )


def _local_sgds():
    for how in ("no_sync", "past DDP"):
        _local_sgd(how)


@pytest.mark.parametrize(
    ("two", "text"),
    [
        ({"w": {"lr": "1"}}, "On rank 3: w has lr 1; on rank 0 it has 2."),
        ({}, "On rank 3: w is not trained; on rank 0 it is."),
        ({"w": {"lr": "2"}, "v": {}}, "On rank 3: v is trained; on rank 0 it is not."),
    ],
)
def test_differences_name_the_rank_and_both_values(two, text):
    one = {"w": {"lr": "2"}}
    assert first_difference({0: one, 2: one}) == ""
    assert first_difference({0: one, 2: one, 3: two}).startswith(text)
