"""The comparison of optimizers: on functions whose optimum is known, killed, and against scipy."""

import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from recipes.arena.plan import Plan, Run, best_place, missing, next_places, place_of, rate_at, tuned
from recipes.arena.report import paired, rows, share_to_reach, table, width
from recipes.arena.runs import Results, Task, arguments, compare

ROOT = Path(__file__).parent.parent
PLAN = Plan("task", {"adamw": 1e-3, "normopt": 1e-3}, fresh=(10, 11, 12, 13))
TASK = Task("task", "text_classification", ("--max_steps", "10"))


def value(run, best=2**-5):
    """A parabola over the logarithm of the rate, with noise that both contenders share."""
    noise = 0.01 * math.sin(run.seed)
    ahead = 0.1 + 1e-4 * (run.seed % 2) if run.contender == "normopt" else 0.0
    return 1 + 0.05 * math.log2(run.rate / best) ** 2 + noise - ahead


def made(task, run, results):
    return {
        "metrics": {"validation_loss": value(run)},
        "cpu_seconds": 2.0 * run.share,
        "curve": [],
        "steps": 10,
    }


def results_of(plan, folder):
    results = Results(folder / "runs.jsonl")
    compare(plan, TASK, results, "loss", made)
    return results


@pytest.mark.parametrize("best", [2**-14, 2**-10, 2**-3])
def test_a_grid_grows_until_its_optimum_is_inside(best):
    values, start = {}, place_of(1e-3)
    while places := next_places(values, start, most=99):
        values |= {p: abs(math.log2(rate_at(p) / best)) for p in places}
    assert rate_at(best_place(values)) == pytest.approx(best, rel=1e-3)
    assert min(values) < best_place(values) < max(values)
    assert {best_place(values) - 1, best_place(values) + 1} <= values.keys()


def test_rates_are_a_factor_apart_and_diverging_ones_are_left():
    assert rate_at(place_of(1e-3) + 2) == pytest.approx(2 * rate_at(place_of(1e-3)), rel=1e-3)
    values, start = {}, place_of(1.0)
    while places := next_places(values, start, fine=False):
        values |= {p: math.inf if rate_at(p) > 0.1 else -rate_at(p) for p in places}
    assert rate_at(best_place(values)) == 2**-4


def test_all_get_the_same_number_of_rates_and_the_same_fresh_seeds(tmp_path):
    plan = replace(PLAN, contenders={"adamw": 1e-3, "normopt": 2**-5})
    known = results_of(plan, tmp_path).values("task", "loss")
    numbers = {name: len(tuned(plan, known, name)) for name in plan.contenders}
    assert numbers["adamw"] == numbers["normopt"] > 5
    fresh = [key for key in known if key[3] in plan.fresh]
    assert {key[2] for key in fresh} == {place_of(2**-5)}
    assert len(fresh) == 8
    assert not missing(plan, known)


def test_the_table_says_what_is_there(tmp_path):
    plan = replace(PLAN, shares=(0.5,))
    known = results_of(plan, tmp_path).values("task", "loss")
    seconds = {key: 2.0 * key[4] for key in known}
    known |= {k: v + 0.2 for k, v in known.items() if k[4] == 0.5 and k[1] == "normopt"}
    adamw, normopt = rows(plan, known, seconds)
    assert (adamw["rate"], adamw["interior"]) == (2**-5, True)
    assert normopt["paired"].mean == pytest.approx(-0.10005)
    assert normopt["paired"].verdict == "better"
    assert 0.5 < normopt["steps_to_reference"] < 1
    assert normopt["seconds_to_reference"] == pytest.approx(normopt["steps_to_reference"])
    text = table([adamw, normopt])
    assert "4 of 4 better: better" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_paired_differences_are_scipys():
    generator = np.random.default_rng(0)
    theirs = generator.normal(1.0, 0.5, 8)
    ours = theirs - 0.05 + generator.normal(0.0, 0.02, 8)
    found = paired(list(ours), list(theirs), margin=0.01)
    low, high = stats.t.interval(0.95, 7, np.mean(ours - theirs), stats.sem(ours - theirs))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.better == (ours < theirs).sum()
    assert found.verdict == "better"
    assert paired(list(ours), list(theirs), margin=0.2).verdict == "equal"
    assert paired(list(ours), list(theirs), margin=0.01, sign=-1).verdict == "worse"
    assert paired([1.0], [2.0], margin=0.1).verdict == "open"
    assert paired([1.0, math.inf], [2.0, 3.0], margin=0.1).verdict == "open"


def test_the_width_of_a_parabola():
    values = {p: 1 + 0.01 * (p / 2) ** 2 for p in range(-10, 11)}
    factor, is_cut = width(values, 0.01)
    assert factor == pytest.approx(4.0)
    assert not is_cut
    assert width({0: 1.0, 2: 1.001, -2: 1.5}, 0.01)[1]


def test_the_share_that_reaches_a_value():
    assert share_to_reach([(1.0, 1.0), (0.5, 2.0), (0.25, 3.0)], 2.0) == pytest.approx(0.5)
    assert math.isnan(share_to_reach([(0.5, 2.0), (1.0, 1.0)], 0.5))


def test_a_margin_does_not_change_once_runs_are_made(tmp_path):
    results = results_of(PLAN, tmp_path)
    with pytest.raises(SystemExit, match=r"the margin was 0\.01"):
        compare(replace(PLAN, margin=0.1), TASK, results, "loss", made)


def test_a_killed_comparison_goes_on_and_processes_share_the_work(tmp_path):
    """One process is killed within a run; two others make each run that is left once."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from tests.test_arena import PLAN, TASK, Results, compare, made

            def make(task, run, results):
                if sys.argv[2] == "die" and len(results.rows()) == 3:
                    os._exit(9)
                time.sleep(0.1)
                return {**made(task, run, results), "by": os.getpid()}

            compare(PLAN, TASK, Results(sys.argv[1]), "loss", make)
            """
        )
    )
    file = tmp_path / "runs.jsonl"
    command = [sys.executable, str(script), str(file)]
    start = lambda how: subprocess.Popen([*command, how], cwd=ROOT, env=environment())
    assert start("die").wait(120) == 9
    file.write_bytes(file.read_bytes() + b'{"task": "cut o')
    pair = [start("live"), start("live")]
    assert [process.wait(120) for process in pair] == [0, 0]
    results = Results(file)
    keys = [tuple(row[f] for f in ("contender", "place", "seed")) for row in results.rows()]
    assert len(keys) == len(set(keys))
    assert not missing(PLAN, results.values("task", "loss"))


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'recipes'}"}


def test_options_reach_the_command_line():
    run = Run("task", "normopt_muon:weight_decay=0.1,lr_head=3", place_of(1e-3), 7)
    argv = arguments(replace(TASK, horizon=8), run, "folder")
    said = dict(zip(argv[::2], argv[1::2], strict=True))
    assert said["--optim"] == "normopt_muon"
    assert said["--optim_args"] == "lr_head=3"
    assert (said["--weight_decay"], said["--seed"], said["--max_steps"]) == ("0.1", "7", "80")
    assert json.loads(json.dumps(run.key())) == list(run.key())


def test_muon_with_adamw_is_both_each_on_its_own_and_follows_a_schedule():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from recipes.arena.launch import MuonAndAdamW

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, intermediate_size=32, vocab_size=50)
    torch.manual_seed(0)
    model, twin = LlamaForCausalLM(config), LlamaForCausalLM(config)
    twin.load_state_dict(model.state_dict())
    optimizer = MuonAndAdamW(model, lr=1e-2, weight_decay=0.1, aux=3.0)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    hidden = [p for n, p in twin.named_parameters() if ".layers." in n and p.ndim == 2]
    tables = [p for n, p in twin.named_parameters() if ".layers." not in n and p.ndim == 2]
    gains = [p for p in twin.parameters() if p.ndim == 1]
    parts = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(tables, lr=3e-2, weight_decay=0.1),
        torch.optim.AdamW(gains, lr=3e-2, weight_decay=0.0),
    ]
    for _ in range(2):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        for part in parts:
            part.step()
        for group in (*optimizer.param_groups, *(g for part in parts for g in part.param_groups)):
            group["lr"] *= 0.5
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # the iteration is in float32 here, and in bfloat16 there
        torch.testing.assert_close(p, q, atol=2e-3 if ".layers." in name else 1e-6, rtol=1e-4)


TINY = """
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, vocab_size=50))
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
trainer = Trainer(model, args, train_dataset=[row] * 16)
trainer.train()
print(trainer.optimizer.optimizer.__class__.__mro__)
"""
CALLS = """
import sys
from arena.launch import launch
script, folder, rows = sys.argv[1:]
for optim, args in (("arena_muon", "aux=2"), ("arena_prodigy", "d_coef=0.5")):
    own = ["--optim", optim, "--optim_args", args, "--max_steps", "2", "--report_to", "none"]
    launch(script, [*own, "--output_dir", folder, "--use_cpu", "True"], rows)
"""


def test_optimizers_of_its_own_train_a_script(tmp_path):
    script, rows = tmp_path / "tiny.py", tmp_path / "rows.json"
    script.write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(script), str(tmp_path / "out"), str(rows)],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MuonAndAdamW" in done.stdout
    assert "Prodigy" in done.stdout
    assert {row["step"] for row in json.loads(rows.read_text()) if "loss" in row} == {2}
