"""A loss that jumps: seen, met as the user chose, told."""

import json
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_normopt import create_normopt_optimizer, update_model_card
from hf_normopt.optim.guard import Guard, parse_guard

USUAL = [2.0, 2.2, 1.9, 2.1, 2.05, 2.2, 1.95, 2.0, 2.1]


def fed(guard, losses, memory=None):
    memory = {} if memory is None else memory
    return [guard.admits_inplace(memory, loss, i + 1) for i, loss in enumerate(losses)], memory


def test_a_jump_is_a_loss_above_a_multiple_of_the_running_range():
    passed, memory = fed(Guard("skip"), [*USUAL, 2.79, 2.0])
    assert all(passed)  # 1.9 + 3 · 0.3 is the limit
    passed, memory = fed(Guard("skip"), [*USUAL, 2.81, 2.0])
    assert passed == [True] * 9 + [False, True]
    assert memory["events"] == ["step 10: loss 2.81, above 2.8: not made"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("before", [[], USUAL])
def test_a_loss_that_is_not_finite_is_a_jump_at_any_time(loss, before):
    passed, memory = fed(Guard("skip"), [*before, loss])
    assert not passed[-1]
    assert all(map(math.isfinite, memory["losses"]))


def test_it_never_triggers_where_losses_are_only_noisy():
    generator = torch.Generator().manual_seed(0)
    level = torch.exp(-torch.arange(3000) / 500) * 3 + 1
    losses = level + 0.3 * torch.randn(3000, generator=generator)
    _, memory = fed(Guard("skip"), losses.tolist())
    assert "events" not in memory


def test_a_new_level_is_soon_taken_for_usual():
    passed, _ = fed(Guard("skip"), [*USUAL, *[20.0] * 12])
    assert passed[9:].index(True) < 8
    assert all(passed[9 + passed[9:].index(True) :])


def test_halving_begins_the_range_anew_so_that_one_jump_halves_once():
    _, memory = fed(Guard("halve"), [*USUAL, *[20.0] * 8])
    assert memory["factor"] == 0.5


def test_its_text():
    assert parse_guard("skip/multiple:5") == Guard("skip", 5)
    assert str(Guard("skip", 5)) == "skip/multiple:5"
    for text in ("ignore", "skip/window:3", "skip/multiple:x", "skip/multiple:1"):
        with pytest.raises(ValueError, match="on_spike"):
            parse_guard(text)


# --- in the optimizer ---


def steps(on_spike, losses, optimizer=None, layer=None):
    """Train on a constant gradient; the weights after each step."""
    layer = layer or nn.Linear(3, 3)
    optimizer = optimizer or create_normopt_optimizer(layer, lr=0.1, on_spike=on_spike)
    seen = []
    for loss in losses:
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimizer.note_loss(loss)
        optimizer.step()
        seen.append(layer.weight.detach().clone())
    return seen, optimizer, layer


def test_skip_leaves_weights_and_momenta():
    seen, optimizer, layer = steps("skip", USUAL)
    momenta = optimizer.state[layer.weight]["momentum_buffer"].clone()
    after, *_ = steps("", [50.0], optimizer, layer)
    assert torch.equal(after[0], seen[-1])
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], momenta)
    assert optimizer.steps == 10
    assert len(optimizer.spikes) == 1


def test_halve_goes_half_as_far_from_then_on():
    seen, optimizer, layer = steps("halve", USUAL)
    after, *_ = steps("", [50.0, 2.0], optimizer, layer)
    whole, first, second = (
        torch.linalg.vector_norm(b - a)
        for a, b in zip([*seen[-2:], *after[:1]], [seen[-1], *after], strict=True)
    )
    torch.testing.assert_close(torch.stack([first, second]), whole.expand(2) / 2, rtol=1e-3, atol=0)


def test_warn_only_tells(caplog):
    seen, optimizer, _ = steps("warn", [*USUAL, 50.0])
    assert not torch.equal(seen[-1], seen[-2])
    assert "The loss jumped at step 10: loss 50, above 2.8" in caplog.text
    assert "factor" not in optimizer.param_groups[0]["guard"]


def test_it_is_off_unless_asked_for():
    optimizer = steps(None, [1.0])[1]
    assert not optimizer.needs_loss
    assert optimizer.param_groups[0]["guard"] == {}


def test_it_resumes(tmp_path):
    _, optimizer, layer = steps("halve", [*USUAL, math.nan, 2.0])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = create_normopt_optimizer(layer, lr=0.1, on_spike="halve")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.param_groups[0]["guard"] == optimizer.param_groups[0]["guard"]
    assert again.param_groups[0]["guard"]["factor"] == 0.5
    assert again.spikes == optimizer.spikes


# --- under Trainer ---


class Spiking(Trainer):
    """Its loss is 100 times as large in one step."""

    at = 12

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * (100 if self.state.global_step == self.at else 1)


def trained(folder, accumulation=1, **options):
    size = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
    rows = [(torch.arange(8) + i).remainder(16) for i in range(32)]
    args = TrainingArguments(
        str(folder),
        max_steps=16,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **{"optim": "normopt", **options},
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Spiking(model, args, train_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_tells_the_loss_and_the_card_the_jump(accumulation, tmp_path):
    trainer = trained(tmp_path, accumulation, optim_args="on_spike=skip,telemetry=false")
    (event,) = trainer.optimizer.optimizer.spikes
    assert event.startswith("step 13: loss 2")
    told = float(event.split()[3].rstrip(","))
    logged = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    assert told == pytest.approx(logged[13], rel=1e-3)  # of the whole step, over micro-batches
    counts = [row["loss_spikes"] for row in trainer.state.log_history if "loss_spikes" in row]
    assert counts == [0] * 12 + [1] * 4
    assert json.loads((tmp_path / "normopt.json").read_text())["spikes"] == [event]
    assert f"- jumps of the loss: {event}" in update_model_card(tmp_path).read_text()


def test_momo_gets_its_loss_from_the_trainer(tmp_path):
    options = "step_size=momo,telemetry=false"
    trainer = trained(tmp_path, 2, optim_args=options, max_grad_norm=0.0)
    memory = trainer.optimizer.optimizer.param_groups[0]["memory"]
    assert {*memory} == {"last", "mean", "weight"}
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert float(memory["last"]) == pytest.approx(logged[-1], rel=1e-3)
