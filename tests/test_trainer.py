import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed
from transformers.training_args import OptimizerNames

import hf_normopt
from hf_normopt import NormOpt, NormOptArguments, NormOptMixin, NormOptTrainer
from hf_normopt.trainer.arguments import normopt_options, parse_optim_args, parse_roles


def bert(**changes):
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, **changes))


def rows(n=48):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (n, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] > 27)} for row in ids]


def arguments(folder, cls=TrainingArguments, **changes):
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 6, "seed": 1}
    batch = {"per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3}
    return cls(output_dir=str(folder), **{**common, **batch, **changes})


def inner(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_doors_give_one_run_bit_for_bit(tmp_path):
    """A plain Trainer, the trainer, the mixin, the typed arguments: one builder, one run."""

    class Mixed(NormOptMixin, Trainer):
        pass

    options = {"optim_args": "lr_head=2.0,momentum=0.9", "weight_decay": 0.1}
    typed = {"lr_multipliers": {"head": 2.0}, "momentum": 0.9, "weight_decay": 0.1}
    runs = []
    for trainer_class, args in (
        (Trainer, arguments(tmp_path, optim="normopt", **options)),
        (NormOptTrainer, arguments(tmp_path, **options)),
        (Mixed, arguments(tmp_path, optim="normopt", **options)),
        (Trainer, arguments(tmp_path, NormOptArguments, **typed)),
    ):
        trainer = trainer_class(bert(), args, train_dataset=rows())
        trainer.train()
        assert isinstance(inner(trainer), NormOpt)
        runs.append(weights(trainer.model))
    assert all(equal(runs[0], run) for run in runs[1:])
    assert not equal(runs[0], weights(bert()))


def test_presets_by_name_and_by_option_are_one(tmp_path):
    runs = []
    for options in ({"optim": "normopt_muon"}, {"optim": "normopt", "optim_args": "preset=muon"}):
        trainer = Trainer(bert(), arguments(tmp_path, **options), train_dataset=rows())
        trainer.train()
        runs.append(weights(trainer.model))
    assert equal(*runs)


def test_seq2seq_trainer(tmp_path):
    model = T5ForConditionalGeneration(
        T5Config(
            d_model=16,
            d_ff=32,
            d_kv=8,
            num_layers=1,
            num_heads=2,
            vocab_size=30,
            decoder_start_token_id=0,
        )
    )
    data = [{"input_ids": [4, 5, 6], "labels": [7, 8]}] * 8
    args = arguments(tmp_path, Seq2SeqTrainingArguments, optim="normopt")
    trainer = Seq2SeqTrainer(model, args, train_dataset=data)
    trainer.train()
    assert isinstance(inner(trainer), NormOpt)


def test_lora(tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
    trainer = Trainer(
        get_peft_model(bert(), config), arguments(tmp_path, optim="normopt"), train_dataset=rows()
    )
    trainer.train()
    groups = {g["role"]: g["param_names"] for g in inner(trainer).param_groups}
    assert set(groups) == {"linear", "head", "bias"}
    assert all("lora_" in name for name in groups["linear"])


@pytest.mark.parametrize("preset", hf_normopt.PRESETS)
def test_resumed_training_is_uninterrupted_training_bit_for_bit(tmp_path, preset):
    args = arguments(
        tmp_path,
        optim="normopt",
        optim_args=f"preset={preset}",
        save_strategy="steps",
        save_steps=3,
    )
    straight = Trainer(bert(), args, train_dataset=rows())
    straight.train()
    resumed = Trainer(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert equal(weights(straight.model), weights(resumed.model))


def test_resuming_under_another_preset_is_refused(tmp_path):
    args = arguments(tmp_path, optim="normopt", save_strategy="steps", save_steps=3)
    Trainer(bert(), args, train_dataset=rows()).train()
    other = Trainer(bert(), dataclasses.replace(args, optim="normopt_muon"), train_dataset=rows())
    with pytest.raises(ValueError, match="trained under the rule"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_logged_learning_rate_is_the_arguments(tmp_path):
    args = arguments(tmp_path, optim="normopt", logging_steps=1, optim_args="lr_linear=3.0")
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([1e-3 * (1 - step / 6) for step in range(6)])


def test_gradient_accumulation_is_one_step(tmp_path):
    args = arguments(tmp_path, optim="normopt", gradient_accumulation_steps=2, max_steps=2)
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    assert trainer.state.global_step == 2


def test_table_is_printed_once(tmp_path, capsys):
    Trainer(bert(), arguments(tmp_path, optim="normopt"), train_dataset=rows()).train()
    printed = capsys.readouterr().out
    assert printed.count("NormOpt, preset normopt:") == 1
    lines = [line.split() for line in printed.splitlines()]
    assert ["head", "rms->linf", "1", "64", "0.004", "0"] in lines
    assert any(line[:3] == ["linear", "rms->rms", "13"] for line in lines if line)


def test_adam_arguments_reach_the_rules_that_have_a_statistic(tmp_path, caplog):
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    trainer = Trainer(
        bert(), arguments(tmp_path, optim="normopt_muon", **adam), train_dataset=rows()
    )
    rule = inner_policy(trainer)["head"]
    assert (rule.momentum, rule.statistic.beta, rule.statistic.eps) == (0.8, 0.95, 1e-6)
    assert not [r for r in caplog.records if "have no effect" in r.getMessage()]


def inner_policy(trainer):
    trainer.create_optimizer()
    return trainer.optimizer.policy


def test_adam_arguments_that_no_rule_uses_give_one_notice(tmp_path, caplog):
    args = arguments(tmp_path, optim="normopt", adam_beta2=0.95)
    inner_policy(Trainer(bert(), args, train_dataset=rows()))
    assert [r.getMessage() for r in caplog.records if "have no effect" in r.getMessage()]
    caplog.clear()
    inner_policy(Trainer(bert(), arguments(tmp_path, optim="normopt"), train_dataset=rows()))
    assert not [r for r in caplog.records if "have no effect" in r.getMessage()]


def test_a_learning_rate_far_outside_of_the_recommended_range_gives_a_notice(tmp_path, caplog):
    for optim, lr, notices in (
        ("normopt_modular", 5e-5, 1),
        ("normopt_prodigy", 5e-5, 1),
        ("normopt_prodigy", 1.0, 0),
        ("normopt", 5e-5, 0),
    ):
        caplog.clear()
        args = arguments(tmp_path, optim=optim, learning_rate=lr)
        Trainer(bert(), args, train_dataset=rows()).create_optimizer()
        found = [r for r in caplog.records if "is far from" in r.getMessage()]
        assert len(found) == notices


def test_decay_as_a_fraction_of_the_run(tmp_path):
    args = arguments(
        tmp_path,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"decay_ratio": 0.5, "decay_type": "linear"},
        logging_steps=1,
    )
    trainer = NormOptTrainer(bert(), args, train_dataset=rows())
    trainer.train()
    logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert logged == pytest.approx([1e-3] * 4 + [1e-3 * 2 / 3, 1e-3 / 3])
    assert trainer._created_lr_scheduler
    with pytest.raises(ValueError, match="decay_ratio belongs to lr_scheduler_type"):
        NormOptTrainer(
            bert(), dataclasses.replace(args, lr_scheduler_type="cosine"), train_dataset=rows()
        ).train()
    with pytest.raises(ValueError, match="decay is a fraction"):
        NormOptTrainer(
            bert(),
            dataclasses.replace(args, lr_scheduler_kwargs={"decay_ratio": 2}),
            train_dataset=rows(),
        ).train()


def test_other_optimizers_are_left_alone(tmp_path):
    for trainer_class in (Trainer, NormOptTrainer):
        trainer = trainer_class(bert(), arguments(tmp_path, optim="sgd"), train_dataset=rows())
        assert isinstance(trainer.create_optimizer(), torch.optim.SGD)


def test_names_on_the_command_line():
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", "x", "--optim", "normopt_muon"])
    assert args.optim == "normopt_muon"
    (optim,) = [action for action in parser._actions if action.dest == "optim"]
    assert {"normopt", "normopt_muon", "adamw_torch"} <= set(optim.choices)
    parser = HfArgumentParser(NormOptArguments)
    (args,) = parser.parse_args_into_dataclasses(
        [
            "--output_dir",
            "x",
            "--preset",
            "muon",
            "--nesterov",
            "false",
            "--lr_multipliers",
            '{"head": 2}',
        ]
    )
    assert normopt_options(args) == {"preset": "muon", "nesterov": False, "lr_head": 2}


def test_typed_fields_and_optim_args_may_agree_but_not_differ(tmp_path):
    def options(**fields):
        return normopt_options(arguments(tmp_path, NormOptArguments, **fields))

    agreed = options(optim_args="lr_head=2", lr_multipliers={"head": 2.0}, optim="normopt_muon")
    assert agreed == {"lr_head": "2", "preset": "muon"}
    with pytest.raises(ValueError, match=r"preset is given twice: 'normopt' by the fields"):
        options(optim="normopt_muon", preset="normopt")
    with pytest.raises(ValueError, match=r"lr_multipliers takes a dict.*found 'head=2'"):
        options(lr_multipliers="head=2")


def test_names_are_members_like_any_other():
    hf_normopt.register()  # a second time changes nothing
    assert len([m for m in OptimizerNames if m.value == "normopt"]) == 1
    member = OptimizerNames("normopt")
    assert member is OptimizerNames.NORMOPT is OptimizerNames["NORMOPT"]
    assert (member == "normopt", str(member), hash(member)) == (
        True,
        "OptimizerNames.NORMOPT",
        hash(member),
    )
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert OptimizerNames("adamw_torch") in list(OptimizerNames)


def test_arguments_survive_their_round_trips(tmp_path):
    args = arguments(tmp_path, optim="normopt", optim_args="lr_head=2.0")
    assert args.to_dict()["optim"] == "normopt"
    assert json.loads(args.to_json_string())["optim_args"] == "lr_head=2.0"
    for twin in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args), dataclasses.replace(args)):
        assert twin.optim == "normopt"


@pytest.mark.slow
def test_a_fresh_process_knows_the_name(tmp_path):
    arguments = f"{str(tmp_path)!r}, optim='normopt', use_cpu=True"
    code = (
        f"import hf_normopt, transformers as t; print(t.TrainingArguments({arguments}).optim.value)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "normopt"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (None, {}),
        ("", {}),
        ("preset=muon", {"preset": "muon"}),
        (" momentum = 0.9 , nesterov=False", {"momentum": "0.9", "nesterov": "False"}),
    ],
)
def test_optim_args(text, options):
    assert parse_optim_args(text) == options


def test_roles_in_optim_args(tmp_path):
    assert parse_roles("head:pooler;embedding:a|b:c") == {"pooler": "head", "a|b:c": "embedding"}
    args = arguments(tmp_path, optim="normopt", optim_args="roles=head:pooler.dense.weight")
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.create_optimizer()
    (head,) = [g for g in trainer.optimizer.param_groups if g["role"] == "head"]
    assert head["param_names"] == ["bert.pooler.dense.weight", "classifier.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "momentun=0.9"}, "Unknown option 'momentun'. Did you mean momentum"),
        ({"optim_args": "preset=moun"}, "Unknown preset 'moun'"),
        ({"optim_args": "roles=head:nothing"}, "override 'nothing' matches none"),
        ({"optim_args": "roles=heads:pooler"}, "Unknown role 'heads'"),
        ({"optim_args": "roles=pooler"}, "expected role:REGEX"),
        ({"optim": "normopt_muon", "optim_args": "preset=normopt"}, "preset is given twice"),
        ({"optim_args": "lr=2"}, "lr is no option; it is said by learning_rate"),
        ({"optim_args": "overrides=2"}, "overrides is no option; it is said by roles="),
        ({"optim_args": "lr_head=2,lr_head=3"}, "lr_head is given twice"),
        ({"learning_rate": -1.0}, "lr must be a finite number >= 0, found -1.0"),
    ],
)
def test_bad_arguments_are_refused_before_training(tmp_path, options, message):
    args = arguments(tmp_path, **{"optim": "normopt", **options})
    with pytest.raises(ValueError, match=message):
        Trainer(bert(), args, train_dataset=rows()).create_optimizer()


def test_malformed_optim_args_show_the_word():
    with pytest.raises(ValueError, match=r"cannot read 'momentum' in 'preset=muon,momentum'"):
        parse_optim_args("preset=muon,momentum")
    with pytest.raises(ValueError, match=r"cannot read 'a=b=c'"):
        parse_optim_args("a=b=c")
