"""The built wheel: it holds the package and nothing else, and works where it is installed."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command, **kwargs):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, **kwargs
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build writes beside its source, and finds what an older one left."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", folder)
    call(*pip, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hf_normopt"}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_normopt").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in names if name.startswith("hf_normopt/")} == here
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(wheel, tmp_path):
    """In a fresh environment, which finds all other packages in the present one."""
    target = tmp_path / "installed"
    call(sys.executable, "-m", "pip", "install", wheel, "--no-deps", "-q", "--target", target)
    venv.create(tmp_path / "fresh", with_pip=False, symlinks=True)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = tmp_path / "fresh" / scripts / "python"
    places = [str(target), *(path for path in sys.path if path.endswith("-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    script = (
        "import hf_normopt, torch; print(hf_normopt.__file__);"
        "model = torch.nn.Linear(2, 3);"
        "optimizer = hf_normopt.create_normopt_optimizer(model, lr=0.1);"
        "model(torch.ones(1, 2)).sum().backward(); optimizer.step();"
        "print(hf_normopt.operator_norm('rms', 'rms'))"
    )
    printed = call(python, "-c", script, cwd=tmp_path, env=environment)
    assert Path(printed.splitlines()[0]).parent == target / "hf_normopt"
    table = call(python, "-m", "hf_normopt", "presets", cwd=tmp_path, env=environment)
    assert "normopt" in table
