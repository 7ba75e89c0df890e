"""The propositions of "Old Optimizer, New Norm", one test each; float64."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from prodigyopt import Prodigy
from torch import nn

from hf_normopt import (
    EMA,
    PRESETS,
    Accumulate,
    DualNorm,
    EscapeVelocity,
    Frobenius,
    NormOpt,
    Rule,
    create_normopt_optimizer,
    operator_norm,
)
from hf_normopt.optim.step_sizes import parse_step_size
from tests.test_optimizer import batches, llama, train

torch64 = {"dtype": torch.float64}
MIXED = {
    "linear": Rule(operator_norm("rms", "rms"), multiplier=0.5),
    "head": Rule(operator_norm("rms", "linf"), multiplier=2.0),
    "embedding": Rule(operator_norm("l1", "rms")),
    "norm": Rule(operator_norm("l1", "linf"), multiplier=1 / 3),
}


def network(roles=tuple(MIXED)):
    """One parameter for each role, with a gradient."""
    params = {}
    for role, shape in zip(roles, [(5, 4), (3, 6), (6, 4), (4,)], strict=False):
        params[role] = nn.Parameter(torch.randn(shape, **torch64))
        params[role].grad = torch.randn(shape, **torch64)
    return params, [{"params": [(role, p)], "role": role} for role, p in params.items()]


def minus_trace_polar(g):
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    return -s.sum() * u @ vh


TABLE_1 = {  # the norm, the shape it is for, and the solution times the sharpness
    "Euclidean": (Frobenius(), (7, 1), lambda g: -g),
    "infinity": (operator_norm("l1", "linf"), (7, 1), lambda g: -g.abs().sum() * g.sign()),
    "Frobenius": (Frobenius(), (4, 6), lambda g: -g),
    "spectral": (operator_norm("l2", "l2"), (4, 6), minus_trace_polar),
}


@pytest.mark.parametrize("row", TABLE_1)
def test_proposition_1_for_every_row_of_table_1(row):
    """-(‖g‖† / λ) lmo(g) minimises ⟨g, Δ⟩ + (λ/2) ‖Δ‖², with the value -‖g‖†² / (2 λ)."""
    norm, shape, solution = TABLE_1[row]
    sharpness, g = 2.5, torch.randn(shape, **torch64)
    step = -norm.dual_norm(g) / sharpness * norm.lmo(g)
    torch.testing.assert_close(step, solution(g) / sharpness)

    def objective(delta):
        return (g * delta).sum((-2, -1)) + sharpness / 2 * norm.norm(delta) ** 2

    best = objective(step)
    torch.testing.assert_close(best, -(norm.dual_norm(g) ** 2) / (2 * sharpness))
    for scale in (1e-3, 1e-1, 1, 10):
        others = step + scale * torch.randn(3000, *shape, **torch64)
        assert (objective(others) >= best * (1 + 1e-12)).all()


@given(seed=st.integers(0, 2**31), sharpness=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_proposition_7_is_optimal_for_mixed_norms_and_scales(seed, sharpness):
    """The step attains -λη²/2 of the majorised loss, and no perturbation does better."""
    torch.manual_seed(seed)
    params, groups = network()
    grads = {role: p.grad for role, p in params.items()}
    start = {role: p.detach().clone() for role, p in params.items()}
    NormOpt(groups, MIXED, lr=1.0, step_size=DualNorm(sharpness)).step()
    step = {role: p.detach() - start[role] for role, p in params.items()}

    def operator(role, tensor):  # tables are stored transposed, vectors are columns
        if role == "norm":
            return tensor[..., None]
        return tensor.mT if role == "embedding" else tensor

    def objective(delta):
        inner = sum((grads[r] * delta[r]).flatten(-grads[r].ndim).sum(-1) for r in delta)
        norms = [MIXED[r].norm.norm(operator(r, delta[r])) / MIXED[r].multiplier for r in delta]
        return inner + sharpness / 2 * torch.stack(norms).amax(0) ** 2

    best = objective(step)
    duals = [
        r.multiplier * r.norm.dual_norm(operator(role, grads[role])) for role, r in MIXED.items()
    ]
    eta = sum(duals) / sharpness
    torch.testing.assert_close(best, -sharpness * eta**2 / 2, rtol=1e-10, atol=0)
    for scale in (1e-4, 1e-2, 1.0):
        others = {r: d + scale * torch.randn(2000, *d.shape, **torch64) for r, d in step.items()}
        assert (objective(others) >= best * (1 + 1e-12)).all()


def test_proposition_7_does_not_depend_on_how_layers_are_grouped():
    params, groups = network()
    twins = {role: nn.Parameter(p.detach().clone()) for role, p in params.items()}
    for role, twin in twins.items():
        twin.grad = params[role].grad
    NormOpt(groups, MIXED, lr=1.0, step_size=DualNorm()).step()
    reverse = [{"params": [(r, twins[r])], "role": r} for r in reversed(twins)]
    NormOpt(reverse, MIXED, lr=1.0, step_size=DualNorm()).step()
    for role, p in params.items():
        torch.testing.assert_close(p, twins[role])


def test_proposition_6_every_step_descends_by_at_least_the_bound():
    """A linear layer, squared loss: λ is known, 1 in rms -> rms and d_in/d_out in l2 -> l2."""
    d_in, d_out, n = 12, 7, 40
    x = torch.randn(n, d_in, **torch64)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(d_in)
    y = torch.randn(n, d_out, **torch64)
    for norm, sharpness in (
        (operator_norm("rms", "rms"), 1.0),
        (operator_norm("l2", "l2"), d_in / d_out),
    ):
        w = nn.Parameter(torch.randn(d_out, d_in, **torch64))
        group = {"params": [w], "role": "linear"}
        optimizer = NormOpt([group], {"linear": Rule(norm)}, lr=1.0, step_size=DualNorm(sharpness))

        def loss(w=w):
            return (y - x @ w.T).square().sum() / (2 * n * d_out)

        for _ in range(50):
            optimizer.zero_grad()
            before = loss()
            before.backward()
            bound = norm.dual_norm(w.grad) ** 2 / (2 * sharpness)
            optimizer.step()
            assert before - loss() >= bound * (1 - 1e-9)


def test_story_1_sign_descent_is_adam_without_moving_averages():
    ours = llama().double()
    theirs = copy.deepcopy(ours)
    train(ours, create_normopt_optimizer(ours, lr=1e-3, preset="sign"), batches(5))
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.0, 0.0), eps=0.0)
    model_step, adam.step = adam.step, None
    for ids in batches(5):
        theirs.zero_grad()
        theirs(input_ids=ids, labels=ids).loss.backward()
        zeros = {p: (p.grad == 0, p.detach().clone()) for p in theirs.parameters()}
        model_step()  # 0 / 0 where a token was not seen: Adam gives NaN, the sign is 0
        for p, (mask, before) in zeros.items():
            p.data[mask] = before[mask]
            adam.state.clear()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_story_2_spectral_descent_is_shampoo_without_accumulation():
    w, g = torch.randn(5, 7, **torch64), torch.randn(5, 3, **torch64) @ torch.randn(3, 7, **torch64)
    p = nn.Parameter(w.clone())
    p.grad = g
    policy = PRESETS["spectral"].policy
    NormOpt([{"params": [p], "role": "linear"}], policy, lr=0.1).step()
    torch.testing.assert_close(p.detach(), w - 0.1 * root(g @ g.T) @ g @ root(g.T @ g))


def root(gram, eps=0.0):
    """(gram + eps)^(-1/4), the pseudo-inverse for eps 0."""
    values, q = torch.linalg.eigh(gram)
    kept = values > 1e-10 * values[-1] if eps == 0 else values > -1
    powers = torch.where(kept, (values.clamp_min(0) + eps + 1e-300) ** -0.25, 0)
    return (q * powers) @ q.T


@pytest.mark.parametrize("accumulate", [False, True])
def test_story_2_with_moving_averages_is_shampoo(accumulate):
    """L^(-1/4) M R^(-1/4), exponent -1/4 on each side, in float64 by its definition."""
    beta, momentum, eps = 0.95, 0.9, 1e-6
    statistic = Accumulate(eps) if accumulate else EMA(beta, eps)
    rule = Rule(operator_norm("l2", "l2"), momentum=momentum, statistic=statistic)
    p = nn.Parameter(torch.randn(6, 9, **torch64))
    w, m = p.detach().clone(), torch.zeros(6, 9, **torch64)
    left, right = torch.zeros(6, 6, **torch64), torch.zeros(9, 9, **torch64)
    optimizer = NormOpt([{"params": [p], "role": "linear"}], {"linear": rule}, lr=0.1)
    for t in range(1, 51):
        p.grad = g = torch.randn(6, 9, **torch64)
        optimizer.step()
        m = momentum * m + (1 - momentum) * g
        keep, take = (1, 1) if accumulate else (beta, 1 - beta)
        left, right = keep * left + take * g @ g.T, keep * right + take * g.T @ g
        c, d = (1, 1) if accumulate else (1 - beta**t, 1 - momentum**t)
        w = w - 0.1 * root(left / c, eps) @ (m / d) @ root(right / c, eps)
    torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "shampoo", "prodigy"])
def test_with_no_memory_each_story_is_its_lmo(name):
    """A statistic with beta 0 and momentum 0 gives the LMO exactly."""
    rule = PRESETS[name].policy["linear"]
    norm = rule.norm
    p, g = nn.Parameter(torch.zeros(4, 6, **torch64)), torch.randn(4, 6, **torch64)
    bare = Rule(norm, statistic=EMA(0.0, eps=0.0))
    optimizer = NormOpt([{"params": [p], "role": "linear"}], {"linear": bare}, lr=1.0)
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), -norm.lmo(g))


def quadratic():
    curvature = torch.logspace(0, -1, 50, **torch64)
    target = torch.randn(50, **torch64)
    return (lambda w: (curvature * (w - target).square()).sum() / 2), (target - 1).abs().amax()


def escape(step_size, policy=None, lr=1.0):
    w = nn.Parameter(torch.ones(50, **torch64))
    policy = policy or {"bias": Rule(operator_norm("l1", "linf"))}
    return w, NormOpt([{"params": [w], "role": "bias"}], policy, lr=lr, step_size=step_size)


def etas(optimizer):
    return [group["memory"]["eta"].item() for group in optimizer.param_groups if group["memory"]]


@pytest.mark.parametrize(
    ("variant", "sequence"),
    [("delayed", [1, 1, 2, 3, 5, 8, 13, 21, 34]), ("undelayed", [1, 1, 2, 4, 8, 16, 32, 64, 128])],
)
def test_story_3_growth_under_a_constant_gradient(variant, sequence):
    """Fibonacci numbers as printed (Eq. 28 and 29), doubling as in prodigyopt."""
    start = 2.0**-20  # exact in binary, so that the sequence is exact too
    w = nn.Parameter(torch.zeros(4, **torch64))
    policy = {"bias": Rule(operator_norm("l1", "linf"))}
    size = EscapeVelocity(start, variant=variant)
    optimizer = NormOpt([{"params": [w], "role": "bias"}], policy, lr=1.0, step_size=size)
    found = []
    for _ in sequence:
        w.grad = torch.full((4,), 0.5, **torch64)
        optimizer.step()
        found.append(etas(optimizer)[0] / start)
    assert found == sequence


@pytest.mark.parametrize(
    ("betas", "size"),
    [
        ((0.0, 0.0), EscapeVelocity(variant="undelayed")),
        ((1e-14, 0.0), EscapeVelocity()),
    ],
)
def test_story_3_without_moving_averages_is_prodigy(betas, size):
    loss, _ = quadratic()
    w, ours = escape(size)
    v = nn.Parameter(torch.ones(50, **torch64))
    theirs = Prodigy([v], lr=1.0, betas=betas, eps=1e-300)
    for _ in range(200):
        for optimizer, x in ((ours, w), (theirs, v)):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        assert etas(ours)[0] == pytest.approx(theirs.param_groups[0]["d"], rel=1e-9)
    torch.testing.assert_close(w, v, rtol=0, atol=1e-9)


def test_story_3_with_moving_averages_is_prodigy_and_its_d():
    """200 steps on a transformer under a schedule, every d."""
    ours = llama().double()
    theirs = copy.deepcopy(ours)
    first = create_normopt_optimizer(ours, lr=1.0, preset="prodigy")
    second = Prodigy(theirs.parameters(), lr=1.0)
    data = batches(8)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1, (t + 1) / 10) * (1 - t / 300))
        for o in (first, second)
    ]
    for t in range(200):
        for model, optimizer, schedule in zip(
            (ours, theirs), (first, second), schedules, strict=True
        ):
            train(model, optimizer, [data[t % 8]])
            schedule.step()
        assert etas(first)[0] == pytest.approx(second.param_groups[0]["d"], rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # RMSNorm computes in float32


SIZES = {
    "delayed": EscapeVelocity(),
    "undelayed": EscapeVelocity(variant="undelayed"),
    "cosine": EscapeVelocity(rule="cosine"),
    "last": EscapeVelocity(rule="cosine", anchor="last"),
    "decrease": EscapeVelocity(decrease=True),
    "memory": EscapeVelocity(beta=0.9),
    "stride": EscapeVelocity(stride=7),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_escape_velocity_leaves_the_start_and_stops_growing(size):
    """From 1e-6 on a quadratic, up to the order of the distance to the optimum."""
    loss, distance = quadratic()
    w, optimizer = escape(size)
    losses, history = [], []
    for _ in range(120):
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        optimizer.step()
        losses.append(value.item())
        history.append(etas(optimizer)[0])
    assert 1e-3 < max(history) <= 2 * distance
    assert min(losses) < 0.5 * losses[0]


POLICIES = {
    "spectral": {"linear": Rule(operator_norm("rms", "rms"))},
    "rows": {"linear": Rule(operator_norm("rms", "linf"))},
    "columns": {"linear": Rule(operator_norm("l1", 3))},
    "momentum": {"linear": Rule(operator_norm("rms", "rms"), momentum=0.9, nesterov=True)},
    "scaled": {"linear": Rule(operator_norm("rms", "rms"), scale="adamw", multiplier=3.0)},
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_escape_velocity_under_any_norm(policy):
    """By Hölder's inequality η is at most the way gone so far, in the network's norm."""
    rule = policy["linear"]
    target = torch.randn(6, 5, **torch64)
    w = nn.Parameter(torch.zeros(6, 5, **torch64))
    group = {"params": [w], "role": "linear"}
    optimizer = NormOpt([group], policy, lr=1.0, step_size=EscapeVelocity(1e-5))
    scale = 1.0 if rule.scale == "norm" else 1 / rule.norm.entry_rms(6, 5)
    farthest = 1e-5
    for _ in range(60):
        optimizer.zero_grad()
        loss = (w - target).square().sum()
        loss.backward()
        farthest = max(farthest, (rule.norm.norm(w.detach()) / (scale * rule.multiplier)).item())
        optimizer.step()
        (peak,) = etas(optimizer)
        assert peak <= farthest * (1 + 1e-9)
    assert peak > 1e-2
    assert loss < 0.7 * target.square().sum()


def test_one_eta_for_each_role_or_one_for_all():
    for per_role in (False, True):
        _, groups = network()
        optimizer = NormOpt(groups, MIXED, lr=1.0, step_size=EscapeVelocity(per_role=per_role))
        for _ in range(10):
            optimizer.step()
        assert len(etas(optimizer)) == (4 if per_role else 1)


@pytest.mark.parametrize("size", [EscapeVelocity(), EscapeVelocity(beta=0.99, per_role=True)])
def test_escape_velocity_survives_a_resume(tmp_path, size):
    def make(model):
        return create_normopt_optimizer(model, lr=1.0, step_size=size)

    straight, data = llama(), batches(30)
    broken = copy.deepcopy(straight)
    train(straight, make(straight), data)
    first = make(broken)
    train(broken, first, data[:15])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = make(broken)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(broken, second, data[15:])
    for a, b in zip(straight.parameters(), broken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_escape_velocity_with_multipliers_and_stride_keeps_less():
    model = llama()
    size = EscapeVelocity(stride=11)
    optimizer = create_normopt_optimizer(
        model, lr=1.0, preset="prodigy", step_size=size, lr_head=2.0
    )
    train(model, optimizer, batches(3))
    for p in model.parameters():
        assert optimizer.state[p]["anchor"].numel() == -(-p.numel() // 11)


def test_lr_zero_leaves_the_memory_alone():
    loss, _ = quadratic()
    w, optimizer = escape(EscapeVelocity(), lr=0.0)
    loss(w).backward()
    optimizer.step()
    assert etas(optimizer) == [1e-6]
    assert torch.equal(w, torch.ones(50, **torch64))


def test_resuming_with_another_step_size_is_refused():
    model = llama()
    state = create_normopt_optimizer(model, lr=1.0, preset="escape").state_dict()
    with pytest.raises(ValueError, match="EscapeVelocity"):
        create_normopt_optimizer(model, lr=1.0, preset="sign").load_state_dict(state)


def test_step_sizes_by_their_text():
    text = "escape_velocity/variant:undelayed/per_role:true/start:1e-5/stride:3"
    size = EscapeVelocity(1e-5, variant="undelayed", per_role=True, stride=3)
    assert parse_step_size(text) == size
    assert parse_step_size("dual_norm/sharpness:2") == DualNorm(2.0)
    optimizer = create_normopt_optimizer(nn.Linear(2, 2), lr=1.0, step_size=text)
    assert optimizer.step_size == size
    for wrong, message in (
        (
            "escape",
            "Unknown step size 'escape'; expected one of fixed, dual_norm, momo, escape_velocity",
        ),
        ("fixed/start:1", "fixed has no field 'start'"),
        ("dual_norm/sharpness:high", "sharpness takes a float, found 'high'"),
        ("escape_velocity/per_role:perhaps", "per_role takes a bool"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_step_size(wrong)


def test_bad_step_sizes_are_refused():
    with pytest.raises(ValueError, match="variant must be delayed or undelayed, found 'late'"):
        EscapeVelocity(variant="late")
    with pytest.raises(ValueError, match="start must be > 0"):
        EscapeVelocity(start=0)
    with pytest.raises(ValueError, match=r"goes with rule='cosine'.*never grow"):
        EscapeVelocity(anchor="last")
    with pytest.raises(ValueError, match="sharpness must be positive"):
        DualNorm(0.0)
