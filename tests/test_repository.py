"""What the repository holds: text, and binary files only where they are known."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("recipes/data/", "model_cards/")
PICTURES = ("recipes/anthology_norms.png", "recipes/anthology_escape_velocity.png")


def tracked_files():
    """Names from the root; none where there is no repository, as in a source distribution."""
    if not ((ROOT / ".git").exists() and shutil.which("git")):
        return []
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    return [name for name in listing.stdout.decode().split("\0") if (ROOT / name).is_file()]


def is_text(content):
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def strangers(files):
    """Those of the named contents that are binary and have no place in the repository."""
    return [
        name
        for name, content in files.items()
        if not (name.startswith(FOLDERS) or name in PICTURES or is_text(content))
    ]


def test_no_binary_file_is_committed_by_mistake():
    files = tracked_files()
    if not files:
        pytest.skip("this is no clone, or git is not installed")
    assert not strangers({name: (ROOT / name).read_bytes() for name in files})
    assert {name for name in files if name in PICTURES} == set(PICTURES)


def test_a_wheel_is_found():
    wheel, picture = b"PK\x03\x04\x14\0\0\0", b"\x89PNG\r\n"
    files = {
        "some-1.0-py3-none-any.whl": wheel,
        "hf_normopt/norms.png": picture,
        "recipes/datafile.gz": wheel,
        "README.md": "η → 0".encode(),
        "recipes/data/snips/train.jsonl.gz": wheel,
        PICTURES[0]: picture,
    }
    assert strangers(files) == [*files][:3]
