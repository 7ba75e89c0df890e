"""Presets against their references on every kind of layer, with weight decay, over several steps.

The references read their tensors by hand, and share no line with the package.
"""

import copy
import math

import pytest
import torch
from prodigyopt import Prodigy
from torch import nn
from transformers import GPT2Config, MixtralConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_normopt import (
    DualNorm,
    EscapeVelocity,
    NormOpt,
    Rule,
    create_normopt_optimizer,
)
from hf_normopt.norms.operators import parse_norm
from hf_normopt.optim.presets import PRESETS
from hf_normopt.trainer.gauge import _dual, _size
from tests.test_presets import fp32_newton_schulz

STEPS, DECAY = 12, 0.1


class Layers(nn.Module):
    """Convolutions of all kinds, a table, fused maps in both orientations, stacked experts."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.depthwise = nn.Conv2d(4, 4, (3, 2), groups=4)
        self.volume = nn.Conv3d(2, 3, 2)
        self.patches = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.up_line = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.up_image = nn.ConvTranspose2d(4, 3, 2)
        self.up_volume = nn.ConvTranspose3d(2, 3, 2)
        self.table = nn.Embedding(7, 6)
        self.attention = GPT2Attention(GPT2Config(n_embd=8, n_head=2), layer_idx=0)
        self.fused = nn.MultiheadAttention(8, 2)  # whose last projection is the model's head
        sizes = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
        self.experts = MixtralExperts(MixtralConfig(**sizes))
        self.norm = nn.LayerNorm(8)
        for p in self.parameters():  # some are not initialized, or 0
            p.data.normal_(std=0.1)


def owner(model, name):
    return model.get_submodule(name.rpartition(".")[0])


def matrices(name, tensor, model):
    """Views of a linear map's or a kernel's matrices (..., out, in), by hand; and its taps."""
    if name == "attention.c_attn.weight":
        return tensor.T.unflatten(0, (3, 8)), 1
    if name == "attention.c_proj.weight":
        return tensor.T, 1
    if name == "fused.in_proj_weight":
        return tensor.unflatten(0, (3, 8)), 1
    if name == "experts.gate_up_proj":
        return tensor.unflatten(1, (2, 6)), 1
    if name == "experts.down_proj":
        return tensor, 1
    layer = owner(model, name)
    if not name.endswith("weight") or not hasattr(layer, "kernel_size"):
        return None, 1
    kernels = tensor.flatten(2).unflatten(0, (layer.groups, -1)).permute(0, 3, 1, 2)
    return kernels.mT if layer.transposed else kernels, math.prod(layer.kernel_size)


def train(model, optimizer, unseen=True):
    """Let the optimizer pull a model to a target; some tokens of the table are not always seen."""
    generator = torch.Generator().manual_seed(3)
    pairs = [(p, torch.randn(p.shape, generator=generator).to(p)) for p in model.parameters()]
    for step in range(STEPS):
        for p, target in pairs:
            p.grad = (p.detach() - target) * (0.1 + target.abs())
        if unseen:
            model.table.weight.grad[step % 3 :: 3] = 0
            model.table.weight.grad[6] = 0
        optimizer.step()


def decayed(params):
    """The usual two groups: gains and biases do not decay."""
    params = list(params)
    tensors = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    return [
        {"params": tensors, "weight_decay": DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]


def twins(dtype=torch.float64):
    ours = Layers().to(dtype)
    return ours, copy.deepcopy(ours)


def assert_same(ours, theirs, rtol=2e-6, atol=1e-8):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("preset", "options"), [("adam", {}), ("sign", {"betas": (0.0, 0.0), "eps": 1e-300})]
)
def test_adam_and_sign_equal_torch_adamw(preset, options):
    ours, theirs = twins()
    train(ours, create_normopt_optimizer(ours, lr=1e-2, preset=preset, weight_decay=DECAY))
    train(theirs, torch.optim.AdamW(decayed(theirs.parameters()), lr=1e-2, **options))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("preset", "step_size", "options"),
    [
        ("prodigy", EscapeVelocity(1e-3, beta=math.sqrt(0.999)), {}),
        ("escape", EscapeVelocity(1e-3), {"betas": (1e-14, 0.0), "eps": 1e-300}),
    ],
)
def test_prodigy_and_escape_equal_prodigyopt_and_its_d(preset, step_size, options):
    ours, theirs = twins()
    first = create_normopt_optimizer(
        ours, lr=1.0, preset=preset, weight_decay=DECAY, step_size=step_size
    )
    second = Prodigy(decayed(theirs.parameters()), lr=1.0, d0=1e-3, **options)
    unseen = preset == "prodigy"  # where its beta2 is 0, a beta1 of 1e-14 divides by 0 there
    train(ours, first, unseen)
    train(theirs, second, unseen)
    (eta,) = [group["memory"]["eta"] for group in first.param_groups if group["memory"]]
    assert eta.item() == pytest.approx(second.param_groups[0]["d"], rel=1e-9)
    assert eta > 0.01  # it grew
    assert_same(ours, theirs)


class TorchMuonAndAdamW:
    """Each map of a fused or stacked tensor by torch.optim.Muon, all else by AdamW."""

    def __init__(self, model):
        named = dict(model.named_parameters())
        self.maps, self.matrices = [], []
        for name, p in named.items():
            views, _ = matrices(name, p.detach(), model)
            if views is not None and not hasattr(owner(model, name), "kernel_size"):
                self.maps.append((name, p))
                self.matrices += [nn.Parameter(m) for m in views.reshape(-1, *views.shape[-2:])]
        self.model = model
        others = [p for n, p in named.items() if n not in dict(self.maps)]
        self.muon = torch.optim.Muon(self.matrices, lr=1e-2, weight_decay=DECAY)
        self.adamw = torch.optim.AdamW(decayed(others), lr=1e-2)

    def step(self):
        gradients = []
        for name, p in self.maps:
            views, _ = matrices(name, p.grad, self.model)
            gradients += views.reshape(-1, *views.shape[-2:])
        for matrix, gradient in zip(self.matrices, gradients, strict=True):
            matrix.grad = gradient
        self.muon.step(), self.adamw.step()


def test_muon_equals_torch_muon_in_float32_plus_adamw(monkeypatch):
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", fp32_newton_schulz)
    ours, theirs = twins(torch.float32)
    train(ours, create_normopt_optimizer(ours, lr=1e-2, preset="muon", weight_decay=DECAY))
    train(theirs, TorchMuonAndAdamW(theirs))
    assert_same(ours, theirs, rtol=1e-4, atol=2e-5)


def polar(m):
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u * (s > 1e-10 * s[..., :1])[..., None, :] @ vh


def unit(m, dim):
    length = m.norm(dim=dim, keepdim=True)
    return m / torch.where(length == 0, 1, length)


def by_role(of_matrix):
    """A norm for each role, by hand; `of_matrix` is the size of a matrix's singular values."""

    def direction(name, m, model):
        views, taps = matrices(name, m, model)
        if views is not None:
            out = torch.zeros_like(m)
            target, _ = matrices(name, out, model)  # a view
            target.copy_(polar(views) * of_matrix(*views.shape[-2:], taps))
            return out
        if name == "table.weight":
            return unit(m, 1) * math.sqrt(m.shape[1])
        if name == "fused.out_proj.weight":
            return unit(m, 1) * math.sqrt(1 / m.shape[1])
        if name == "norm.weight":
            return m.sign()
        parts = m.unflatten(0, (3, 8)) if len(m) == 24 else m[None]
        return (unit(parts, 1) * math.sqrt(parts.shape[1])).reshape(m.shape)

    return direction


def modular(out, into, taps):
    return math.sqrt(out / into) / taps


def scion(name, m, model):
    return by_role(modular)(name, m, model) * (3000 if name == "fused.out_proj.weight" else 50)


def normopt(name, m, model):
    direction = by_role(lambda out, into, taps: math.sqrt(max(out, into)))(name, m, model)
    return direction * (m.shape[1] if name == "fused.out_proj.weight" else 1)


def spectral(name, m, model):
    if name in ("table.weight", "fused.out_proj.weight"):
        return polar(m)
    views, taps = matrices(name, m, model)
    if views is None:
        return m.sign()
    out = torch.zeros_like(m)
    matrices(name, out, model)[0].copy_(polar(views) / math.sqrt(taps))
    return out


RULES = {  # preset: (the direction, the momentum, the momentum that a step sees)
    "signum": (lambda name, m, model: m.sign(), 0.9, 0.9),
    "lion": (lambda name, m, model: m.sign(), 0.95, 0.95**2),
    "normalized-sgd": (lambda name, m, model: m / m.norm(), 0.9, 0.9),
    "scion": (scion, 0.9, 0.9),
    "modular": (by_role(modular), 0.9, 0.9**2),
    "normopt": (normopt, 0.9, 0.9**2),
    "spectral": (spectral, 0.0, 0.0),
}


class Published:
    """W ← (1 - lr · decay) W - lr · direction(beta1 M + (1 - beta1) G), then M by beta2."""

    def __init__(self, model, lr, direction, beta2, beta1):
        self.model, self.lr, self.direction = model, lr, direction
        self.betas, self.buffers = (beta1, beta2), {}

    @torch.no_grad()
    def step(self):
        for name, p in self.model.named_parameters():
            old = self.buffers.get(name, torch.zeros_like(p))
            used, self.buffers[name] = (b * old + (1 - b) * p.grad for b in self.betas)
            if p.ndim > 1:
                p *= 1 - self.lr * DECAY
            p -= self.lr * self.direction(name, used, self.model)


@pytest.mark.parametrize("preset", RULES)
def test_preset_equals_the_published_rule(preset):
    """signSGD with momentum; Lion, Algorithm 2; Table 1; Scion; the Epilogue; Prop. 5."""
    direction, *momenta = RULES[preset]
    ours, theirs = twins()
    lr = PRESETS[preset].learning_rate[0]
    train(ours, create_normopt_optimizer(ours, lr=lr, preset=preset, weight_decay=DECAY))
    train(theirs, Published(theirs, lr, direction, *momenta))
    assert_same(ours, theirs, rtol=1e-6, atol=lr * 1e-4)


KERNEL = "out in tap=2 tap=3"
WEIGHTS = {  # norm: a kernel's norm over that of its largest tap, of 6
    "rms->rms": 6,
    "rms->linf": 6,
    "linf->linf": 6,
    "l2->l2": 6**0.5,
    "l3->linf": 6 ** (2 / 3),
    "l1->linf": 1,
    "l1->rms": 1,
}


@pytest.mark.parametrize("name", [*WEIGHTS, "frobenius"])
@pytest.mark.parametrize("scale", ["norm", "adamw", "muon"])
def test_a_kernel_has_one_unit_in_its_step_and_its_dual_norm(name, scale):
    """η is ⟨G, D⟩ (Prop. 7), of norm 1 under the norm's scale; no other scale knows of taps."""
    norm = parse_norm(name)
    p, g = torch.randn(2, 5, 4, 2, 3, dtype=torch.float64)
    w = nn.Parameter(p.clone())
    w.grad = g.clone()
    group = {"params": [w], "role": "conv", "layouts": [KERNEL]}
    rule = Rule(norm, scale=scale)
    NormOpt([group], {"conv": rule}, lr=1.0, step_size=DualNorm()).step()
    step = p - w.detach()
    eta = ((g * step).sum()).sqrt()  # ⟨G, η D⟩ = η²
    direction = step / eta
    if name == "frobenius" and scale != "muon":
        expected = {"norm": 1 / g.norm(), "adamw": 120**0.5 / g.norm()}[scale] * g
    else:
        units = {"norm": 1 / WEIGHTS.get(name, 1), "muon": (5 / 4) ** 0.5}
        unit = units.get(scale) or 1 / norm.entry_rms(5, 4)
        expected = unit * norm.lmo(g.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
    torch.testing.assert_close(direction, expected)


@pytest.mark.parametrize("preset", ["sign", "adam", "signum", "lion"])
def test_flat_partitions_of_kernels_are_right_where_entries_move_alone(preset):
    assert create_normopt_optimizer(Layers(), lr=0.1, preset=preset).may_be_flat


@pytest.mark.parametrize("preset", ["sign", "normalized-sgd", "spectral", "modular"])
def test_telemetry_measures_a_step_in_the_unit_in_which_it_was_made(preset):
    model = Layers().double()
    optimizer = create_normopt_optimizer(model, lr=0.1, preset=preset)
    sizes = {}
    optimizer.observer = lambda move, eta: sizes.update(
        {move.param: (_size(move, move.direction), _dual(move, move.smooth), move.dual())}
    )
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert len(sizes) == len(list(model.parameters()))
    for size, dual, gained in sizes.values():
        assert size.item() == pytest.approx(1, rel=1e-5)
        assert dual.item() == pytest.approx(gained.item(), rel=1e-5)
