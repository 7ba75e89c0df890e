"""What the package must never do: touch files of others, or cost somebody a trained model."""

import json
import logging
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_normopt import create_normopt_optimizer
from tests.test_trainer import arguments, bert, rows

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("run.json", "norms.png", "normopt.json", "normopt_run.json", "normopt_norms.png")
ADAMW = """
import sys
{first}
import json
import torch
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed
{second}
set_seed(0)
torch.set_num_threads(1)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
rows = [dict(input_ids=x, labels=int(x[0] > 9)) for x in torch.randint(0, 20, (24, 8))]
args = TrainingArguments(
    "out", optim="adamw_torch", max_steps=4, save_steps=2, logging_steps=1, report_to=[],
    use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4,
)
trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows)
trainer.train()
trainer.evaluate()
trainer.save_model()
trainer.create_model_card()
timing = ("runtime", "per_second")
log = [
    {{key: value for key, value in row.items() if not any(word in key for word in timing)}}
    for row in trainer.state.log_history
]
Path("log.json").write_text(json.dumps(log))
Path("rng.txt").write_text(str(torch.rand(())))
"""


def adamw(folder, first="", second=""):
    """A run with AdamW in a fresh process; every file that it leaves, and its bytes."""
    folder.mkdir()
    for name in NAMES:  # the user's own
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out" / name).write_bytes(b'{"format_version": 1, "mine": true}')
    code = ADAMW.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {n: content for n, content in found.items() if not n.endswith("trainer_state.json")}


@pytest.mark.slow
def test_a_run_with_another_optimizer_is_the_same_with_and_without_the_import(tmp_path):
    """Losses, log, random numbers, card, checkpoints and the user's files, byte by byte."""
    plain = adamw(tmp_path / "plain")
    for place in ("first", "second"):
        found = adamw(tmp_path / place, **{place: "import hf_normopt"})
        assert found.keys() == plain.keys()
        assert [name for name in plain if found[name] != plain[name]] == []


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("optim", ["adamw_torch", "normopt"])
def test_files_that_have_our_names_stay(tmp_path, optim, kind):
    mine = b'{"my own": "record"}'
    for name in NAMES:
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            (tmp_path / f"target of {name}").write_bytes(mine)
            path.symlink_to(f"target of {name}")
        else:
            path.write_bytes(mine)
    args = arguments(tmp_path, optim=optim, max_steps=3, logging_steps=1)
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    for name in NAMES:
        path = tmp_path / name
        assert path.is_dir() if kind == "folder" else path.read_bytes() == mine
        assert path.is_symlink() == (kind == "link")


def warnings_of(caplog):
    return [r for r in caplog.records if r.levelno >= logging.WARNING and "hf_normopt" in r.name]


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("cannot open font")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", broken)
    args = arguments(tmp_path, optim="normopt", max_steps=3, logging_steps=1)
    Trainer(bert(), args, train_dataset=rows()).train()
    (warning,) = warnings_of(caplog)
    assert "cannot open font" in warning.getMessage()


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch, caplog):
    """A full disk, at every checkpoint and at the end; nothing half-written stays."""

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_normopt.cards.report.os.replace", full)
    args = arguments(tmp_path, optim="normopt", max_steps=2, save_strategy="no")
    trainer = Trainer(bert(), args, train_dataset=rows())
    trainer.train()
    trainer.create_model_card()
    assert any("No space left" in warning.getMessage() for warning in warnings_of(caplog))
    assert not list(tmp_path.glob(".normopt*"))
    assert not (tmp_path / "normopt.json").exists()


def test_what_an_earlier_run_of_ours_left_is_renewed(tmp_path):
    """A record and a picture of a longer run would be taken for those of this one."""
    (tmp_path / "normopt_run.json").write_text(json.dumps({"run_version": 1}))
    for steps, drawn in ((3, True), (1, False)):
        args = arguments(tmp_path, optim="normopt", max_steps=steps, logging_steps=1)
        Trainer(bert(), args, train_dataset=rows()).train()
        assert (tmp_path / "normopt_norms.png").exists() == drawn
        assert json.loads((tmp_path / "normopt.json").read_text())["steps"] == steps
        assert not (tmp_path / "normopt_run.json").exists()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def stepped(model, optimizer):
    ids = torch.arange(16).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("before", [False, True])
def test_other_layouts_are_refused(before):
    """A matrix that was one operator would go on as several, or the reverse."""
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-3, heads=before)
    stepped(model, optimizer)
    other = create_normopt_optimizer(llama(), lr=1e-3, heads=not before)
    with pytest.raises(ValueError, match=r"q_proj.* was trained as .* and would go on as"):
        other.load_state_dict(optimizer.state_dict())
    same = create_normopt_optimizer(llama(), lr=1e-3, heads=before)
    same.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("rounding", ["kahan", "nearest"])
@pytest.mark.parametrize(
    ("before", "after"),
    list(permutations((torch.bfloat16, torch.float16, torch.float32), 2)),
)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_on_with_weights_of_another_dtype(before, after, rounding):
    """The next step is as long as the learning rate says."""
    model = torch.nn.Linear(16, 16).to(before)
    options = {"lr": 1e-3, "rounding": rounding}
    optimizer = create_normopt_optimizer(model, **options)
    for _ in range(3):
        model.weight.grad = torch.randn(16, 16).to(before)
        optimizer.step()
    other = torch.nn.Linear(16, 16).to(after)
    other.load_state_dict(model.state_dict())
    resumed = create_normopt_optimizer(other, **options)
    resumed.load_state_dict(optimizer.state_dict())
    old = other.weight.detach().float().clone()
    other.weight.grad = torch.randn(16, 16).to(after)
    resumed.step()
    assert (other.weight.float() - old).abs().max() < 0.02


def test_a_resized_vocabulary_is_told_from_flattened_parameters():
    model = llama()
    optimizer = create_normopt_optimizer(model, lr=1e-3)
    model.resize_token_embeddings(40)
    with pytest.raises(RuntimeError, match=r"\(32, 16\).*\(40, 16\).*resize_token_embeddings") as e:
        stepped(model, optimizer)
    assert "FSDP" not in str(e.value)
