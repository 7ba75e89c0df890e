"""Each preset, and the public implementation that it equals."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_normopt import EMA, PRESETS, create_normopt_optimizer
from hf_normopt.optim.presets import changed, optimizer_names
from hf_normopt.roles import ROLES
from tests.test_optimizer import batches, gpt2, llama, train


def fp32_newton_schulz(grad, coefficients, steps, eps):
    """torch.optim.Muon's iteration, which torch runs in bfloat16, in float32."""
    a, b, c = coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


class TorchMuonAndAdamW:
    def __init__(self, model, lr, weight_decay):
        named = dict(model.named_parameters())
        hidden = [p for n, p in named.items() if "_proj" in n]
        vectors = [p for n, p in named.items() if p.ndim < 2]
        tables = [p for n, p in named.items() if "_proj" not in n and p.ndim == 2]
        groups = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
        self.muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay)
        self.adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)

    def step(self):
        self.muon.step(), self.adamw.step()


def test_muon_equals_torch_muon_in_float32_plus_adamw(monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", fp32_newton_schulz)
    ours = llama()
    theirs = copy.deepcopy(ours)
    train(
        ours, create_normopt_optimizer(ours, lr=2e-3, preset="muon", weight_decay=0.1), batches(20)
    )
    train(theirs, TorchMuonAndAdamW(theirs, 2e-3, 0.1), batches(20))
    for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_adam_rules_equal_torch_adamw_over_two_hundred_steps():
    """Bias correction, decay and eps, to 1e-6 relative."""
    p = nn.Linear(6, 4, dtype=torch.float64)
    q = copy.deepcopy(p)
    options = {"norm": "l1->linf", "scale": "norm", "momentum": 0.9, "nesterov": False}
    optimizer = create_normopt_optimizer(
        p, lr=1e-2, preset="muon", weight_decay=0.1, eps=1e-6, **options
    )
    adamw = torch.optim.AdamW(
        [{"params": [q.weight]}, {"params": [q.bias], "weight_decay": 0.0}],
        lr=1e-2,
        weight_decay=0.1,
        eps=1e-6,
    )
    for _ in range(200):
        for a, b in zip(p.parameters(), q.parameters(), strict=True):
            a.grad = b.grad = torch.randn_like(a)
        optimizer.step(), adamw.step()
    for a, b in zip(p.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def entry(name, m):
    return m.sign()


def frobenius(name, m):
    return m / m.norm()


class ByHand:
    """Published update rules, written out: W ← W - lr · update(momentum), by role."""

    def __init__(self, model, lr, update, momentum=0.9, lion=None):
        self.named, self.lr, self.update = dict(model.named_parameters()), lr, update
        self.momentum, self.lion, self.buffers = momentum, lion, {}

    @torch.no_grad()
    def step(self):
        for name, p in self.named.items():
            old = self.buffers.get(name, torch.zeros_like(p))
            self.buffers[name] = self.momentum * old + (1 - self.momentum) * p.grad
            used = self.buffers[name]
            if (
                self.lion is not None
            ):  # Chen et al. 2023, Algorithm 2: beta1 for the step, beta2 kept
                used = self.lion * old + (1 - self.lion) * p.grad
            p -= self.lr * self.update(name, used)


def role_norms(name, m):
    """Epilogue of the paper, by hand for a Llama: its modules' names and shapes."""
    if "_proj" in name:
        u, _, vh = torch.linalg.svd(m, full_matrices=False)
        return math.sqrt(m.shape[0] / m.shape[1]) * u @ vh
    if "embed" in name:
        rms = m.square().mean(1, keepdim=True).sqrt()
        return torch.where(rms > 0, m / rms, 0)
    if "lm_head" in name:
        return m / m.norm(dim=1, keepdim=True) / math.sqrt(m.shape[1])
    return m.sign()


def scion(name, m):
    radius = 3000 if "lm_head" in name else 50
    return role_norms(name, m) * (radius if m.ndim == 2 else 50)


REFERENCES = {
    "signum": (entry, {"momentum": 0.9}),
    "lion": (entry, {"momentum": 0.95, "lion": 0.95**2}),
    "normalized-sgd": (frobenius, {"momentum": 0.9}),
    "scion": (scion, {"momentum": 0.9}),
    "modular": (role_norms, {"momentum": 0.9, "lion": 0.9**2}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_preset_equals_the_published_rule(name):
    """signSGD with momentum; Lion, Algorithm 2; Table 1's Frobenius row; Scion; the Epilogue."""
    update, options = REFERENCES[name]
    ours = llama().double()
    theirs = copy.deepcopy(ours)
    lr = PRESETS[name].learning_rate[0]
    train(ours, create_normopt_optimizer(ours, lr=lr, preset=name), batches(8))
    train(theirs, ByHand(theirs, lr, update, **options), batches(8))
    for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=lr * 1e-3, msg=lambda m, n=n: f"{n}: {m}")


def test_adam_preset_equals_torch_adamw_over_two_hundred_steps():
    ours = llama().double()
    theirs = copy.deepcopy(ours)
    train(
        ours,
        create_normopt_optimizer(ours, lr=1e-3, preset="adam", weight_decay=0.1),
        batches(8) * 25,
    )
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim == 2]},
        {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    train(theirs, torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1), batches(8) * 25)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # RMSNorm computes in float32


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_total_and_described(name):
    preset = PRESETS[name]
    assert set(preset.policy) >= set(ROLES)
    assert preset.description.endswith(".")
    assert preset.source
    low, high = preset.learning_rate
    assert 0 < low < high


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_presets_learn(name, make):
    model = make()
    low, high = PRESETS[name].learning_rate
    optimizer = create_normopt_optimizer(model, lr=math.sqrt(low * high), preset=name)
    losses = train(model, optimizer, batches(1) * 60)
    assert losses[-1] < losses[0] - 0.1


def test_every_preset_is_an_optimizer_name():
    assert set(optimizer_names().values()) == set(PRESETS)
    assert optimizer_names()["normopt_muon"] == "muon"


def test_changes_of_all_roles_and_of_one():
    policy = changed(
        PRESETS["normopt"].policy,
        momentum="0.8",
        lr_head="2",
        norm_linear="l2->l2",
        nesterov="False",
    )
    assert {rule.momentum for rule in policy.values()} == {0.8}
    assert {rule.nesterov for rule in policy.values()} == {False}
    assert policy["head"].multiplier == 2.0
    assert str(policy["linear"].norm) == "l2->l2"
    assert str(policy["conv"].norm) == "rms->rms"
    assert PRESETS["normopt"].policy["head"].momentum == 0.9  # presets are never changed


def test_one_role_goes_before_all():
    assert (
        changed(PRESETS["normopt"].policy, momentum_head=0.5, momentum=0.8)["head"].momentum == 0.5
    )


def test_a_change_of_a_kind_makes_its_rule_from_its_role():
    policy = changed(PRESETS["normopt"].policy, lr_adapter_b=4.0)
    assert policy["adapter_b"].multiplier == 4.0
    assert policy["adapter_b"].norm == policy["linear"].norm


def after_steps(count=3, **options):
    torch.manual_seed(0)
    model = gpt2()
    optimizer = create_normopt_optimizer(model, lr=0.01, **options)
    train(model, optimizer, batches(count))
    return dict(model.named_parameters()), optimizer


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=name)


EXACT = {"rtol": 0, "atol": 0}


def test_modular_gives_a_tied_table_the_rule_of_a_head():
    tied, optimizer = after_steps(preset="modular")
    assert "embedding/tied" in [group["label"] for group in optimizer.param_groups]
    head, _ = after_steps(preset="modular", overrides={"wte": "head"})
    assert_same(tied, head, rtol=1e-5, atol=1e-7)
    table, _ = after_steps(preset="modular", overrides={"wte": "embedding"})
    assert not torch.allclose(tied["transformer.wte.weight"], table["transformer.wte.weight"])


def test_no_other_preset_has_a_rule_for_tied_tables():
    assert [name for name, preset in PRESETS.items() if "tied" in preset.policy] == ["modular"]
    _, optimizer = after_steps(1)
    assert "embedding/tied" not in [group["label"] for group in optimizer.param_groups]


def test_options_of_embeddings_reach_tied_tables():
    usual = PRESETS["modular"].policy
    policy = changed(usual, lr_embedding=3, momentum_embedding=0.5)
    assert policy["tied"] == replace(usual["tied"], multiplier=3.0, momentum=0.5)
    assert changed(usual, norm_embedding="l1->rms")["tied"] == usual["embedding"]
    assert changed(usual, norm_linear="l2->l2")["product"] == usual["product"]
    assert changed(usual, lr_embedding=3, lr_tied=2)["tied"].multiplier == 2
    assert changed(usual, lr_tied=2)["embedding"] == usual["embedding"]


def test_a_kind_of_its_own_for_tied_tables_goes_with_every_preset():
    one, optimizer = after_steps(lr_tied=1.0)
    assert "embedding/tied" in [group["label"] for group in optimizer.param_groups]
    assert_same(one, after_steps()[0], **EXACT)
    faster, _ = after_steps(lr_tied=2.0)
    assert_same(faster, after_steps(lr_embedding=2.0, lr_position=1.0)[0], **EXACT)
    scion = {"preset": "scion", "norm_tied": "tied rms->linf", "lr_tied": 3000.0}
    assert_same(
        after_steps(**scion)[0],
        after_steps(preset="scion", overrides={"wte": "head"})[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_checkpoint_without_a_rule_for_tied_tables():
    """It is refused with a reason, and goes on with an override that says what wrote it."""
    torch.manual_seed(0)
    model, data = gpt2(), batches(4)
    before = {"lr": 0.01, "preset": "modular", "overrides": {"wte": "embedding"}}
    optimizer = create_normopt_optimizer(model, **before)
    train(model, optimizer, data[:2])
    again, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, data[2:])
    changed_rule = r"wte\.weight was trained under .*l1->rms.* go on under .*tied rms->linf"
    with pytest.raises(ValueError, match=changed_rule):
        create_normopt_optimizer(again, lr=0.01, preset="modular").load_state_dict(state)
    optimizer = create_normopt_optimizer(again, **before)
    optimizer.load_state_dict(state)
    train(again, optimizer, data[2:])
    assert_same(dict(again.named_parameters()), dict(model.named_parameters()), **EXACT)


def test_a_change_that_concerns_no_parameter_gives_a_notice(caplog):
    create_normopt_optimizer(
        nn.Linear(2, 2), lr=0.1, lr_conv=2.0, lr_head=2.0, beta2=0.9, preset="adam"
    )
    assert [r.getMessage() for r in caplog.records] == [
        "lr_conv has no effect: no trainable parameter is 'conv'."
    ]


def test_changes_do_not_depend_on_their_order():
    one = changed(PRESETS["normopt"].policy, lr_router=2, momentum_linear=0.5)
    other = changed(PRESETS["normopt"].policy, momentum_linear=0.5, lr_router=2)
    assert one == other
    assert one["router"].momentum == 0.5


def test_adam_options_reach_the_rules_with_a_statistic():
    policy = changed(PRESETS["muon"].policy, beta1=0.8, beta2=0.99, eps=1e-6)
    assert (policy["head"].momentum, policy["head"].statistic) == (0.8, EMA(0.99, 1e-6))
    assert policy["linear"] == PRESETS["muon"].policy["linear"]


@pytest.mark.parametrize("beta", [0.999, "0.999"])
def test_a_statistic_of_one_role_makes_it_adamw(beta):
    ours, theirs = nn.Linear(6, 4), nn.Linear(6, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = create_normopt_optimizer(
        ours,
        lr=1e-2,
        overrides={"weight": "head"},
        norm_head="l1->linf",
        momentum_head=0.9,
        nesterov_head=False,
        statistic_head=beta,
    )
    adamw = torch.optim.AdamW([theirs.weight], lr=1e-2, weight_decay=0)
    for _ in range(5):
        grad = torch.randn(4, 6)
        ours.weight.grad, theirs.weight.grad = grad, grad.clone()
        optimizer.step(), adamw.step()
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_no_statistic_makes_a_rule_the_lmo():
    policy = changed(PRESETS["adam"].policy, statistic="none", statistic_head=0.9)
    assert policy["head"].statistic == EMA(0.9)
    assert all(rule.statistic is None for role, rule in policy.items() if role != "head")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_heads": 2}, r"Unknown option 'lr_heads'. Did you mean lr_head"),
        ({"momentun": 0.9}, r"Unknown option 'momentun'. Did you mean momentum"),
        ({"nesterov": "maybe"}, r"Option nesterov: expected a bool, found 'maybe'"),
        ({"momentum": "high"}, r"Option momentum: expected a float, found 'high'"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\)"),
        ({"norm_head": "l2->l1"}, r"no closed form"),
        ({"norm_head": "spectral"}, r"Cannot read the norm 'spectral'"),
        ({"beta2": 0.5}, r"beta2 has no effect: no rule of this preset has a second moment"),
        ({"scale": "huge"}, r"Unknown scale 'huge'; expected one of norm, adamw, muon"),
        ({"preset": "moun"}, r"Unknown preset 'moun'.*Did you mean muon"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        create_normopt_optimizer(nn.Linear(2, 2), lr=0.1, **changes)
