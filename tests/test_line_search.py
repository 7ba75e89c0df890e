"""The preset `free`: a rate found in the first steps, wherever it starts and whatever comes."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_normopt import LineSearch, create_normopt_optimizer

STEPS = LineSearch().steps


class Adapted(nn.Module):
    """A frozen layer and a product of two factors, the second of which starts at 0."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.head((self.base(x) + self.lora_b(self.lora_a(x))).tanh())


def deep():
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def task(make=deep, seed=0):
    """A model and a function that gives it the gradient of a batch."""
    torch.manual_seed(seed)
    model, goal = make(), deep()
    generator = torch.Generator().manual_seed(seed)

    def backward(parts=1):
        x = torch.randn(64, 16, generator=generator)
        y = (3 * goal(x)).detach()
        model.zero_grad()
        for one, at in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = (model(one) - at).square().mean() / parts
            loss.backward()

    return model, backward


def found(make=deep, seed=0, warmup=0, change=None, parts=1, **options):
    """The η that is found, with a schedule that begins with a warm-up."""
    model, backward = task(make, seed)
    size = LineSearch(**options)
    optimizer = create_normopt_optimizer(model, lr=1.0, preset="free", step_size=size)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, step / warmup) if warmup else 1.0)
    for _ in range(size.steps + 1):
        backward(parts)
        if change is not None:
            change(model)
        optimizer.step()
        schedule.step()
    return float(optimizer.param_groups[0]["memory"]["eta"])


def logs(*etas):
    """How far apart they are, in factors of 2."""
    return max(map(math.log2, etas)) - min(map(math.log2, etas))


def test_it_hardly_matters_where_it_starts():
    """Each batch is noisy, and so is what is found; but a factor of 10,000 ends within one of 4."""
    starts = [found(start=start) for start in (1e-8, 1e-6, 1e-4)]
    assert logs(*starts) < 2
    assert logs(*starts, found(start=1e-3)) < 3


@pytest.mark.parametrize("warmup", [8, 32, 200])
def test_a_warm_up_is_no_second_search(warmup):
    assert logs(found(), found(warmup=warmup)) < 1.5


def test_clipping_hides_nothing():
    clip = lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert logs(found(), found(change=clip)) < 1.5


def test_accumulation_changes_nothing():
    assert found(parts=4) == pytest.approx(found(), rel=0.02)


def test_factors_that_start_at_0_are_no_obstacle():
    """⟨g_A, A_0 - A⟩ is 0 while B is; the network's cosine is not."""
    assert 1e-4 < found(Adapted) < 0.1
    model, backward = task(Adapted)
    optimizer = create_normopt_optimizer(model, lr=1.0, preset="free")
    before = copy.deepcopy(model)
    for _ in range(STEPS + 5):
        backward()
        optimizer.step()
    for name in ("lora_a", "lora_b"):
        moved = getattr(model, name).weight - getattr(before, name).weight
        assert moved.detach().square().mean().sqrt() > 1e-3


def searched(seed=0):
    """A model, its gradients, and an optimizer whose search is over."""
    model, backward = task(seed=seed)
    optimizer = create_normopt_optimizer(model, lr=1.0, preset="free")
    for _ in range(STEPS + 1):
        backward()
        optimizer.step()
    return model, backward, optimizer


def test_no_spike_moves_it_after_the_search():
    model, backward, optimizer = searched()
    before = float(optimizer.param_groups[0]["memory"]["eta"])
    for scale in (1e6, -1e6, 1.0):
        backward()
        for p in model.parameters():
            p.grad *= scale
        optimizer.step()
    assert float(optimizer.param_groups[0]["memory"]["eta"]) == before


def test_all_roles_have_the_one_that_was_found():
    *_, optimizer = searched()
    assert len(optimizer.param_groups) > 2
    assert all(not group["memory"] for group in optimizer.param_groups[1:])


def test_after_the_search_nothing_is_measured_or_kept(monkeypatch):
    _, backward, optimizer = searched()
    assert all("anchor" not in state for state in optimizer.state.values())
    monkeypatch.setattr(LineSearch, "observe", None)
    backward()
    optimizer.step()


@pytest.mark.parametrize("at", [5, STEPS + 3])
def test_it_resumes_bit_for_bit(at, tmp_path):
    def run(cut):
        model, backward = task()
        optimizer = create_normopt_optimizer(model, lr=1.0, preset="free")
        for i in range(STEPS + 6):
            if i == cut:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = create_normopt_optimizer(model, lr=1.0, preset="free")
                saved = torch.load(tmp_path / "state.pt", weights_only=True)
                optimizer.load_state_dict(saved)
            backward()
            optimizer.step()
        return model.state_dict()

    torch.testing.assert_close(run(at), run(None), rtol=0, atol=0)


def test_values_outside_of_their_range_are_refused():
    for options in ({"start": 0.0}, {"steps": 8}, {"reach": 0.0}):
        with pytest.raises(ValueError, match="LineSearch"):
            LineSearch(**options)
