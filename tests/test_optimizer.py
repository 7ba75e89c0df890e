import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_normopt import (
    EMA,
    Accumulate,
    DualNorm,
    Fixed,
    NormOpt,
    Rule,
    classify,
    create_normopt_optimizer,
    operator_norm,
)
from hf_normopt.norms.operators import parse_norm
from hf_normopt.optim import batches as batching
from hf_normopt.optim.groups import parameter_groups
from hf_normopt.optim.presets import PRESETS
from hf_normopt.optim.rules import ADAMW_RMS, SCALES

LINEAR = {"linear": Rule(operator_norm("rms", "rms"))}


def llama(**changes):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": 64, **changes})
    )


def gpt2():
    sizes = {"n_layer": 2, "n_embd": 24, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def batches(n):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (4, 16), generator=generator) for _ in range(n)]


def train(model, optimizer, data):
    losses = []
    for ids in data:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one(shape=(6, 4), role="linear", policy=None, dtype=torch.float32, **options):
    p = nn.Parameter(torch.randn(shape, dtype=dtype))
    policy = policy or {"linear": Rule(operator_norm("rms", "rms"), momentum=0.9)}
    return p, NormOpt([{"params": [("w", p)], "role": role}], policy, **{"lr": 0.1, **options})


class Reference:
    """The preset `normopt` once more, sharing no line with the package: layouts by hand, SVDs."""

    def __init__(self, model, lr, weight_decay, rms, momentum=0.9):
        self.model, self.lr, self.weight_decay, self.rms, self.mu = (
            model,
            lr,
            weight_decay,
            rms,
            momentum,
        )
        self.buffers = {}

    def update(self, name, m):
        """The direction, with entries of RMS 1 at full rank, and whether the weight decays."""
        if name.endswith(("wte.weight", "wpe.weight", "embed_tokens.weight")):  # rows are tokens
            length = m.norm(dim=1, keepdim=True)
            return torch.where(length > 0, m / length, 0) * math.sqrt(m.shape[1]), True
        if name == "lm_head.weight":
            return m / m.norm(dim=1, keepdim=True) * math.sqrt(m.shape[1]), True
        if m.ndim == 1 and name.endswith("bias"):
            parts = m.reshape(3, -1) if "c_attn" in name else m[None]
            parts = parts / parts.norm(dim=1, keepdim=True) * math.sqrt(parts.shape[1])
            return parts.reshape(m.shape), False
        if m.ndim == 1:
            return m.sign(), False
        parts = m.chunk(3, dim=1) if "c_attn" in name else [m]
        polar = []
        for part in parts:
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            # what writes into a stream before LayerNorm has no gradient along the constant vector
            polar.append(u * (s > 1e-10 * s[0]) @ vh * math.sqrt(max(part.shape)))
        return torch.cat(polar, dim=1), True

    @torch.no_grad()
    def step(self):
        for name, p in self.model.named_parameters():
            g = p.grad
            buffer = self.buffers[name] = self.mu * self.buffers.get(name, 0) + (1 - self.mu) * g
            update, decays = self.update(name, (1 - self.mu) * g + self.mu * buffer)
            if decays:
                p *= 1 - self.lr * self.weight_decay
            p -= self.lr * self.rms * update


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_default_preset_equals_an_independent_implementation(make):
    ours = make().double()
    for p in ours.parameters():  # away from LayerNorm's start, where more singular values are tiny
        p.data += 0.1 * torch.randn_like(p)
    theirs = copy.deepcopy(ours)
    optimizer = create_normopt_optimizer(ours, lr=1e-3, weight_decay=0.1, lr_head=1.0)
    train(ours, optimizer, batches(10))
    train(theirs, Reference(theirs, 1e-3, 0.1, rms=ADAMW_RMS), batches(10))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.endswith("c_attn.bias"):  # softmax ignores the key's bias: its gradient is rounding
            a, b = (torch.cat(x.chunk(3)[::2]) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_the_formula():
    """W ← (1 - lr · weight_decay · decay) · W - lr · multiplier · scale · lmo(momentum)."""
    norm = operator_norm("rms", "linf")
    rule = Rule(norm, scale="muon", multiplier=3.0, momentum=0.8, decay=0.5)
    p, optimizer = one((6, 4), "head", {"head": rule}, weight_decay=0.2, dtype=torch.float64)
    w, m = p.detach().clone(), torch.zeros(6, 4)
    for _ in range(3):
        p.grad = torch.randn(6, 4, dtype=torch.float64)
        m = 0.8 * m + 0.2 * p.grad
        w = (1 - 0.1 * 0.2 * 0.5) * w - 0.1 * 3.0 * math.sqrt(6 / 4) * norm.lmo(m)
        optimizer.step()
    torch.testing.assert_close(p.detach(), w)


def test_nesterov_looks_ahead():
    rule = Rule(operator_norm("l2", "l2"), momentum=0.8, nesterov=True)
    p, optimizer = one(policy={"linear": rule}, lr=1.0)
    w, g = p.detach().clone(), torch.randn(6, 4)
    p.grad = g.clone()
    optimizer.step()
    buffer = 0.2 * g
    torch.testing.assert_close(p.detach(), w - rule.norm.lmo(0.2 * g + 0.8 * buffer))


def test_paper_mode_is_stateless():
    """Two steps with one gradient are one step made twice, and nothing is remembered."""
    p, optimizer = one(policy={"linear": Rule(operator_norm("rms", "rms"))})
    p.grad = torch.randn(6, 4)
    start = p.detach().clone()
    optimizer.step()
    first = p.detach() - start
    optimizer.step()
    torch.testing.assert_close(p.detach() - start, 2 * first)
    assert not optimizer.state[p]


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale):
    """What each entry of SCALES promises of the update, per unit of learning rate."""
    for norm in (
        parse_norm("rms->rms (svd)"),
        operator_norm("l1", "rms"),
        operator_norm("rms", "linf"),
    ):
        for shape in ((32, 8), (8, 32), (16, 16)):
            p, optimizer = one(shape, policy={"linear": Rule(norm, scale=scale)}, lr=1.0)
            start = p.detach().clone()
            p.grad = torch.randn(shape)
            optimizer.step()
            update = start - p.detach()
            if scale == "norm":
                assert norm.norm(update).item() == pytest.approx(1, rel=1e-4)
            elif scale == "adamw":
                assert update.square().mean().sqrt().item() == pytest.approx(ADAMW_RMS, rel=1e-4)
            else:
                assert norm.norm(update).item() == pytest.approx(
                    math.sqrt(max(1, shape[0] / shape[1])), rel=1e-4
                )


def test_a_convolution_moves_by_one_over_its_taps():
    """The norm is k² max over taps, so lmo / k²; the adamw scale restores the entries."""
    conv = nn.Conv2d(6, 5, 3, bias=False)
    for scale in ("norm", "adamw"):
        start = conv.weight.detach().clone()
        layouts = ["out in tap=3 tap=3"]
        group = {"params": [conv.weight], "role": "conv", "layouts": layouts}
        norm = operator_norm("rms", "rms")
        optimizer = NormOpt([group], {"conv": Rule(norm, scale=scale)}, lr=1.0)
        conv.weight.grad = torch.randn_like(conv.weight)
        optimizer.step()
        update = start - conv.weight.detach()
        if scale == "norm":
            torch.testing.assert_close(9 * norm.norm(update.permute(2, 3, 0, 1)), torch.ones(3, 3))
        else:
            assert update.square().mean().sqrt().item() == pytest.approx(ADAMW_RMS, rel=1e-4)


def test_fused_maps_train_as_separate_ones():
    """GPT-2's c_attn, transposed and fused, moves as three nn.Linear would."""
    c_attn = torch.randn(8, 24)
    grad = torch.randn(8, 24)
    fused = nn.Parameter(c_attn.clone())
    separate = [nn.Parameter(part.T.clone()) for part in c_attn.chunk(3, dim=1)]
    fused.grad = grad
    for p, g in zip(separate, grad.chunk(3, dim=1), strict=True):
        p.grad = g.T.contiguous()
    policy = PRESETS["normopt"].policy
    one = NormOpt(
        [{"params": [fused], "role": "linear", "layouts": ["in (part=3 out)"]}], policy, lr=0.1
    )
    three = NormOpt([{"params": separate, "role": "linear"}], policy, lr=0.1)
    one.step(), three.step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.T for p in separate], dim=1).detach())


def test_groups_are_named_plain_and_ordered():
    optimizer = create_normopt_optimizer(llama(), lr=1e-3, weight_decay=0.1)
    assert [g["role"] for g in optimizer.param_groups] == ["linear", "embedding", "head", "norm"]
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] == 1e-3
    names = [name for g in optimizer.param_groups for name in g["param_names"]]
    assert sorted(names) == sorted(name for name, _ in llama().named_parameters())
    plain = (str, int, float, tuple, list, dict, type(None))

    def check(value):
        assert isinstance(value, plain), value
        for inner in (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else ()
        ):
            check(inner)

    for group in optimizer.state_dict()["param_groups"]:
        check(group)


def test_weight_decay_acts_on_matrices_only():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(5, 4), nn.Conv1d(4, 4, 3)
            self.layers = nn.ModuleList([nn.Linear(4, 4)])
            self.norm, self.gate, self.last = (
                nn.LayerNorm(4),
                nn.Parameter(torch.ones(())),
                nn.Linear(4, 2),
            )

    model = Model()
    optimizer = create_normopt_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decays = name in ("table.weight", "conv.weight", "layers.0.weight", "last.weight")
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0))


def test_kinds_with_a_rule_get_a_group_of_their_own():
    rule = Rule(operator_norm("l1", "linf"))
    policy = {**PRESETS["normopt"].policy, "position": rule}
    model = gpt2()
    groups = parameter_groups(model, classify(model), policy)
    position = next(g for g in groups if g["kind"] == "position")
    assert [name for name, _ in position["params"]] == ["transformer.wpe.weight"]


def test_state_is_one_momentum_buffer_made_lazily():
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-3, situation="pretrained")
    assert not optimizer.state
    train(model, optimizer, batches(1))
    for p in model.parameters():
        assert list(optimizer.state[p]) == ["momentum_buffer"]
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape


def test_none_zero_and_empty():
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    groups = [{"params": [p, q], "role": "linear"}, {"params": [], "role": "linear"}]
    for step_size in (Fixed(), DualNorm()):
        optimizer = NormOpt(
            groups,
            {"linear": Rule(parse_norm("rms->rms (svd)"), momentum=0.9)},
            lr=0.1,
            step_size=step_size,
        )
        p.grad, q.grad = None, torch.zeros(3, 3)
        optimizer.step()
        assert torch.equal(p, torch.ones(3, 3))
        assert torch.equal(q, torch.ones(3, 3))
        q.grad = None
        optimizer.step()


def test_learning_rate_zero_changes_nothing():
    """Checkpoint code calls step() with zero gradients and lr 0."""
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=0.0, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(1))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_closure():
    p, optimizer = one()

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0] / 2


def test_plain_loop_learns():
    model = llama()
    ids = batches(1)
    losses = train(model, create_normopt_optimizer(model, lr=1e-2), ids * 30)
    assert losses[-1] < 0.6 * losses[0]


def test_sparse_gradients_are_made_dense():
    def make(sparse):
        torch.manual_seed(0)
        table = nn.Embedding(7, 4, sparse=sparse)
        optimizer = create_normopt_optimizer(table, lr=0.1)
        for ids in ([1, 1, 3], [2], [1, 2, 6]):
            optimizer.zero_grad()
            table(torch.tensor(ids)).square().sum().backward()
            optimizer.step()
        return table.weight.detach()

    torch.testing.assert_close(make(True), make(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_a_float32_momentum(dtype):
    p, optimizer = one(dtype=dtype)
    p.grad = torch.randn(6, 4).to(dtype)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32


def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path):
    for preset in PRESETS:
        torch.manual_seed(0)
        straight, data = llama(), batches(6)
        broken = copy.deepcopy(straight)
        train(straight, create_normopt_optimizer(straight, lr=1e-2, preset=preset), data)
        first = create_normopt_optimizer(broken, lr=1e-2, preset=preset)
        train(broken, first, data[:3])
        torch.save(first.state_dict(), tmp_path / "optimizer.pt")
        second = create_normopt_optimizer(broken, lr=1e-2, preset=preset)
        second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
        train(broken, second, data[3:])
        for a, b in zip(straight.parameters(), broken.parameters(), strict=True):
            assert torch.equal(a, b)


def test_state_is_loaded_by_name():
    a, b = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
    policy = {"linear": Rule(operator_norm("rms", "rms"), momentum=0.9)}
    first = NormOpt([{"params": [("module.a", a), ("b", b)], "role": "linear"}], policy, lr=0.1)
    a.grad, b.grad = torch.randn(3, 3), torch.randn(3, 3)
    first.step()
    second = NormOpt([{"params": [("b", b), ("a", a)], "role": "linear"}], policy, lr=0.1)
    second.load_state_dict(first.state_dict())
    for p in (a, b):
        assert torch.equal(second.state[p]["momentum_buffer"], first.state[p]["momentum_buffer"])
    assert second.param_groups[0]["param_names"] == ["b", "a"]


def test_checkpoints_that_do_not_fit_are_refused_before_anything_changes():
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    train(model, optimizer, batches(1))
    state = copy.deepcopy(optimizer.state_dict())

    other = create_normopt_optimizer(model, lr=1e-3, preset="muon")
    with pytest.raises(
        ValueError, match=r"trained under the rule \[rms->rms.*go on under \[l2->l2 \(muon\)"
    ):
        other.load_state_dict(state)
    assert not other.state

    smaller = llama(num_hidden_layers=1)
    with pytest.raises(
        ValueError, match=r"Only in the checkpoint: model.layers.1.*Only in the model: none"
    ):
        create_normopt_optimizer(smaller, lr=1e-3).load_state_dict(state)

    adamw = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="not written by NormOpt"):
        optimizer.load_state_dict(adamw.state_dict())
    assert torch.equal(
        optimizer.state_dict()["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"]
    )


def test_checkpoints_of_another_shape_are_refused():
    _, first = one((5, 3))
    _, second = one((6, 3))
    with pytest.raises(
        ValueError, match=r"w has the shape \(5, 3\) in the checkpoint and \(6, 3\)"
    ):
        second.load_state_dict(first.state_dict())


def test_resume_in_another_dtype():
    p, first = one()
    p.grad = torch.randn(6, 4)
    first.step()
    q, second = one(dtype=torch.float64)
    second.load_state_dict(first.state_dict())
    q.grad = torch.randn(6, 4, dtype=torch.float64)
    second.step()
    assert second.state[q]["momentum_buffer"].dtype == torch.float64


def test_two_parameters_of_one_name_are_refused():
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    params = [*a.named_parameters(), *b.named_parameters()]
    with pytest.raises(ValueError, match="Two parameters are named weight"):
        NormOpt([{"params": params, "role": "linear"}], LINEAR, lr=0.1)


def test_nothing_moves_when_one_shape_is_wrong():
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = NormOpt([{"params": [p, q], "role": "linear"}], LINEAR, lr=0.1)
    q.data = torch.ones(9)
    p.grad, q.grad = torch.randn(3, 3), torch.randn(9)
    with pytest.raises(RuntimeError, match="param_1 had the shape"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 3))


def test_step_counters_do_not_depend_on_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        p, optimizer = one(policy={"linear": Rule(operator_norm("l1", "linf"), statistic=EMA(0.9))})
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].item() == 300


def test_nesterov_with_bias_correction_starts_at_full_size():
    """The weights of the Nesterov average sum to 1 - momentum^(t + 1), as in NAdam."""
    rule = Rule(
        operator_norm("l1", "linf"), momentum=0.9, nesterov=True, statistic=EMA(0.99, eps=0)
    )
    p, optimizer = one(policy={"linear": rule}, lr=1.0)
    start, p.grad = p.detach().clone(), torch.randn(6, 4)
    for step in range(1, 5):  # a constant gradient: every step is its sign
        optimizer.step()
        torch.testing.assert_close(start - p.detach(), step * p.grad.sign(), rtol=1e-4, atol=1e-4)


def test_empty_tensors_are_left_alone():
    for role, shape in (("linear", (0, 4)), ("bias", (0,)), ("embedding", (4, 0))):
        p, optimizer = one(shape, role, PRESETS["normopt"].policy)
        p.grad = torch.zeros(shape)
        optimizer.step()


def test_copies_keep_their_policy():
    p, optimizer = one()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.policy == optimizer.policy
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones(6, 4)
        twin.step()
        assert not torch.equal(p, q)


def test_schedulers_scale_every_group():
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-3, lr_head=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, batches(1))
    scheduler.step()
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4}


def test_dual_norm_step_is_one_number_for_the_network():
    """Prop. 7: η = (1/λ) Σ_k ‖G_k‖† / s_k, and each layer moves by η / s_l along its LMO."""
    a, b = torch.randn(4, 3), torch.randn(5, 4)
    linear, head = operator_norm("rms", "rms"), operator_norm("rms", "linf")
    policy = {"linear": Rule(linear, multiplier=0.5), "head": Rule(head)}
    p, q = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5, 4))
    groups = [{"params": [p], "role": "linear"}, {"params": [q], "role": "head"}]
    optimizer = NormOpt(groups, policy, lr=1.0, step_size=DualNorm(sharpness=4.0))
    p.grad, q.grad = a, b
    optimizer.step()
    eta = (0.5 * linear.dual_norm(a) + head.dual_norm(b)) / 4.0
    torch.testing.assert_close(p.detach(), -0.5 * eta * linear.lmo(a))
    torch.testing.assert_close(q.detach(), -eta * head.lmo(b))


@pytest.mark.parametrize("statistic", [EMA(0.0, eps=0.0), EMA(0.0, eps=0.0, bias_correction=False)])
@pytest.mark.parametrize("pair", [("l1", "linf"), ("l1", "rms"), ("rms", "linf")])
def test_a_statistic_without_memory_is_the_lmo(statistic, pair):
    norm = operator_norm(*pair)
    p, optimizer = one(policy={"linear": Rule(norm, statistic=statistic)}, lr=1.0)
    q, plain = one(policy={"linear": Rule(norm)}, lr=1.0)
    q.data.copy_(p.data)
    for _ in range(3):
        p.grad = q.grad = torch.randn(6, 4)
        optimizer.step(), plain.step()
    torch.testing.assert_close(p, q)


def test_accumulated_statistic_is_adagrad():
    rule = Rule(operator_norm("l1", "linf"), statistic=Accumulate(eps=1e-10))
    p, optimizer = one(policy={"linear": rule}, lr=0.1)
    q = nn.Parameter(p.detach().clone())
    adagrad = torch.optim.Adagrad([q], lr=0.1, eps=1e-10)
    for _ in range(20):
        p.grad = q.grad = torch.randn(6, 4)
        optimizer.step(), adagrad.step()
    torch.testing.assert_close(p, q)


def test_errors():
    weight = nn.Parameter(torch.ones(2, 2))
    group = {"params": [weight], "role": "linear"}
    with pytest.raises(ValueError, match=r"lr must be a finite number >= 0, found -0.1"):
        NormOpt([group], LINEAR, lr=-0.1)
    for lr in (None, "0.1", math.inf):
        with pytest.raises(ValueError, match="lr must be a finite number"):
            NormOpt([group], LINEAR, lr=lr)
    with pytest.raises(ValueError, match="A group needs a role"):
        NormOpt([group], LINEAR, lr=0.1).add_param_group({"params": []})
    with pytest.raises(ValueError, match="weight_decay must be"):
        NormOpt([group], LINEAR, lr=0.1, weight_decay=math.nan)
    with pytest.raises(
        ValueError, match=r"no rule for the role head. The model has head, linear; the policy has"
    ):
        NormOpt(
            [group, {"params": [nn.Parameter(torch.ones(2, 2))], "role": "head"}], LINEAR, lr=0.1
        )
    with pytest.raises(ValueError, match="use create_normopt_optimizer"):
        NormOpt([weight], LINEAR, lr=0.1)
    with pytest.raises(ValueError, match="complex"):
        NormOpt(
            [{"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], "role": "linear"}],
            LINEAR,
            lr=0.1,
        )
    with pytest.raises(ValueError, match=r"does not divide the tensor's shape \(2, 2\)"):
        NormOpt([{**group, "layouts": ["(part=3 out) in"]}], LINEAR, lr=0.1)
    with pytest.raises(ValueError, match="no trainable parameter"):
        create_normopt_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=0.1)
    with pytest.raises(ValueError, match=r"Unknown scale 'mup'"):
        Rule(operator_norm("rms", "rms"), scale="mup")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), found 1.0"):
        Rule(operator_norm("rms", "rms"), momentum=1.0)
    with pytest.raises(ValueError, match="has no statistic"):
        Rule(operator_norm("l1", 3), statistic=EMA(0.9))


def test_a_flattened_parameter_is_refused_at_the_step():
    p, optimizer = one()
    p.data = torch.zeros(24)
    p.grad = torch.ones(24)
    with pytest.raises(RuntimeError, match=r"w had the shape \(6, 4\).*has \(24,\) now.*FSDP2"):
        optimizer.step()


def test_print_shows_the_groups():
    text = repr(create_normopt_optimizer(llama(), lr=1e-3, weight_decay=0.1, lr_head=2.0))
    assert "linear     rms->rms" in text
    assert any(
        line.split() == ["head", "rms->linf", "1", "2,048", "0.002", "0.1"]
        for line in text.splitlines()
    )


ROWS = {"statistic_head": 0.9, "statistic_embedding": 0.9}


@pytest.mark.parametrize(
    ("preset", "options"), [*((preset, {}) for preset in PRESETS), ("normopt", ROWS)]
)
def test_tensors_that_move_together_or_in_parts_move_as_alone(preset, options, monkeypatch):
    """Stacks of equal shapes, and parts of large tensors, change nothing but rounding."""
    ends = []
    for small, part in ((0, 2**30), (2**16, 2**30), (0, 100), (2**8, 100)):
        monkeypatch.setattr(batching, "SMALL", small)
        monkeypatch.setattr(batching, "PART", part)
        torch.manual_seed(0)
        model = llama()
        rates = {"lr": 1e-2, "weight_decay": 0.1}
        optimizer = create_normopt_optimizer(model, preset=preset, **rates, **options)
        losses = train(model, optimizer, batches(3))
        ends.append((losses, [p.detach() for p in model.parameters()]))
    for losses, params in ends[1:]:
        torch.testing.assert_close(losses, ends[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(params, ends[0][1], rtol=1e-4, atol=1e-5)


def test_what_moves_at_a_time(monkeypatch):
    def shapes(role, shape, count, policy=PRESETS["normopt"].policy, **options):
        params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
        for p in params:
            p.grad = torch.randn(shape)
        optimizer = NormOpt([{"params": params, "role": role, **options}], policy, lr=0.1)
        group = optimizer.param_groups[0]
        many = batching.moves_of(group, optimizer.rule_of(group), optimizer.state)
        return [
            [tuple(p.shape) for p in part.params] for move in many for part in batching.parts(move)
        ]

    assert shapes("linear", (64, 64), 200) == [[(64, 64)] * 64] * 3 + [[(64, 64)] * 8]
    assert shapes("linear", (512, 512), 2) == [[(512, 512)]] * 2  # one operator cannot be divided
    assert shapes("embedding", (5000, 128), 1) == [[(2048, 128)], [(2048, 128)], [(904, 128)]]
    assert shapes("head", (5000, 128), 1) == [[(2048, 128)], [(2048, 128)], [(904, 128)]]
    assert shapes("head", (128, 5000), 1, layouts=["in out"]) == [[(128, 5000)]]
    experts = shapes("linear", (4, 256, 512), 1, layouts=["expert out in"])
    assert experts == [[(2, 256, 512)], [(2, 256, 512)]]
    assert shapes("linear", (2, 512, 1024), 1, layouts=["expert out in"]) == [[(1, 512, 1024)]] * 2


@pytest.mark.parametrize(
    "options",
    [
        *({"preset": preset} for preset in PRESETS),
        {"step_size": DualNorm(1.0)},
        {"step_size": "escape_velocity/beta:0.9/per_role:true"},
        {"momentum_dtype": "bfloat16", "rounding": "kahan"},
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(options):
    """Meta tensors have no values: whoever asked for one, or branched on one, would fail."""
    model = llama(vocab_size=5000)
    if "rounding" in options:
        model.bfloat16()
    optimizer = create_normopt_optimizer(model, lr=1e-2, weight_decay=0.1, **options)
    model.to("meta")
    for group in optimizer.param_groups:
        group["params"] = [model.get_parameter(name) for name in group["param_names"]]
    # As at the start of a warm-up, a number, and a tensor as for a CUDA graph.
    for lr in (0.0, 1e-2, torch.tensor(1e-2, device="meta")):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()


@pytest.mark.parametrize("size", [Fixed(), DualNorm(1.0)], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_steps_find_their_state_where_it_was(preset, size):
    """So that a CUDA graph of the second step takes the third, with another learning rate."""
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=0.0, preset=preset, step_size=size)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-2)
    places = []
    for ids in batches(3):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        tensors = [*model.parameters(), *(group["lr"] for group in optimizer.param_groups)]
        tensors += [
            value
            for p in model.parameters()
            for value in optimizer.state[p].values()
            if isinstance(value, torch.Tensor)
        ]
        places.append([tensor.data_ptr() for tensor in tensors])
    assert places[2] == places[1]
    assert not any(group["memory"] for group in optimizer.param_groups)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_step_is_the_step():
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        optimizer = create_normopt_optimizer(model, lr=1e-2, overrides={"weight": "linear"})
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_who_is_watched_moves_as_who_is_not(monkeypatch):
    """Bit for bit, also where the one moves in parts and the other whole."""
    monkeypatch.setattr(batching, "PART", 2**10)
    for shape, role, layout in (
        ((6, 40, 70), "linear", "expert out in"),
        ((100, 30), "embedding", "in out"),
        ((100, 30), "head", "out in"),
        ((3000,), "norm", "out"),
    ):
        ends = []
        for observer in (None, lambda move, eta: None):
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(shape))
            groups = [{"params": [p], "role": role, "layouts": [layout]}]
            optimizer = NormOpt(groups, PRESETS["normopt"].policy, lr=0.1)
            optimizer.observer = observer
            for _ in range(3):
                p.grad = torch.randn(shape)
                p.grad[0] = 0  # an expert that no token reached
                optimizer.step()
            ends.append(p.detach())
        assert torch.equal(*ends), role


def partitioned(model, optimizer, stage):
    """ZeRO's doing: each group becomes one flat tensor, here on a single rank."""
    flats = []
    for group in optimizer.param_groups:
        flats.append((torch.cat([p.detach().flatten() for p in group["params"]]), group["params"]))
        group["params"] = [flats[-1][0]]

    def step():
        groups = optimizer.param_groups
        for flat, params in flats:
            flat.grad = torch.cat([p.grad.flatten() for p in params])
        for group in groups:  # one call for each
            if stage == 3:
                kept = [(other, other["params"]) for other in groups if other is not group]
                for other, _ in kept:
                    other["params"] = []
                optimizer.step()
                for other, params in kept:
                    other["params"] = params
            else:
                optimizer.param_groups = [group]
                optimizer.step()
                optimizer.param_groups = groups
        for flat, params in flats:
            for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.detach().copy_(part.reshape(p.shape))

    return step


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("preset", ["adam", "sign", "signum", "lion"])
def test_rules_by_entry_are_right_for_flat_partitions(monkeypatch, preset, stage):
    config = {"zero_optimization": {"stage": stage}}
    monkeypatch.setattr("hf_normopt.optim.sharding.deepspeed_config", lambda: config)
    ends = []
    for flat in (False, True):
        torch.manual_seed(0)
        model = llama()
        optimizer = create_normopt_optimizer(model, lr=1e-2, preset=preset, weight_decay=0.1)
        step = partitioned(model, optimizer, stage) if flat else optimizer.step
        for i, ids in enumerate(batches(3)):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            step()
            if flat and i == 1:  # what DeepSpeed does when a run is resumed
                state = copy.deepcopy(optimizer.state_dict())
                optimizer.state.clear()
                optimizer.load_state_dict(state)
        assert optimizer.steps == 3
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"preset": "muon"}, {"preset": "prodigy"}, {"preset": "adam", "step_size": "dual_norm"}],
    ids=str,
)
def test_flat_tensors_of_unknown_make_are_refused_where_matrices_or_the_network_count(options):
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-2, **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match=r"FSDP1 flattens.*FSDP2.*--fsdp_config"):
        partitioned(model, optimizer, 2)()
