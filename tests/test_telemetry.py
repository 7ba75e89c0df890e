import math
import sys

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_normopt
from hf_normopt import (
    NormOpt,
    NormTelemetry,
    Rule,
    classify,
    create_normopt_optimizer,
    operator_norm,
)
from hf_normopt.cards.plot import series
from hf_normopt.trainer import gauge as gauge_module
from hf_normopt.trainer.gauge import Gauge

from .test_optimizer import gpt2, llama
from .test_trainer import arguments, bert, equal, rows, weights


def trained(folder, callbacks=(), model=None, **changes):
    changes = {"optim": "normopt", "logging_steps": 2, "max_steps": 5, **changes}
    args = arguments(folder, **changes)
    trainer = Trainer(model or bert(), args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def svd_norms(spec, tensor):
    """Size and dual norm of a tensor in its role's own norm, by textbook formulas."""
    sizes, duals = [], []
    for operators in spec.layout.to_operators(tensor.double()):
        fan_out, fan_in = operators.shape[-2:]
        for op in operators.reshape(-1, fan_out, fan_in):
            if spec.role in ("linear", "conv"):
                values, unit = torch.linalg.svdvals(op), math.sqrt(fan_in / fan_out)
                sizes.append(unit * values.max())
                duals.append(values.sum() / unit)
            elif spec.also_head:  # a token's vector, as a row of the head
                lengths = op.norm(dim=0)
                sizes.append(lengths.max() * math.sqrt(fan_out))
                duals.append(lengths.sum() / math.sqrt(fan_out))
            elif spec.role in ("embedding", "bias"):
                lengths = op.norm(dim=0)
                sizes.append(lengths.max() / math.sqrt(fan_out))
                duals.append(lengths.sum() * math.sqrt(fan_out))
            elif spec.role == "head":
                lengths = op.norm(dim=1)
                sizes.append(lengths.max() * math.sqrt(fan_in))
                duals.append(lengths.sum() / math.sqrt(fan_in))
            else:
                sizes.append(op.abs().max())
                duals.append(op.abs().sum())
    taps = spec.layout.taps
    return taps * max(sizes).item(), sum(duals).item() / taps


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_quantities_are_those_of_textbook_formulas(make):
    model = make()
    options = {"preset": "modular", "lr_head": 2.0, "norm_linear": "rms->rms(svd)"}
    optimizer = create_normopt_optimizer(model, lr=0.01, **options)
    gauge = Gauge()
    optimizer.observer = gauge.observe
    before, gradients = weights(model), {}
    for name, p in model.named_parameters():
        p.grad = gradients[name] = torch.randn_like(p)
    optimizer.step()
    found = gauge.read(optimizer)
    specs = classify(model)
    labels = {spec.name: "embedding/tied" if spec.also_head else spec.role for spec in specs}
    for role in set(labels.values()):
        members = [spec for spec in specs if labels[spec.name] == role]
        sizes = [svd_norms(spec, before[spec.name])[0] for spec in members]
        duals = [svd_norms(spec, gradients[spec.name])[1] for spec in members]
        now = dict(model.named_parameters())
        moves = [svd_norms(s, now[s.name].detach() - before[s.name])[0] for s in members]
        assert found[f"weight_norm/{role}"] == pytest.approx(max(sizes), rel=1e-4)
        assert found[f"dual_norm/{role}"] == pytest.approx(sum(duals), rel=1e-4)
        rate = 0.02 if role == "head" else 0.01
        assert max(moves) == pytest.approx(rate, rel=1e-2)  # differences of float32
        if max(sizes):
            assert found[f"relative_update/{role}"] == pytest.approx(rate / max(sizes), rel=1e-4)
        assert found[f"certificate/{role}"] == pytest.approx(1, abs=1e-5)
        assert found[f"lr/{role}"] == pytest.approx(rate)
    assert found["step_size"] == pytest.approx(0.01)


def watched(preset, steps=3, **options):
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=0.01, preset=preset, **options)
    gauge, before = Gauge(), None
    optimizer.observer = gauge.observe
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        found = gauge.read(optimizer)
    return model, before, found


@pytest.mark.parametrize(
    ("preset", "options", "low", "high"),
    [
        ("muon", {}, 0.6, 0.992),
        ("normopt", {"norm_linear": "rms->rms(svd)"}, 1 - 1e-5, 1 + 1e-5),
        ("normopt", {}, 1 - 7e-3, 1 + 7e-3),  # ‖D‖ is taken as 1, which it is to 0.7 %
        ("shampoo", {}, 0.7, 0.992),
    ],
)
def test_the_certificate_tells_an_exact_lmo_from_an_approximation(preset, options, low, high):
    """⟨M, D⟩ ≤ ‖D‖ ‖M‖†, with equality for the LMO."""
    _, _, found = watched(preset, **options)
    assert low <= found["certificate/linear"] <= high


def test_an_approximate_direction_is_measured_not_assumed():
    model, before, found = watched("muon")
    specs = {spec.name: spec for spec in classify(model) if spec.role == "linear"}
    now = dict(model.named_parameters())
    sizes = [torch.linalg.matrix_norm(before[n], 2).item() for n in specs]
    moves = [torch.linalg.matrix_norm(now[n].detach() - before[n], 2).item() for n in specs]
    assert found["relative_update/linear"] == pytest.approx(max(moves) / max(sizes), rel=1e-3)
    assert max(moves) != pytest.approx(0.01 * math.sqrt(48 / 32), rel=1e-3)


def test_large_models_are_measured_in_turn(monkeypatch):
    """Within some percent of the whole measurement, and each matrix anew within a period."""
    calls = []
    singular = gauge_module.singular
    monkeypatch.setattr(gauge_module, "LARGE", 0)
    monkeypatch.setattr(gauge_module, "PERIOD", 4)
    monkeypatch.setattr(gauge_module, "singular", lambda x: calls.append(x.shape) or singular(x))
    model, twin = llama(), llama()
    twin.load_state_dict(model.state_dict())
    pairs = []
    for made in (model, twin):
        optimizer = create_normopt_optimizer(made, lr=0.01)
        pairs.append((made, optimizer, Gauge()))
        optimizer.observer = pairs[-1][2].observe
    counts = []
    for step in range(9):
        found = []
        for in_turn, (made, optimizer, gauge) in enumerate(pairs):
            torch.manual_seed(step)
            for p in made.parameters():
                p.grad = torch.randn_like(p)
            gauge_module.LARGE = 0 if in_turn else math.inf
            calls.clear()
            optimizer.step()
            found.append(gauge.read(optimizer))
        counts.append(len(calls))
        whole, turns = found
        assert whole.keys() == turns.keys()
        for key in whole:
            assert turns[key] == pytest.approx(whole[key], rel=0.1), key
    assert counts[0] == 2 * 14 + 1  # 14 matrices, their gradients, and the certificate
    assert sum(counts[1:5]) == 4 + 2 * 14


def test_norms_reach_the_log_and_later_reporters(tmp_path):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    history = trained(tmp_path, [Reporter]).state.log_history
    keys = {"weight_norm/linear", "relative_update/head", "dual_norm/embedding", "lr/bias"}
    keys |= {"certificate/norm", "step_size"}
    for rows_ in (history, seen):
        assert [keys <= row.keys() for row in rows_] == [True, True, True]  # 2, 4, and the last
    assert [row["step"] for row in history] == [2, 4, 5]
    assert history[0]["lr/linear"] == history[0]["learning_rate"]
    assert not any("cos_theta" in row for row in history)


def test_escape_velocity_logs_its_angle(tmp_path, pictures):
    per_role = {"learning_rate": 1.0, "optim_args": "step_size=escape_velocity/per_role:true"}
    row = trained(tmp_path, **per_role).state.log_history[1]
    assert -1 <= row["cos_theta/linear"] <= 1
    assert row["cos_theta/linear"] != row["cos_theta/head"]
    assert row["step_size/linear"] >= 1e-6 * row["learning_rate"]
    assert "step_size" not in row
    assert (tmp_path / "normopt_norms.png").stat().st_size > 10_000


def test_watching_changes_nothing(tmp_path):
    runs = [trained(tmp_path, optim_args=text) for text in ("", "telemetry=false")]
    assert equal(*(weights(run.model) for run in runs))
    assert not any("weight_norm" in key for row in runs[1].state.log_history for key in row)


def test_other_optimizers_are_not_watched(tmp_path):
    history = trained(tmp_path, optim="adamw_torch").state.log_history
    assert not any("/" in key for row in history for key in row)


def test_a_second_callback_logs_once(tmp_path, caplog):
    history = trained(tmp_path, [NormTelemetry()]).state.log_history
    assert all("weight_norm/linear" in row for row in history)


@pytest.mark.parametrize(
    ("options", "logged"),
    [
        ({"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1}, [12, 24, 24]),
        ({"logging_strategy": "no"}, [5]),
        ({"logging_first_step": True, "logging_steps": 3}, [1, 3, 5]),
    ],
)
def test_steps_that_are_logged_are_watched(options, logged, tmp_path):
    history = trained(tmp_path, **options).state.log_history
    assert [row["step"] for row in history] == logged
    assert all("weight_norm/linear" in row for row in history[: 2 if len(logged) > 2 else 1])


def test_bf16_weights_and_lora_are_watched(tmp_path):
    history = trained(tmp_path, model=bert().bfloat16()).state.log_history
    assert history[0]["certificate/linear"] == pytest.approx(1, abs=7e-3)  # see gauge.py


def test_an_epoch_that_ends_early_is_watched_at_its_own_step(tmp_path):
    options = {"logging_strategy": "epoch", "num_train_epochs": 1.5, "max_steps": -1}
    first, *_ = trained(tmp_path, **options).state.log_history
    assert first["step"] == 12
    assert first["lr/linear"] == first["learning_rate"]


class Drops(torch.nn.Module):
    """A layer that is left out in every other step."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, hidden, *args, **kwargs):
        self.calls += 1
        return hidden if self.calls % 2 else self.layer(hidden, *args, **kwargs)


def test_layers_without_gradients_do_not_end_the_run(tmp_path):
    model = bert()
    model.bert.encoder.layer[1] = Drops(model.bert.encoder.layer[1])
    history = trained(tmp_path, model=model, logging_steps=1).state.log_history
    assert all("dual_norm/linear" in row for row in history[:-1])  # the last: train_loss


def test_a_watched_step_that_is_not_logged_is_forgotten(tmp_path):
    class Suppress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = control.should_log and state.global_step > 3

    quiet = trained(tmp_path, [Suppress], logging_steps=1).state.log_history
    whole = trained(tmp_path, logging_steps=1).state.log_history
    assert [row["step"] for row in quiet] == [4, 5, 5]
    assert quiet[0]["dual_norm/linear"] == whole[3]["dual_norm/linear"]


def test_logs_of_other_kinds_are_completed(tmp_path):
    class Renaming(Trainer):
        def log(self, logs, start_time=None):
            logs = {f"mine/{key}": value for key, value in logs.items()}
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
            seen.append(logs)

    seen = []
    args = arguments(tmp_path, optim="normopt", logging_steps=2, max_steps=2)
    Renaming(bert(), args, train_dataset=rows()).train()
    assert "weight_norm/linear" in seen[0]


def test_two_groups_of_one_role_have_their_own_names():
    model = bert()
    parts = [
        {"params": [(n, p)], "role": "linear"}
        for n, p in model.named_parameters()
        if n.endswith(("query.weight", "key.weight"))
    ]
    optimizer = NormOpt(parts[:3], {"linear": Rule(operator_norm("rms", "rms"))}, lr=0.1)
    optimizer.param_groups[1]["lr"] = 0.2
    gauge = Gauge()
    optimizer.observer = gauge.observe
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    found = gauge.read(optimizer)
    assert [found[f"lr/{name}"] for name in ("linear", "linear/2", "linear/3")] == [0.1, 0.2, 0.1]


def test_the_run_is_drawn(tmp_path, pictures):
    trainer = trained(tmp_path)
    picture = (tmp_path / "normopt_norms.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    lines = series(trainer.state.log_history, ("dual_norm",))
    assert set(lines) == {"linear", "embedding", "head", "norm", "bias"}
    steps, values = lines["head"]
    assert steps == [2, 4, 5]
    assert values == [row["dual_norm/head"] for row in trainer.state.log_history]


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trained(tmp_path)
    assert not (tmp_path / "normopt_norms.png").exists()


def test_every_trainer_has_the_callback_once(tmp_path):
    hf_normopt.register()
    trainer = Trainer(bert(), arguments(tmp_path), train_dataset=rows())
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("NormTelemetry") == names.count("NormOptCallback") == 1
    trainer.remove_callback(NormTelemetry)
