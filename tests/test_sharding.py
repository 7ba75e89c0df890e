"""Ranks over gloo on this machine: the run of one process, or a refusal on every rank."""

import copy
import math
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import chain

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from hf_normopt import PRESETS, DualNorm, EscapeVelocity, Fixed, create_normopt_optimizer
from hf_normopt.norms.orthogonalize import plan
from hf_normopt.optim import exchange
from hf_normopt.optim.exchange import assign
from hf_normopt.optim.sharding import shard_sizes
from tests.ddp_worker import rank_of
from tests.processes import start
from tests.test_optimizer import batches, llama, train

DATA = [ids % 33 for ids in batches(4)]


def _rank(rank, folder, function, world, *args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=100),
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def spawn(tmp_path, function, world, *args):
    folder = tmp_path / f"{function.__name__}{world}"
    folder.mkdir()
    start(_rank, str(folder), function, world, *args, world=world)


def assert_same(alone, sharded, case=""):
    for (name, p), q in zip(alone.named_parameters(), sharded.parameters(), strict=True):
        whole = q.full_tensor() if isinstance(q, DTensor) else q
        wrong = lambda message, name=name: f"{case} {name}: {message}"
        torch.testing.assert_close(whole, p, rtol=1e-3, atol=2e-5, msg=wrong)


class Odd(nn.Module):
    """Stacked experts, uneven shapes, a single row, a fused matrix, and what is never used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(33, 17)
        self.experts = nn.Parameter(torch.randn(5, 17, 9) * 0.1)
        self.up = nn.Linear(17, 33)
        self.row = nn.Linear(33, 1, bias=False)
        self.unused = nn.Linear(4, 3)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        y = (x.unsqueeze(1) @ self.experts).relu().sum(1)
        x = self.up(x + nn.functional.pad(y, (0, 8))).tanh()
        return self.row(x).square().mean() + (x - 1).square().mean()


def odd(**options):
    torch.manual_seed(3)
    model = Odd()
    overrides = {"experts|up|unused": "linear", "row": "head"}
    return model, create_normopt_optimizer(model, lr=1e-2, overrides=overrides, **options)


def llama33(**options):
    """Tied weights, and a vocabulary that does not divide."""
    torch.manual_seed(0)
    model = llama(vocab_size=33, tie_word_embeddings=True)
    # In float64, since the rounding of a mean over three ranks grows in roots of nearly singular
    # matrices, and becomes one of 8 bits where a momentum lies between two values of bfloat16.
    if options.get("preset") == "shampoo" or "momentum_dtype" in options:
        model.double()
    return model, create_normopt_optimizer(model, **options)


def untied(**options):
    """Tables of 34 rows, which three equal parts of the entries cut."""
    torch.manual_seed(0)
    model = llama(vocab_size=34)
    return model, create_normopt_optimizer(model, **options)


def gpt2(**options):
    """Fused projections, stored transposed."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 33, "n_positions": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **ends))
    for block in model.transformer.h:  # the gradient of the keys' is nothing but rounding
        block.attn.c_attn.bias.requires_grad_(False)
    return model, create_normopt_optimizer(model, **options)


def lora(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(llama(vocab_size=33), config)
    return model, create_normopt_optimizer(model, **options)


def rate(preset):
    low, high = PRESETS[preset].learning_rate
    return {"lr": math.sqrt(low * high), "weight_decay": 0.1}


CASES = [
    *((llama33, {"preset": preset, **rate(preset)}) for preset in PRESETS),
    (llama33, {"lr": 1e-2, "preset": "spectral", "step_size": DualNorm(100.0)}),
    (llama33, {"lr": 1.0, "step_size": EscapeVelocity(1e-4, beta=0.9)}),
    (llama33, {"lr": 1e-2, "step_size": EscapeVelocity(1e-4, per_role=True)}),
    (llama33, {"lr": 1e-2, "step_size": EscapeVelocity(1e-4, stride=3, rule="cosine")}),
    (llama33, {"lr": 1e-2, "momentum_dtype": "bfloat16"}),
    (gpt2, {"lr": 1e-2, "weight_decay": 0.1}),
    (lora, {"lr": 1e-2, "weight_decay": 0.1}),
    (odd, {"weight_decay": 0.1}),
    (untied, {"lr": 1e-2, "statistic_head": 0.9, "statistic_embedding": 0.9}),
]


def shard(model, optimizer, mesh=None):
    """FSDP2, as accelerate does it: the parameters of the groups are found again by name."""
    fully_shard(model, mesh=mesh)
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]


def steps(model, optimizer, data):
    """Every second step is watched, as those are that are logged."""
    if isinstance(model, Odd):
        for ids in data:
            model.zero_grad()
            model(ids).backward()
            optimizer.step()
        return
    for i, ids in enumerate(data):
        optimizer.observer = (lambda move, eta: None) if i % 2 else None
        train(model, optimizer, [ids])


def _runs_are_those_of_one_process(how):
    for make, options in CASES:
        alone, single = make(**options)
        many, optimizer = make(**options)
        if how == "replicas":
            optimizer.replicas = dist.group.WORLD
        elif how == "shards":
            shard(many, optimizer)
        else:  # hybrid
            shard(many, optimizer, init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))
        steps(alone, single, DATA[:3])
        steps(many, optimizer, DATA[:3])
        assert_same(alone, many, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "world"),
    [("replicas", 2), ("shards", 3), ("hybrid", 4)],
)
def test_runs_are_those_of_one_process(tmp_path, how, world):
    spawn(
        tmp_path,
        _all,
        world,
        *(partial(f, how) for f in (_runs_are_those_of_one_process, _every_operator_is_found_once)),
    )


def counted(optimizer):
    """A step; which operators all ranks found together, and how many entries they sent."""
    names = ("directions", "traded", "broadcast", "reductions")
    seen = dict.fromkeys(names, 0)

    def count(owner, attribute, name, number):
        original = getattr(owner, attribute)

        def counting(*args, **kwargs):
            seen[name] += number(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, attribute, counting)

    def to_others(arriving, outgoing, come, gone, group, async_op):
        return len(outgoing) - gone[dist.get_rank(group)]

    def from_me(buffer, group, group_src, **kwargs):
        return len(buffer) * (dist.get_rank(group) == group_src)

    with pytest.MonkeyPatch.context() as patch:
        operators = lambda norm, g, *size: math.prod(g.shape[:-2])
        count(exchange.Spectral, "lmo", "directions", operators)
        count(dist, "all_to_all_single", "traded", to_others)
        count(dist, "broadcast", "broadcast", from_me)
        count(dist, "all_reduce", "reductions", lambda *args, **kwargs: 1)
        optimizer.step()
    numbers = torch.tensor(list(seen.values()))
    dist.all_reduce(numbers)
    return dict(zip(names, numbers.tolist(), strict=True))


def _every_operator_is_found_once(how):
    """Whatever the step size: its dual norms are found by the owners too, and reduced once."""
    world = dist.get_world_size()
    for size in (Fixed(), DualNorm(), EscapeVelocity()):
        model, optimizer = llama33(lr=1e-2, step_size=size)
        groups = 1
        if how == "replicas":
            optimizer.replicas = dist.group.WORLD
        elif how == "shards":
            shard(model, optimizer)
        else:
            groups = 2
            shard(model, optimizer, init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")))
        model(DATA[0], labels=DATA[0]).loss.backward()
        optimizer.step()  # the first compares the replicas' models
        found = counted(optimizer)
        matrices = [p for g in optimizer.param_groups if g["role"] == "linear" for p in g["params"]]
        entries = sum(p.numel() for p in matrices)
        divided = {"replicas": 1, "shards": world, "hybrid": 2}[how]
        sizes = [shard_sizes(len(p), divided) for p in matrices]  # of which one is the owner's
        rows = [p[0].numel() for p in matrices]
        most, least = (
            sum(row * (sum(of) - end(of)) for row, of in zip(rows, sizes, strict=True))
            for end in (min, max)
        )
        duals = isinstance(size, EscapeVelocity)
        assert found["directions"] == (1 + duals) * len(matrices)  # a dual norm is ⟨G, lmo(G)⟩
        assert (2 + duals) * least <= found["traded"] <= (2 + duals) * most
        assert found["broadcast"] == (0 if how == "shards" else entries)
        reduced = int(duals or (how != "replicas" and size != Fixed()))
        if duals and how == "hybrid":  # what each shard has, and what the owner has
            reduced = 3
        assert found["reductions"] == world * (groups + reduced)  # groups: to agree


PLACEMENTS = [
    (Shard(0), Replicate()),
    (Shard(1), Replicate()),
    (Replicate(), Shard(1)),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    (Replicate(), Replicate()),
]


def _tensor_parallel_is_one_process():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for make, options in CASES[:1] + CASES[-4:]:
        for placements in PLACEMENTS:
            alone, single = make(**options)
            many, optimizer = make(**options)
            for module in many.modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    if p.ndim > 1:  # vectors stay plain
                        setattr(
                            module, name, nn.Parameter(distribute_tensor(p.data, mesh, placements))
                        )
            if hasattr(many, "tie_weights"):
                many.tie_weights()
            for group in optimizer.param_groups:
                group["params"] = [many.get_parameter(name) for name in group["param_names"]]
            for ids in DATA[:2]:
                alone.zero_grad()
                loss = alone(ids) if isinstance(alone, Odd) else alone(ids, labels=ids).loss
                loss.backward()
                for p, q in zip(alone.parameters(), many.parameters(), strict=True):
                    placed = isinstance(q, DTensor) and p.grad is not None
                    q.grad = (
                        distribute_tensor(p.grad, mesh, placements) if placed else copy.copy(p.grad)
                    )
                single.step()
                optimizer.step()
            assert_same(alone, many)


@pytest.mark.slow
def test_tensor_parallel_is_one_process(tmp_path):
    spawn(tmp_path, _tensor_parallel_is_one_process, 4)


def _ddp_shares_the_work():
    """Each operator is computed once; batches are divided, and some parameters are never used."""
    world, me = dist.get_world_size(), dist.get_rank()
    alone, single = odd()
    many, optimizer = odd()
    wrapped = DistributedDataParallel(many, find_unused_parameters=True)
    optimizer.replicas = dist.group.WORLD
    seen = []
    of_norm = exchange.Spectral.lmo
    exchange.Spectral.lmo = lambda norm, g, size=1.0: seen.append(len(g)) or of_norm(norm, g, size)
    for ids in DATA:
        single.zero_grad()
        alone(ids).backward()
        optimizer.zero_grad()
        wrapped(ids.chunk(world)[me]).backward()
        before = len(seen)
        optimizer.step()
        mine = torch.tensor(sum(seen[before:]))
        single.step()
    exchange.Spectral.lmo = of_norm
    assert_same(alone, many)
    dist.all_reduce(mine)
    assert mine == 5 + 2  # five experts, and the weight and bias of `up`
    for p in many.parameters():
        everyone = [torch.empty_like(p) for _ in range(world)]
        dist.all_gather(everyone, p.detach())
        assert all(torch.equal(other, p) for other in everyone)  # bit for bit


def _who_has_no_gradient_waits_for_nobody():
    """A gradient that is None on one rank counts as 0 there."""
    many, _ = odd()
    optimizer = create_normopt_optimizer(many, lr=1e-2, overrides={"row": "head"})
    optimizer.replicas = dist.group.WORLD
    many(DATA[0]).backward()
    if dist.get_rank() == 1:
        many.up.weight.grad = None
    before = many.up.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, many.up.weight)
    assert many.unused.weight.grad is None


def _a_complaint_is_everybodys():
    many, optimizer = odd()
    optimizer.replicas = dist.group.WORLD
    many(DATA[0]).backward()
    optimizer.step()
    if dist.get_rank() == 1:
        many.up.weight.data = many.up.weight.data.flatten()
        many.up.weight.grad = torch.zeros_like(many.up.weight)
    start = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"On rank 1: up\.weight had the shape \(33, 17\).*FSDP2"
    ):
        optimizer.step()
    assert time.monotonic() - start < 20


def _a_nan_of_one_rank_counts_as_0_on_all():
    ends = []
    for value in (torch.nan, 0.0):
        many, optimizer = odd()
        shard(many, optimizer)
        many(DATA[0]).backward()
        if dist.get_rank() == 0:
            many.up.weight.grad.to_local()[0, 0] = value
        optimizer.step()
        ends.append([p.full_tensor() for p in many.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def _fsdp1_is_refused():
    for use_orig_params in (True, False):
        wrapped = FullyShardedDataParallel(
            llama(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(ValueError, match=r"FSDP1.*FSDP2"):
            create_normopt_optimizer(wrapped, lr=1e-2)


def _all(*functions):
    for function in functions:
        function()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    spawn(
        tmp_path,
        _all,
        2,
        _ddp_shares_the_work,
        _who_has_no_gradient_waits_for_nobody,
        _a_complaint_is_everybodys,
        _a_nan_of_one_rank_counts_as_0_on_all,
        _fsdp1_is_refused,
    )


OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def _saves(folder, full):
    many, optimizer = llama33(**OPTIONS)
    shard(many, optimizer)
    steps(many, optimizer, DATA[:2])
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model_state, optimizer_state = get_state_dict(many, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    if not full:
        dcp.save(state, checkpoint_id=folder)
    elif dist.get_rank() == 0:
        torch.save(state, f"{folder}/state.pt")


def _goes_on(folder, full):
    alone, single = llama33(**OPTIONS)
    steps(alone, single, DATA)
    many, optimizer = llama33(**OPTIONS)
    shard(many, optimizer)
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    model_state, optimizer_state = get_state_dict(many, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    if full:
        state = torch.load(f"{folder}/state.pt")
    else:
        dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        many,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    assert optimizer.steps == 2
    assert optimizer.param_groups[0]["role"] == single.param_groups[0]["role"]
    steps(many, optimizer, DATA[2:])
    assert_same(alone, many)


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False], ids=["full", "sharded"])
def test_checkpoints_go_on_with_another_number_of_ranks(tmp_path, full):
    for before, others in ((2, [1, 3]), (1, [4])) if full else ((2, [3]), (3, [1])):
        folder = tmp_path / str(before)
        folder.mkdir()
        spawn(folder, _saves, before, str(folder), full)
        for after in others:
            spawn(folder, _goes_on, after, str(folder), full)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama", "lora", "fsdp", "experts"])
def test_a_trainer_on_two_processes_is_one_on_one(tmp_path, model):
    """DDP for the first two; transformers' own sharding at loading for the others."""
    for name, world, batch_size in (("one", 1, 8), ("two", 2, 4)):
        (tmp_path / name).mkdir()
        start(rank_of, world, free_port(), tmp_path / name, batch_size, model, world=world)
    one, two = (torch.load(tmp_path / name / "weights.pt") for name in ("one", "two"))
    for name in one:
        # A router's logits may be shifted, so that one singular value is nothing but rounding.
        atol = 3e-4 if name.endswith("gate.weight") else 2e-5
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["raise", "die"])
def test_no_rank_waits_for_one_that_is_gone(tmp_path, fault):
    begin = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command += ["-m", "tests.ddp_worker", str(tmp_path), "4", "llama", fault]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode
    assert ("rank 1 has had enough" if fault == "raise" else "exitcode  : 9") in done.stderr
    assert time.monotonic() - begin < 120


@pytest.mark.parametrize("world", [1, 2, 8, 64, 1024])
def test_work_is_divided_evenly(world):
    """A Llama of 32 layers and 4096 wide: within 10 % of the mean, or of the largest operator."""
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3
    costs = tuple(plan(shape, device="meta").work for shape in layer * 32)
    loads = [0.0] * world
    for owner, cost in zip(assign(costs, world), costs, strict=True):
        loads[owner] += cost
    assert max(loads) <= max(1.1 * sum(costs) / world, max(costs))


@pytest.mark.parametrize("length", [0, 1, 5, 33, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_shard_sizes_are_those_of_torch(length, world):
    sizes = [Shard.local_shard_size_and_offset(length, world, rank)[0] for rank in range(world)]
    assert shard_sizes(length, world) == sizes
    assert sum(chain(sizes)) == length
