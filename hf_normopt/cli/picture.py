"""A picture of a model with its norms, as HTML or PNG.

A row is a module. A box is a tensor: its colour is the role, its width the logarithm of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cards.files import check_picture
from ..roles import ParamSpec
from .outline import count_roles, outline
from .picture_html import write_html
from .picture_png import write_png

_WRITERS = {".html": write_html, ".png": write_png}
SUFFIXES = tuple(_WRITERS)


def save_picture(
    file: str | Path, title: str, specs: Sequence[ParamSpec], norms: Sequence[str]
) -> None:
    """Draw a model with its norms.

    Args:
        file: where to; its suffix, .html or .png, says how.
        title: what the picture is called.
        specs: the parameters, from `classify`.
        norms: the name of each parameter's norm.

    Raises:
        ValueError, OSError, ImportError: see [`check_picture`].
    """
    check_picture(file, SUFFIXES)
    rows, totals = outline(specs, norms), count_roles(specs, norms)
    _WRITERS[Path(file).suffix](file, title, rows, totals)
