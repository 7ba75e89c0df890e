"""What mkdocs needs to know of this repository: its pages link to files outside of `docs/`.

They read well on GitHub, where `../recipes/README.md` is a link like any other. A site has its
pages only, so the files of `OUTSIDE` become part of it under their own names, and links are written
anew; mkdocs then checks each of them. A folder has no page, so a link to one becomes its text.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    *("recipes/*.py", "recipes/*.md", "recipes/*.ipynb", "recipes/*.png", "recipes/metrics/*.py"),
    *("model_cards/**/*.md", "model_cards/**/*.png", "constraints.txt"),
)


def on_files(files, config):
    """Add the files that pages link to."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, **_):
    """Write links for the site, in which `docs/` is the root."""
    outside = page.file.src_uri.startswith(("recipes/", "model_cards/"))
    here = (ROOT / page.file.src_uri if outside else ROOT / "docs" / page.file.src_uri).parent

    def written(link):
        text, target = link.groups()
        if (here / target).is_dir():
            return text
        if outside:
            target = re.sub(r"^((?:\.\./)+)docs/", r"\1", target)
            return f"[{text}]({target})"
        return f"[{text}]({target.removeprefix('../')})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s:]+)\)", written, markdown)
