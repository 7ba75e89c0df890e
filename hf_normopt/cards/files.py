"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in place of the one that was there.

    Raises:
        OSError: if it cannot be written: the old one stays.
    """
    # a name that nobody else has; "x" follows no link, and gives the rights of any new file
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("xb") as file:
            file.write(content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
