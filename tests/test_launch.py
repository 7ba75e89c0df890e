"""`hf-normopt run` reaches the Python processes that a script starts, and harms none of them."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_normopt
from hf_normopt.cli.launch import run

SITE = Path(hf_normopt.__file__).parent / "_site"
ROOT = Path(__file__).parent.parent
PYTHON = sys.executable

# Stand-ins that take no time; as in transformers, the trainer's modules import the arguments.
STAND_INS = {
    "transformers/__init__.py": "",
    "transformers/other.py": "",
    "transformers/training_args.py": "NAMES = ['adamw']",
    "transformers/trainer_optimizer.py": "from .training_args import NAMES\nHANDLERS = {}",
    "transformers/trainer.py": "from .trainer_optimizer import HANDLERS\nclass Trainer: pass",
    "hf_normopt/__init__.py": (
        "from transformers.trainer import HANDLERS, Trainer\n"
        "from transformers.training_args import NAMES\n"
        "NAMES.append('normopt')"
    ),
}
SHOW = "from transformers.training_args import NAMES\nprint(NAMES)"
BOTH = "['adamw', 'normopt']"


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """A folder of stand-ins, which children find, while `hf-normopt run` runs a script."""
    write(tmp_path, STAND_INS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # `python -c` looks there first
    launch(tmp_path, monkeypatch)
    return tmp_path


def launch(folder, monkeypatch, code=""):
    """Run a script as `hf-normopt run` does; the variables it sets stay for the test."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    (folder / "script.py").write_text(code)
    assert run([str(folder / "script.py")]) == 0


def python(*words, path=None, **options):
    env = {**os.environ, **({} if path is None else {"PYTHONPATH": path})}
    return subprocess.run(
        [PYTHON, *map(str, words)], env=env, capture_output=True, text=True, timeout=120, **options
    )


def plain(*words):
    """The same without `hf-normopt run`."""
    folders = os.environ["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == str(SITE)
    return python(*words, path=os.pathsep.join(folders[1:]))


def said(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


# --- whom it reaches ---


@pytest.mark.parametrize("first", ["training_args", "trainer", "trainer_optimizer", "other"])
def test_a_child_knows_the_name_whatever_it_imports_first(first, launched):
    """The package needs modules that may be half made when the names are there."""
    code = f"import transformers.{first}\n{SHOW}"
    assert said(python("-c", code)) == BOTH
    assert said(plain("-c", code)) == "['adamw']"


def test_a_child_of_a_child_of_the_script_knows_the_name(tmp_path, monkeypatch):
    write(tmp_path, {**STAND_INS, "show.py": SHOW})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    script = (
        "import pathlib, subprocess, sys\n"
        f"show = [sys.executable, {str(tmp_path / 'show.py')!r}]\n"
        "again = 'import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))'\n"
        "found = subprocess.check_output([sys.executable, '-c', again, *show], text=True)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'found').write_text(found)\n"
    )
    launch(tmp_path, monkeypatch, script)
    assert (tmp_path / "found").read_text().strip() == BOTH


def test_a_spawned_process_knows_the_name(launched):
    script = (
        "import multiprocessing\n"
        "def names():\n"
        "    from transformers.training_args import NAMES\n"
        "    return NAMES\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(names))\n"
    )
    write(launched, {"spawns.py": script})
    assert said(python(launched / "spawns.py")) == BOTH


@pytest.mark.slow
def test_a_child_with_the_real_transformers_knows_the_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(hf_normopt.__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    launch(tmp_path, monkeypatch)
    code = (
        "import transformers.trainer_optimizer as module\n"  # half made while it imports the names
        "print(module.OptimizerNames('normopt').value, 'normopt' in module._OPTIMIZER_HANDLERS)"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "normopt True", done.stderr
    assert "hf-normopt run" not in done.stderr


# --- what it leaves alone ---

MODULES = "import json, sys; print(json.dumps(sorted(sys.modules)))"


@pytest.mark.parametrize("flag", ["-s", "-E", "-I", "-S"])
def test_a_child_without_transformers_is_left_as_it_is(flag, launched):
    ours, theirs = (json.loads(said(run(flag, "-c", MODULES))) for run in (python, plain))
    assert set(ours) - set(theirs) <= {"sitecustomize"}
    assert set(theirs) <= set(ours)


def test_a_child_that_trains_nothing_does_not_import_the_package(launched):
    code = "import sys, transformers.other; print('hf_normopt' in sys.modules)"
    assert said(python("-c", code)) == "False"


def test_modules_keep_their_loaders(launched):
    code = (
        "import inspect, transformers.training_args as module\n"
        "print(type(module.__loader__), vars(module.__loader__), inspect.getsource(module))"
    )
    assert said(python("-c", code)) == said(plain("-c", code))


SHADOWED = {
    "fine": "import sys; sys.path.append('/of-the-user'); FACT = 3",
    "fails": "raise LookupError('on purpose')",
    "lacks a module": "import nowhere",
    "exits": "import sys; sys.exit(5)",
    "imports transformers": "import transformers.trainer",
}
FACTS = (
    "import sys, sitecustomize as s\n"
    "print(s.__name__, s.__file__, s.__spec__.origin, s.__loader__.path, s.FACT)\n"
    "print(s is sys.modules['sitecustomize'], '/of-the-user' in sys.path)"
)


@pytest.mark.parametrize("kind", SHADOWED)
def test_a_sitecustomize_of_the_users_own_runs_as_without(kind, launched):
    write(launched, {"sitecustomize.py": SHADOWED[kind]})
    code = FACTS if kind == "fine" else "print('goes on')"
    ours, theirs = python("-c", code), plain("-c", code)
    assert ours.stdout == theirs.stdout
    assert ours.returncode == theirs.returncode
    if kind == "exits":  # a traceback, with a frame more
        assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]
        return
    assert ours.stderr == theirs.stderr
    assert ("True True" in ours.stdout) == (kind == "fine")
    assert python("-c", SHOW).stdout.strip() == BOTH


def test_another_programs_sitecustomize_that_comes_before_passes_on_to_ours(launched):
    """Tracers put a folder of theirs in front, and import the next `sitecustomize` themselves."""
    chained = (
        "import os, sys\n"
        "folder, me = os.path.dirname(__file__), sys.modules.pop('sitecustomize')\n"
        "sys.path.remove(folder)\n"
        "import sitecustomize\n"
        "sys.path.insert(0, folder)\n"
        "print('tracer')\n"
    )
    write(launched, {"tracer/sitecustomize.py": chained, "sitecustomize.py": "print('user')"})
    path = os.pathsep.join([str(launched / "tracer"), os.environ["PYTHONPATH"]])
    done = python("-c", SHOW, path=path)
    assert done.stdout.split("\n")[:3] == ["user", "tracer", BOTH], done.stderr


# --- what may fail ---


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ("raise ImportError('too\\nold')", "ImportError: too old"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("from hf_normopt_nowhere import x", "No module named 'hf_normopt_nowhere'"),
    ],
)
def test_a_failure_of_ours_is_one_line_and_the_child_goes_on(package, reason, launched):
    write(launched, {"hf_normopt/__init__.py": package})
    done = python("-c", f"import transformers.other, transformers.trainer\n{SHOW}")
    assert (done.returncode, done.stdout.strip()) == (0, "['adamw']")
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf-normopt run: optim='normopt' is unknown in process")
    assert reason in line


def test_a_child_with_stderr_closed_goes_on(launched):
    write(launched, {"hf_normopt/__init__.py": "1 / 0"})
    assert python("-c", f"import sys\nsys.stderr = None\n{SHOW}").stdout.strip() == "['adamw']"


def test_an_error_of_the_childs_own_import_is_its_own(launched):
    write(launched, {"transformers/training_args.py": "raise LookupError('on purpose')"})
    ours, theirs = python("-c", SHOW), plain("-c", SHOW)
    assert ours.stderr.splitlines()[-1] == theirs.stderr.splitlines()[-1]
    assert ours.returncode == theirs.returncode == 1


def test_the_file_is_for_older_pythons_too_and_imports_nothing_of_weight():
    tree = ast.parse((SITE / "sitecustomize.py").read_text(), feature_version=(3, 8))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in found for alias in node.names}
    assert names == {"os", "sys", "hf_normopt", "sitecustomize"}


def test_the_folder_is_part_of_a_wheel():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = ROOT / "pyproject.toml"
    if not project.exists():
        pytest.skip("the tests run without the sources of the package")
    data = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["hf_normopt"]
    assert "_site/sitecustomize.py" in data


# --- the environment ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, [SITE]),
        ("", [SITE]),  # an empty variable is none, but an empty part is the current folder
        (":/a", [SITE, "", "/a"]),
        ("/a:/b", [SITE, "/a", "/b"]),
        (f"{SITE}:/a", [SITE, "/a"]),
        (f"/tracer:{SITE}:/a", [SITE, "/tracer", "/a"]),
    ],
)
def test_what_is_on_the_path_stays_and_the_folder_comes_once(before, after, tmp_path, monkeypatch):
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before.replace(":", os.pathsep))
    launch(tmp_path, monkeypatch)
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(part) for part in after]


@pytest.mark.parametrize("words", [[], ["nowhere.py"], ["--help"]])
def test_without_a_script_the_environment_stays(words, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/a")
    run(words)
    assert os.environ["PYTHONPATH"] == "/a"
