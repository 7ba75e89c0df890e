"""Parameters that are unfrozen, added, replaced or frozen after the optimizer was made."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_normopt import NormOpt, NormOptTrainer, classify, create_normopt_optimizer
from hf_normopt.optim.groups import parameter_groups
from hf_normopt.optim.presets import PRESETS
from hf_normopt.trainer.bystanders import Bystanders

from .test_optimizer import llama
from .test_trainer import arguments, bert, equal, inner, rows, weights

MESSAGE = "Not trained"
LAYER = "bert.encoder.layer.1"
PART = f"{LAYER}.attention.self.query.weight"


class At(TrainerCallback):
    """Calls a function once, at an event of a step."""

    def __init__(self, event, call, step=0):
        def handler(args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == step and not self.is_done:
                self.is_done = True
                call(model, optimizer)

        self.is_done = False
        setattr(self, event, handler)


def unfreeze(model, optimizer=None):
    model.get_submodule(LAYER).requires_grad_(True)


def freeze(model, optimizer=None):
    model.get_submodule(LAYER).requires_grad_(False)


def frozen(**changes):
    model = bert(**changes)
    freeze(model)
    return model


def trained(model, folder, *callbacks, cls=Trainer, optimizers=(None, None), **changes):
    args = arguments(folder, **{"optim": "normopt", "weight_decay": 0.1, **changes})
    trainer = cls(
        model, args, train_dataset=rows(12), callbacks=list(callbacks), optimizers=optimizers
    )
    trainer.train()
    assert isinstance(inner(trainer), NormOpt)
    return trainer


def messages(caplog):
    return [r.getMessage() for r in caplog.records if MESSAGE in r.getMessage()]


@pytest.mark.parametrize(
    ("cls", "event", "step"),
    [
        (Trainer, "on_train_begin", 0),
        (Trainer, "on_epoch_begin", 3),
        (Trainer, "on_step_begin", 2),
        (NormOptTrainer, "on_epoch_begin", 3),
    ],
)
def test_what_a_callback_unfreezes_is_named_once(cls, event, step, tmp_path, caplog):
    """The run has 6 steps, 3 in each epoch, and logs each."""
    model = frozen()
    before = weights(model)
    trained(model, tmp_path, At(event, unfreeze, step), cls=cls, logging_steps=1)
    (message,) = messages(caplog)
    assert f"{LAYER}.attention.output" in message
    assert "and 11 more" in message
    assert torch.equal(before[PART], model.get_parameter(PART))


def test_it_is_named_at_once_where_nothing_is_logged(tmp_path, caplog):
    seen = []
    told = At("on_step_end", lambda *_: seen.extend(messages(caplog)), step=3)
    silent = {"logging_strategy": "no", "num_train_epochs": 1}
    trained(frozen(), tmp_path, At("on_step_begin", unfreeze, 2), told, **silent)
    assert len(seen) == len(messages(caplog)) == 1


def test_what_is_unfrozen_bit_by_bit_is_named_bit_by_bit(tmp_path, caplog):
    def part(name):
        return lambda model, _: model.get_parameter(name).requires_grad_(True)

    names = [f"{LAYER}.attention.self.{what}.weight" for what in ("query", "key", "value")]
    calls = [At("on_step_begin", part(name), step) for step, name in enumerate(names)]
    trained(frozen(), tmp_path, *calls, logging_steps=1)
    found = messages(caplog)
    assert len(found) == 3
    assert all(name in text for name, text in zip(names, found, strict=True))


def extended(model, optimizer=None):
    """A part that only later runs will use."""
    model.extra = nn.Linear(2, 2)


def replaced(model, optimizer=None):
    """As by a vocabulary that is resized, or a head that is made anew."""
    model.classifier = nn.Linear(32, 2)


@pytest.mark.parametrize(
    ("change", "name"), [(extended, "extra.weight"), (replaced, "classifier.w")]
)
@pytest.mark.parametrize(("event", "step"), [("on_step_begin", 1), ("on_step_end", 6)])
def test_what_is_added_or_replaced_is_named_once(change, name, event, step, tmp_path, caplog):
    trained(bert(), tmp_path, At(event, change, step), logging_strategy="no")
    (message,) = messages(caplog)
    assert name in message


@pytest.mark.parametrize("log", ["no", "steps"])
def test_an_ordinary_run_is_not_told_of(log, tmp_path, caplog):
    """Also with parameters that stay frozen, and with some that nothing uses."""
    model = frozen()
    model.unused = nn.Linear(2, 2)
    trainer = trained(model, tmp_path, logging_strategy=log, logging_steps=1)
    trainer.train()
    trainer.evaluate(rows(4))
    assert not messages(caplog)


def test_a_parameter_without_a_gradient_is_not_told_of(tmp_path, caplog):
    """As an adapter that requires grad and is not active."""
    model = bert()
    model.unused = nn.Linear(2, 2).requires_grad_(False)
    call = At("on_step_begin", lambda model, _: model.unused.requires_grad_(True), 1)
    trained(model, tmp_path, call, logging_steps=1)
    assert not messages(caplog)


def of_classifier(model):
    return create_normopt_optimizer(model.classifier, lr=1e-3)


def of_groups(model):
    """By the names of the whole model, without the layer."""
    policy = PRESETS["normopt"].policy
    specs = [spec for spec in classify(model) if not spec.name.startswith(LAYER)]
    return NormOpt(parameter_groups(model, specs, policy), policy, lr=1e-3)


@pytest.mark.parametrize("make", [of_classifier, of_groups])
def test_what_a_user_left_out_is_not_told_of(make, tmp_path, caplog):
    model = bert()
    trained(model, tmp_path, optimizers=(make(model), None))
    assert not messages(caplog)
    freeze(model)  # what was frozen when the optimizer was made is no choice
    optimizer = make(model)
    trained(model, tmp_path, At("on_epoch_begin", unfreeze, 3), optimizers=(optimizer, None))
    assert len(messages(caplog)) == 1


def test_what_is_unfrozen_between_optimizer_and_trainer_is_named(tmp_path, caplog):
    model = frozen()
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    unfreeze(model)
    trained(model, tmp_path, optimizers=(optimizer, None))
    assert len(messages(caplog)) == 1


def two_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    return model, optimizer, Bystanders(optimizer, model)


def unfrozen_with_gradient(model):
    model.requires_grad_(True)
    model(torch.ones(2)).sum().backward()


def test_what_another_optimizer_holds_is_not_told_of():
    """A wrapper steps two optimizers."""
    model, optimizer, bystanders = two_layers()
    other = torch.optim.SGD(model[1].parameters(), lr=1e-3)
    groups = optimizer.param_groups + other.param_groups
    bystanders.begin(SimpleNamespace(optimizer=optimizer, param_groups=groups), model)
    unfrozen_with_gradient(model)
    assert not bystanders.with_gradient()
    bystanders.begin(SimpleNamespace(optimizer=optimizer), model)
    assert bystanders.with_gradient() == ["1.weight", "1.bias"]


def test_what_a_callback_adds_to_the_optimizer_is_not_told_of():
    model, optimizer, bystanders = two_layers()
    bystanders.begin(optimizer, model)
    optimizer.add_param_group({"params": [("1.weight", model[1].weight)], "role": "linear"})
    unfrozen_with_gradient(model)
    assert bystanders.with_gradient() == ["1.bias"]
    assert not bystanders.with_gradient()


def with_adapters():
    model = llama(vocab_size=50)
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(target_modules=["q_proj"]), adapter_name=name)
    model.set_adapter("first")
    return model


def of_adapter(model, name):
    return {n: p for n, p in weights(model).items() if f".{name}." in n}


def tokens():
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(12)]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("cls", [Trainer, NormOptTrainer])
def test_a_second_adapter_is_named_once_in_a_run_and_a_new_trainer_trains_it(cls, tmp_path, caplog):
    model = with_adapters()
    args = arguments(tmp_path, optim="normopt", weight_decay=0.1, max_steps=3)
    trainer = cls(model, args, train_dataset=tokens())
    trainer.train()
    assert not messages(caplog)
    model.set_adapter("second")
    first, second = of_adapter(model, "first"), of_adapter(model, "second")
    for run in (1, 2):
        trainer.train()
        assert len(messages(caplog)) == run
        assert ".second." in messages(caplog)[-1]
        assert ".first." not in messages(caplog)[-1]
    assert equal(second, of_adapter(model, "second"))
    cls(model, args, train_dataset=tokens()).train()
    assert len(messages(caplog)) == 2
    assert equal(first, of_adapter(model, "first"))
    assert not equal(second, of_adapter(model, "second"))


def test_what_starts_later_may_be_frozen_when_training_begins(tmp_path, caplog):
    """What the message says to do."""
    model = bert()
    before, between = weights(model), {}
    calls = [
        At("on_train_begin", freeze),
        At("on_epoch_end", lambda model, _: between.update(weights(model)), 3),
        At("on_epoch_begin", unfreeze, 3),
    ]
    trained(model, tmp_path, *calls)
    assert torch.equal(before[PART], between[PART])
    assert not torch.equal(between[PART], model.get_parameter(PART))
    assert not messages(caplog)


@pytest.mark.parametrize("preset", ["normopt", "adam", "prodigy"])
def test_what_is_frozen_later_stays_where_it_is(preset, tmp_path, caplog):
    """Its momentum and the weight decay move it no more, as with AdamW."""
    model, then = bert(), {}
    calls = [
        At("on_step_begin", freeze, 3),
        At("on_step_begin", lambda model, _: then.update(weights(model)), 3),
    ]
    trained(model, tmp_path, *calls, optim=f"normopt_{preset}" if preset != "normopt" else preset)
    now = weights(model)
    assert all(torch.equal(then[n], p) for n, p in now.items() if n.startswith(LAYER))
    assert not equal(then, now)
    assert not messages(caplog)


def test_another_optimizer_is_not_looked_at(tmp_path, caplog):
    args = arguments(tmp_path)
    call = At("on_epoch_begin", unfreeze, 3)
    Trainer(frozen(), args, train_dataset=rows(12), callbacks=[call]).train()
    assert not messages(caplog)


def test_an_optimizer_does_not_keep_its_model_alive():
    model = nn.Linear(3, 3)
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert optimizer.made_for() is None
