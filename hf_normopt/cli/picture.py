"""A picture of a model with its norms, as HTML or PNG.

A row is a module. A box is a tensor: its colour is the role, its width the logarithm of its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..roles import ParamSpec
from .outline import count_roles, outline
from .picture_html import write_html
from .picture_png import write_png

_WRITERS = {".html": write_html, ".png": write_png}


def check_file(file: str | Path) -> None:
    """Complain early about a file that [`save_picture`] cannot write.

    Raises:
        ValueError: if its suffix is neither .html nor .png.
        OSError: if its folder does not exist.
        ImportError: if a .png is asked for without matplotlib.
    """
    path = Path(file)
    if path.suffix not in _WRITERS:
        raise ValueError(f"A picture is a file {' or '.join(_WRITERS)}, found {file!r}.")
    if not path.parent.is_dir():
        raise OSError(f"There is no folder {path.parent} for the picture {path.name}.")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ImportError(
                "A .png needs matplotlib: pip install hf_normopt[recipes]; a .html needs nothing."
            ) from None


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
        ValueError, OSError, ImportError: see [`check_file`].
    """
    check_file(file)
    rows, totals = outline(specs, norms), count_roles(specs, norms)
    _WRITERS[Path(file).suffix](file, title, rows, totals)
