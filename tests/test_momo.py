"""Momo's cap on the step, under any norms: against a slow reference, and on a quadratic."""

import pytest
import torch
from torch import nn

from hf_normopt import Momo, NormOpt, Rule, create_normopt_optimizer, operator_norm
from hf_normopt.optim.step_sizes import format_step_size, parse_step_size

NORMS = {
    "linear": operator_norm("rms", "rms"),
    "embedding": operator_norm("l1", "rms"),
    "head": operator_norm("rms", "linf"),
}


def policy(momentum, nesterov=False):
    made = {role: Rule(norm, momentum=momentum, nesterov=nesterov) for role, norm in NORMS.items()}
    made["head"] = Rule(NORMS["head"], momentum=momentum, nesterov=nesterov, multiplier=2.0)
    return made


def optimizer_of(weights, lr, momentum, nesterov=False, **options):
    groups = [
        {"params": [(role, p)], "role": role, "layouts": ["out in"]}
        for role, p in zip(NORMS, weights, strict=True)
    ]
    groups[1]["lr"] = lr / 3  # as a schedule of its own would have it
    rules = policy(momentum, nesterov)
    return NormOpt(groups, rules, lr=lr, step_size=Momo(**options))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_it_equals_the_slow_form_that_keeps_all_linearizations(momentum, nesterov):
    """The model is a weighted mean of lines f_i + ⟨g_i, w - w_i⟩; the step ends at F*."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    weights = [nn.Parameter(draw(3, 4)), nn.Parameter(draw(5, 3)), nn.Parameter(draw(4, 3))]
    lr, least = 0.3, -0.5
    optimizer = optimizer_of(weights, lr, momentum, nesterov, least=least)
    lines, etas = [], []
    for _ in range(12):
        before = [w.detach().clone() for w in weights]
        grads = [draw(*w.shape) / 4 for w in weights]
        loss = float(draw(1).abs())
        lines.append((loss, grads, before))
        share = [(1 - momentum) * momentum ** (len(lines) - 1 - i) for i in range(len(lines))]
        if nesterov:
            share = [momentum * one for one in share]
            share[-1] += 1 - momentum
        mean = [
            sum(s * gs[k] for s, (_, gs, _) in zip(share, lines, strict=True)) for k in range(3)
        ]
        model = sum(
            s * (f + sum(((w - v) * g).sum() for w, v, g in zip(before, at, gs, strict=True)))
            for s, (f, gs, at) in zip(share, lines, strict=True)
        )
        rates = [lr, lr / 3, 2 * lr]
        steps = [
            rate * NORMS[role].lmo(m) for rate, role, m in zip(rates, NORMS, mean, strict=True)
        ]
        fall = sum((step * m).sum() for step, m in zip(steps, mean, strict=True))
        eta = min(1.0, max(0.0, float((model - sum(share) * least) / fall)))
        etas.append(eta)
        for w, g in zip(weights, grads, strict=True):
            w.grad = g
        optimizer.note_loss(loss)
        optimizer.step()
        for w, was, step in zip(weights, before, steps, strict=True):
            torch.testing.assert_close(w.detach(), was - eta * step, rtol=1e-4, atol=1e-5)
    assert any(0 < eta < 1 for eta in etas)


def quadratic(lr, step_size, steps=60):
    """The loss at the end, and the largest on the way, of ½ ‖W - W*‖² with least loss 0."""
    torch.manual_seed(0)
    model = nn.Linear(6, 6, bias=False)
    goal = torch.randn(6, 6)
    optimizer = create_normopt_optimizer(
        model, lr=lr, step_size=step_size, momentum=0.0, nesterov=False
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = ((model.weight - goal) ** 2).sum() / 2
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return losses[-1], max(losses)


def test_it_stands_rates_that_are_far_too_large():
    """On a convex loss, the step to F* of the tangent halves the way or less: no loss rises."""
    for lr in (0.3, 3.0, 30.0):
        end, most = quadratic(lr, "momo")
        start = quadratic(lr, "momo", 1)[0]
        assert end < 1e-3 * start
        assert most == pytest.approx(start)
        assert quadratic(lr, "fixed")[0] > 100 * end


def test_it_changes_nothing_where_the_rate_is_small():
    torch.manual_seed(0)
    ends = [quadratic(0.003, size, 20)[0] for size in ("momo", "fixed")]
    assert ends[0] == ends[1]


def test_a_loss_that_is_not_finite_counts_as_the_last_one():
    layer = nn.Parameter(torch.randn(3, 4))
    rules = {"linear": Rule(NORMS["linear"], momentum=0.9)}
    optimizer = NormOpt([{"params": [layer], "role": "linear"}], rules, lr=0.1, step_size=Momo())
    for loss in (1.0, float("nan"), 1.0):
        layer.grad = torch.ones(3, 4)
        optimizer.note_loss(loss)
        optimizer.step()
    assert layer.isfinite().all()
    assert all(
        float(value) == float(value) for value in optimizer.param_groups[0]["memory"].values()
    )


def test_without_the_loss_it_says_what_to_do():
    layer = nn.Linear(3, 3)
    optimizer = create_normopt_optimizer(layer, lr=0.1, step_size="momo")
    layer(torch.ones(3)).sum().backward()
    with pytest.raises(RuntimeError, match="needs the loss: train with a Trainer"):
        optimizer.step()


def test_roles_of_different_momenta_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"one momentum for all roles, found 0.9, 0.95 \(nest"):
        create_normopt_optimizer(model, lr=0.1, preset="muon", step_size="momo")


def test_its_text():
    assert parse_step_size("momo/least:0.5") == Momo(least=0.5)
    assert format_step_size(Momo(least=0.5)) == "momo/least:0.5"
