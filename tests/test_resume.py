"""Interrupted training goes on as if it had not been interrupted, or says why it cannot."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_normopt import create_normopt_optimizer

from .test_trainer import arguments, bert, equal, inner, rows, weights

SAVING = {"optim": "normopt", "save_strategy": "steps", "save_steps": 3, "seed": 1}


def trained(folder, model=None, resume=None, **changes):
    args = arguments(folder, **{**SAVING, **changes})
    trainer = Trainer(model or bert(), args, train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of step 3 of 6, with the model that the whole run gave."""
    model = trained(tmp_path).model
    shutil.rmtree(tmp_path / "checkpoint-6")
    return tmp_path / "checkpoint-3", model


def tampered(folder, change):
    """Change a checkpoint's optimizer state."""
    path = folder / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def state_dtypes(trainer):
    states = inner(trainer).state.values()
    return {value.dtype for state in states for value in state.values()}


@pytest.mark.parametrize("optim", ["normopt", "normopt_muon", "normopt_shampoo", "normopt_prodigy"])
def test_bf16_weights_resume_bit_for_bit(optim, tmp_path):
    straight = trained(tmp_path, bert().bfloat16(), optim=optim)
    resumed = trained(tmp_path, bert().bfloat16(), tmp_path / "checkpoint-3", optim=optim)
    assert equal(weights(straight.model), weights(resumed.model))
    assert state_dtypes(resumed) == {torch.float32, torch.int16}  # momenta, compensations


@pytest.mark.parametrize(
    "options",
    [
        "preset=modular,step_size=escape_velocity/beta:0.9",
        "preset=modular,step_size=escape_velocity/per_role:true/variant:undelayed",
        "step_size=dual_norm,momentum=0.5",
        "schedule_head=wsd/decay:0.5,lr_head=2.0",
    ],
)
def test_step_sizes_and_schedules_resume_bit_for_bit(options, tmp_path):
    options = {"optim_args": options, "learning_rate": 0.1, "max_grad_norm": 0.0}
    straight = trained(tmp_path, **options)
    resumed = trained(tmp_path, resume=tmp_path / "checkpoint-3", **options)
    assert equal(weights(straight.model), weights(resumed.model))


def test_groups_and_names_of_another_order_are_remapped(checkpoint, tmp_path):
    """Regrouped, reordered, and renamed as `module.` and `_orig_mod.` rename, on disk."""
    folder, whole = checkpoint

    def change(state):
        groups = state["param_groups"][::-1]
        prefixes = ["module.", "_orig_mod.", "", "", ""]
        for group, prefix in zip(groups, prefixes, strict=True):
            for key in ("params", "param_names", "param_shapes", "layouts"):
                group[key] = group[key][::-1]
            group["param_names"] = [prefix + name for name in group["param_names"]]
        state["param_groups"] = groups

    tampered(folder, change)
    assert equal(weights(trained(tmp_path, resume=folder).model), weights(whole))


def test_a_second_train_goes_on_with_the_state(tmp_path):
    trainer = trained(tmp_path, save_strategy="no", max_steps=2)
    optimizer = inner(trainer)
    trainer.train()
    assert inner(trainer) is optimizer
    assert optimizer.steps == trainer.state.global_step == 2


MISMATCHES = {
    "another preset": ({"optim": "normopt_muon"}, r"trained under the rule \[.*go on under \["),
    "another norm": ({"optim_args": "norm_head=l1->linf"}, r"rms->linf.*go on under \[l1->linf"),
    "another momentum": ({"optim_args": "momentum=0.5"}, "momentum 0.9 nesterov"),
    "another role": ({"optim_args": "roles=head:pooler"}, r"\(linear\) and would go on.*\(head\)"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_other_rules_are_refused_or_reset(case, checkpoint, tmp_path, caplog):
    folder, _ = checkpoint
    changes, message = MISMATCHES[case]
    with pytest.raises(ValueError, match=message) as error:
        trained(tmp_path, resume=folder, **changes)
    assert 'on_mismatch="reset"' in str(error.value)
    options = ",".join(filter(None, [changes.get("optim_args"), "on_mismatch=reset"]))
    resumed = trained(tmp_path, resume=folder, **{**changes, "optim_args": options})
    assert resumed.state.global_step == inner(resumed).steps == 6
    assert any("starts without state" in r.getMessage() for r in caplog.records)


def test_reset_keeps_what_fits(checkpoint, tmp_path):
    folder, _ = checkpoint
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    optimizer = create_normopt_optimizer(
        bert(), lr=1e-3, momentum_head=0.5, on_mismatch="reset", weight_decay=0.0
    )
    optimizer.load_state_dict(saved)
    numbers = {n: i for g in saved["param_groups"] for n, i in named(g)}
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            kept = optimizer.state[p].get("momentum_buffer")
            if group["role"] == "head":
                assert kept is None
            else:
                assert torch.equal(kept, saved["state"][numbers[name]]["momentum_buffer"])


def named(group):
    return zip(group["param_names"], group["params"], strict=True)


def test_missing_extra_and_reshaped_parameters_are_listed(checkpoint, tmp_path):
    folder, _ = checkpoint
    model = bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    missing = "Only in the checkpoint: bert.encoder.layer.1.* and 11 more. Only in the model: none"
    with pytest.raises(ValueError, match=missing):
        trained(tmp_path, model, folder)

    def change(state):
        state["param_groups"][0]["param_names"][0] = "other"
        state["param_groups"][0]["param_shapes"][1] = (7, 7)

    tampered(folder, change)
    both = "Only in the checkpoint: other. Only in the model: bert.encoder.layer.0.attention"
    with pytest.raises(ValueError, match=both):
        trained(tmp_path, resume=folder)
    tampered(folder, lambda state: rename(state, "other", name_of(bert(), 0)))
    with pytest.raises(
        ValueError, match=r"has the shape \(7, 7\) in the checkpoint and \(32, 32\)"
    ):
        trained(tmp_path, resume=folder)


def name_of(model, i):
    return create_normopt_optimizer(model, lr=0.1).param_groups[0]["param_names"][i]


def rename(state, old, new):
    for group in state["param_groups"]:
        group["param_names"] = [new if name == old else name for name in group["param_names"]]


@pytest.mark.parametrize("unfrozen_first", [True, False])
def test_freezing_and_unfreezing_between_runs(unfrozen_first, tmp_path):
    """The number of groups changes, and with it the scheduler's."""

    def model(frozen):
        made = bert()
        made.bert.requires_grad_(not frozen)
        return made

    trained(tmp_path, model(frozen=not unfrozen_first))
    other = {"model": model(frozen=unfrozen_first), "resume": tmp_path / "checkpoint-3"}
    with pytest.raises(ValueError, match="its parameters are not this model's"):
        trained(tmp_path, **other)
    resumed = trained(tmp_path, **other, optim_args="on_mismatch=reset")
    head = next(g for g in inner(resumed).param_groups if g["role"] == "head")
    assert (resumed.state.global_step, inner(resumed).steps, head["lr"]) == (6, 6, 0)


def test_an_adamw_checkpoint_is_refused_or_reset(tmp_path, caplog):
    trained(tmp_path, optim="adamw_torch")
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match=r"it was not written by NormOpt. Its groups have .*betas"):
        trained(tmp_path, resume=folder)
    resumed = trained(tmp_path, resume=folder, optim_args="on_mismatch=reset")
    assert inner(resumed).steps == 6
    # steps 3, 4, 5 of 6 under "linear"
    assert [g["initial_lr"] for g in inner(resumed).param_groups] == [1e-3] * 5
    messages = [r.getMessage() for r in caplog.records]
    assert any("was not written by NormOpt" in m for m in messages)
    assert inner(resumed).resets[0].startswith("at step 3: it was not written by NormOpt")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("optimizer.pt", "goes on at step 3, but the optimizer has no state: optimizer.pt or"),
        ("scheduler.pt", "goes on at step 3, but the optimizer has no state: optimizer.pt or"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_or_reset(lost, message, checkpoint, tmp_path):
    folder, _ = checkpoint
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, resume=folder)
    resumed = trained(tmp_path, resume=folder, optim_args="on_mismatch=reset")
    assert resumed.state.global_step == inner(resumed).steps == 6


def test_files_of_two_checkpoints_are_refused(tmp_path):
    trained(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt"):
        shutil.copy(tmp_path / "checkpoint-6" / name, tmp_path / "checkpoint-3" / name)
    with pytest.raises(
        ValueError, match="at step 3, but the optimizer has made 6 steps and the scheduler 6"
    ):
        trained(tmp_path, resume=tmp_path / "checkpoint-3")


def test_a_scheduler_of_another_checkpoint_is_refused_or_reset(tmp_path):
    straight = trained(tmp_path)
    whole = tmp_path / "checkpoint-3" / "scheduler.pt"
    kept = whole.read_bytes()
    shutil.copy(tmp_path / "checkpoint-6" / "scheduler.pt", whole)
    with pytest.raises(ValueError, match="has made 3 steps and the scheduler 6"):
        trained(tmp_path, resume=tmp_path / "checkpoint-3")
    reset = {"resume": tmp_path / "checkpoint-3", "optim_args": "on_mismatch=reset"}
    assert equal(weights(trained(tmp_path, **reset).model), weights(straight.model))
    assert kept != whole.read_bytes()


TAMPERED = {
    "a state is lost": lambda state: state["state"].pop(0),
    "all states are lost": lambda state: state["state"].clear(),
    "a buffer is lost": lambda state: state["state"][0].pop("momentum_buffer"),
    "a buffer has another shape": lambda state: state["state"][0].update(
        momentum_buffer=torch.zeros(3, 3)
    ),
    "a buffer has another type": lambda state: state["state"][0].update(
        momentum_buffer=state["state"][0]["momentum_buffer"].long()
    ),
    "zeros": lambda state: state["state"][0]["momentum_buffer"].zero_(),
    "NaN": lambda state: state["state"][0]["momentum_buffer"].fill_(torch.nan),
    "one entry": lambda state: state["state"][0]["momentum_buffer"][2, 3].neg_(),
    "two rows have changed places": lambda state: state["state"][0].update(
        momentum_buffer=state["state"][0]["momentum_buffer"].roll(1, 0)
    ),
    "two states have changed places": lambda state: state["state"].update(
        {0: state["state"][1], 1: state["state"][0]}
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_state_that_is_not_what_was_saved_is_refused_or_reset(case, checkpoint, tmp_path):
    folder, _ = checkpoint
    tampered(folder, TAMPERED[case])
    with pytest.raises(ValueError, match=r"is not what was saved.*self.query.weight has \["):
        trained(tmp_path, resume=folder)
    resumed = trained(tmp_path, resume=folder, optim_args="on_mismatch=reset")
    assert "is not what was saved" in inner(resumed).resets[0]


KEPT = {
    "float32": {},
    "statistics": {"preset": "adam"},
    "bfloat16": {"momentum_dtype": "bfloat16", "rounding": "kahan"},
    "8bit": {"momentum_dtype": "8bit", "rounding": "kahan"},
    "sums": {"lr": 1.0, "preset": "prodigy"},
}


@pytest.mark.parametrize("kind", KEPT)
def test_every_kind_of_state_has_a_checksum(kind, tmp_path):
    def made():
        model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Linear(80, 64))
        model = model.bfloat16() if "rounding" in KEPT[kind] else model
        return model, create_normopt_optimizer(model, **{"lr": 1e-2, **KEPT[kind]})

    model, optimizer = made()
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    read = lambda: torch.load(tmp_path / "optimizer.pt", weights_only=True)
    made()[1].load_state_dict(read())
    keys = {key for state in read()["state"].values() for key in state}
    for key in keys:
        state = read()
        value = next(its[key] for its in state["state"].values() if key in its)
        value.view(-1).view(torch.uint8)[0] ^= 1
        with pytest.raises(ValueError, match="is not what was saved"):
            made()[1].load_state_dict(state)


def test_reset_carries_the_step_size_over_whatever_was_frozen(caplog):
    """Its memory is in the first group, which may be another one after a freeze."""

    def made(first):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6))
        model[0].requires_grad_(first)
        return model, create_normopt_optimizer(
            model, lr=1.0, preset="prodigy", weight_decay=0.0, on_mismatch="reset"
        )

    model, optimizer = made(True)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.ones(3, 6)) - 1).square().sum().backward()
        optimizer.step()
    eta = optimizer.param_groups[0]["memory"]["eta"]
    assert eta > 2e-6
    for first in (True, False):
        other, resumed = made(first)
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.param_groups[0]["memory"]["eta"] == eta
        assert ("eta" in caplog.text) == (not first)
        (other(torch.ones(3, 6)) - 1).square().sum().backward()
        resumed.step()
        assert resumed.param_groups[0]["memory"]["eta"] >= eta


def test_a_multiplier_in_the_checkpoint_has_no_effect(checkpoint, tmp_path):
    folder, whole = checkpoint
    tampered(folder, lambda state: state["param_groups"][1].update(multiplier=7.0))
    assert equal(weights(trained(tmp_path, resume=folder).model), weights(whole))


def test_rates_in_the_checkpoint_are_told(checkpoint, tmp_path, caplog):
    folder, _ = checkpoint
    tampered(folder, lambda state: state["param_groups"][2].update(initial_lr=0.5))
    trained(tmp_path, resume=folder, weight_decay=0.1)
    messages = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert messages[0].startswith("learning_rate=0.001 has no effect: the checkpoint's 0.5 goes on")
    assert "for head, as with every" in messages[0]
    assert "weight_decay=0.1 has no effect: the checkpoint's 0 goes on for linear" in messages[1]


def test_steps_without_gradients_count_during_the_warm_up(tmp_path):
    """With rate 0 and no gradient they look like torch's rehearsal of a step."""

    class Silent(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0

    args = arguments(tmp_path, **{**SAVING, "save_steps": 2}, warmup_steps=5)
    Silent(bert(), args, train_dataset=rows()).train()
    resumed = Silent(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert inner(resumed).steps == 6


def test_save_only_model_gives_no_checkpoint_to_resume_from(tmp_path):
    trained(tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match=r"save_only_model=True writes none"):
        trained(tmp_path, resume=tmp_path / "checkpoint-3")


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    args = arguments(tmp_path, **{**SAVING, **best})
    trainer = Trainer(bert(), args, train_dataset=rows(), eval_dataset=rows(8))
    trainer.train()
    folder = Path(trainer.state.best_model_checkpoint)
    loaded = type(trainer.model).from_pretrained(folder)
    assert equal(weights(trainer.model), weights(loaded))
    again = Trainer(bert(), args, train_dataset=rows(), eval_dataset=rows(8))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(weights(trainer.model), weights(again.model))


def test_lora_resumes_bit_for_bit(tmp_path):
    def model():
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
        base = bert()
        torch.manual_seed(2)
        return get_peft_model(base, config)

    straight = trained(tmp_path, model())
    resumed = trained(tmp_path, model(), tmp_path / "checkpoint-3")
    assert equal(weights(straight.model), weights(resumed.model))


def test_the_role_table_lies_beside_the_checkpoint(checkpoint):
    folder, _ = checkpoint
    content = json.loads((folder / "normopt.json").read_text())
    saved = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"]
    names = {n: g["role"] for g in saved for n in g["param_names"]}
    assert {row["name"]: row["role"] for row in content["parameters"]} == names
    for row, group in zip(content["roles"], saved, strict=True):
        smoothed = ", EMA(beta=0.99, eps=1e-08, bias_correction=True)"
        assert row["rule"] == group["rule"] + (smoothed if row["role"] == "head" else "")
    assert (content["steps"], content["preset"]["name"], content["schedule"]) == (
        3,
        "normopt",
        "linear",
    )


@pytest.mark.slow
def test_a_process_that_imported_nothing_reads_saved_arguments(tmp_path):
    trained(tmp_path, max_steps=1, save_steps=1)
    path = tmp_path / "checkpoint-1" / "training_args.bin"
    code = f"import torch; print(torch.load({str(path)!r}, weights_only=False).optim.value)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "normopt\n"


@pytest.mark.slow
def test_a_killed_process_never_resumes_to_another_run(tmp_path):
    """SIGKILL at random moments, half of them while a checkpoint is written."""
    worker = Path(__file__).with_name("kill_worker.py")
    seed = str(random.randrange(10**6))
    done = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), seed],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}\n{done.stderr}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] >= 10
    assert counts["equal"], f"seed {seed}"
