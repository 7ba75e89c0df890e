"""The benchmark runs and prints what it says; the times are not tested."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_row_for_each_optimizer_and_a_picture(tmp_path):
    picture = tmp_path / "benchmark.png"
    options = ["--models", "small", "--against", "adamw,torch-muon", "--rounds", "1"]
    command = [sys.executable, "recipes/benchmark.py", *options, "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, header, _, adamw, muon, normopt = [
        re.split(" {2,}", line) for line in done.stdout.splitlines()
    ]
    column = header.index("efficiency")
    efficiencies = {row[0]: float(row[column]) for row in (adamw, muon, normopt)}
    assert list(efficiencies) == ["adamw", "torch-muon (iteration in float32)", "normopt"]
    assert all(0 < efficiency <= 1.001 for efficiency in efficiencies.values())
    assert efficiencies["normopt"] >= 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")
