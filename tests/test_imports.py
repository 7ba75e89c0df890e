"""Imports point one way; a file that imports from a later row fails here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_normopt

PACKAGE = Path(hf_normopt.__file__).parent
ROWS = [
    {"files", "kernels", "layouts", "sharding", "tables", "version", "launch"},
    {"roles"},
    {"orthogonalize", "precision", "agreement"},
    {"norms", "checkpoints"},
    {"rules", "step_sizes", "picture"},
    {"moves", "cost"},
    {"exchange"},
    {"optimizer"},
    {"batch", "groups"},
    {"presets"},
    {"schedules"},
    {"arguments", "bystanders", "report", "plot"},
    {"runs"},
    {"callback", "door", "gauge", "model_card"},
    {"telemetry", "publish"},
    {"trainer", "cli"},
    {"__init__", "__main__"},
]
TRAINER_API = {
    "Trainer",
    "TrainingArguments",
    "HfArgumentParser",
    "TrainerCallback",
    "get_scheduler",
}


def row(name):
    return next(i for i, names in enumerate(ROWS) if name in names)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node


def test_every_file_has_a_row():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files | rooms == set().union(*ROWS)


def test_imports_point_one_way():
    for path in PACKAGE.glob("*.py"):
        for node in imports(path):
            if node.level == 1:
                for module in (
                    [node.module] if node.module else [alias.name for alias in node.names]
                ):
                    room = module.partition(".")[0]
                    assert row(room) < row(path.stem), f"{path.stem} imports {module}"


def test_roles_import_only_layouts_from_outside():
    for path in (PACKAGE / "roles").glob("*.py"):
        outside = {node.module for node in imports(path) if node.level > 1}
        assert outside <= {"layouts"}, path.stem


def test_only_the_last_rows_know_the_trainer():
    for path in PACKAGE.glob("*.py"):
        names = {alias.name for node in imports(path) for alias in node.names}
        if names & TRAINER_API:
            assert row(path.stem) >= row("schedules")


def test_norms_work_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util, types\n"
        f"package = types.ModuleType('p'); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['p'] = package\n"
        "from p.norms import operator_norm\n"
        "import torch; print(operator_norm('rms', 'rms').lmo(torch.eye(2)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(2), done.stderr


def test_public_names():
    assert all(hasattr(hf_normopt, name) for name in hf_normopt.__all__)
