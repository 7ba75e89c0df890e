"""Every way to NormOpt gives the same training run, and what a trainer offers works with it."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import optuna
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from hf_normopt import (
    NormOpt,
    NormOptArguments,
    NormOptFactory,
    NormOptMixin,
    NormOptTrainer,
    create_normopt_optimizer,
    create_normopt_scheduler,
)
from hf_normopt.cli.launch import run
from hf_normopt.trainer.callback import warn_of_deepspeed

from .test_optimizer import llama
from .test_trainer import arguments, bert, equal, inner, rows, weights

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, WARMUP, DECAY = 6, 2, 0.1


@dataclass(frozen=True)
class Case:
    """What is asked for: as keyword arguments of the builder."""

    lr: float
    options: dict = field(default_factory=dict)

    @property
    def text(self):
        return ",".join(f"{key}={value}" for key, value in self.options.items())

    @property
    def typed(self):
        """As fields of NormOptArguments."""
        fields = {"lr_multipliers": {}, "role_schedules": {}}
        names = {"lr": "lr_multipliers", "schedule": "role_schedules"}
        for key, value in self.options.items():
            option, _, role = key.partition("_")
            if role and option in names:
                fields[names[option]][role] = value
            else:
                fields[key] = value
        return fields

    @property
    def builder(self):
        return {"lr": self.lr, "weight_decay": DECAY, **self.options}

    def args(self, folder, cls=TrainingArguments, **changes):
        common = {"learning_rate": self.lr, "weight_decay": DECAY, "warmup_steps": WARMUP}
        return arguments(folder, cls, **{**common, "max_steps": STEPS, **changes})


CASES = {
    "options": Case(1e-3, {"lr_head": 2.0, "momentum": 0.9, "schedule_head": "constant"}),
    # These presets have a schedule of their own: warmup-stable-decay and cosine.
    "scion": Case(1e-4, {"preset": "scion", "lr_embedding": 10.0}),
    "prodigy": Case(1.0, {"preset": "prodigy"}),
}


class MixedTrainer(NormOptMixin, Trainer):
    pass


def trained(trainer):
    trainer.train()
    assert isinstance(inner(trainer), NormOpt)
    return weights(trainer.model)


@lru_cache
def reference(name):
    """The weights that `optim="normopt"` with `optim_args` gives."""
    case = CASES[name]
    with TemporaryDirectory() as folder:
        args = case.args(folder, optim="normopt", optim_args=case.text)
        return trained(Trainer(bert(), args, train_dataset=rows()))


def by_normopt_trainer(case, folder):
    args = case.args(folder, optim_args=case.text)
    return trained(NormOptTrainer(bert(), args, train_dataset=rows()))


def by_mixin(case, folder):
    args = case.args(folder, optim="normopt", optim_args=case.text)
    return trained(MixedTrainer(bert(), args, train_dataset=rows()))


def by_typed_arguments(case, folder):
    args = case.args(folder, NormOptArguments, **case.typed)
    return trained(Trainer(bert(), args, train_dataset=rows()))


def by_factory(case, folder):
    factory = (NormOptFactory, case.builder)
    return trained(
        Trainer(bert(), case.args(folder), train_dataset=rows(), optimizer_cls_and_kwargs=factory)
    )


def by_optimizer(case, folder):
    model = bert()
    optimizers = (create_normopt_optimizer(model, **case.builder), None)
    return trained(Trainer(model, case.args(folder), train_dataset=rows(), optimizers=optimizers))


def by_loop(case, folder):
    """A raw loop with accelerate; the trainer only says in which order the data come."""
    model, accelerator = bert(), Accelerator(cpu=True)
    batches = iter(Trainer(bert(), case.args(folder), train_dataset=rows()).get_train_dataloader())
    optimizer = create_normopt_optimizer(model, **case.builder)
    scheduler = create_normopt_scheduler(optimizer, STEPS, num_warmup_steps=WARMUP)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    model.train()
    for _ in range(STEPS):
        accelerator.backward(model(**next(batches)).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return weights(model)


DOORS = (
    *(by_normopt_trainer, by_mixin, by_typed_arguments),
    *(by_factory, by_optimizer, by_loop),
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_door_gives_the_run_of_every_other_bit_for_bit(door, case, tmp_path):
    assert equal(door(CASES[case], tmp_path), reference(case))


def test_schedules_of_the_cases_differ_from_the_trainers_own(tmp_path):
    """Otherwise the test above would not notice a door that forgets them."""
    for name, case in CASES.items():
        args = case.args(tmp_path, optim="normopt", optim_args=case.text)
        trainer = Trainer(bert(), args, train_dataset=rows())
        trainer.create_optimizer_and_scheduler(STEPS)  # no callback: the trainer's own
        rates = [trainer.lr_scheduler.lr_lambdas[0](step) for step in range(STEPS)]
        assert rates == [0, 0.5, 1, 0.75, 0.5, 0.25], name
        trainer = Trainer(bert(), args, train_dataset=rows())
        trainer.train()
        factors = trainer.lr_scheduler.lr_lambdas
        found = [[factor(step) for step in range(STEPS)] for factor in factors]
        assert any(row != rates for row in found), name


def t5():
    set_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=30, decoder_start_token_id=0, pad_token_id=0)
    )


class MixedSeq2SeqTrainer(NormOptMixin, Seq2SeqTrainer):
    pass


def test_doors_of_the_seq2seq_trainer_give_one_run(tmp_path):
    data = [{"input_ids": [4, 5, 6 + i], "labels": [7 + i, 8]} for i in range(12)]
    case = CASES["options"]

    def args(**changes):
        return case.args(tmp_path, Seq2SeqTrainingArguments, **changes)

    named = args(optim="normopt", optim_args=case.text)
    runs = [
        trained(cls(t5(), named, train_dataset=data))
        for cls in (Seq2SeqTrainer, MixedSeq2SeqTrainer)
    ]
    model = t5()
    optimizers = (create_normopt_optimizer(model, **case.builder), None)
    runs += [
        trained(MixedSeq2SeqTrainer(t5(), args(optim_args=case.text), train_dataset=data)),
        trained(Seq2SeqTrainer(model, args(), train_dataset=data, optimizers=optimizers)),
    ]
    assert all(equal(runs[0], run) for run in runs[1:])
    assert not equal(runs[0], weights(t5()))


# --- hf-normopt run: scripts that know nothing of the package ---

SCRIPT = """
import os
import sys

import torch
from transformers import AutoModelForSequenceClassification, HfArgumentParser, Trainer
from transformers import TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[2:])


def main():
    folder = sys.argv[1]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = Trainer(model, args, train_dataset=torch.load(os.path.join(folder, "rows.pt")))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = {"weights": dict(model.named_parameters()), "losses": losses}
    torch.save(found, os.path.join(args.output_dir, f"found_{args.process_index}.pt"))


if __name__ == "__main__":
    main()
"""
PYTHON = sys.executable
COMMAND = str(Path(sysconfig.get_path("scripts")) / "hf-normopt")
LIMIT = 240  # seconds


def in_shell(command, folder, timeout=LIMIT):
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    changes = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache")}
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def flags(args):
    """Training arguments as a command line."""
    return [word for key, value in args.items() for word in (f"--{key}", str(value))]


def run_script(launcher, case, folder, **changes):
    """What a script trains that a launcher starts: by rank, its weights and losses."""
    (folder / "script.py").write_text(SCRIPT)
    bert().save_pretrained(folder / "model")
    torch.save(rows(), folder / "model" / "rows.pt")
    args = {
        "output_dir": folder / "out",
        "optim": "normopt",
        "optim_args": case.text,
        "learning_rate": case.lr,
        "weight_decay": DECAY,
        "warmup_steps": WARMUP,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 1,
        **changes,
    }
    done = in_shell([*launcher, str(folder / "model"), *flags(args)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NormOpt, preset" in done.stdout
    return [torch.load(path) for path in sorted((folder / "out").glob("found_*.pt"))]


ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "case"),
    [
        ([COMMAND, "run", "-m", "script"], "prodigy"),
        ([PYTHON, "-m", "hf_normopt", "run", "script.py"], "scion"),
        ([*ACCELERATE, "-m", "hf_normopt", "run", "script.py"], "options"),
        ([PYTHON, "-m", "hf_normopt", "run", *ACCELERATE[1:], "script.py"], "options"),
    ],
    ids=["module", "python -m", "accelerate launch", "a launcher is the script"],
)
def test_an_unedited_script_gives_the_run_of_every_other_door(launcher, case, tmp_path):
    (found,) = run_script(launcher, CASES[case], tmp_path)
    assert equal(found["weights"], reference(case))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_an_unedited_script_runs_on_two_processes_under_torchrun(tmp_path):
    launcher = [PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    launcher += ["-m", "hf_normopt", "run", "script.py"]
    changes = {"max_steps": 24, "logging_steps": 4, "learning_rate": 5e-3}
    ranks = run_script(launcher, CASES["options"], tmp_path, **changes)
    assert len(ranks) == 2
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    losses = ranks[0]["losses"]
    assert losses[-1] < 0.9 * losses[0]


FACTS = """
import json
import multiprocessing
import os
import sys

import neighbour


class Doubler:  # a pickled instance needs the script as its module
    def __call__(self, x):
        return 2 * x


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        doubled = pool.map(Doubler(), [1, 2])
    main = sys.modules["__main__"]
    facts = {
        "argv": sys.argv,
        "path": os.path.realpath(sys.path[0]),
        "name": __name__,
        "file": os.path.realpath(__file__),
        "main": main.__dict__ is globals(),
        "module": Doubler.__module__,
        "spec": __spec__ and __spec__.name,
        "doubled": doubled,
    }
    print("FACTS", json.dumps(facts), flush=True)
    if "--fail" in sys.argv:
        raise LookupError("on purpose")
    sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [["link.py", "--fail", "-m", "1"], ["-m", "package.script", "run"]],
    ids=["script", "module"],
)
def test_a_script_finds_what_it_finds_under_python(target, tmp_path):
    """Its name, file, arguments, neighbours, spawned processes, exit status, traceback."""
    for folder in (tmp_path, tmp_path / "package", tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        (folder / "script.py").write_text(FACTS)
        (folder / "neighbour.py").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "elsewhere" / "script.py")
    plain = in_shell([PYTHON, *target], tmp_path)
    ours = in_shell([COMMAND, "run", *target], tmp_path)
    assert "FACTS" in plain.stdout, plain.stderr
    assert ours.stdout == plain.stdout, ours.stderr
    assert ours.returncode == plain.returncode == (1 if "--fail" in target else 3)
    if "--fail" in target:
        assert ours.stderr.splitlines()[-2:] == plain.stderr.splitlines()[-2:]  # line and error
    else:  # torchao, which transformers imports where it is installed, writes there
        assert "Traceback" not in ours.stderr + plain.stderr


def test_what_a_script_raises_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-normopt"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    (tmp_path / "script.py").write_text("raise SystemExit('no data')")
    with pytest.raises(SystemExit, match="no data"):
        run([str(tmp_path / "script.py")])


@pytest.mark.parametrize("words", [[], ["--optim"], ["-m"], ["nowhere.py"]])
def test_run_without_a_script_says_so(words, capsys):
    assert run(words) == 2
    expected = "there is no nowhere.py" if words == ["nowhere.py"] else "usage: hf-normopt run"
    assert expected in capsys.readouterr().err


# --- what a trainer offers ---


class Witness(TrainerCallback):
    """Notes the optimizer with which each training begins."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        made = optimizer.optimizer
        self.found.append(
            {
                "optimizer": made,
                "steps": made.steps,
                "state": len(made.state),
                "rates": {g["role"]: g["initial_lr"] * g["multiplier"] for g in made.param_groups},
                "momentum": made.policy["linear"].momentum,
                "preset": made.origin["preset"],
            }
        )


def fresh():
    """For `model_init`, which may take a trial."""
    return bert()


def search(trainer_class, args, space):
    """The optimizers of a search of three trials."""
    witness = Witness()
    trainer = trainer_class(
        args=args,
        model_init=fresh,
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[witness],
    )
    sampler = optuna.samplers.RandomSampler(seed=0)
    best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna", sampler=sampler)
    assert best.hyperparameters.keys() == space(optuna.trial.FixedTrial(SPACE)).keys()
    assert len({id(trial["optimizer"]) for trial in witness.found}) == 3
    assert all(trial["steps"] == trial["state"] == 0 for trial in witness.found)
    return witness.found


SPACE = {
    "learning_rate": 1e-3,
    "optim_args": "lr_head=2.0",
    "optim": "normopt",
    "momentum": 0.5,
    "step": "x",
}


@pytest.mark.parametrize("trainer_class", [Trainer, NormOptTrainer])
def test_a_search_over_learning_rate_and_options_reaches_each_trials_optimizer(
    tmp_path, trainer_class
):
    asked = []

    def space(trial):
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        head = trial.suggest_categorical("optim_args", ["lr_head=2.0", "lr_head=4.0"])
        asked.append((rate, float(head.rpartition("=")[2])))
        return {"learning_rate": rate, "optim_args": head}

    args = arguments(tmp_path, optim="normopt", optim_args="lr_head=1.0", max_steps=2)
    found = search(trainer_class, args, space)
    for trial, (rate, head) in zip(found, asked, strict=False):
        assert trial["rates"]["linear"] == rate
        assert trial["rates"]["head"] == pytest.approx(rate * head)


def test_a_search_over_names_and_typed_fields_reaches_each_trials_optimizer(tmp_path):
    asked = []

    def space(trial):
        name = trial.suggest_categorical("optim", ["normopt", "normopt_scion", "normopt_muon"])
        momentum = trial.suggest_float("momentum", 0.1, 0.9)
        asked.append((name.partition("_")[2] or "normopt", momentum))
        return {"optim": name, "momentum": momentum}

    args = arguments(tmp_path, NormOptArguments, momentum=0.5, max_steps=2)
    found = search(Trainer, args, space)
    assert [(trial["preset"], trial["momentum"]) for trial in found] == asked[:3]


def test_model_init_gives_the_run_of_its_model(tmp_path):
    args = CASES["options"].args(tmp_path, optim="normopt", optim_args=CASES["options"].text)
    trainer = Trainer(args=args, model_init=fresh, train_dataset=rows())
    first, second = trained(trainer), trained(trainer)  # each begins with a model of its own
    assert equal(first, second)


def test_an_optimizer_of_ones_own_is_refused_with_model_init(tmp_path):
    optimizer = create_normopt_optimizer(bert(), lr=1e-3)
    with pytest.raises(RuntimeError, match="model_init"):
        Trainer(args=arguments(tmp_path), model_init=fresh, optimizers=(optimizer, None))


# Of a step: the polar factor makes small singular values, where rounding shows, as large as others.
ROUNDING = 0.1
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def furthest(a, b):
    """The largest difference of two models' weights.

    Without the biases of keys: the softmax cancels them, so that their gradient is rounding.
    """
    return max((a[name] - b[name]).abs().max().item() for name in a if "key.bias" not in name)


def first_step(folder, model=None, **changes):
    """A step of all the learning rate on the first four rows."""
    model = model or bert(**NO_DROPOUT)
    common = {"optim": "normopt", "max_steps": 1, "lr_scheduler_type": "constant"}
    args = arguments(folder, **{**common, **changes})
    return trained(Trainer(model, args, train_dataset=rows(4)))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Two micro-batches of two: one step, the step of the batch of four."""
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = first_step(tmp_path)
    assert furthest(first_step(tmp_path, **halves), whole) < ROUNDING * 1e-3
    assert furthest(weights(bert()), whole) > 1e-3


def test_clipping_changes_no_direction_but_what_a_gradient_counts_in_the_momentum(tmp_path):
    clips = (0.0, 1e-2)
    assert furthest(*(first_step(tmp_path, max_grad_norm=c) for c in clips)) < ROUNDING * 1e-3
    runs = [
        trained(
            Trainer(
                bert(**NO_DROPOUT),
                arguments(tmp_path, optim="normopt", max_grad_norm=c),
                train_dataset=rows(),
            )
        )
        for c in clips
    ]
    assert furthest(*runs) > 1e-3


def state_dtypes(trainer):
    return {
        value.dtype
        for state in inner(trainer).state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("kind", ["bf16=True", "bf16 weights"])
def test_state_is_float32_under_bf16(tmp_path, kind):
    mixed = kind == "bf16=True"
    model = bert() if mixed else bert().to(torch.bfloat16)
    args = arguments(tmp_path, optim="normopt", bf16=mixed, save_strategy="steps", save_steps=3)
    trainer = Trainer(model, args, train_dataset=rows())
    run = trained(trainer)
    assert {p.dtype for p in run.values()} == {torch.float32 if mixed else torch.bfloat16}
    kept = {torch.float32} if mixed else {torch.float32, torch.int16}  # with compensations
    assert state_dtypes(trainer) == kept
    assert all(p.isfinite().all() for p in run.values())
    again = bert() if mixed else bert().to(torch.bfloat16)
    resumed = Trainer(again, args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert state_dtypes(resumed) == kept
    assert equal(weights(resumed.model), run)


@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_resumes(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # inductor: a minute
    saved = {"save_strategy": "steps", "save_steps": 1}
    args = arguments(tmp_path, optim="normopt", max_steps=2, **compiled, **saved)
    trainer = Trainer(bert(**NO_DROPOUT), args, train_dataset=rows())
    run = trained(trainer)
    plain = Trainer(
        bert(**NO_DROPOUT), arguments(tmp_path, optim="normopt", max_steps=2), train_dataset=rows()
    )
    assert furthest(run, trained(plain)) < ROUNDING * 1e-3
    groups, others = inner(trainer).param_groups, inner(plain).param_groups
    assert [g["param_names"] for g in groups] == [g["param_names"] for g in others]
    resumed = Trainer(bert(**NO_DROPOUT), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert furthest(weights(resumed.model), run) < ROUNDING * 1e-3


# transformers 5.23 has a new name for it, which 5.2 does not know
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = [
        trained(
            Trainer(
                bert(),
                arguments(tmp_path, optim="normopt", gradient_checkpointing=on),
                train_dataset=rows(),
            )
        )
        for on in (False, True)
    ]
    assert equal(*runs)


def causal_lm(lora):
    """A Llama with a tied table, or one with adapters."""
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=not lora)
    if not lora:
        return model
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, config)


REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("lora", "options"), [(False, REENTRANT), (True, REENTRANT), (False, COMPILED)], ids=str
)
def test_checkpointed_and_compiled_causal_lms_train_alike(tmp_path, lora, options):
    """Same weights, and the same roles of the same names, as tied tables and products have."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 33, (16, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in ids]
    runs, groups = [], []
    for changes in ({}, {"gradient_checkpointing": True, **options}):
        args = arguments(tmp_path, optim="normopt_modular", max_steps=3, **changes)
        trainer = Trainer(causal_lm(lora), args, train_dataset=data)
        runs.append(trained(trainer))
        groups.append([(g["label"], g["param_names"]) for g in inner(trainer).param_groups])
    assert furthest(*runs) < ROUNDING * 1e-3
    assert groups[0] == groups[1]
    assert ("linear/product" if lora else "embedding/tied") in [label for label, _ in groups[1]]


class ShortOfMemory(Trainer):
    """Fails for batches of four once it has made a number of steps."""

    steps = 0

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["labels"]) > 3 and self.state.global_step == self.steps:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def test_a_smaller_batch_is_found_before_the_first_step(tmp_path):
    """auto_find_batch_size: the run is that of the smaller batch from the start."""
    common = {"optim": "normopt", "max_steps": 4}
    args = arguments(tmp_path, **common, auto_find_batch_size=True)
    found = ShortOfMemory(bert(**NO_DROPOUT), args, train_dataset=rows())
    args = arguments(tmp_path, **common, per_device_train_batch_size=3)
    asked = Trainer(bert(**NO_DROPOUT), args, train_dataset=rows())
    assert equal(trained(found), trained(asked))
    assert inner(found).steps == found.state.global_step == 4


def test_a_smaller_batch_is_found_on_the_way_and_its_checkpoints_resume(tmp_path):
    """The trainer counts steps anew; the model, the momentum and their checkpoints go on."""
    args = arguments(
        tmp_path,
        optim="normopt",
        auto_find_batch_size=True,
        save_strategy="steps",
        save_steps=3,
    )
    trainer, witness = ShortOfMemory(bert(), args, train_dataset=rows()), Witness()
    trainer.add_callback(witness)
    trainer.steps = 2
    run = trained(trainer)
    before, after = witness.found
    assert before["optimizer"] is after["optimizer"]
    assert (before["state"], after["state"]) == (0, len(run))
    assert inner(trainer).steps == trainer.state.global_step == 6
    resumed = Trainer(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(weights(resumed.model), run)


def test_a_second_training_writes_checkpoints_that_resume(tmp_path):
    args = arguments(tmp_path, optim="normopt", save_strategy="steps", save_steps=3)
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    run = trained(trainer)
    resumed = Trainer(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(weights(resumed.model), run)


# --- what is said to the user ---


@pytest.fixture
def notices(caplog):
    """What the package has said so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("hf_normopt")]


def test_an_ordinary_run_says_nothing(tmp_path, notices):
    args = arguments(
        tmp_path,
        optim="normopt",
        optim_args="schedule_head=constant",
        warmup_steps=1,
        save_strategy="steps",
        save_steps=3,
    )
    for trainer_class in (Trainer, NormOptTrainer):
        trainer_class(bert(), args, train_dataset=rows()).train()
        resumed = trainer_class(bert(), args, train_dataset=rows())
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    plain = arguments(tmp_path, optim="sgd")
    Trainer(bert(), plain, train_dataset=rows()).train()
    assert notices() == []


DEEPSPEED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 0},
}


@pytest.mark.parametrize("as_file", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize("section", [False, True], ids=["without", "with optimizer"])
def test_deepspeeds_own_optimizer_is_told(tmp_path, notices, as_file, section):
    config = {key: DEEPSPEED[key] for key in DEEPSPEED if key != "optimizer" or section}
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(config))
    warn_of_deepspeed(SimpleNamespace(deepspeed=str(file) if as_file else config, process_index=0))
    if not section:
        assert notices() == []
        return
    (notice,) = notices()
    assert "has the section optimizer (AdamW)" in notice
    assert "Remove the section" in notice


@pytest.mark.parametrize(
    ("trainer_class", "optim", "told"),
    [
        (Trainer, {"optim": "normopt"}, 1),
        (NormOptTrainer, {"optim": "normopt"}, 1),
        (NormOptTrainer, {}, 1),
        (NormOptTrainer, {"optim": "sgd"}, 0),
        (Trainer, {}, 0),
    ],
)
def test_deepspeeds_own_optimizer_is_told_once_by_each_door(
    tmp_path, notices, trainer_class, optim, told
):
    args = arguments(tmp_path, **optim)
    args.deepspeed = DEEPSPEED  # afterwards: the arguments themselves ask for the package
    trainer_class(bert(), args, train_dataset=rows())
    assert len(notices()) == told


def test_fsdp_on_cpus_is_told(tmp_path, notices):
    trainer = Trainer(bert(), arguments(tmp_path, optim="normopt"), train_dataset=rows())
    trainer.args.fsdp = True  # afterwards: a single process is refused
    trainer.train()
    (notice,) = notices()
    assert "nothing is sharded" in notice


def test_a_new_learning_rate_on_resuming_is_told(tmp_path, notices):
    common = {"optim": "normopt", "save_strategy": "steps", "save_steps": 3}
    run = trained(Trainer(bert(), arguments(tmp_path, **common), train_dataset=rows()))
    args = arguments(tmp_path, **common, learning_rate=5e-3)
    resumed = Trainer(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (notice,) = notices()
    assert "learning_rate=0.005 has no effect: the checkpoint's 0.001 goes on" in notice
    assert equal(weights(resumed.model), run)


@pytest.mark.parametrize(("clip", "told"), [(1.0, 1), (0.0, 0)])
def test_clipping_under_the_dual_norm_is_told(tmp_path, notices, clip, told):
    args = arguments(
        tmp_path, optim="normopt", optim_args="step_size=dual_norm", max_grad_norm=clip
    )
    Trainer(bert(), args, train_dataset=rows()).train()
    assert [notice.partition(" changes")[0] for notice in notices()] == ["max_grad_norm=1"] * told


def test_an_optimizer_that_is_not_the_one_asked_for_is_told(tmp_path, notices):
    model = bert()
    optimizers = (torch.optim.SGD(model.parameters(), lr=1e-3), None)
    args = arguments(tmp_path, optim="normopt")
    Trainer(model, args, train_dataset=rows(), optimizers=optimizers).train()
    assert notices() == ["optim='normopt' was asked for, but the trainer trains with SGD."]


def test_a_schedule_that_a_scheduler_of_ones_own_keeps_out_is_told(tmp_path, notices):
    model = bert()
    optimizer = create_normopt_optimizer(model, lr=1e-3, schedule_head="constant")
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args = arguments(tmp_path)
    Trainer(model, args, train_dataset=rows(), optimizers=(optimizer, scheduler)).train()
    (notice,) = notices()
    assert "schedule constant has no effect: the trainer's scheduler is a ConstantLR" in notice
