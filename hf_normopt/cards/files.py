"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
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
