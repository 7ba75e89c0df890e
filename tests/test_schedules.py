import dataclasses

import pytest
import torch
from transformers import Trainer, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from hf_normopt import (
    PRESETS,
    NormOptArguments,
    NormOptTrainer,
    create_normopt_optimizer,
    create_normopt_scheduler,
)
from hf_normopt.optim.schedules import BY_METRIC, Schedule, parse_schedule

from .test_trainer import arguments, bert, equal, inner, rows, weights

OPTIONS = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 3},
}
BY_STEP = [kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if kind.value not in BY_METRIC]


def rates(trainer, key="learning_rate"):
    return [row[key] for row in trainer.state.log_history if key in row]


def trained(trainer_class, folder, cls=None, **changes):
    changes = {"optim": "normopt", "logging_steps": 1, "max_steps": 10, **changes}
    args = arguments(folder, cls, **changes) if cls else arguments(folder, **changes)
    trainer = trainer_class(bert(), args, train_dataset=rows())
    trainer.train()
    return trainer


def curve(text, steps=10):
    """The factors of a schedule at every step of a run."""
    factor = parse_schedule(text).factor(steps, 1.0)
    return [factor(step) for step in range(steps)]


@pytest.mark.parametrize("name", BY_STEP)
def test_shapes_are_those_of_transformers(name):
    theirs = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    options = OPTIONS.get(name, {})
    scheduler = get_scheduler(name, theirs, 2, 10, scheduler_specific_kwargs=options)
    factor = Schedule(name, 2, 0.0, options).factor(10, 2e-3)
    for step in range(10):
        assert theirs.param_groups[0]["lr"] == 2e-3 * factor(step)
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", [1] * 10),
        ("constant/warmup:2", [0, 0.5] + [1] * 8),
        ("linear/warmup:0.2", [0, 0.5] + [1 - i / 8 for i in range(8)]),
        ("linear/floor:0.5", [1 - 0.5 * i / 10 for i in range(10)]),
        ("linear/warmup:2/floor:0.5", [0, 0.5] + [1 - 0.5 * i / 8 for i in range(8)]),
        ("wsd/decay:0.4/shape:linear", [1] * 6 + [1, 0.75, 0.5, 0.25]),
        ("wsd/shape:linear", [1] * 8 + [1, 0.5]),
        ("wsd/decay:0.4", [1] * 7 + [1 - (i / 4) ** 0.5 for i in (1, 2, 3)]),
        ("wsd/num_decay_steps:5/shape:linear", [1] * 5 + [1 - i / 5 for i in range(5)]),
    ],
)
def test_curves(text, expected):
    assert curve(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["linear", "wsd/decay:0.3", "cosine/warmup:3/floor:0.1", "warmup:5"]
)
def test_text_and_schedule_are_one(text):
    schedule = parse_schedule(text)
    assert parse_schedule(str(schedule)) == schedule


def test_a_text_without_a_name_changes_the_schedule_of_the_run():
    base = Schedule("cosine", 2, 0.1, {"num_cycles": 0.5})
    assert parse_schedule("warmup:4").over(base) == dataclasses.replace(base, warmup=4)
    assert parse_schedule("linear").over(base) == Schedule("linear", 2)
    assert str(parse_schedule("constant").over(base)) == "constant"  # it has no warm-up


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cosin", "Unknown schedule 'cosin'; expected one of wsd, linear"),
        ("wsd/decay:2", "decay is a fraction in .0, 1., found 2"),
        ("linear/decay:0.2", "'linear' has no option 'decay', but warmup, floor"),
        ("cosine/cycles:2", "no option 'cycles', but warmup, floor, num_cycles"),
        ("linear/floor", "cannot read 'floor'; expected NAME/key:value"),
        ("linear/warmup:-1", "warmup is at least 0, found -1"),
        ("greedy", "follows a metric, not the step"),
    ],
)
def test_errors_say_what_was_expected(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)
    args = arguments(tmp_path, optim="normopt", optim_args=f"schedule_head={text}")
    with pytest.raises(ValueError, match=message):
        Trainer(bert(), args, train_dataset=rows()).create_optimizer()


def test_a_decay_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"decays over 8 steps after 5 of warm-up.* has 10"):
        curve("wsd/decay:0.8/warmup:5")


@pytest.mark.parametrize("trainer_class", [Trainer, NormOptTrainer])
def test_roles_have_schedules_of_their_own(trainer_class, tmp_path):
    trainer = trained(
        trainer_class,
        tmp_path,
        warmup_steps=2,
        optim_args="lr_head=3.0,schedule_head=constant/warmup:4,schedule_norm=warmup:0.5",
    )
    main = [0, 0.5] + [1 - i / 8 for i in range(8)]
    assert rates(trainer) == pytest.approx([1e-3 * f for f in main])
    assert rates(trainer, "lr/linear") == rates(trainer)
    head = [0, 0.25, 0.5, 0.75] + [1] * 6
    assert rates(trainer, "lr/head") == pytest.approx([3e-3 * f for f in head])
    gains = [i / 5 for i in range(5)] + [1 - i / 5 for i in range(5)]
    assert rates(trainer, "lr/norm") == pytest.approx([1e-3 * f for f in gains])


@pytest.mark.parametrize("trainer_class", [Trainer, NormOptTrainer])
def test_the_logged_rate_is_the_runs_whatever_the_matrices_have(trainer_class, tmp_path):
    options = {"optim_args": "lr_head=1,schedule_linear=constant", "max_steps": 4}
    trainer = trained(trainer_class, tmp_path, **options)
    assert rates(trainer) == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rates(trainer, "lr/linear") == [1e-3] * 4
    assert rates(trainer, "lr/head") == rates(trainer)
    options["optim_args"] = "lr_head=1,schedule=wsd/decay:0.5/shape:linear,schedule_linear=linear"
    trainer = trained(trainer_class, tmp_path, **options)
    assert rates(trainer) == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])
    assert rates(trainer, "lr/linear") == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_typed_fields_are_the_same_run(tmp_path):
    text = trained(Trainer, tmp_path, optim_args="schedule=wsd/decay:0.4,schedule_head=constant")
    fields = {"schedule": "wsd/decay:0.4", "role_schedules": {"head": "constant"}}
    typed = trained(NormOptTrainer, tmp_path, NormOptArguments, **fields)
    assert rates(text) == rates(typed)
    assert equal(weights(text.model), weights(typed.model))


@pytest.mark.parametrize("trainer_class", [Trainer, NormOptTrainer])
def test_the_decay_ratio_is_a_field(trainer_class, tmp_path):
    trainer = trained(trainer_class, tmp_path, NormOptArguments, decay_ratio=0.4)
    assert rates(trainer) == pytest.approx([1e-3 * f for f in curve("wsd/decay:0.4")])


def test_the_decay_ratio_goes_with_warmup_stable_decay_only(tmp_path):
    wsd = {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.4}
    trainer = trained(NormOptTrainer, tmp_path, NormOptArguments, **wsd)
    cosine = [1e-3 * f for f in curve("warmup_stable_decay/decay:0.4")]
    assert rates(trainer) == pytest.approx(cosine)
    with pytest.raises(ValueError, match="decay_ratio belongs to lr_scheduler_type"):
        trained(
            NormOptTrainer, tmp_path, NormOptArguments, lr_scheduler_type="cosine", decay_ratio=0.4
        )


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].schedule])
def test_presets_may_have_a_schedule(preset, tmp_path):
    name = f"normopt_{preset}"
    for trainer_class in (Trainer, NormOptTrainer):
        own = trained(trainer_class, tmp_path, optim=name)
        assert rates(own) == pytest.approx([1e-3 * f for f in curve(PRESETS[preset].schedule)])
    asked = trained(Trainer, tmp_path, optim=name, lr_scheduler_type="polynomial", max_steps=2)
    assert rates(asked)[1] == pytest.approx(5e-4, rel=1e-3)
    linear = trained(Trainer, tmp_path, optim=name, optim_args="schedule=linear", max_steps=2)
    assert rates(linear) == pytest.approx([1e-3, 5e-4])


def test_the_schedule_multiplies_escape_velocity(tmp_path):
    trainer = trained(
        Trainer,
        tmp_path,
        learning_rate=1.0,
        optim_args="step_size=escape_velocity,schedule=constant,schedule_head=linear",
    )
    steps, eta = rates(trainer, "step_size"), inner(trainer).param_groups[0]["memory"]["eta"]
    assert steps[0] == pytest.approx(1e-6)
    assert steps[0] < steps[-1] <= eta.item()
    assert rates(trainer, "lr/head") == pytest.approx([1 - i / 10 for i in range(10)])


def test_resumed_schedules_go_on(tmp_path):
    options = {"optim_args": "schedule_head=wsd/decay:0.6,schedule_norm=warmup:6", "save_steps": 5}
    straight = trained(Trainer, tmp_path, save_strategy="steps", **options)
    args = arguments(tmp_path, optim="normopt", max_steps=10, logging_steps=1, **options)
    resumed = Trainer(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert rates(resumed, "lr/head") == rates(straight, "lr/head")
    assert equal(weights(resumed.model), weights(straight.model))


def test_a_scheduler_of_ones_own_is_left_alone(tmp_path, caplog):
    for schedule, notices in ((None, 0), ("linear", 1)):
        model = bert()
        changes = {"schedule_head": schedule} if schedule else {}
        optimizer = create_normopt_optimizer(model, lr=1e-3, preset="scion", **changes)
        own = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        args = arguments(tmp_path, logging_steps=1, max_steps=2)
        trainer = Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, own))
        trainer.train()
        assert rates(trainer) == [5e-4, 5e-4]
        found = [r for r in caplog.records if "schedule linear has no effect" in r.getMessage()]
        assert len(found) == notices


@pytest.mark.parametrize("trainer_class", [Trainer, NormOptTrainer])
def test_a_schedule_that_a_subclass_makes_is_left_alone(trainer_class, tmp_path, caplog):
    """Also one of transformers' own shapes, made for the wrapped optimizer as the Trainer does."""

    class Cosine(trainer_class):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = get_scheduler("cosine", self.optimizer, 0, num_training_steps)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    trainer = trained(Cosine, tmp_path, optim="normopt_scion", max_steps=4)
    assert rates(trainer) == pytest.approx([1e-3 * f for f in curve("cosine", 4)])
    assert not [r for r in caplog.records if "has no effect" in r.getMessage()]
    trained(Cosine, tmp_path, optim_args="schedule_head=constant", max_steps=2)
    assert [r for r in caplog.records if "has no effect" in r.getMessage()]


def test_schedules_by_metric_keep_their_meaning(tmp_path, caplog):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "max_steps": 2}
    for trainer_class in (Trainer, NormOptTrainer):
        options |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
        args = arguments(tmp_path, optim="normopt", optim_args="schedule_head=linear", **options)
        trainer = trainer_class(bert(), args, train_dataset=rows(), eval_dataset=rows(4))
        trainer.train()
        assert rates(trainer) == [1e-3, 1e-3]
    messages = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert len(messages) == 2
    assert "ReduceLROnPlateau" in messages[0]


def test_a_loop_of_ones_own():
    optimizer = create_normopt_optimizer(bert(), lr=1e-3, schedule_head="constant")
    scheduler = create_normopt_scheduler(optimizer, 4, "linear", num_warmup_steps=2)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [row[0] for row in seen] == pytest.approx([0, 5e-4, 1e-3, 5e-4])
    head = [group["role"] for group in optimizer.param_groups].index("head")
    assert [row[head] for row in seen] == [1e-3] * 4
