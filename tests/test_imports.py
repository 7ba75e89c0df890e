"""Imports point one way; a file that imports from a later row fails here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_normopt

PACKAGE = Path(hf_normopt.__file__).parent
# Each room imports those before it, and no other.
ROOMS = ["norms", "roles", "optim", "cards", "trainer", "cli"]
EVERYWHERE = {"tables", "version"}
TRAINER_API = {
    "Trainer",
    "TrainingArguments",
    "HfArgumentParser",
    "TrainerCallback",
    "get_scheduler",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node


def files():
    """Every module of a room, with the room's name."""
    return [(path, room) for room in ROOMS for path in (PACKAGE / room).glob("*.py")]


def test_every_file_is_in_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*ROOMS}
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*EVERYWHERE, "__init__", "__main__"}
    assert all((PACKAGE / room / "__init__.py").read_text().startswith('"""') for room in ROOMS)


def test_imports_point_one_way():
    for path, room in files():
        for node in imports(path):
            if node.level == 2:
                target = node.module.partition(".")[0]
                earlier = {*ROOMS[: ROOMS.index(room)], *EVERYWHERE}
                assert target in earlier, f"{room}/{path.name} imports {node.module}"
            assert node.level < 3


def test_files_of_a_room_do_not_import_in_circles():
    for room in ROOMS:
        graph = {
            path.stem: {node.module.partition(".")[0] for node in imports(path) if node.level == 1}
            for path in (PACKAGE / room).glob("*.py")
        }
        while graph:
            free = [name for name, needed in graph.items() if not needed & graph.keys()]
            assert free, f"{room}: {sorted(graph)} import each other"
            for name in free:
                del graph[name]


def test_only_the_last_rooms_know_the_trainer():
    for path, room in files():
        names = {alias.name for node in imports(path) for alias in node.names}
        if names & TRAINER_API and path.name != "schedules.py":
            assert ROOMS.index(room) >= ROOMS.index("cards")


def test_norms_work_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import importlib.util, types\n"
        f"package = types.ModuleType('p'); package.__path__ = [{str(PACKAGE)!r}]\n"
        "sys.modules['p'] = package\n"
        "from p.norms.operators import operator_norm\n"
        "import torch; print(operator_norm('rms', 'rms').lmo(torch.eye(2)).sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert float(done.stdout) == pytest.approx(2), done.stderr


def test_public_names():
    assert all(hasattr(hf_normopt, name) for name in hf_normopt.__all__)
