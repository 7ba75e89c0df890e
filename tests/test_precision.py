"""Momenta in few bits, weights in 16 bits that lose no small step, sparse rows, stacked tensors."""

import io
import itertools
import logging
import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer
from transformers.trainer_utils import set_seed

from hf_normopt import (
    DualNorm,
    NormOpt,
    NormOptArguments,
    Rule,
    create_normopt_optimizer,
    operator_norm,
)
from hf_normopt.optim import batches as batching
from hf_normopt.optim.precision import MOMENTUM_DTYPES, ROUNDINGS, warn_once

from .test_optimizer import batches, llama, train
from .test_trainer import arguments, equal, inner, rows, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PRECISIONS = list(itertools.product(MOMENTUM_DTYPES, ROUNDINGS))
SIGN = Rule(operator_norm("l1", "linf"))  # moves each entry by the learning rate
VECTORS = Rule(operator_norm("l1", "rms"))
ULP = 2**-7  # of bfloat16, relative to the power of two below


def one(start, rule=SIGN, role="linear", **options):
    p = nn.Parameter(start.clone())
    return p, NormOpt([{"params": [("w", p)], "role": role}], {role: rule}, **options)


def few_bits(**changes):
    """A model whose matrices are large enough for 8 bits."""
    return llama(hidden_size=64, intermediate_size=128, **changes)


def state_bytes(optimizer):
    """Bytes of all states, those inside tensors of 8 bits included."""
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    inside = [[t.codes, t.scale, t.qmap] if hasattr(t, "block_size") else [t] for t in tensors]
    return sum(t.numel() * t.element_size() for t in itertools.chain(*inside))


def on_disk(optimizer):
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def numbers(tensor):
    """The numbers that a momentum stands for."""
    return tensor.dequantize() if hasattr(tensor, "block_size") else tensor.float()


@pytest.mark.parametrize(
    ("momentum_dtype", "least", "most"), [("float32", 4, 4), ("bfloat16", 2, 2), ("8bit", 1, 1.05)]
)
def test_bytes_of_a_momentum(momentum_dtype, least, most):
    model = nn.Linear(512, 512, bias=False)
    optimizer = create_normopt_optimizer(model, lr=1e-3, momentum_dtype=momentum_dtype)
    model(torch.randn(3, 512)).square().sum().backward()
    optimizer.step()
    assert least <= state_bytes(optimizer) / 512**2 <= most


def test_small_momenta_are_not_in_8_bits():
    rule = Rule(SIGN.norm, momentum=0.9)
    for shape, size in {(63, 65): 4, (64, 65): 4, (64, 64): 1}.items():
        p, optimizer = one(torch.zeros(shape), rule, lr=0.1, momentum_dtype="8bit")
        p.grad = torch.randn(shape)
        optimizer.step()
        momentum = optimizer.state[p]["momentum_buffer"]
        assert hasattr(momentum, "codes") == (size == 1), shape


@pytest.mark.parametrize(("momentum_dtype", "rounding"), PRECISIONS)
def test_a_step_in_parts_is_the_whole_step(momentum_dtype, rounding, monkeypatch):
    """Rows of 384 entries do not align with blocks of 256."""
    rule = Rule(VECTORS.norm, momentum=0.9, nesterov=True)
    start = torch.randn(3000, 384).bfloat16()
    gradients = [torch.randn(3000, 384).bfloat16() for _ in range(3)]
    runs = []
    for size in (2**15, 2**30):
        monkeypatch.setattr(batching, "PART", size)
        options = {"momentum_dtype": momentum_dtype, "rounding": rounding}
        p, optimizer = one(start, rule, "embedding", lr=0.01, weight_decay=0.1, **options)
        for p.grad in gradients:
            (move,) = batching.moves_of(optimizer.param_groups[0], rule, optimizer.state)
            assert (len(list(batching.parts(move))) > 30) == (size == 2**15)
            optimizer.step()
        runs.append((p, optimizer.state[p]))
    (a, kept), (b, whole) = runs
    assert torch.equal(a, b)
    assert kept.keys() == whole.keys()
    assert all(torch.equal(numbers(kept[key]), numbers(whole[key])) for key in kept)


def test_momenta_in_few_bits_train_as_float32():
    losses = {}
    start = few_bits().state_dict()
    for momentum_dtype in MOMENTUM_DTYPES:
        model = few_bits()
        model.load_state_dict(start)
        options = {"momentum_dtype": momentum_dtype, "situation": "neutral"}
        optimizer = create_normopt_optimizer(model, lr=1e-3, **options)
        losses[momentum_dtype] = train(model, optimizer, batches(4) * 10)
    assert losses["float32"][-1] < losses["float32"][0] / 2
    assert losses["bfloat16"] != losses["float32"] != losses["8bit"]
    assert losses["bfloat16"][-1] == pytest.approx(losses["float32"][-1], rel=0.003)
    assert losses["8bit"][-1] == pytest.approx(losses["float32"][-1], rel=0.006)


def test_the_nearest_weight_in_16_bits_never_moves():
    """Steps of half a last bit are lost; the others arrive, as near as bfloat16 has numbers."""
    start = 1 + 0.5 * torch.rand(64, 64).bfloat16().float()
    goal = start + 0.2 * (torch.rand(64, 64) - 0.5)

    def distance(dtype, rounding):
        p, optimizer = one(start.to(dtype), lr=1e-3, rounding=rounding)
        for _ in range(150):
            p.grad = p.detach() - goal.to(dtype)
            optimizer.step()
        return (p.detach().float() - goal).abs().mean().item()

    far = (start.bfloat16().float() - goal).abs().mean().item()
    near = (goal.bfloat16().float() - goal).abs().mean().item()
    found = {r: distance(torch.bfloat16, r) for r in ROUNDINGS}
    exact = distance(torch.float32, "nearest")
    assert exact < 1e-3
    assert found["nearest"] == far
    assert found["kahan"] < 2 * near < far / 8
    assert found["stochastic"] < 2 * near


def test_a_model_in_16_bits_learns_small_steps():
    start = few_bits(initializer_range=0.1).bfloat16().state_dict()

    def loss(dtype, rounding):
        model = few_bits().to(dtype)
        model.load_state_dict(start)
        options = {"rounding": rounding, "situation": "neutral"}
        optimizer = create_normopt_optimizer(model, lr=1e-4, **options)
        losses = train(model, optimizer, batches(2) * 15)
        return losses[0] - losses[-1]

    exact = loss(torch.float32, "nearest")
    found = {r: loss(torch.bfloat16, r) for r in ROUNDINGS}
    assert found["nearest"] < 0.7 * exact
    assert found["kahan"] == pytest.approx(exact, rel=0.05)
    assert found["stochastic"] == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_kahan_keeps_what_rounding_takes(weight_decay):
    """A weight and its compensation are the float32 run's weight, for two bytes more."""
    start = torch.randn(64, 64).bfloat16()
    options = {"rule": VECTORS, "role": "embedding", "lr": 1e-3, "weight_decay": weight_decay}
    wide, exact = one(start.float(), **options)
    p, optimizer = one(start, rounding="kahan", **options)
    for _ in range(200):
        p.grad = torch.randn(64, 64).bfloat16()
        wide.grad = p.grad.float()
        exact.step()
        optimizer.step()
    assert state_bytes(optimizer) == 2 * p.numel()
    upper = p.detach().view(torch.int16).to(torch.int32) << 16
    compensated = (upper + optimizer.state[p]["compensation"]).view(torch.float32)
    p, wide = p.detach().float(), wide.detach()
    size = wide.abs().clamp(min=0.05)

    def error(tensor):
        return ((tensor - wide) / size).square().mean().sqrt()

    assert error(compensated) < 2**-17 < 2**-10 < error(p)
    assert ((compensated - wide).abs() / size).max() < 2**-16
    assert ((p - wide).abs() <= (ULP / 2 + 2**-16) * size).all()


def test_kahan_in_float16_keeps_more_than_nearest():
    start = torch.randn(64, 64).half()
    ends = []
    for value, rounding in ((start.float(), "nearest"), (start, "kahan"), (start, "nearest")):
        torch.manual_seed(0)
        p, optimizer = one(value, rule=VECTORS, role="embedding", lr=1e-5, rounding=rounding)
        for _ in range(50):
            p.grad = torch.randn(64, 64).to(p.dtype)
            optimizer.step()
        ends.append(p.detach().float() + optimizer.state[p].get("compensation", 0))
    wide, kahan, nearest = ends
    assert (kahan - wide).norm() < 0.1 * (nearest - wide).norm()


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_what_is_not_finite_stays_so(rounding):
    p, optimizer = one(torch.ones(4, 4).bfloat16(), lr=1.0, rounding=rounding)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    p.data[0], p.data[1] = nan.bfloat16(), torch.inf
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[0].isnan().all()
    assert (p[1] == torch.inf).all()
    assert p[2:].isfinite().all()


def test_stochastic_rounding_is_unbiased_and_near():
    start = (torch.rand(512, 512) + 1) * 2.0 ** torch.randint(-3, 4, (512, 512))
    start = (start * torch.randn(512, 512).sign()).bfloat16()
    p, optimizer = one(start, lr=1e-4, rounding="stochastic")
    p.grad = torch.randn(512, 512).bfloat16()
    exact = start.float() - 1e-4 * p.grad.float().sign()
    optimizer.step()
    ulp = ULP * 2.0 ** exact.abs().log2().floor()
    error = (p.detach().float() - exact) / ulp
    assert error.abs().max() < 1
    upwards = (exact - start.float()) / ulp  # where it is x, it rounds up with the probability x
    x = upwards - upwards.floor()
    bound = 5 * (x * (1 - x)).sum().sqrt() / error.numel()
    assert error.mean().abs() < bound
    towards = (error * p.grad.float().sign()).mean().abs()
    assert towards < bound < upwards.abs().mean() / 10


def test_stochastic_rounding_is_unbiased_over_steps():
    """The noise of one step is not that of another."""
    start = torch.full((64, 64), 1.25).bfloat16()
    p, optimizer = one(start, lr=1e-4, rounding="stochastic")
    for _ in range(200):
        p.grad = torch.ones(64, 64, dtype=torch.bfloat16)
        optimizer.step()
    moved = (start - p.detach()).float()
    chance = 1e-4 / ULP  # a walk of steps of one ulp
    bound = 5 * ULP * (200 * chance / 64**2) ** 0.5
    assert moved.mean().item() == pytest.approx(0.02, abs=bound)
    assert moved.std().item() == pytest.approx(ULP * (200 * chance) ** 0.5, rel=0.2)


@pytest.mark.parametrize(("momentum_dtype", "rounding"), PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(momentum_dtype, rounding):
    start, data = few_bits().bfloat16().state_dict(), batches(6)

    def make(state):
        model = few_bits().bfloat16()
        model.load_state_dict(state)
        options = {"momentum_dtype": momentum_dtype, "rounding": rounding}
        return model, create_normopt_optimizer(model, lr=1e-3, weight_decay=0.1, **options)

    straight, optimizer = make(start)
    train(straight, optimizer, data)
    first, before = make(start)
    train(first, before, data[:3])
    second, after = make(first.state_dict())
    after.load_state_dict(on_disk(before))
    train(second, after, data[3:])
    assert equal(weights(straight), weights(second))
    for p, q in zip(straight.parameters(), second.parameters(), strict=True):
        a, b = optimizer.state[p], after.state[q]
        assert a.keys() == b.keys()
        assert all(a[key].dtype == b[key].dtype for key in a)
        assert all(torch.equal(numbers(a[key]), numbers(b[key])) for key in a)


@pytest.mark.parametrize("wide", ["float32", "bfloat16"])
@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "8bit"])
def test_a_checkpoint_goes_on_in_other_bits(momentum_dtype, wide):
    model, data = few_bits(), batches(4)

    def make(momentum_dtype, checkpoint=None):
        optimizer = create_normopt_optimizer(model, lr=1e-3, momentum_dtype=momentum_dtype)
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint)
            assert {g["momentum_dtype"] for g in optimizer.param_groups} == {momentum_dtype}
        train(model, optimizer, data[:1])
        return optimizer

    def momenta(optimizer):
        return [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]

    before = make(wide)
    there = create_normopt_optimizer(model, lr=1e-3, momentum_dtype=momentum_dtype)
    there.load_state_dict(on_disk(before))
    for a, b in zip(momenta(before), momenta(there), strict=True):
        error = (numbers(a) - numbers(b)).abs()
        if momentum_dtype == "bfloat16":
            assert torch.equal(b, a.bfloat16())
        else:
            assert error.max() <= 0.02 * numbers(a).abs().max()
    train(model, there, data)
    back = create_normopt_optimizer(model, lr=1e-3, momentum_dtype=wide)
    back.load_state_dict(on_disk(there))
    for a, b in zip(momenta(there), momenta(back), strict=True):
        assert torch.equal(numbers(a).to(b.dtype), b)
        assert b.dtype == getattr(torch, wide)
    train(model, back, data)


def test_replicas_of_other_seeds_draw_the_same_noise():
    """And what they draw is not taken from what torch draws."""
    start = few_bits().bfloat16().state_dict()
    replicas = []
    for seed in (1, 2):
        model = few_bits().bfloat16()
        model.load_state_dict(start)
        optimizer = create_normopt_optimizer(model, lr=1e-4, rounding="stochastic")
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        train(model, optimizer, batches(3))
        assert torch.equal(state, torch.random.get_rng_state())
        replicas.append(weights(model))
    assert equal(*replicas)
    assert not equal(replicas[0], start)


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"momentum_dtype": "fp8"}, torch.float32, "one of float32, bfloat16, 8bit, found 'fp8'"),
        ({"rounding": "up"}, torch.float32, "one of nearest, stochastic, kahan, found 'up'"),
        ({"rounding": "stochastic"}, torch.float16, r'found torch.float16: use rounding="kahan"'),
    ],
)
def test_what_cannot_be_done_is_refused(options, dtype, message):
    with pytest.raises(ValueError, match=message):
        one(torch.zeros(3, 3, dtype=dtype), lr=0.1, **options)


def test_8_bits_name_the_extra_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    with pytest.raises(ImportError, match=r'pip install "hf_normopt\[torchao\]"'):
        one(torch.zeros(3, 3), lr=0.1, momentum_dtype="8bit")
    one(torch.zeros(3, 3), lr=0.1, momentum_dtype="bfloat16")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_warning_tells_of_lost_steps(rounding, caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        one(torch.zeros(3, 3), lr=0.1, rounding=rounding)
        assert not caplog.records
        for _ in range(2):
            one(torch.zeros(3, 3, dtype=torch.bfloat16), lr=0.1, rounding=rounding)
    found = [r.getMessage() for r in caplog.records]
    assert len(found) == (rounding == "nearest")
    assert all("Some weights are torch.bfloat16" in text for text in found)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "8bit"])
def test_the_trainer_resumes_bit_for_bit(momentum_dtype, rounding, tmp_path):
    text = f"momentum_dtype={momentum_dtype},rounding={rounding}"
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "learning_rate": 1e-4}

    def run(args, **changes):
        set_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        config = BertConfig(**sizes, num_attention_heads=2, vocab_size=64)
        model = BertForSequenceClassification(config).bfloat16()
        trainer = Trainer(model, args, train_dataset=rows())
        trainer.train(**changes)
        return trainer

    args = arguments(tmp_path, optim="normopt", optim_args=text, **saving)
    straight = run(args)
    resumed = run(args, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    options = {"momentum_dtype": momentum_dtype, "rounding": rounding}
    typed = run(arguments(tmp_path, NormOptArguments, **options, **{**saving, "save_steps": 9}))
    assert equal(weights(straight.model), weights(resumed.model))
    assert equal(weights(straight.model), weights(typed.model))
    states = inner(straight).state.values()
    assert all(("compensation" in state) == (rounding == "kahan") for state in states)
    kept = {hasattr(s["momentum_buffer"], "codes") for s in states if "momentum_buffer" in s}
    assert kept == ({True, False} if momentum_dtype == "8bit" else {False})


def table(sparse, rule, dtype=torch.float32, shape=(40, 6), **options):
    torch.manual_seed(3)
    layer = nn.Embedding(*shape, sparse=sparse, dtype=dtype)
    groups = [{"params": [("w", layer.weight)], "role": "embedding"}]
    return layer, NormOpt(groups, {"embedding": rule}, lr=0.1, **options)


IDS = [torch.tensor([3, 3, 5, 39]), torch.tensor([5]), torch.tensor([0, 7, 7])]


@pytest.mark.parametrize(
    ("rule", "dtype", "options"),
    [
        (VECTORS, torch.float32, {}),
        (Rule(VECTORS.norm, scale="adamw"), torch.float32, {}),
        (Rule(VECTORS.norm, scale="muon"), torch.float32, {}),
        (Rule(operator_norm("l1", "linf"), multiplier=2.0), torch.float32, {}),
        (Rule(operator_norm("rms", "rms")), torch.float32, {}),
        (VECTORS, torch.float32, {"step_size": DualNorm()}),
        (VECTORS, torch.float32, {"weight_decay": 0.1}),
        (Rule(VECTORS.norm, momentum=0.9), torch.float32, {}),
        (VECTORS, torch.bfloat16, {"rounding": "kahan"}),
        (VECTORS, torch.bfloat16, {"rounding": "stochastic"}),
    ],
)
def test_a_sparse_gradient_is_the_dense_one(rule, dtype, options):
    (a, sparse), (b, dense) = (
        table(is_sparse, rule, dtype, **options) for is_sparse in (True, False)
    )
    start = weights(a)
    for ids in IDS:
        for layer, optimizer in ((a, sparse), (b, dense)):
            layer.zero_grad()
            (layer(ids) * torch.arange(1.0, 7)).sum().backward()
            optimizer.step()
        assert a.weight.grad.is_sparse
        assert not b.weight.grad.is_sparse
    assert not equal(weights(a), start)
    torch.testing.assert_close(a.weight, b.weight)


@pytest.mark.parametrize("shape", [(40, 6), (3000, 128)])
def test_rows_that_were_not_asked_for_do_not_pay(shape):
    layer, optimizer = table(True, VECTORS, shape=shape)
    start = layer.weight.detach().clone()
    layer(IDS[0]).square().sum().backward()
    (move,) = batching.moves_of(optimizer.param_groups[0], VECTORS, optimizer.state)
    (part,) = batching.parts(move)
    assert part.param.shape == (3, shape[1])
    optimizer.step()
    moved = (layer.weight != start).any(dim=1).nonzero().flatten()
    assert moved.tolist() == [3, 5, 39]
    length = (layer.weight - start)[moved].square().mean(dim=1).sqrt()
    torch.testing.assert_close(length, torch.full((3,), 0.1))
    assert not optimizer.state[layer.weight]


@pytest.mark.parametrize("ids", [[], [3, 5]])
@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_sparse_steps_at_the_edges(ids, lr):
    """A batch without tokens, and the first step of a warmup."""
    layer, optimizer = table(True, VECTORS)
    optimizer.param_groups[0]["lr"] = lr
    start = layer.weight.detach().clone()
    layer(torch.tensor(ids, dtype=torch.long)).sum().backward()
    optimizer.step()
    assert (layer.weight != start).any(dim=1).sum() == (len(ids) if lr else 0)


@pytest.mark.parametrize("preset", ["adam", "shampoo"])
def test_statistics_of_stacked_tensors_are_those_of_each(preset, monkeypatch):
    start = nn.Sequential(*(nn.Linear(12, 12) for _ in range(8))).state_dict()
    data = [torch.randn(5, 12) for _ in range(4)]
    runs = []
    for small in (batching.SMALL, 0):
        monkeypatch.setattr(batching, "SMALL", small)
        model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(8)))
        model.load_state_dict(start)
        optimizer = create_normopt_optimizer(model, preset=preset, lr=1e-2, weight_decay=0.1)
        counts = []
        for i, x in enumerate(data):
            model.zero_grad()
            layers = model[: 8 if i % 2 else 5]  # some come to be later than others
            layers(x).square().sum().backward()
            for group in optimizer.param_groups:
                found = batching.moves_of(group, optimizer.rule_of(group), optimizer.state)
                counts.append(len(list(found)))
            optimizer.step()
        runs.append((model, optimizer, sum(counts)))
    (a, together, few), (b, apart, many) = runs
    assert few < many / 4
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        assert together.state[p].keys() == apart.state[q].keys()
        for key, value in together.state[p].items():
            torch.testing.assert_close(value, apart.state[q][key])
