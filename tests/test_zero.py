"""ZeRO's flat partitions, made here as DeepSpeed makes them; with DeepSpeed: test_deepspeed."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_normopt import PRESETS, Fixed, NormOpt, create_normopt_optimizer
from hf_normopt.norms.layouts import Layout
from hf_normopt.optim.zero import Partition, Place, matched_flat
from hf_normopt.optim.zero_moves import owners_of
from tests.test_optimizer import llama
from tests.test_sharding import DATA, gpt2, llama33, lora, odd, rate, spawn, untied


class Zero:
    """What DeepSpeed does with an optimizer: partitions, one step for each, and their words."""

    def __init__(self, model, optimizer, stage, sub_group=10**9):
        self.model, self.optimizer, self.stage = model, optimizer, stage
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.parts = []  # of (group, flat tensor, [(parameter, its first entry here, span)])
        for group in optimizer.param_groups:
            params = group["params"]
            (self._stage_3 if stage == 3 else self._stage_2)(group, params, sub_group)

    def _stage_2(self, group, params, _):
        whole = torch.cat([p.detach().flatten() for p in params])
        size = -(-len(whole) // (2 * self.world)) * 2  # DeepSpeed's alignment
        begin = self.rank * size
        flat = nn.functional.pad(whole, (0, size * self.world - len(whole)))[begin:][:size].clone()
        held, end = [], 0
        for p in params:
            start, end = end, end + p.numel()
            first, last = max(start, begin), min(end, begin + size)
            p._dp_group, p._hp_mapping = dist.group.WORLD, None
            if first < last:
                p._hp_mapping = SimpleNamespace(
                    lp_fragment_address=SimpleNamespace(start=first - start, numel=last - first),
                    hp_fragment_address=SimpleNamespace(start=first - begin, numel=last - first),
                )
                held.append((p, first - begin, (first - start, last - start)))
        group["params"] = [flat]
        self.parts.append((group, flat, held))

    def _stage_3(self, group, params, sub_group):
        runs = [[]]
        for p in params:
            if sum(q.numel() for q in runs[-1]) > sub_group:
                runs.append([])
            runs[-1].append(p)
        for run in runs:
            shards, held, position = [], [], 0
            for p in run:
                size = -(-p.numel() // self.world)
                span = [min(p.numel(), (self.rank + i) * size) for i in (0, 1)]
                shard = p.detach().flatten()[slice(*span)]
                p.ds_tensor = nn.functional.pad(shard, (0, size - len(shard)))
                p.ds_numel, p.ds_process_group, p._z3_optimizer = p.numel(), dist.group.WORLD, self
                held.append((p, position, span))
                shards.append(p.ds_tensor)
                position += size
            self.parts.append((group, torch.cat(shards), held))
        group["params"] = []

    get_param_id = staticmethod(id)

    @property
    def grad_position(self):
        return {
            id(p): (i, position, -(-p.numel() // self.world))
            for i, (_, _, held) in enumerate(self.parts)
            for p, position, _ in held
        }

    @property
    def fp32_partitioned_groups_flat(self):
        return [flat for _, flat, _ in self.parts]

    def step(self):
        groups = self.optimizer.param_groups
        for group, flat, held in self.parts:
            flat.grad = torch.zeros_like(flat)
            for p, position, (start, stop) in held:
                flat.grad[position : position + stop - start] = p.grad.flatten()[start:stop]
            if self.stage == 3:
                group["params"] = [flat]
            else:
                self.optimizer.param_groups = [group]
            self.optimizer.step()
            if self.stage == 3:
                group["params"] = []
            self.optimizer.param_groups = groups
        for p in self.model.parameters():
            if p.requires_grad:
                p.detach().copy_(self.whole(p, lambda flat: flat))

    def whole(self, p, of):
        """What flat tensors have for a parameter, on every rank."""
        found = torch.zeros(p.numel())
        for _, flat, held in self.parts:
            for q, position, (start, stop) in held:
                if q is p:
                    found[start:stop] = of(flat)[position : position + stop - start]
        dist.all_reduce(found)
        return found.reshape(p.shape)


def backward(model, ids):
    model.zero_grad()
    out = model(input_ids=ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    loss = logits if logits.ndim == 0 else nn.functional.cross_entropy(logits[:, 0], ids[:, 1])
    loss.backward()
    for p in model.parameters():
        if p.grad is None and p.requires_grad:  # ZeRO makes it 0
            p.grad = torch.zeros_like(p)


def steps_as_one_device_does(make, options, stage, sub_group=10**9):
    alone, reference = make(**options)
    model, optimizer = make(**options)
    zero = Zero(model, optimizer, stage, sub_group)
    for step, ids in enumerate(DATA):
        seen, expected = {}, {}
        if step == 1:
            reference.observer = lambda move, eta, to=expected: to.update(noted(move))
            if dist.get_rank() == 1:  # one looks on, all gather
                optimizer.observer = lambda move, eta, to=seen: to.update(noted(move))
        else:
            reference.observer = optimizer.observer = None
        backward(alone, ids)
        reference.step()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            p.grad = q.grad
        zero.step()
        if seen:
            assert seen.keys() == expected.keys()
            for name, tensors in expected.items():
                close(seen[name], tensors, name)
    assert optimizer.steps == reference.steps == len(DATA)
    for (name, p), q in zip(alone.named_parameters(), model.named_parameters(), strict=True):
        close([q[1]], [p], name)
        if "momentum_buffer" in reference.state.get(p, {}):
            momentum = zero.whole(q[1], lambda flat: optimizer.state[flat]["momentum_buffer"])
            close([momentum], [reference.state[p]["momentum_buffer"].float()], name)


def noted(move):
    """What an observer sees; a direction's scale is large where a rate is small."""
    return {
        one.names[0]: [one.param.clone(), one.grad.clone(), one.smooth.clone(), one.direction / 10]
        for one in move.each()
    }


def close(found, expected, name):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.reshape(b.shape), b, rtol=1e-3, atol=2e-5, msg=lambda text: f"{name}: {text}"
        )


FIT = [name for name, of in PRESETS.items() if of.step_size == Fixed() and name != "shampoo"]
RATE = {"lr": 1e-2, "weight_decay": 0.1}
MODELS = [
    (llama33, {**RATE, "heads": True}),
    (gpt2, RATE),
    (lora, {**RATE, "norm_product": "rms->rms"}),
    (odd, {"weight_decay": 0.1}),
    (untied, {**RATE, "statistic_head": 0.9, "statistic_embedding": 0.9}),
]


def all_cases(stage):
    for make, options in MODELS:
        steps_as_one_device_does(make, options, stage)
    if stage == 2:
        for preset in FIT:
            steps_as_one_device_does(llama33, {"preset": preset, **rate(preset)}, stage)
    else:  # a group in several flat tensors
        steps_as_one_device_does(llama33, RATE, stage, sub_group=3000)


@pytest.mark.parametrize("stage", [2, 3])
def test_partitions_step_as_whole_parameters_on_one_device(tmp_path, stage):
    """Three ranks, so that parameters lie across partitions, and rows too."""
    spawn(tmp_path, all_cases, 3, stage)


def mistaken():
    model, optimizer = llama33(**RATE)
    zero = Zero(model, optimizer, 2)
    if dist.get_rank() == 1:
        zero.parts[0][1].add_(1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"rank 1.*q_proj.*other entries than the weight"):
        zero.step()

    model, optimizer = llama33(**RATE, step_size="dual_norm")
    with pytest.raises(RuntimeError, match=r"step size .*depends on all.*FSDP2"):
        backward(model, DATA[0]), Zero(model, optimizer, 2).step()

    model, optimizer = llama33(**RATE)
    zero = Zero(model, optimizer, 2)
    mapping = zero.parts[0][2][0][0]._hp_mapping
    if mapping is not None:
        mapping.lp_fragment_address.numel -= 1
    with pytest.raises(RuntimeError, match=r"flattened .*q_proj.*the ranks have its entries"):
        backward(model, DATA[0]), zero.step()

    model, optimizer = llama33(lr=0.1 if dist.get_rank() else 0.2)
    zero = Zero(model, optimizer, 2)
    with pytest.raises(RuntimeError, match=r"On rank 1: the group linear.*has lr 0.1; on rank 0"):
        backward(model, DATA[0]), zero.step()


def test_what_is_wrong_on_one_rank_is_an_error_on_all(tmp_path):
    spawn(tmp_path, mistaken, 2)


def offloaded():
    """A partition on a device of which the ranks' transport knows nothing."""
    elsewhere = SimpleNamespace(_device_types=[torch.device("cuda")])
    for preset in ("normopt", "adam"):
        model, optimizer = llama33(**RATE, preset=preset)
        zero = Zero(model, optimizer, 2)
        for p in model.parameters():
            p._dp_group = elsewhere
        backward(model, DATA[0])
        if preset == "adam":
            zero.step()
        else:
            with pytest.raises(RuntimeError, match=r"partitions are offloaded.*offload_optimizer"):
                zero.step()


def test_offloaded_partitions_are_refused_by_who_needs_them_whole(tmp_path):
    spawn(tmp_path, offloaded, 1)


# Shapes alone


def partition(shape, spans, layout="out in"):
    places = [Place(spans[0], 0)]
    names, shapes = ["w"], [shape]
    return Partition(None, None, True, [], names, shapes, [layout], places, spans=[spans])


@pytest.mark.parametrize("role", ["embedding", "linear"])
@pytest.mark.parametrize("cuts", [[0, 31, 60], [0, 1, 59, 60], [0, 60, 60], [0, 12, 24, 60]])
def test_pieces_cover_a_parameter_once(role, cuts):
    rule = PRESETS["normopt"].policy[role]
    layout = "in out" if role == "embedding" else "out in"
    found = partition((5, 12), list(pairwise(cuts)), layout).pieces(rule)
    ends = [0]
    for piece in found:
        assert piece.start == ends[-1]
        assert Layout(piece.layout).fits(piece.shape)
        assert sum(map(piece.size, range(len(cuts) - 1))) == math.prod(piece.shape)
        ends.append(piece.start + math.prod(piece.shape))
    assert ends[-1] == 60
    if role == "linear":
        assert len(found) == 1
    else:  # only rows that a partition ends in are sent
        sent = sum(math.prod(piece.shape) for piece in found if piece.holder is None)
        assert sent == 12 * len({cut // 12 for cut in cuts if cut % 12})


@pytest.mark.parametrize("world", [2, 8])
def test_shards_of_equal_size_are_divided_evenly(world):
    spans = [(i * 60 // world, (i + 1) * 60 // world) for i in range(world)]
    (piece,) = partition((5, 12), spans).pieces(PRESETS["normopt"].policy["linear"])
    owners = owners_of([piece] * 10 * world, [1.0] * 10 * world, world)
    assert {owners.count(rank) for rank in range(world)} == {10}


# Doors


@pytest.mark.parametrize(
    ("options", "config", "complaint"),
    [
        ({"preset": "shampoo"}, {}, r"statistic of whole matrices.*FSDP2.*--fsdp_config"),
        ({"preset": "prodigy"}, {}, r"depends on all.*fixed step size"),
        ({"step_size": "dual_norm"}, {}, r"depends on all"),
        ({}, {"zero": {"round_robin_gradients": True}}, r"round_robin_gradients"),
        ({}, {"tensor_parallel": {"autotp_size": 2}}, r"divides matrices.*autotp_size to 1"),
        (
            {},
            {
                "zero": {"offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            r"offloaded to cpu",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_zero_cannot_do_is_refused_when_the_optimizer_is_made(
    monkeypatch, stage, options, config, complaint
):
    rest = {key: value for key, value in config.items() if key != "zero"}
    whole = {"zero_optimization": {"stage": stage, **config.get("zero", {})}, **rest}
    monkeypatch.setattr("hf_normopt.optim.sharding.deepspeed_config", lambda: whole)
    with pytest.raises(ValueError, match=rf"ZeRO stage {stage}\. .*{complaint}"):
        create_normopt_optimizer(llama(), lr=1e-2, **options)
    if not options:  # of no concern to who steps by entry
        create_normopt_optimizer(llama(), lr=1e-2, preset="adam")


def test_roles_are_found_where_zero_init_has_divided_the_parameters():
    expected = create_normopt_optimizer(llama(), lr=1e-2)
    model = llama()
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0)
    optimizer = create_normopt_optimizer(model, lr=1e-2)
    assert all(p.shape == (0,) for p in model.parameters())
    for key in ("role", "param_names", "param_shapes", "layouts"):
        assert [g[key] for g in optimizer.param_groups] == [g[key] for g in expected.param_groups]


def test_a_checkpoint_of_other_partitions_is_refused():
    def saved(**changes):
        return NormOpt.state_dict(create_normopt_optimizer(llama(), lr=1e-2, **changes))

    schedule = {"schedule_linear": "wsd/decay:0.2"}  # which may change
    own = create_normopt_optimizer(llama(), lr=1e-2, **schedule).param_groups
    groups = matched_flat(saved()["param_groups"], own)
    assert [group["schedule"] for group in groups] == [group["schedule"] for group in own]
    with pytest.raises(
        ValueError, match=r"in rule it has \[.*momentum 0.5.*DeepSpeed's checkpoints"
    ):
        matched_flat(saved(momentum_linear=0.5)["param_groups"], own)
    with pytest.raises(ValueError, match=r"in param_names it has 7 parameters"):
        matched_flat(
            create_normopt_optimizer(llama(num_hidden_layers=1), lr=1e-2).param_groups, own
        )
