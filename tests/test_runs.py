"""What a script leaves of its run, and the card that is written from it."""

import json
import sys

import pytest
from huggingface_hub import ModelCard

from hf_normopt import NormOptTrainer, finish_run, update_model_card
from hf_normopt.cli.commands import main

from .test_model_card import Hub, card_of, hub, pushed
from .test_trainer import arguments, bert, rows

FACTS = {
    "title": "Tiny on nothing",
    "task": "text-classification",
    "metric": "accuracy",
    "dataset": "nothing",
    "data": "Random numbers. No rows of | sense.",
    "baselines": {"always 0": 0.5},
    "limits": "It is good for nothing.",
    "language": "en",
    "license": "mit",
}


def finished(folder, seed=1, facts=FACTS, splits=("validation", "test"), **options):
    """A folder in which a short run was finished."""
    options = {"optim": "normopt", "eval_strategy": "steps", "eval_steps": 3, **options}
    trainer = NormOptTrainer(
        bert(),
        arguments(folder, seed=seed, **options),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
    )
    trainer.train()
    trainer.save_model()
    metrics = {}
    for split in splits:
        metrics |= trainer.evaluate(rows(), metric_key_prefix=split)
    finish_run(trainer, metrics=metrics, **facts)
    return trainer


def test_the_whole_card_is_rebuilt_from_the_run(tmp_path, capsys):
    trainer = finished(tmp_path)
    card = card_of(tmp_path)
    (tmp_path / "README.md").unlink()
    assert main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"\n{tmp_path / 'README.md'}\n")
    assert card_of(tmp_path) == card
    trainer.create_model_card()  # of transformers, which would say less
    assert card_of(tmp_path) == card


def test_the_card_says_what_ran(tmp_path):
    trainer = finished(tmp_path, weight_decay=0.1)
    card, history = card_of(tmp_path), trainer.state.log_history
    results = json.loads((tmp_path / "normopt_run.json").read_text())["metrics"]
    value = f"{results['test_accuracy']:.4f}"
    assert f"| this model | {' ' * 7}{value} |" in card
    assert f"| always 0   | {' ' * 7}0.5000 |" in card
    for text in (FACTS["data"], FACTS["limits"], "# Tiny on nothing\n", "trained from scratch"):
        assert text in card
    assert "- weight_decay: 0.1\n" in card
    assert "- optimizer: NormOpt (hf_normopt " in card
    assert "## Optimizer" in card
    seconds = next(row["train_runtime"] for row in history if "train_runtime" in row)
    assert f"- training took: {seconds:.0f} s" in card
    assert "- command: `" in card
    for row in history:
        if "eval_accuracy" in row:
            assert f"|    {row['step']} | {row['eval_loss']:.4g} |".replace(" ", "") in (
                card.replace(" ", "")
            )
    data = ModelCard(card).data
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_name) == (FACTS["task"], "nothing")
    assert (result.metric_type, result.dataset_split) == ("accuracy", "test")
    assert f"{result.metric_value:.4f}" == value
    assert {"hf-normopt", "generated_from_trainer"} <= set(data.tags)
    assert (data.license, data.language, data.pipeline_tag) == ("mit", "en", FACTS["task"])
    assert (data["optimizer"], data["optimizer_preset"]) == ("normopt", "normopt")
    assert data.base_model is None


def test_a_run_with_another_optimizer_has_a_whole_card_too(tmp_path):
    finished(tmp_path, optim="adamw_torch")
    card = card_of(tmp_path)
    assert "- optimizer: Use OptimizerNames.ADAMW_TORCH with betas=(0.9,0.999)" in card
    assert FACTS["limits"] in card
    assert "normopt" not in card.lower()


def test_runs_are_compared_by_optimizer_and_rate(tmp_path):
    finished(tmp_path / "a")
    others = []
    for name, options in {
        "b": {"optim": "adamw_torch"},
        "c": {"optim": "adamw_torch", "seed": 2},
        "d": {"optim": "normopt", "optim_args": "preset=muon"},
    }.items():
        finished(tmp_path / name, **options)
        others.append(str(tmp_path / name))
    assert main(["card", str(tmp_path / "a"), "--compare", *others]) == 0
    card = card_of(tmp_path / "a")
    test = [
        json.loads((tmp_path / name / "normopt_run.json").read_text())["metrics"]["test_accuracy"]
        for name in "bc"
    ]
    span = f"{sum(test) / 2:.4f} ({min(test):.4f} to {max(test):.4f})"
    row = next(line for line in card.splitlines() if line.startswith("| adamw_torch"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["adamw_torch", "0.001", "2"]
    assert cells[4] == span
    assert "| normopt_muon | " in card
    (tmp_path / "a" / "README.md").unlink()
    update_model_card(tmp_path / "a")
    assert card_of(tmp_path / "a") == card


def test_without_test_data_nothing_is_said_of_them(tmp_path):
    finished(tmp_path, splits=("validation",))
    card = card_of(tmp_path)
    assert "On the validation data, next to" in card
    assert "| test" not in card
    assert "`test_" not in card
    assert ModelCard(card).data.eval_results[0].dataset_split == "validation"


def test_the_record_names_what_trained(tmp_path):
    """NormOptTrainer makes NormOpt where the arguments have another name by default."""
    options = {"optim": "adamw_torch_fused", "optim_args": "preset=muon,lr_head=2.0"}
    finished(tmp_path, **options)
    record = json.loads((tmp_path / "normopt_run.json").read_text())
    assert (record["optimizer"], record["optim_args"]) == ("normopt_muon", "lr_head=2.0")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"facts": {**FACTS, "dataset": "other"}}, "dataset is other, not nothing"),
        ({"max_steps": 3}, "steps is 3, not 6"),
        ({"weight_decay": 0.1}, "weight_decay is 0.1, not 0.0"),
    ],
)
def test_runs_with_other_settings_are_not_compared(tmp_path, capsys, options, complaint):
    finished(tmp_path / "a")
    finished(tmp_path / "b", **options)
    assert main(["card", str(tmp_path / "a"), "--compare", str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b'} cannot be compared with {tmp_path / 'a'}: " in error
    assert complaint in error
    assert main(["card", str(tmp_path / "a"), "--compare", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be compared: it has no normopt_run.json" in capsys.readouterr().err


@pytest.mark.parametrize("secret", [["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]])
def test_the_command_has_no_token(tmp_path, monkeypatch, secret):
    monkeypatch.setattr(
        sys, "orig_argv", ["/somewhere/python3.11", "train.py", *secret, "--a", "1"]
    )
    finished(tmp_path)
    card = card_of(tmp_path)
    assert "hf_secret" not in card + (tmp_path / "normopt_run.json").read_text()
    assert "- command: `python train.py --hub_token" in card
    assert "... --a 1`" in card


def test_a_local_base_model_is_one_wherever_the_card_is_written(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    finished(tmp_path / "out", facts={**FACTS, "base_model": str(tmp_path / "base")})
    card = card_of(tmp_path / "out")
    assert "fine-tuned from the local model `base`" in card
    assert ModelCard(card).data.base_model is None
    (tmp_path / "base").rmdir()
    update_model_card(tmp_path / "out")
    assert card_of(tmp_path / "out") == card


def test_a_metric_that_was_not_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"The metrics are .*, and not test_f1\."):
        finished(tmp_path, facts={**FACTS, "metric": "f1"})


@pytest.mark.parametrize("content", ["{}", "[]", '{"run_version": 99}', '{"run'])
def test_a_record_that_cannot_be_read_is_named(tmp_path, capsys, content):
    (tmp_path / "normopt_run.json").write_text(content)
    assert main(["card", str(tmp_path)]) == 2
    assert f"{tmp_path / 'normopt_run.json'} " in capsys.readouterr().err


def test_a_record_of_an_earlier_run_is_not_taken_for_this_one(tmp_path):
    finished(tmp_path)
    trainer = NormOptTrainer(bert(), arguments(tmp_path, max_steps=2), train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    assert FACTS["title"] not in card_of(tmp_path)
    assert "- steps: 2\n" in card_of(tmp_path)


PUSH = """
import sys
from tests.test_runs import FACTS, finished

finished(
    sys.argv[1], facts={**FACTS, "push_to_hub": True}, hub_model_id="me/tiny",
    hub_token="hf_dummy", save_strategy="steps", save_steps=3, logging_steps=2,
)
"""


def push(folder, endpoint):
    return pushed(PUSH, folder / "out", folder / "home", endpoint)


@pytest.mark.slow
def test_the_hub_receives_weights_card_and_picture(tmp_path):
    with hub() as endpoint:
        done = push(tmp_path, endpoint)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("README.md", "normopt_norms.png", "normopt_run.json", "normopt.json"):
        assert Hub.files[f"me/tiny/{name}"] == (tmp_path / "out" / name).read_bytes()
    assert "me/tiny/model.safetensors" in Hub.files
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert not any("checkpoint" in path for path in Hub.files)


@pytest.mark.slow
def test_without_a_network_the_error_is_one_line_and_all_is_kept(tmp_path):
    done = push(tmp_path, "http://127.0.0.1:9")  # where nothing listens
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("Nothing was pushed to the Hub: ")
    assert f"hf upload me/tiny {tmp_path / 'out'}" in line
    for name in ("README.md", "normopt_norms.png", "model.safetensors", "normopt_run.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
