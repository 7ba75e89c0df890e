"""A low-rank adapter s B A is one operator: the laws of its step, through PEFT and public names."""

import copy
import logging
import math

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.pytorch_utils import Conv1D

from hf_normopt import classify, create_normopt_optimizer
from hf_normopt.norms.operators import parse_norm as parse_plain
from hf_normopt.norms.product import GUARD, Pair, parse_norm
from hf_normopt.optim import products
from hf_normopt.trainer.gauge import Gauge
from tests.test_sharding import spawn

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:Adapter other was active"),
]

RANK, WIDTH, OUT = 4, 12, 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, OUT)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(model=None, **options):
    torch.manual_seed(0)
    model = Net() if model is None else model
    options = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["first", "second"]} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options)).double()


def with_b(model, seed=1):
    """Not at the start any more."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data.copy_(0.3 * drawn)
    return model


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}


def merged(model):
    return {
        name: (layer.get_delta_weight("default") + layer.get_base_layer().weight).detach().clone()
        for name, layer in layers(model).items()
    }


def batches(count, size=16):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)
        yield x, x[:, :OUT].roll(1, 1) * 2


def train(model, steps, lr=1e-2, **options):
    """Train, and return the merged weights after each step."""
    optimizer = create_normopt_optimizer(model, lr=lr, **options)
    seen = []
    for x, y in batches(steps):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(merged(model))
    return seen


def assert_same(first, second, tolerance=1e-9):
    for one, other in zip(first, second, strict=True):
        for name in one:
            assert (one[name] - other[name]).norm() <= tolerance * one[name].norm(), name


def turn(model, matrix):
    for layer in layers(model).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.copy_(matrix @ a)
        b.data.copy_(b @ torch.linalg.inv(matrix))
    return model


def conditioned(condition):
    generator = torch.Generator().manual_seed(3)
    q, p = (
        torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    return q @ torch.diag(torch.logspace(0, math.log10(condition), RANK).double()) @ p


@pytest.mark.parametrize(
    "matrix",
    [conditioned(10), 1e-3 * torch.eye(RANK).double(), 1e3 * torch.eye(RANK).double()],
    ids=["R", "small", "large"],
)
def test_the_step_does_not_depend_on_how_the_product_is_divided(matrix):
    plain, turned = with_b(adapted()), turn(with_b(adapted()), matrix)
    assert_same(train(plain, 45), train(turned, 45))
    by_factors = {"norm_product": "rms->rms"}  # what must fail: each factor by itself
    apart = train(turn(with_b(adapted()), matrix), 2, **by_factors)
    together = train(with_b(adapted()), 2, **by_factors)
    with pytest.raises(AssertionError):
        assert_same(apart, together, 1e-3)


@pytest.mark.parametrize("factor", [8, 1 / 8])
def test_the_step_does_not_depend_on_the_scale(factor):
    plain, scaled = with_b(adapted()), with_b(adapted(lora_alpha=2 * RANK * factor))
    for layer in layers(scaled).values():
        layer.lora_B["default"].weight.data.div_(factor)
    assert_same(train(plain, 25), train(scaled, 25))


def by_halves(a, b, s, m_a, m_b, eta):
    """LoRA-Muon's steps, which give D_A and D_B a half of the length each."""

    def kernel(gram, other):
        values, q = torch.linalg.eigh(gram)
        root = q * values**-0.5
        inner, p = torch.linalg.eigh(root.T @ other @ root)
        return root @ p @ torch.diag(inner**-0.5) @ p.T @ root.T

    return (
        eta / (2 * s) * kernel(b.T @ b, m_a @ m_a.T) @ m_a,
        eta / (2 * s) * m_b @ kernel(a @ a.T, m_b.T @ m_b),
    )


def asked_of(fan_out, fan_in, ranks):
    """The norm of a product's change at rate 1: with it in r directions, entries have RMS 0.1."""
    return 0.1 * math.sqrt(fan_out * fan_in / min(ranks, fan_in, fan_out))


def asked(a, b):
    return asked_of(len(b), a.shape[1], len(a))


@pytest.mark.parametrize("rank", [1, 4])
def test_the_change_is_as_long_as_was_asked_and_better_than_by_halves(rank):
    model = with_b(adapted(r=rank, lora_alpha=rank))
    factors = {
        n: (m.lora_A["default"].weight, m.lora_B["default"].weight)
        for n, m in layers(model).items()
    }
    before = {n: [p.detach().clone() for p in pair] for n, pair in factors.items()}
    lr = 1e-7  # the guard is off
    x, y = next(batches(1))
    nn.functional.mse_loss(model(x), y).backward()
    grads = {n: [p.grad.clone() for p in pair] for n, pair in factors.items()}
    create_normopt_optimizer(model, lr=lr).step()
    for name, (a, b) in before.items():
        s, (g_a, g_b) = layers(model)[name].scaling["default"], grads[name]
        eta = lr * asked(a, b)

        def of(d_a, d_b, a=a, b=b, s=s, g_a=g_a, g_b=g_b):
            size = torch.linalg.matrix_norm(s * (d_b @ a + b @ d_a), 2)
            return size, (g_a * d_a).sum() + (g_b * d_b).sum()

        after_a, after_b = (p.detach() for p in factors[name])
        size, gain = of(a - after_a, b - after_b)
        assert math.sqrt(3) / 2 - 1e-6 <= size / eta <= 1 + 1e-6
        halves, usual = of(*by_halves(a, b, s, g_a, g_b, eta))
        assert gain / size > 1.05 * usual / halves


def tangent_step(a, b, s, m_a, m_b, eta):
    """The rule by QR decompositions, with the guard as more rows of B."""
    d = math.sqrt(3) / 2 * eta / s
    q_a, r_a = torch.linalg.qr(a.T)
    guard = d / GUARD * torch.linalg.inv(r_a)  # guardᵀ guard = δ² S_A⁻¹
    q_b, r_b = torch.linalg.qr(torch.cat([b, guard.T]))
    h_a = torch.linalg.inv(r_b).T @ m_a
    h_b = torch.cat([m_b @ torch.linalg.inv(r_a), torch.zeros_like(r_a)])
    q_1, r_1 = torch.linalg.qr((h_a - h_a @ q_a @ q_a.T).T)
    q_2, r_2 = torch.linalg.qr(h_b - q_b @ q_b.T @ h_b)
    inner = (h_a @ q_a + q_b.T @ h_b) / 2
    core = torch.cat(
        [torch.cat([inner, r_1.T], 1), torch.cat([r_2, torch.zeros_like(inner)], 1)], 0
    )
    u, _, vh = torch.linalg.svd(core)
    polar, r = u @ vh, len(a)
    both = polar[:r, :r] / 2
    return (
        -d * torch.linalg.inv(r_b) @ (both @ q_a.T + polar[:r, r:] @ q_1.T),
        -d * (q_b @ both + q_2 @ polar[r:, :r])[: len(b)] @ torch.linalg.inv(r_a).T,
    )


def test_steps_are_those_of_a_slow_reference():
    model, reference = with_b(adapted()), with_b(adapted())
    lr, beta = 1e-2, 0.9
    seen = train(model, 15, lr=lr)
    momenta = {}
    for i, (x, y) in enumerate(batches(15)):
        nn.functional.mse_loss(reference(x), y).backward()
        with torch.no_grad():
            for layer in layers(reference).values():
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                smooth = []
                for p in (a, b):
                    m = momenta.setdefault(p, torch.zeros_like(p)).lerp_(p.grad, 1 - beta)
                    smooth.append(p.grad.lerp(m, beta))
                eta = lr * asked(a, b)
                d_a, d_b = tangent_step(a, b, layer.scaling["default"], *smooth, eta)
                a += d_a
                b += d_b
        reference.zero_grad()
        assert_same([seen[i]], [merged(reference)], 1e-8)


def test_at_b_zero_only_b_moves_and_then_a_moves_by_the_guard():
    model = adapted()
    optimizer = create_normopt_optimizer(model, lr=1e-1)
    for step, (x, y) in enumerate(batches(2)):
        before = {n: m.lora_A["default"].weight.detach().clone() for n, m in layers(model).items()}
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in layers(model).items():
            a = layer.lora_A["default"].weight.detach()
            root = torch.linalg.cholesky(torch.linalg.inv(before[name] @ before[name].T)).T
            moved = torch.linalg.matrix_norm(root @ (a - before[name]), 2)
            assert moved == 0 if step == 0 else 0.5 * GUARD < moved <= GUARD * (1 + 1e-9)


def test_a_product_taken_apart_gives_no_notice(caplog):
    create_normopt_optimizer(adapted(), lr=0.1, norm_product="rms->rms")
    assert not [r for r in caplog.records if "no effect" in r.getMessage()]


def test_decay_shrinks_the_product_as_it_would_a_weight():
    model = with_b(adapted())
    optimizer = create_normopt_optimizer(model, lr=0.1, weight_decay=0.3)
    before = {n: m.get_delta_weight("default").detach() for n, m in layers(model).items()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_delta_weight("default"), before[name] * (1 - 0.03))


@pytest.mark.parametrize(("condition", "tolerance"), [(1, 5e-6), (30, 1e-3), (1000, 1e-2)])
def test_factors_in_float32_step_as_those_in_float64(condition, tolerance):
    """Where B is ill-conditioned, as where the rank is too large, it takes more digits."""
    generator = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(s, generator=generator).double() for s in ((4, 96), (64, 4), (64, 96)))
    b = (b @ conditioned(condition)).float().double()
    a = a.float().double()
    norm = parse_norm("product rms->rms (svd)")

    def change(dtype):
        m_a, m_b, scale = b.mT @ g, g @ a.mT, torch.ones(1, 1)
        pair = Pair(*(x.to(dtype) for x in (a, b, scale, m_a, m_b)))
        d_a, d_b = (x.double() for x in norm.factor_lmos(pair, 1.0, 1e-6))
        return d_b @ a + b @ d_a

    exact = change(torch.float64)
    assert (change(torch.float32) - exact).norm() < tolerance * exact.norm()


def test_balancing_changes_no_step(monkeypatch):
    ill = conditioned(300)
    often = turn(with_b(adapted()), ill)
    monkeypatch.setattr(products, "PERIOD", 1)
    balanced = train(often, 100)
    assert all(torch.linalg.cond(m.lora_A["default"].weight) < 10 for m in layers(often).values())
    monkeypatch.setattr(products, "PERIOD", 10**9)
    assert_same(balanced, train(turn(with_b(adapted()), ill), 100), 1e-7)


def test_factors_stay_well_conditioned_where_the_rank_is_more_than_is_needed():
    torch.manual_seed(0)
    target = torch.randn(24, 2).double() @ torch.randn(2, 24).double() / 5

    def run(steps):
        torch.manual_seed(1)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(24, 24, bias=False)),
            peft.LoraConfig(r=12, lora_alpha=12, target_modules=["0"]),
        ).double()
        layer = next(iter(layers(model).values()))
        start = layer.get_base_layer().weight.clone()
        optimizer = create_normopt_optimizer(model, lr=0.07)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 0.07 * (1 - i / steps)
            x = torch.randn(64, 24).double()
            (model(x) - x @ (start + target).T).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    a, b = run(600)
    assert torch.linalg.cond(a) < 30
    assert a.norm() < 50
    assert b.norm() < 50
    torch.testing.assert_close((b @ a).detach(), target, rtol=0, atol=0.05)


# What is a product


def kinds(model):
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    return {n: g["label"] for g in optimizer.param_groups for n in g["param_names"]}


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv1d(8, 8, 1)
        self.gpt = Conv1D(12, 8)
        self.out = nn.Linear(12, 5)

    def forward(self, ids):
        x = self.point(self.table(ids).mT).mT
        x = x + self.conv(x[:, None].expand(-1, 4, -1, -1)).mean(1)
        return self.out(self.gpt(x.contiguous()))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_lora_of_every_layer_is_a_product(options):
    names = ["table", "conv", "point", "gpt", "out"]
    model = adapted(Zoo(), target_modules=names, **options)
    found = kinds(model)
    for name, label in found.items():
        if "magnitude" in name:
            assert label == "norm", name
        elif "embedding" in name:
            assert label == "embedding/table_product", name
        else:
            assert label == "linear/product", name
    ids = torch.arange(20).reshape(2, 10)
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    with_b(model)
    before = merged(model) if not options.get("use_dora") else {}
    (model(ids) - 1).square().mean().backward()
    optimizer.step()
    for name, old in before.items():
        change = (merged(model)[name] - old).detach()
        is_table = name.endswith("table")
        flat = change if is_table else change.flatten(1)
        length = flat.norm(dim=1).max() if is_table else torch.linalg.matrix_norm(flat, 2)
        scale = math.sqrt(flat.shape[1]) if is_table else asked_of(*flat.shape, RANK)
        assert 0.45e-3 * scale < length < 1.01e-3 * scale, name


def test_experts_are_products_each():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.weight, x)

    model = nn.Module()
    model.experts = Experts()
    model.forward = lambda x: model.experts(x)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    model = peft.get_peft_model(model, config)
    assert set(kinds(model).values()) == {"linear/product"}
    optimizer = create_normopt_optimizer(model, lr=1e-2)
    (group,) = optimizer.param_groups
    assert [len(layout.split("expert=3")) for layout in group["layouts"]] == [2, 2]
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()


def test_what_is_no_product_keeps_its_rule():
    for config in (
        peft.AdaLoraConfig(target_modules=["first"], total_step=10),
        peft.LoHaConfig(r=4, target_modules=["first"]),
        peft.VeraConfig(r=4, target_modules=["first"]),
        peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
    ):
        model = peft.get_peft_model(Net(), config)
        assert not any("product" in label for label in kinds(model).values()), config
    frozen = adapted()
    for name, p in frozen.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    assert set(kinds(frozen).values()) == {"linear"}


def test_rules_by_hand_for_the_factors_go_first():
    model = adapted()
    optimizer = create_normopt_optimizer(model, lr=1e-3, lr_adapter_b=16)
    labels = {group["label"] for group in optimizer.param_groups}
    assert labels == {"linear", "linear/adapter_b"}


def test_different_rates_for_the_factors_are_explained(caplog):
    model = adapted()
    groups = [
        {"params": [p for n, p in model.named_parameters() if side in n], "lr": lr}
        for side, lr in (("lora_A", 1e-3), ("lora_B", 16e-3))
    ]
    with caplog.at_level(logging.WARNING):
        optimizer = create_normopt_optimizer(model, lr=1e-3, params=groups)
    assert "LoRA+" in caplog.text
    assert {group["label"] for group in optimizer.param_groups} == {"linear", "linear/2"}


def test_one_of_several_adapters_is_trained_and_the_other_stays():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    model.double()
    frozen = {n: p.clone() for n, p in model.named_parameters() if "default" in n}
    found = kinds(model)
    assert set(found.values()) == {"linear/product"}
    assert all("other" in name for name in found)
    optimizer = create_normopt_optimizer(model, lr=1e-2)
    for x, y in batches(3):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_factor_that_is_frozen_later_stays():
    model = with_b(adapted())
    optimizer = create_normopt_optimizer(model, lr=1e-2)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for x, y in batches(25):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_B" in name), name


# State


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_for_bit(dtype):
    def run(parts):
        model = with_b(adapted()).to(dtype)
        state = None
        data = list(batches(44))
        for start, end in parts:
            model = copy.deepcopy(model)
            optimizer = create_normopt_optimizer(model, lr=1e-2, rounding="kahan")
            if state is not None:
                optimizer.load_state_dict(state)
            for x, y in data[start:end]:
                nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
                optimizer.step()
                optimizer.zero_grad()
            state = copy.deepcopy(optimizer.state_dict())
        return model

    whole, parted = run([(0, 44)]), run([(0, 17), (17, 44)])
    for (name, p), q in zip(whole.named_parameters(), parted.parameters(), strict=True):
        assert torch.equal(p, q), name
    states = create_normopt_optimizer(whole, lr=1e-2).state
    assert not states


def test_the_state_is_that_of_the_adapter_by_name():
    model = adapted()
    optimizer = create_normopt_optimizer(model, lr=1e-2)
    for x, y in batches(1):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    assert {key for state in optimizer.state.values() for key in state} == {"momentum_buffer"}
    other = adapted(Net(), target_modules=["first"])
    with pytest.raises(ValueError, match="second"):
        create_normopt_optimizer(other, lr=1e-2).load_state_dict(optimizer.state_dict())
    model.merge_adapter()
    model.unmerge_adapter()
    again = create_normopt_optimizer(model, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="default"):
        create_normopt_optimizer(model, lr=1e-2).load_state_dict(optimizer.state_dict())
    model.delete_adapter("other")
    model.set_adapter("default")
    create_normopt_optimizer(model, lr=1e-2).load_state_dict(optimizer.state_dict())


def test_specs_name_the_product():
    rows = {spec.name: spec.factor for spec in classify(adapted())}
    a = rows["base_model.model.first.lora_A.default.weight"]
    b = rows["base_model.model.first.lora_B.default.weight"]
    assert (a.product, a.side, a.scale) == ("base_model.model.first.lora.default", "A", 2.0)
    assert (b.product, b.side) == (a.product, "B")


def test_norms_of_products_have_names():
    for text in ("product rms->rms", "product l1->rms", "product l2->l2 (svd)"):
        assert str(parse_norm(text)) == text
    assert parse_norm("rms->linf") == parse_plain("rms->linf")
    with pytest.raises(ValueError, match="factors of a product"):
        parse_norm("product l1->linf")


# Ranks


def _ranks_do_what_one_process_does():
    products.PERIOD = 2
    for axes in ("replicas", (0, 0), (1, 0), (0, 1)):
        alone = turn(with_b(adapted()), conditioned(100))
        many = copy.deepcopy(alone)
        single = create_normopt_optimizer(alone, lr=1e-2, weight_decay=0.1)
        optimizer = create_normopt_optimizer(many, lr=1e-2, weight_decay=0.1)
        if axes == "replicas":
            optimizer.replicas = dist.group.WORLD
        else:
            mesh = init_device_mesh("cpu", (2,))
            for layer in layers(many).values():
                for factors, axis in zip((layer.lora_A, layer.lora_B), axes, strict=True):
                    module = factors["default"]
                    sharded = distribute_tensor(module.weight.data, mesh, [Shard(axis)])
                    module.weight = nn.Parameter(sharded)
            for group in optimizer.param_groups:
                group["params"] = [many.get_parameter(name) for name in group["param_names"]]
        for i in range(5):
            generator = torch.Generator().manual_seed(i)
            optimizer.observer = (lambda move, eta: [*move.each()]) if i % 2 else None
            for p, q in zip(alone.parameters(), many.parameters(), strict=True):
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                    q.grad = p.grad.clone()
                    if isinstance(q, DTensor):
                        q.grad = distribute_tensor(q.grad, q.device_mesh, q.placements)
            single.step()
            optimizer.step()
        for (name, p), q in zip(alone.named_parameters(), many.parameters(), strict=True):
            whole = q.full_tensor() if isinstance(q, DTensor) else q
            assert torch.allclose(whole, p), (axes, name)


def test_ranks_do_what_one_process_does(tmp_path):
    spawn(tmp_path, _ranks_do_what_one_process_does, 2)


@pytest.mark.parametrize("matrix", [conditioned(10), 100 * torch.eye(RANK).double()])
def test_escape_velocity_is_that_of_the_product(matrix):
    options = {"lr": 1.0, "step_size": "escape_velocity/start:0.001"}
    plain, turned = with_b(adapted()), turn(with_b(adapted()), matrix)
    assert_same(train(plain, 25, **options), train(turned, 25, **options), 1e-7)


def test_escape_velocity_finds_its_rate_from_b_zero():
    model = adapted()
    optimizer = create_normopt_optimizer(model, lr=1.0, step_size="escape_velocity/start:1e-6")
    losses = []
    for x, y in batches(60):
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert float(optimizer.param_groups[0]["memory"]["eta"]) > 1e-4
    assert losses[-1] < 0.8 * losses[0]


def test_no_step_waits_for_the_device(monkeypatch):
    """Meta tensors have no values: whoever asked for one, or branched on one, would fail."""
    monkeypatch.setattr(products, "PERIOD", 1)
    model = adapted(Zoo(), target_modules=["table", "conv", "out"])
    optimizer = create_normopt_optimizer(model, lr=1e-2, weight_decay=0.1)
    model.to("meta")
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


def test_telemetry_measures_the_product():
    model = with_b(adapted())
    optimizer, gauge = create_normopt_optimizer(model, lr=1e-6), Gauge()  # the guard is off
    before = {n: m.get_delta_weight("default").detach() for n, m in layers(model).items()}
    (x, y) = next(iter(batches(1)))
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.observer = gauge.observe
    optimizer.step()
    seen = gauge.read(optimizer)
    rms = lambda w: torch.linalg.matrix_norm(w, 2) * math.sqrt(w.shape[1] / w.shape[0])
    weight = max(map(rms, before.values()))
    assert seen["weight_norm/linear/product"] == pytest.approx(float(weight), rel=1e-4)
    moved = [rms(m.get_delta_weight("default") - before[n]) for n, m in layers(model).items()]
    update = seen["relative_update/linear/product"] * weight
    assert 0.5 * update < max(moved) < 1.05 * update
    assert seen["certificate/linear/product"] == pytest.approx(1, abs=1e-6)
