"""`hf-normopt find-rate`: which rates it tries, what a short run is, and what it leaves."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from hf_normopt.cli import find_rate as module
from hf_normopt.cli.commands import main
from hf_normopt.cli.find_rate import Search, Tried, find_rate
from hf_normopt.trainer.trial import Outcome, Trial

SCRIPT = """
import os
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
LAYOUT = dict(vocab_size=16, hidden_size=16, intermediate_size=32)
config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **LAYOUT)
data = [{"input_ids": (x := (torch.arange(8) + i).remainder(16)), "labels": x} for i in range(40)]
usual = dict(per_device_train_batch_size=4, dataloader_pin_memory=False)
args = TrainingArguments("mine", num_train_epochs=20, **usual, %s)
set_seed(args.seed)
assert not os.path.exists(args.output_dir)  # or a script would refuse, or resume
args.save_strategy = "steps"
optimizers = (None, None)
model = LlamaForCausalLM(config)
if %r:
    optimizers = torch.optim.SGD(model.parameters(), lr=0.5), None
trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, optimizers=optimizers)
try:
    trainer.train()
finally:
    open("after", "w").close()
"""
OPTIONS = (
    'learning_rate=1e-3, warmup_steps=50, eval_strategy="steps", eval_steps=1, save_steps=1, '
    'report_to="all", lr_scheduler_type="cosine"'
)


def outcome(loss, steps=4, **more):
    return Outcome(steps=steps, total=80, losses=[3.0] + [loss] * (steps - 1), **more)


def searched(loss_at, first=5, most=12):
    """The powers that a search tries, in order, and the search."""
    search, order = Search({}), []
    while (power := search.next(first, most)) is not None:
        order.append(power)
        search.tried[power] = Tried(power, outcome(loss_at(power), rate=2.0**power))
    return order, search


def test_the_best_rate_has_neighbours_on_both_sides():
    order, search = searched(lambda power: 1 + 0.2 * (power - 1) ** 2)
    assert order == [0, 1, -1, 2, -2]
    assert (search.best, search.chosen, search.is_at_edge) == (1, 1, False)


@pytest.mark.parametrize("at", [6, -6])
def test_a_best_rate_at_the_edge_extends_the_search(at):
    order, search = searched(lambda power: 1 + 0.2 * abs(power - at), most=20)
    assert order[:5] == [0, 1, -1, 2, -2]
    assert search.chosen == at
    assert not search.is_at_edge
    _, short = searched(lambda power: 1 + 0.2 * abs(power - at), most=6)
    assert short.is_at_edge
    assert "at the edge" in module._verdict(short)


def test_the_middle_of_the_rates_that_are_as_good_is_chosen():
    _, search = searched(lambda power: {-1: 1.012, 0: 1.005, 1: 1.0}.get(power, 1.5))
    assert search.near == [-1, 0, 1]
    assert (search.best, search.chosen) == (1, 0)
    assert "it is within 2%" in module._verdict(search)


def test_nothing_is_tried_above_a_rate_that_is_too_large():
    order, search = searched(lambda power: math.nan if power > -4 else 1.0 + 0.1 * abs(power + 5))
    assert max(order) == 0
    assert search.chosen == -5
    assert search.tried[0].loss == math.inf


def test_where_no_rate_is_stable_it_says_so():
    order, search = searched(lambda power: math.inf, most=4)
    assert order == [0, -1, -2, -3]
    assert search.chosen is None
    assert "No rate is stable" in module._verdict(search)


# --- one run ---


def _trial(rank, folder, options, own, values):
    from hf_normopt.trainer.trial import begin_trial

    os.chdir(folder)
    os.environ |= Trial(outcome="outcome.json", folder="elsewhere", **values).environment()
    torch.set_num_threads(1)
    begin_trial()
    exec(compile(SCRIPT % (options, own), "script.py", "exec"), {"__name__": "__main__"})


def tried(folder, options=OPTIONS, own=False, **values):
    given = str(folder), options, own, {"factor": 2.0, "steps": 0.1} | values
    mp.start_processes(_trial, args=given, nprocs=1, start_method="fork")
    return Outcome(**json.loads((folder / "outcome.json").read_text()))


@pytest.mark.slow
def test_a_run_is_short_and_leaves_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("x")
    found = tried(tmp_path)
    assert (found.rate, found.steps, found.total, found.error) == (2e-3, 20, 200, "")
    assert len(found.losses) == 20
    assert found.losses[-1] < found.losses[0]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious"]
    assert not (tmp_path / "after").exists()  # what follows training does not happen
    assert not list(tmp_path.glob("**/checkpoint-*"))


@pytest.mark.slow
def test_runs_have_the_same_data_and_their_own_rate(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    low, high = (
        tried(tmp_path / name, factor=factor, optim="normopt", steps=6)
        for name, factor in (("a", 0.5), ("b", 4.0))
    )
    assert low.losses[0] == high.losses[0]
    assert low.losses[-1] > high.losses[-1]
    assert (low.rate, high.rate, low.steps) == (5e-4, 4e-3, 6)
    assert low.optimizer == "normopt (NormOpt)"


@pytest.mark.slow
def test_an_optimizer_of_the_scripts_own_takes_the_rate(tmp_path):
    found = tried(tmp_path, own=True, start=0.25)
    assert found.rate == 0.5
    assert found.optimizer.endswith("(SGD)")


@pytest.mark.slow
def test_an_error_of_the_script_is_told(tmp_path):
    with pytest.raises(Exception, match="exit code 1"):
        tried(
            tmp_path,
            own=True,
            optim="adamw_torch",
            options='lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": "x"}',
        )
    found = Outcome(**json.loads((tmp_path / "outcome.json").read_text()))
    assert found.error
    assert Tried(0, found).loss == math.inf


# --- the command ---


@pytest.fixture
def runs(monkeypatch):
    """Stands in for the processes; the powers it was asked for."""
    asked = []

    def run(words, env, **options):
        trial = Trial(**json.loads(env["HF_NORMOPT_TRIAL"]))
        asked.append(trial)
        loss = 1 + abs(math.log2(trial.factor) - 1)
        made = outcome(loss, rate=1e-3 * trial.factor)
        with open(trial.outcome, "w") as file:
            json.dump(vars(made), file)

    monkeypatch.setattr(module.subprocess, "run", run)
    return asked


def test_the_command_names_the_rate(runs, tmp_path, capsys):
    state = tmp_path / "state.json"
    words = ["find-rate", "--steps", "0.1", "--state", str(state), "script.py", "--steps", "3"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Use a learning rate of 0.002" in said
    assert [trial.factor for trial in runs] == [1, 2, 0.5, 4, 0.25]
    assert all(trial.steps == 0.1 for trial in runs)
    assert json.loads(state.read_text())["asked"]["command"] == ["script.py", "--steps", "3"]


def test_a_search_goes_on_where_it_was_cut(runs, tmp_path, capsys):
    state = str(tmp_path / "state.json")
    asked = ["--points", "3", "--state", state, "script.py"]
    assert find_rate([*asked[:4], "--most", "2", "script.py"]) == 0
    assert find_rate(asked) == 0
    assert [trial.factor for trial in runs] == [1, 2, 0.5, 4]
    assert find_rate(asked) == 0  # nothing is left to do
    assert len(runs) == 4
    assert find_rate([*asked[:-1], "another.py"]) == 2
    assert "of another search (command" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--plot", "rates.jpg", "found 'rates.jpg'"),
        ("--plot", "nowhere/rates.png", "There is no folder nowhere"),
        ("--state", "nowhere/rates.json", "There is no folder nowhere"),
        ("--state", ".", ". is a folder"),
    ],
)
def test_files_are_looked_at_before_the_search(runs, capsys, option, file, words):
    assert find_rate([option, file, "script.py"]) == 2
    assert words in capsys.readouterr().err
    assert not runs


def test_the_picture_is_drawn(runs, tmp_path):
    assert find_rate(["--plot", str(tmp_path / "rates.svg"), "script.py"]) == 0
    assert "<svg" in (tmp_path / "rates.svg").read_text()


def test_a_file_of_the_users_own_is_no_state(tmp_path, capsys):
    file = tmp_path / "notes.json"
    file.write_text("{}")
    assert find_rate(["--state", str(file), "script.py"]) == 2
    assert "is left alone" in capsys.readouterr().err
    assert file.read_text() == "{}"


def test_a_script_that_does_not_train_is_told_with_its_last_words(monkeypatch, capsys):
    def run(words, stdout, **options):
        stdout.write(b"no such data")
        return module.subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert find_rate(["script.py"]) == 2
    said = capsys.readouterr().err
    assert "status 3" in said
    assert "no such data" in said


@pytest.mark.parametrize("words", [[], ["--steps", "0.1"], ["--steps", "0.1", "-x"]])
def test_without_a_script_it_says_what_it_needs(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        find_rate(words)
    assert stopped.value.code == 2
    assert "name a script" in capsys.readouterr().err


@pytest.mark.slow
def test_a_script_as_transformers_examples_are(tmp_path, monkeypatch, capsys):
    """Its rate is found, and what it would save, resume, evaluate and push stays untouched."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 240), ("dev", 16)):
        texts = torch.randint(0, 8, (count, 6), generator=generator).tolist()
        rows = [f"{''.join('abcdefgh'[i] for i in t)},{int(sum(t) > 21)}" for t in texts]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    for folder in ("out/checkpoint-7", "final"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("precious")
    script = Path(__file__).parent / "example_script.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(script.parent.parent))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = (
        "--train_file train.csv --validation_file dev.csv --output_dir out --do_train --do_eval "
        "--per_device_train_batch_size 16 --num_train_epochs 20 --learning_rate 3e-4 "
        "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end true "
        "--metric_for_best_model accuracy --resume_from_checkpoint out/checkpoint-7 "
        "--push_to_hub true --report_to none --optim normopt --warmup_steps 0.1"
    )
    search = ["--points", "2", "--most", "2", "--factor", "10", "--steps", "20"]
    assert find_rate([*search, str(script), *words.split()]) == 0
    said = capsys.readouterr().out
    assert "Use a learning rate of 0.003 with normopt (NormOpt)." in said
    assert "20 steps (300 in the script)" in said
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
