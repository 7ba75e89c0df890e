"""Gradients that are not finite: the same for every preset, and nothing waits for the device."""

import pytest
import torch
from torch import nn

from hf_normopt import PRESETS, DualNorm, create_normopt_optimizer

from .test_optimizer import llama

OPTIONS = [
    *({"preset": preset} for preset in PRESETS),
    {"step_size": DualNorm(1.0)},
    {"momentum_dtype": "8bit", "rounding": "kahan"},
]


def model_and_gradients(dtype):
    torch.manual_seed(0)
    model = llama(vocab_size=1500).to(dtype)  # the embedding moves alone, gains move together
    generator = torch.Generator().manual_seed(3)
    steps = [
        {
            n: torch.randn(p.shape, generator=generator).to(dtype)
            for n, p in model.named_parameters()
        }
        for _ in range(3)
    ]
    return model, steps


def moved(options, replace_inplace):
    model, steps = model_and_gradients(torch.bfloat16 if "rounding" in options else torch.float32)
    optimizer = create_normopt_optimizer(model, **{"lr": 1e-2, "weight_decay": 0.1, **options})
    for step, gradients in enumerate(steps):
        for name, p in model.named_parameters():
            p.grad = gradients[name]
            if step == 1:
                replace_inplace(p.grad)
        optimizer.step()
    return optimizer, {name: p.detach() for name, p in model.named_parameters()}


def spoil_inplace(gradient):
    for start, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        gradient.view(-1)[start::7] = value


def clear_inplace(gradient):
    for start in range(3):
        gradient.view(-1)[start::7] = 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_entries_that_are_not_finite_count_as_zero(options, caplog):
    optimizer, found = moved(options, spoil_inplace)
    _, expected = moved(options, clear_inplace)
    for name, value in found.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, expected[name]), name
    for _ in range(2):
        optimizer.warn_of_gradients()
    assert caplog.text.count("NaN or infinite") == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_gradient_of_nothing_else_is_a_gradient_of_zeros(options):
    _, found = moved(options, lambda gradient: gradient.fill_(torch.nan))
    _, expected = moved(options, lambda gradient: gradient.zero_())
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_rows_of_sparse_gradients_too(caplog):
    def after(value):
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=True)
        optimizer = create_normopt_optimizer(table, lr=0.1, preset="sign", weight_decay=0.0)
        table(torch.tensor([2, 5])).sum().backward()
        table.weight.grad._values()[0, 1] = value
        optimizer.step()
        optimizer.warn_of_gradients()
        return table.weight.detach()

    assert torch.equal(after(torch.nan), after(0.0))
    assert "NaN or infinite" in caplog.text


def test_finite_gradients_are_not_told_of(caplog):
    optimizer, _ = moved({}, lambda gradient: None)
    optimizer.warn_of_gradients()
    assert not caplog.text
