"""Cards are read back and compared with what ran."""

import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

import hf_normopt
from hf_normopt import NormOptFactory, NormOptMixin, NormOptTrainer, update_model_card
from hf_normopt.cards.report import FILE_NAME, report, write_report
from hf_normopt.cli.commands import main
from hf_normopt.trainer.arguments import optimizer_from_arguments, run_schedule
from hf_normopt.trainer.callback import unwrapped

from .test_trainer import arguments, bert, equal, rows, weights

ROOT = Path(__file__).parents[1]
QUIET = {"max_steps": 3, "logging_strategy": "no"}


def card_of(folder):
    return (Path(folder) / "README.md").read_text()


def table(card, first="role", second="norm"):
    """The rows of the table that has these two columns first."""
    (block,) = re.findall(rf"^\| {first} +\| {second} .*\n(?:\|.*\n?)+", card, re.MULTILINE)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def assert_true(folder, optimizer):
    """The card says what the optimizer is, in valid metadata, and is the same if written twice."""
    card = card_of(folder)
    groups = {group["label"]: group for group in optimizer.param_groups}
    found = {row["role"]: row for row in table(card)}
    assert found.keys() == groups.keys()
    for label, row in found.items():
        group = groups[label]
        numbers = {key: float(row[key].replace(",", "")) for key in list(row)[2:6]}
        rate = float(group["initial_lr"]) * group["multiplier"]
        assert numbers == {
            "tensors": len(group["params"]),
            "parameters": sum(p.numel() for p in group["params"]),
            "learning rate": pytest.approx(rate),
            "weight decay": pytest.approx(group["weight_decay"]),
        }
        assert str(optimizer.rule_of(group)) == f"{row['norm']}, {row['rule']}"
    assert f"- steps: {optimizer.steps}\n" in card

    lines = re.findall(r"^- optimizer: (.*)", card, re.MULTILINE)
    preset = optimizer.origin.get("preset")
    what = f"preset {preset}" if preset else "a policy of its own"
    assert len(lines) == 1
    assert lines[0].startswith(f"NormOpt (hf_normopt {hf_normopt.__version__}), {what}, step size ")
    assert "OptimizerNames" not in card
    assert "and the args are" not in card

    data = ModelCard.load(Path(folder) / "README.md").data
    assert "hf-normopt" in data.tags
    assert (data["optimizer"], data.get("optimizer_preset")) == ("normopt", preset)
    assert ModelCard(card).content == card
    update_model_card(folder)
    assert card_of(folder) == card


THE_CARD = """\
---
library_name: transformers
tags:
- generated_from_trainer
- hf-normopt
optimizer: normopt
optimizer_preset: muon
model-index:
- name: my-model
  results: []
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# my-model

This model is a fine-tuned version of <any> on an unknown dataset.

## Model description

More information needed

## Intended uses & limitations

More information needed

## Training and evaluation data

More information needed

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.001
- train_batch_size: 4
- eval_batch_size: 8
- seed: 1
- optimizer: NormOpt (hf_normopt <version>), preset muon, step size fixed, options `lr_head=2.0,norm_linear=rms->rms,roles=head:(pooler|x).dense.weight`
- lr_scheduler_type: cosine
- lr_scheduler_warmup_steps: 2
- training_steps: 6

### Training results



### Framework versions

- Transformers <version>
- Pytorch <version>
- Datasets <version>
- Tokenizers <version>

<!-- hf-normopt: start -->
## Optimizer

Trained with NormOpt of `hf_normopt`: steepest descent under an operator norm for each tensor, by the role that it plays in the network.

- preset: `muon`. Orthogonalized momentum for linear layers, AdamW for the rest.
- source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon
- options: `lr_head=2.0`, `norm_linear=rms->rms`, `roles=head:(pooler|x).dense.weight`
- learning rate: 0.001
- weight decay: 0.1
- step size: `fixed`. η = 1: the learning rate is the step size. With the rate and the schedule, at the last step that was logged: <number>.
- schedule: `cosine/warmup:2`
- steps: 6
- versions: hf_normopt <version>, torch <version>, transformers <version>

| role      | norm     | tensors | parameters | learning rate | weight decay | rule |
|-----------|----------|--------:|-----------:|--------------:|-------------:|------|
| linear    | rms->rms |      12 |     14,336 |         0.001 |          0.1 | scale muon, momentum 0.95 nesterov |
| embedding | l1->linf |       3 |     18,048 |         0.001 |          0.1 | scale norm, momentum 0.9, EMA(<any>) |
| head      | l1->linf |       2 |      1,088 |         0.002 |          0.1 | scale norm, lr x2.0, momentum 0.9, EMA(<any>) |
| norm      | l1->linf |       5 |        160 |         0.001 |            0 | scale norm, momentum 0.9, EMA(<any>), decay x0.0 |
| bias      | l1->linf |      19 |        610 |         0.001 |            0 | scale norm, momentum 0.9, EMA(<any>), decay x0.0 |

### Final norms

Of each role in its own norm, at the last step that was logged:

| role      | weight norm | relative update | dual norm | certificate |
|-----------|------------:|----------------:|----------:|------------:|
| linear    | <number> | <number> | <number> | <number> |
| embedding | <number> | <number> | <number> | <number> |
| head      | <number> | <number> | <number> | <number> |
| norm      | <number> | <number> | <number> | <number> |
| bias      | <number> | <number> | <number> | <number> |

![Norms by role during training](normopt_norms.png)

### How to reproduce

```python
import hf_normopt
from transformers import TrainingArguments

args = TrainingArguments(
    output_dir="output",
    optim="normopt",
    optim_args="preset=muon,lr_head=2.0,norm_linear=rms->rms,roles=head:(pooler|x).dense.weight",
    learning_rate=0.001,
    weight_decay=0.1,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    max_steps=6,
)
# trainer = hf_normopt.NormOptTrainer(model, args, train_dataset=...)
```

The data, the batch size, the seed and the clipping of gradients are the script's.

### Citation

```bibtex
@article{bernstein2024old,
  title   = {Old Optimizer, New Norm: An Anthology},
  author  = {Bernstein, Jeremy and Newhouse, Laker},
  journal = {arXiv preprint arXiv:2409.20325},
  year    = {2024}
}
```
<!-- hf-normopt: end -->
"""  # noqa: E501
PLACES = {"version": r"\d[\w.+]*", "number": r"\d[\d.e+-]*", "any": ".*"}


def lines(card):
    """The lines, with columns and rules of any width as one."""
    return re.sub(r" {2,}", " ", re.sub("-{3,}", "---", card)).split("\n")


def test_the_whole_card(tmp_path):
    folder = tmp_path / "my-model"
    options = "preset=muon,lr_head=2.0,norm_linear=rms->rms,roles=head:(pooler|x).dense.weight"
    shape = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    args = arguments(folder, optim="normopt", optim_args=options, logging_steps=3, **shape)
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    (folder / "normopt_norms.png").touch()  # drawn only where matplotlib is installed
    trainer.create_model_card()
    update_model_card(folder)
    for line, pattern in zip(lines(card_of(folder)), lines(THE_CARD), strict=True):
        parts = re.split(r"<(version|number|any)>", pattern)
        parts[::2] = map(re.escape, parts[::2])
        parts[1::2] = [PLACES[name] for name in parts[1::2]]
        assert re.fullmatch("".join(parts), line), f"expected {pattern}"
    assert_true(folder, unwrapped(trainer.optimizer))
    last = [row for row in trainer.state.log_history if "weight_norm/head" in row][-1]
    (head,) = [
        row for row in table(card_of(folder), "role", "weight norm") if row["role"] == "head"
    ]
    for name in ("weight norm", "relative update", "dual norm", "certificate"):
        logged = last[f"{name.replace(' ', '_')}/head"]
        assert float(head[name]) == pytest.approx(logged, rel=1e-3)


def plain(folder):
    return Trainer(bert(), arguments(folder, optim="normopt_adam", **QUIET), train_dataset=rows())


def mixed(folder):
    return NormOptTrainer(
        bert(), arguments(folder, optim_args="preset=modular", **QUIET), train_dataset=rows()
    )


def typed(folder):
    args = arguments(folder, hf_normopt.NormOptArguments, preset="prodigy", **QUIET)
    return Trainer(bert(), dataclasses.replace(args, learning_rate=1.0), train_dataset=rows())


def made_by_hand(folder):
    """Not from the training arguments, which say another rate."""
    model = bert()
    optimizer = hf_normopt.create_normopt_optimizer(model, lr=0.02, preset="lion", momentum=0.8)
    args = arguments(folder, **QUIET)
    return Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, None))


def policy_by_hand(folder):
    model, norm = bert(), hf_normopt.operator_norm("l1", "linf")
    policy = {"linear": hf_normopt.Rule(norm, momentum=0.9, multiplier=3.0)}
    groups = [{"params": list(model.named_parameters()), "role": "linear"}]
    optimizer = hf_normopt.NormOpt(groups, policy, lr=1e-4)
    args = arguments(folder, **QUIET)
    return NormOptTrainer(model, args, train_dataset=rows(), optimizers=(optimizer, None))


def factory(folder):
    how = (NormOptFactory, {"lr": 3e-3, "preset": "scion"})
    args = arguments(folder, **QUIET)
    return Trainer(bert(), args, train_dataset=rows(), optimizer_cls_and_kwargs=how)


def seq2seq(folder):
    class Mixed(NormOptMixin, Seq2SeqTrainer):
        pass

    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=30, decoder_start_token_id=0))
    data = [{"input_ids": [4, 5, 6], "labels": [7, 8]}] * 16
    return Mixed(model, arguments(folder, Seq2SeqTrainingArguments, **QUIET), train_dataset=data)


def lora(folder):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=4)
    model = get_peft_model(bert(), config)
    return NormOptTrainer(model, arguments(folder, **QUIET), train_dataset=rows())


def sft(folder, mixin=True):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from trl import SFTConfig, SFTTrainer

    class Mixed(NormOptMixin, SFTTrainer):
        pass

    words = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, vocab_size=len(words)))
    data = Dataset.from_dict({"text": ["a b c d", "c d e f", "e f g h"] * 4})
    args = arguments(
        folder, SFTConfig, optim="normopt", **{**QUIET, "save_strategy": "steps", "save_steps": 2}
    )
    trainer_class = Mixed if mixin else SFTTrainer
    return trainer_class(model, args, train_dataset=data, processing_class=fast)


def plain_sft(folder):
    return sft(folder, mixin=False)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl
@pytest.mark.parametrize(
    "door",
    [
        *(plain, mixed, typed, made_by_hand, policy_by_hand, factory),
        *(seq2seq, lora, sft, plain_sft),
    ],
)
def test_every_door_has_a_true_card(tmp_path, door):
    trainer = door(tmp_path)
    trainer.train()
    trainer.save_model()  # peft writes a card with it
    words = {"model_name": "tiny", "tags": ["mine"]}
    if isinstance(trainer, NormOptMixin):
        super(NormOptMixin, trainer).create_model_card(**words)
        untouched = card_of(tmp_path)
        trainer.create_model_card(**words)
    else:
        trainer.create_model_card(**words)
        untouched = card_of(tmp_path)
        update_model_card(tmp_path)
    optimizer = unwrapped(trainer.optimizer)
    assert_true(tmp_path, optimizer)
    card = card_of(tmp_path)
    assert others(card) == others(untouched)
    if "hyperparameters were used" in card:
        assert f"- learning_rate: {optimizer.param_groups[0]['initial_lr']}\n" in card
    assert ("mine" in ModelCard(card).data.tags) == (door is not lora)  # peft drops it


def others(card):
    """The text that is not ours."""
    text = card.partition("\n---\n")[2].partition("<!-- hf-normopt: start -->")[0].rstrip()
    ours = "- (optimizer|learning_rate|lr_scheduler_type): |No additional"
    return [line for line in text.split("\n") if not re.match(ours, line)]


def code_of(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def reproduced(card):
    """The training arguments that the card's code makes."""
    names = {}
    exec(code_of(card), names)
    return names["args"]


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "normopt_muon", "optim_args": "lr_head=2.0,momentum=0.8,nesterov=false"},
        {"optim": "normopt", "optim_args": "step_size=escape_velocity/beta:0.99/per_role:true"},
        {"optim": "normopt", "optim_args": "heads=true,scale=norm,lr_linear=1e-05,decay_head=0.5"},
        {"optim": "normopt", "optim_args": "norm_linear=l2->l2(muon),norm_bias=frobenius"},
        {"optim": "normopt", "optim_args": r"roles=head:pooler\.dense\.(weight|x);bias:Norm.*"},
        {"optim": "normopt_adam", "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
        {"optim": "normopt_scion", "warmup_steps": 0.1},
        {"optim": "normopt_scion", "lr_scheduler_type": "constant"},
        {"optim": "normopt_prodigy", "optim_args": "schedule_head=warmup:2,schedule=constant"},
        {
            "optim": "normopt",
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1, "num_cycles": 0.5},
            "warmup_steps": 3,
        },
        {
            "optim": "normopt",
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"decay_ratio": 0.5, "decay_type": "1-sqrt"},
        },
        {
            "cls": hf_normopt.NormOptArguments,
            "lr_multipliers": {"head": 3.0},
            "role_overrides": {
                "pooler.dense.{1,2}weight|a=b; c": "head",
                r"layer\.1\..*query|x": "embedding",
            },
            "role_schedules": {"head": "constant"},
            "decay_ratio": 0.25,
        },
    ],
)
def test_the_code_makes_the_same_optimizer(tmp_path, options):
    args = arguments(tmp_path, weight_decay=0.1, **options)
    optimizer = optimizer_from_arguments(bert(), args)
    schedule = str(run_schedule(args, optimizer))
    write_report(tmp_path, report(optimizer, schedule, max_steps=6))
    twin_args = reproduced(update_model_card(tmp_path).read_text())
    twin = optimizer_from_arguments(bert(), twin_args)
    assert plain_groups(twin) == plain_groups(optimizer)
    assert twin.step_size == optimizer.step_size
    assert twin.policy == optimizer.policy
    assert str(run_schedule(twin_args, twin)) == schedule
    assert twin_args.max_steps == 6
    assert not twin_args.lr_scheduler_kwargs or "decay" not in twin_args.lr_scheduler_kwargs


def plain_groups(optimizer):
    return [
        {k: v for k, v in group.items() if k not in ("params", "memory")}
        for group in optimizer.param_groups
    ]


def test_the_code_gives_the_same_run(tmp_path):
    options = {"optim_args": "preset=scion,lr_head=0.5,schedule_bias=constant", "warmup_steps": 2}
    trainer = NormOptTrainer(bert(), arguments(tmp_path, **options), train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    args = reproduced(card_of(tmp_path))
    scripts = {"per_device_train_batch_size": 4, "seed": 1, "use_cpu": True, "report_to": []}
    args = dataclasses.replace(args, output_dir=str(tmp_path), save_strategy="no", **scripts)
    twin = NormOptTrainer(bert(), args, train_dataset=rows())
    twin.train()
    assert equal(weights(trainer.model), weights(twin.model))


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"optim": "normopt_scion"}, ["lr_scheduler_type: warmup_stable_decay"]),
        ({"optim": "normopt_prodigy", "learning_rate": 1.0}, ["lr_scheduler_type: cosine"]),
        (
            {"optim": "normopt", "optim_args": "schedule=cosine/warmup:1", "warmup_steps": 2},
            ["lr_scheduler_type: cosine", "lr_scheduler_warmup_steps: 1"],
        ),
        (
            {"optim": "normopt", "optim_args": "schedule_head=constant,schedule_bias=cosine"},
            ["lr_scheduler_type: linear; constant for head; cosine for bias"],
        ),
        (
            {"optim": "normopt", "lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0.5},
            ["lr_scheduler_type: inverse_sqrt", "lr_scheduler_warmup_steps: 0.5"],
        ),
    ],
)
def test_the_schedule_is_the_one_that_ran(tmp_path, options, lines):
    trainer = Trainer(bert(), arguments(tmp_path, **QUIET, **options), train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    update_model_card(tmp_path)
    found = re.findall("^- (lr_scheduler.*)", card_of(tmp_path), re.MULTILINE)
    assert found == lines


def test_a_scheduler_of_the_script_is_named(tmp_path):
    model = bert()
    optimizer = hf_normopt.create_normopt_optimizer(model, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    args = arguments(tmp_path, **QUIET, warmup_steps=2)
    trainer = NormOptTrainer(model, args, train_dataset=rows(), optimizers=(optimizer, scheduler))
    trainer.train()
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "- lr_scheduler_type: StepLR\n" in card
    assert "- lr_scheduler_warmup_steps: not used, StepLR is a scheduler of its own\n" in card
    assert "- schedule: `StepLR`\n" in card
    assert "so is the schedule, a `StepLR`." in card


def test_a_resumed_run_has_the_rates_of_its_checkpoint(tmp_path):
    args = arguments(tmp_path, optim="normopt", save_strategy="steps", save_steps=3, max_steps=6)
    args = dataclasses.replace(args, weight_decay=0.1)
    Trainer(bert(), args, train_dataset=rows()).train()
    other = dataclasses.replace(args, learning_rate=5e-3, weight_decay=0.3)
    trainer = NormOptTrainer(bert(), other, train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer.create_model_card()
    assert_true(tmp_path, unwrapped(trainer.optimizer))
    assert card_of(tmp_path).count("\n- learning_rate: 0.001\n") == 1
    args = reproduced(card_of(tmp_path))
    assert (args.learning_rate, args.weight_decay) == (1e-3, 0.1)

    card = update_model_card(tmp_path / "checkpoint-3")
    assert card == tmp_path / "checkpoint-3" / "README.md"
    assert "\n# checkpoint-3\n" in card.read_text()
    assert "\n- steps: 3 of 6\n" in card.read_text()


def test_a_card_before_training_claims_nothing(tmp_path):
    trainer = NormOptTrainer(bert(), arguments(tmp_path), train_dataset=rows())
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "\n- optimizer: NormOpt, which has not trained this model yet\n" in card
    assert "ADAMW" not in card
    assert "## Optimizer" not in card


def test_the_card_of_another_optimizer_is_left_alone(tmp_path):
    trainer = NormOptTrainer(
        bert(), arguments(tmp_path, optim="sgd", **QUIET), train_dataset=rows()
    )
    trainer.train()
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "- optimizer: Use OptimizerNames.SGD and the args are:\n" in card
    assert "normopt" not in card.lower()


def test_a_card_that_people_wrote_keeps_their_words(tmp_path):
    optimizer = hf_normopt.create_normopt_optimizer(bert(), lr=1e-3)
    write_report(tmp_path, report(optimizer, "linear"))
    head = "---\nlicense: mit\ntags: [a]\nmine: {b: 1}\n---\n\n# Mine\n\n- optimizer: AdamW\n"
    (tmp_path / "README.md").write_text(head)
    update_model_card(tmp_path / "README.md")
    card = card_of(tmp_path)
    assert "# Mine\n\n- optimizer: AdamW\n\n<!-- hf-normopt: start -->" in card
    (tmp_path / "README.md").write_text(f"{card}\n## Later\n")
    write_report(tmp_path, report(optimizer, "cosine"))
    update_model_card(tmp_path)
    assert card_of(tmp_path) == card.replace("`linear`", "`cosine`").replace(
        "    weight_decay=0.0,\n", '    weight_decay=0.0,\n    lr_scheduler_type="cosine",\n'
    ) + ("\n## Later\n")
    data = ModelCard(card).data.to_dict()
    assert data == {
        "license": "mit",
        "tags": ["a", "hf-normopt"],
        "mine": {"b": 1},
        "optimizer": "normopt",
        "optimizer_preset": "normopt",
    }


@pytest.mark.parametrize("optim", ["normopt_adam", "normopt", "adamw_torch"])
def test_a_plain_trainers_own_card_is_true(tmp_path, optim):
    """Without a second command, as unedited scripts end."""
    args = arguments(tmp_path, optim=optim, **QUIET)
    factory = {"optimizer_cls_and_kwargs": (NormOptFactory, {"lr": 2e-3})}
    given = factory if optim == "adamw_torch" else {}
    trainer = Trainer(bert(), args, train_dataset=rows(), **given)
    trainer.train()
    trainer.create_model_card()
    assert_true(tmp_path, unwrapped(trainer.optimizer))
    assert "OptimizerNames" not in card_of(tmp_path)


def test_the_card_names_what_trained_in_place_of_normopt(tmp_path):
    model, args = bert(), arguments(tmp_path, optim="normopt", **QUIET)
    optimizers = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    trainer = Trainer(model, args, train_dataset=rows(), optimizers=optimizers)
    trainer.train()
    trainer.create_model_card()
    assert "\n- optimizer: SGD\n" in card_of(tmp_path)


def test_a_card_with_the_newlines_of_windows(tmp_path):
    trainer = NormOptTrainer(bert(), arguments(tmp_path, **QUIET), train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    card, path = card_of(tmp_path), tmp_path / "README.md"
    path.write_bytes(card.replace("\n", "\r\n").encode())
    update_model_card(tmp_path)
    assert path.read_bytes().decode() == card


def test_a_card_of_a_run_that_was_reset_says_so(tmp_path):
    saving = {**QUIET, "save_strategy": "steps", "save_steps": 3}
    args = arguments(tmp_path, optim="adamw_torch", **saving)
    Trainer(bert(), args, train_dataset=rows()).train()
    args = arguments(tmp_path, optim="normopt", optim_args="on_mismatch=reset", **saving)
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer.create_model_card()
    assert "\n- begun anew: at step 3: it was not written by NormOpt." in card_of(tmp_path)


def test_a_stray_mark_takes_no_text_away(tmp_path):
    write_report(tmp_path, report(hf_normopt.create_normopt_optimizer(bert(), lr=1e-3)))
    (tmp_path / "README.md").write_text("# Mine\n\n<!-- hf-normopt: start -->\n\nWords\n")
    update_model_card(tmp_path)
    card = card_of(tmp_path)
    update_model_card(tmp_path)
    assert card_of(tmp_path) == card
    assert "\nWords\n" in card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "format_version None; this version of hf_normopt reads 1"),
        ("[]", "format_version None"),
        ('{"format_version": 99}', "format_version 99"),
        ('{"format', "cannot be read: Unterminated string"),
    ],
)
def test_a_report_that_cannot_be_read_is_named(tmp_path, capsys, content, message):
    (tmp_path / FILE_NAME).write_text(content)
    assert main(["card", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / FILE_NAME) in error
    assert message in error


def test_metadata_that_cannot_be_read_are_named(tmp_path, capsys):
    write_report(tmp_path, report(hf_normopt.create_normopt_optimizer(bert(), lr=1e-3)))
    (tmp_path / "README.md").write_text("---\na: [b\n---\n# Mine\n")
    assert main(["card", str(tmp_path)]) == 2
    assert "The metadata of" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert f"{tmp_path} has no normopt.json" in capsys.readouterr().err
    write_report(tmp_path, report(hf_normopt.create_normopt_optimizer(bert(), lr=1e-3)))
    assert main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'README.md'}\n"
    assert "- schedule" not in card_of(tmp_path)


class CardsAtSaves(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        self.found = [*getattr(self, "found", []), card_of(args.output_dir)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl
def test_the_cards_that_trl_makes_while_it_trains(tmp_path):
    trainer, seen = sft(tmp_path), CardsAtSaves()
    trainer.add_callback(seen)
    trainer.train()
    steps = [re.findall("- steps: (.*)", card) for card in seen.found]
    assert steps == [["2 of 3"], ["3"]]


class Hub(BaseHTTPRequestHandler):
    """What `create_repo`, `upload_folder` and `ModelCard.push_to_hub` ask of the Hub."""

    files: dict  # of all repositories, by path
    validated: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}"
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.answer({"url": f"{url}/{asked['organization']}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self.validated.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **mode} for name in names]})
        elif path.endswith("/commit/main"):
            repo = path.removeprefix("/api/models/").removesuffix("/commit/main")
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[f"{repo}/{entry['value']['path']}"] = content
            self.answer({"commitUrl": f"{url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.send_error(404, path)

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def hub():
    """The stand-in, while it serves."""
    Hub.files, Hub.validated = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def pushed(code, folder, home, endpoint):
    """The process of a script that pushes a folder."""
    here = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, **here, "HF_HOME": str(home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


PUSH = """
import sys
from huggingface_hub import ModelCard
from transformers import Trainer
from hf_normopt import NormOptTrainer, update_model_card
from tests.test_trainer import arguments, bert, rows

for cls, name in ((NormOptTrainer, "mixed"), (Trainer, "plain")):
    args = arguments(
        f"{sys.argv[1]}/{name}", optim="normopt_muon", max_steps=3, logging_strategy="no",
        push_to_hub=True, hub_model_id=f"me/{name}", hub_token="hf_dummy",
    )
    trainer = cls(bert(), args, train_dataset=rows())
    trainer.train()
    trainer.push_to_hub()
path = update_model_card(args.output_dir)
ModelCard.load(path).push_to_hub("me/plain", token="hf_dummy")
"""


@pytest.mark.slow
def test_what_the_hub_receives(tmp_path):
    with hub() as endpoint:
        done = pushed(PUSH, tmp_path, tmp_path / "home", endpoint)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("mixed", "plain"):
        received = Hub.files[f"me/{name}/README.md"].decode()
        assert received == card_of(tmp_path / name)
        assert "- optimizer: NormOpt (hf_normopt " in received
        assert len(table(received)) == 5
        data = ModelCard(received).data
        assert data.tags == ["hf-normopt", "generated_from_trainer"]
        assert (data["optimizer"], data["optimizer_preset"]) == ("normopt", "muon")
        assert {f"me/{name}/normopt.json", f"me/{name}/model.safetensors"} <= Hub.files.keys()
    assert card_of(tmp_path / "plain") in Hub.validated
