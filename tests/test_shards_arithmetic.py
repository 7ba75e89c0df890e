"""What a rank holds of a parameter changes no number: placements, empty shards, low precision."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hf_normopt import EscapeVelocity, create_normopt_optimizer
from hf_normopt.optim.precision import block_of, entry_noise, new_momentum, packed, unpacked
from hf_normopt.optim.sharding import places
from tests.test_sharding import _all, shard, spawn


class Net(nn.Module):
    """A head of one row, and matrices whose momenta 8 bits hold: rows of 64, 96 and 130 entries."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(131, 64)
        self.up = nn.Linear(64, 130)
        self.norm = nn.LayerNorm(130)
        self.mixed = nn.Conv1d(130, 96, 3)
        self.down = nn.Linear(96, 64)
        self.score = nn.Linear(64, 1)

    def forward(self, ids):
        x = self.norm(self.up(self.embedding(ids)).tanh()).transpose(1, 2)
        x = self.down(self.mixed(x).transpose(1, 2).tanh())
        return (self.score(x) - 1).square().mean() + (x - 0.3).square().mean()


def net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Net().to(dtype)
    overrides = {"score.weight": "head", "up|down": "linear"}
    return model, create_normopt_optimizer(
        model, overrides=overrides, **{"lr": 1e-2, "weight_decay": 0.1, **options}
    )


def data(number):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(131, (6, 5), generator=generator) for _ in range(number)]


def weights(model):
    values = {name: p.detach() for name, p in model.named_parameters()}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p) for n, p in values.items()}


def gradients(start, number):
    """The same on all ranks, so that a difference is the step's."""
    generator = torch.Generator().manual_seed(7)
    return [
        {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in start.items()}
        for _ in range(number)
    ]


def moved(model, optimizer, given, place=lambda gradient, p: gradient):
    for step in given:
        for name, p in model.named_parameters():
            p.grad = place(step[name], p)
        optimizer.step()
    return weights(model)


def sliced(gradient, p):
    """A gradient as FSDP2 leaves it."""
    return distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)


PLACED = {  # of parameters, with those of gradients
    "parts of a sum": (Replicate(), [Partial()]),
    "parts of a mean": (Shard(0), [Partial("avg")]),
    "copies": (Shard(0), [Replicate()]),
    "other shards": (Shard(1), [Shard(0)]),
    "shards": (Replicate(), [Shard(0)]),
}
SIZES = {
    "fixed": {},
    "adam": {"preset": "adam"},
    "escape": {"lr": 1.0, "step_size": EscapeVelocity(1e-3)},
}


def _gradients_may_be_placed_otherwise():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(placements, gradient, p):
        if not isinstance(placements[0], Partial):
            return distribute_tensor(gradient, mesh, placements, src_data_rank=None)
        mine = 1.0 + dist.get_rank()  # of the sum: 1 + 2
        share = mine / 3 if placements[0].reduce_op == "sum" else mine / 1.5
        return DTensor.from_local(gradient * share, mesh, placements)

    for options in SIZES.values():
        alone, single = net(torch.float64, **options)
        start = weights(alone)
        expected = moved(alone, single, gradients(start, 2))
        for name, (of_parameter, of_gradient) in PLACED.items():
            many, optimizer = net(torch.float64, **options)
            for module in many.modules():
                for key, p in list(module.named_parameters(recurse=False)):
                    axis = getattr(of_parameter, "dim", 0)
                    placements = [of_parameter if p.ndim > axis else Replicate()]
                    whole = distribute_tensor(p.data, mesh, placements)
                    setattr(module, key, nn.Parameter(whole))
            for group in optimizer.param_groups:
                group["params"] = [many.get_parameter(n) for n in group["param_names"]]
            found = moved(many, optimizer, gradients(start, 2), partial(placed, of_gradient))
            for key, value in found.items():
                torch.testing.assert_close(value, expected[key], msg=f"{name} {options} {key}")


def _a_shard_may_be_empty():
    for options in (
        {},
        *SIZES.values(),
        {"lr": 1.0, "preset": "prodigy"},
        {"lr": 1.0, "preset": "escape"},
        {"lr": 1.0, "preset": "muon", "step_size": EscapeVelocity(1e-3)},
        {"lr": 1.0, "step_size": EscapeVelocity(1e-3, beta=0.9, stride=2)},
        {"momentum_dtype": "8bit"},
    ):
        alone, single = net(torch.float64, **options)
        start = weights(alone)
        expected = moved(alone, single, gradients(start, 3))
        many, optimizer = net(torch.float64, **options)
        shard(many, optimizer)
        found = moved(many, optimizer, gradients(start, 3), sliced)
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], msg=f"{options} {key}")


def _low_precision_is_that_of_one_process():
    """Bit for bit: the same blocks of momenta, the same noise."""
    for dtype, options in (
        (torch.float32, {"momentum_dtype": "8bit"}),
        (torch.bfloat16, {"rounding": "stochastic"}),
        (torch.bfloat16, {"rounding": "stochastic", "preset": "sign"}),
    ):
        alone, single = net(dtype, **options)
        start = weights(alone)
        expected = moved(alone, single, gradients(start, 3))
        many, optimizer = net(dtype, **options)
        shard(many, optimizer)
        found = moved(many, optimizer, gradients(start, 3), sliced)
        for key, value in found.items():
            assert torch.equal(value, expected[key]), (options, key)
        if "momentum_dtype" in options:
            kept = optimizer.state[many.up.weight]["momentum_buffer"].to_local()
            assert hasattr(kept, "codes") == bool(kept.numel())


def _what_is_not_sharded_draws_the_same_noise():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, optimizer = net(torch.bfloat16, rounding="stochastic")
    table = distribute_tensor(model.embedding.weight.data, mesh, [Shard(0)])
    model.embedding.weight = nn.Parameter(table)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(n) for n in group["param_names"]]
    place = lambda g, p: sliced(g, p) if isinstance(p, DTensor) else g
    moved(model, optimizer, gradients(weights(model), 2), place)
    for p in model.parameters():
        if not isinstance(p, DTensor):
            everyone = [torch.empty_like(p) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, p.detach())
            assert all(torch.equal(other, p) for other in everyone)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    spawn(
        tmp_path,
        _all,
        2,
        _gradients_may_be_placed_otherwise,
        _a_shard_may_be_empty,
        _low_precision_is_that_of_one_process,
        _what_is_not_sharded_draws_the_same_noise,
    )


def _three():
    _a_shard_may_be_empty()
    _low_precision_is_that_of_one_process()


@pytest.mark.slow
def test_three_ranks_are_one(tmp_path):
    """Rows do not divide, and two ranks hold nothing of the head."""
    spawn(tmp_path, _three, 3)


KINDS = {
    "kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "kahan16": (torch.float16, {"rounding": "kahan"}),
    "8bit": (torch.float32, {"momentum_dtype": "8bit"}),
    "both": (torch.bfloat16, {"momentum_dtype": "8bit", "rounding": "kahan"}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "momentum_dtype": "bfloat16"}),
    "sign": (torch.float32, {"preset": "sign"}),
    "adam": (torch.float32, {"preset": "adam"}),
}


def _made(kind):
    dtype, options = KINDS[kind]
    model, optimizer = net(dtype, **options)
    start = weights(model)
    if dist.get_world_size() > 1:
        shard(model, optimizer)
    place = sliced if dist.get_world_size() > 1 else lambda gradient, p: gradient
    return model, optimizer, partial(moved, model, optimizer, place=place), gradients(start, 4)


def _state(model, optimizer, full):
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    return dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)
    )


def _saves(folder):
    for kind in KINDS:
        model, optimizer, go, given = _made(kind)
        go(given[:2])
        dcp.save(_state(model, optimizer, False), checkpoint_id=f"{folder}/{kind}")
        full = _state(model, optimizer, True)
        if dist.get_rank() == 0:
            torch.save(full, f"{folder}/{kind}.pt")
        end = go(given[2:])  # undisturbed
        if dist.get_rank() == 0:
            torch.save(end, f"{folder}/{kind}.end.pt")


def _goes_on(folder):
    for kind in KINDS:
        for full in (True, False):
            model, optimizer, go, given = _made(kind)
            state = _state(model, optimizer, full)
            if full:
                state = torch.load(f"{folder}/{kind}.pt")
            else:
                dcp.load(state, checkpoint_id=f"{folder}/{kind}")
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=full, cpu_offload=full),
            )
            assert optimizer.steps == 2
            assert bool(optimizer.state) == (kind != "sign")
            end = torch.load(f"{folder}/{kind}.end.pt")
            for key, value in go(given[2:]).items():
                assert torch.equal(value, end[key]), (kind, full, key)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, (1, 2, 3)), (1, (2,)), (3, (2,))])
def test_a_checkpoint_goes_on_bit_for_bit_with_any_number_of_ranks(tmp_path, before, after):
    spawn(tmp_path, _saves, before, str(tmp_path))
    for world in after:
        spawn(tmp_path, _goes_on, world, str(tmp_path))


def test_a_block_of_8_bits_is_the_same_for_any_number_of_ranks():
    """A row, which no rank cuts, holds whole blocks."""
    blocks = {(64, 64): 64, (4096, 4096): 256, (64, 65): 0, (63, 64): 0, (33, 64, 3): 64}
    blocks |= {(768, 96): 32, (4096, 8): 0, (4096, 16): 16, (8192,): 256, (4097,): 0}
    assert {shape: block_of(torch.empty(shape)) for shape in blocks} == blocks


@pytest.mark.parametrize("shape", [(64, 64), (33, 64, 3), (8192,)])
def test_a_packed_state_is_the_state(shape):
    p = torch.zeros(shape)
    momentum = new_momentum(p, "8bit")
    momentum.copy_(torch.randn(shape))
    state = {"momentum_buffer": momentum, "compensation": torch.arange(-3, 3, dtype=torch.int16)}
    before = copy.copy(state)
    made = packed(state, p, "8bit")
    assert {type(value) for value in made.values()} == {torch.Tensor}
    after = unpacked(made)
    assert state == before
    assert torch.equal(after["momentum_buffer"].dequantize(), momentum.dequantize())
    assert torch.equal(after["compensation"], state["compensation"])
    assert unpacked(packed({}, p, "8bit")) == {}


def test_noise_is_even_and_of_each_entry():
    p = torch.empty(300, 70)
    axes = places(p)
    whole = entry_noise("1 w", axes, p.shape)
    assert whole.min() >= 0
    assert whole.max() < 2**16
    assert whole.float().mean() / 2**16 == pytest.approx(0.5, abs=0.01)
    for bit in range(16):
        assert (whole >> bit & 1).float().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(entry_noise("1 w", [axes[0][7:9], axes[1]], p.shape), whole[7:9])
    for other in ("2 w", "1 v"):
        both = torch.stack([whole, entry_noise(other, axes, p.shape)]).flatten(1).float()
        assert abs(torch.corrcoef(both)[0, 1]) < 0.03
    near = torch.stack([whole[:, 1:], whole[:, :-1]]).flatten(1).float()
    assert abs(torch.corrcoef(near)[0, 1]) < 0.03
    assert entry_noise("1 w", [], ()).shape == ()


def _numbers_of_what_is_held():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    shape = (8, 6)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    for placements in (
        (Shard(0), Replicate()),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0)),
    ):
        p = distribute_tensor(numbers, mesh, placements, src_data_rank=None)
        rows, columns = places(p)
        assert torch.equal(rows[:, None] * shape[1] + columns, p.to_local()), placements


@pytest.mark.slow
def test_numbers_of_what_is_held(tmp_path):
    spawn(tmp_path, _numbers_of_what_is_held, 4)
