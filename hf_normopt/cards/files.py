"""Files: written whole or not at all, and looked at before long work for them begins."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace the one that is there.

    Raises:
        OSError: if it cannot be written; the old file stays.
    """
    # a name that nobody else has; "x" follows no link and gives the permissions of a new file
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def check_place(file: str | Path) -> None:
    """Complain early about a place where no file can be written.

    Raises:
        OSError: if its folder does not exist, or if it is a folder itself.
    """
    path = Path(file)
    if not path.parent.is_dir():
        raise OSError(f"There is no folder {path.parent} for {path.name}.")
    if path.is_dir():
        raise OSError(f"{path} is a folder; expected a file.")


def check_picture(file: str | Path, suffixes: Collection[str]) -> None:
    """Complain early about a picture that cannot be drawn.

    Args:
        file: where it is to go.
        suffixes: those that can be written; all but .html need matplotlib.

    Raises:
        ValueError: for another suffix.
        OSError: if its folder does not exist, or if it is a folder itself.
        ImportError: without matplotlib, where it is needed.
    """
    suffix = Path(file).suffix
    if suffix not in suffixes:
        raise ValueError(f"A picture is a file {' or '.join(suffixes)}, found {str(file)!r}.")
    check_place(file)
    if suffix != ".html":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            instead = "; a .html needs nothing" if ".html" in suffixes else ""
            raise ImportError(
                f"A {suffix} needs matplotlib: pip install hf_normopt[recipes]{instead}."
            ) from None
