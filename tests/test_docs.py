"""What a reader meets first: links that lead somewhere, a whole API reference, a notebook."""

import json
import re
from pathlib import Path

import pytest
import yaml

import hf_normopt

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOK = ROOT / "recipes" / "first_steps.ipynb"
PAGES = [ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "recipes").glob("*.md"), NOTEBOOK]


def text_of(page):
    """Its Markdown, without code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """Of the headings, as GitHub and mkdocs name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT), target
        assert found.exists(), target
        if anchor and not anchor.startswith("hf_normopt."):  # mkdocs checks those
            assert anchor in anchors(found), target


def test_every_public_name_is_in_the_api_reference():
    shown = re.findall(r"^::: hf_normopt\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(hf_normopt.__all__) - {"__version__"})


def test_every_page_is_in_the_readme_and_the_site():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = {page for entry in nav for page in entry.values()}
    for page in DOCS.glob("*.md"):
        assert f"](docs/{page.name})" in readme
        assert page.name in listed


def test_the_presets_of_the_documentation_are_the_presets():
    table = (DOCS / "presets.md").read_text().split("## All presets")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w-]+)`", "".join(r.split("|")[1] for r in rows))) == set(
        hf_normopt.PRESETS
    )


def test_the_supported_versions_are_those_that_are_pinned():
    page = (DOCS / "index.md").read_text()
    least = (ROOT / "pyproject.toml").read_text()
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    rows = re.findall(r"^\| ([\w-]+)(?: \(.*?\))? \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for package, oldest, tested in rows:
        assert f'"{package}>={oldest}"' in least
        assert pins[package] == tested


def test_the_citation_names_the_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_normopt.__version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2409.20325"


def test_the_notebook_has_no_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    losses = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+) +[\d.]+$", printed, re.MULTILINE))
    assert losses.keys() == {"adamw_torch", "normopt"}
    assert re.search(r"^lm_head +head +rms->linf", printed, re.MULTILINE)
    assert any("image/png" in output.get("data", ()) for output in outputs)
