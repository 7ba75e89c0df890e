"""A file is whole or not there, and no file of ours costs a run, ours or another's."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_normopt import NormOptTrainer, NormTelemetry, create_normopt_optimizer, update_model_card
from hf_normopt.cards.files import write_whole
from hf_normopt.cards.plot import is_picture, save_run
from hf_normopt.cards.report import report, write_report
from hf_normopt.trainer.callback import innermost, unwrapped

from .test_runs import FACTS, finished
from .test_trainer import arguments, bert, rows

pytestmark = pytest.mark.usefixtures("one_thread")
LOG = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]


def warnings_of(caplog):
    found = [r for r in caplog.records if r.levelno >= logging.WARNING and "hf_normopt" in r.name]
    return [r.getMessage() for r in found]


def full(*args):
    raise OSError(28, "No space left on device")


def test_on_a_full_disk_the_old_file_stays(tmp_path, monkeypatch, pictures):
    save_run(tmp_path / "picture.png", LOG)
    assert is_picture(tmp_path / "picture.png")
    write_report(tmp_path, report(create_normopt_optimizer(bert(), lr=1e-3)))
    (tmp_path / "README.md").write_text("# Mine\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "replace", full)
    for write in (
        lambda: save_run(tmp_path / "picture.png", LOG[:2]),
        lambda: write_report(tmp_path, {}),
        lambda: update_model_card(tmp_path),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_has_the_rights_of_any_other(tmp_path):
    write_whole(tmp_path / "ours", b"x")
    (tmp_path / "other").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_record_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "normopt_run.json").write_text('{"mine": 1}')
    (tmp_path / "normopt.json").mkdir()
    finished(tmp_path, max_steps=3)
    assert (tmp_path / "normopt_run.json").read_text() == '{"mine": 1}'
    assert len([text for text in warnings_of(caplog) if "The record and the card" in text]) == 1
    assert len([text for text in warnings_of(caplog) if "normopt.json could not" in text]) == 1


def test_the_record_names_what_trained_without_a_report(tmp_path):
    (tmp_path / "normopt.json").write_text("{}")
    finished(tmp_path, max_steps=3, optim="adamw_torch_fused", optim_args="preset=muon")
    record = json.loads((tmp_path / "normopt_run.json").read_text())
    assert record["optimizer"] == "normopt_muon"
    assert record["title"] == FACTS["title"]


def test_optimizers_of_others_may_wrap_what_they_like():
    class Raising:
        @property
        def optimizer(self):
            raise RuntimeError("not ready")

    ring = SimpleNamespace()
    ring.optimizer = SimpleNamespace(optimizer=ring)
    for optimizer in (None, ring, Raising(), MagicMock(), SimpleNamespace(optimizer=None)):
        assert unwrapped(optimizer) is None
        assert innermost(optimizer)
    ours = create_normopt_optimizer(torch.nn.Linear(2, 2), lr=1e-3)
    assert unwrapped(SimpleNamespace(optimizer=SimpleNamespace(optimizer=ours))) is ours


def test_data_of_other_runs_are_not_asked_for_their_length(tmp_path):
    class Data:
        def __len__(self):
            raise AssertionError("asked")

    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    NormTelemetry().on_train_begin(
        arguments(tmp_path), TrainerState(), TrainerControl(), adamw, train_dataloader=Data()
    )


@pytest.mark.parametrize(
    ("optim", "said"), [("adamw_torch_fused", 1), ("normopt", 0), ("adamw_torch", 0)]
)
def test_the_defaults_name_written_out_is_one_warning(tmp_path, caplog, optim, said):
    trainer = NormOptTrainer(bert(), arguments(tmp_path, optim=optim), train_dataset=rows())
    trainer.create_optimizer()
    assert (unwrapped(trainer.optimizer) is None) == (optim == "adamw_torch")
    found = [text for text in warnings_of(caplog) if "NormOpt trains, and not" in text]
    assert len(found) == said


@pytest.mark.slow
def test_the_import_prints_nothing_and_takes_no_torchao():
    """Transformers imports it, but not for us; what it prints then is not ours."""
    code = """
import sys
from transformers import Trainer, TrainingArguments
for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
    del sys.modules[name]
sys.modules["torchao"] = None
for stream in (sys.stdout, sys.stderr):
    print("HERE", file=stream, flush=True)
import hf_normopt
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.partition("HERE\n")[2] == done.stderr.partition("HERE\n")[2] == ""
