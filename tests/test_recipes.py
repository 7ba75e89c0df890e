"""The recipes, run as a user runs them."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_normopt import PRESETS

ROOT = Path(__file__).parent.parent
SNIPS = ROOT / "recipes" / "data" / "snips"


def run(*argv, seconds=900):
    command = [sys.executable, str(ROOT / "recipes" / "text_classification.py"), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def accuracy(done):
    return float(re.fullmatch(r"test_accuracy = (\d\.\d{4})", done.stdout.splitlines()[-1])[1])


@pytest.mark.slow
def test_default_reaches_what_the_readme_says(tmp_path):
    done = run("--output_dir", tmp_path)
    assert accuracy(done) >= 0.97
    assert "NormOpt, preset normopt:" in done.stdout
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in tmp_path.iterdir()
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["0"] == "AddToPlaylist"
    for line in (ROOT / "README.md").read_text().splitlines():  # the table that README shows
        if re.match(r"(linear|embedding|head|norm|bias) +\S+->", line):
            assert line in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "normopt_muon"])
def test_other_data_and_another_optimizer(tmp_path, optim):
    """A csv whose labels are words, no validation data, checkpoints, resume."""
    with gzip.open(SNIPS / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    text = "\n".join(
        [
            "sentence,intent",
            *(f'"{r["text"].replace(chr(34), "")}",{r["label_name"]}' for r in rows[::5]),
        ]
    )
    (tmp_path / "train.csv").write_text(text, encoding="utf-8")
    argv = ["--train_file", tmp_path / "train.csv", "--text_column_name", "sentence"]
    argv += ["--label_column_name", "intent", "--output_dir", tmp_path / "out", "--optim", optim]
    argv += ["--per_device_train_batch_size", 8, "--save_strategy", "steps", "--save_steps", 1]
    assert 0 <= accuracy(run(*argv, "--max_steps", 1)) <= 1
    resumed = run(
        *argv, "--max_steps", 2, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1"
    )
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()
    assert ("NormOpt, preset muon" in resumed.stdout) == (optim == "normopt_muon")


@pytest.mark.slow
def test_anthology_prints_its_equivalences_and_draws(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "anthology.py"), "--steps", "40"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    differences = [float(d) for d in re.findall(r"= .*? (\d\.\de[-+]\d+)", done.stdout)]
    assert len(differences) == 5
    assert max(differences) < 1e-6
    for name in PRESETS:
        assert re.search(rf"^  {name} +lr", done.stdout, re.MULTILINE)
    assert (tmp_path / "norms.png").stat().st_size > 10_000
    assert (tmp_path / "escape_velocity.png").stat().st_size > 10_000


def test_shipped_data_has_its_source_and_licence():
    for folder in (ROOT / "recipes" / "data").iterdir():
        assert (folder / "SOURCE.txt").exists()
    assert sum(f.stat().st_size for f in (ROOT / "recipes" / "data").rglob("*")) < 5e6
