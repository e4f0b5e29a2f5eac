"""Notebooks are what their pages are: docs/notebooks.py makes them."""

import importlib.util
import pathlib
import re

import pages
import pytest

ROOT = pathlib.Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs/notebooks.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)
TUTORIALS = notebooks.tutorials()


def sources(notebook, kind):
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_has_the_code_of_its_page(path):
    notebook = notebooks.notebook(path)
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(notebook))
    install, *code = sources(notebook, "code")
    code = [cell for cell in code if not cell.startswith("from IPython")]
    # The tests run the code of the page, so that they run that of the notebook.
    assert code == [block.code.strip("\n") for block in pages.blocks(path)]
    assert "flowdiffrax" in install
    prose = "".join(sources(notebook, "markdown"))
    assert not re.search(r"<!--|^\?\?\?|^!!!|!\[|\]\[\]|```text", prose, re.M)
    # Its reader sees a figure.
    assert any(word in cell for cell in code for word in ("plt.", ".plot(")) or any(
        "Image(" in cell for cell in sources(notebook, "code")
    )


def test_links_are_absolute_once_there_is_an_address(tmp_path):
    page = ROOT / "docs" / "tutorials" / "ode.md"
    text = "See [fits](../pdes.md#a), [`x`](https://a.example)\nand ![a figure](b.png)."
    prose = lambda place: notebooks._prose(text, page, place, "1.2")
    assert prose("") == "See fits, [`x`](https://a.example)\nand ."
    there = "https://b.example/c/blob/v1.2/docs/pdes.md#a"
    assert prose("https://b.example/c").startswith(f"See [fits]({there})")


def test_first_cell_installs_what_the_page_imports():
    code = "import torch\nfd.paths.OptimalTransportCoupling()"
    cell = notebooks._install(code, "https://b.example/c")
    assert "['flowdiffrax', 'ott', 'torch']" in cell
    assert '%pip install --quiet "flowdiffrax[examples]" ott-jax torch' in cell
    chains = notebooks._install("fd.paths.couple_snapshots(cells, key=key)", "")
    assert "['flowdiffrax', 'ott']" in chains
    assert "%pip" not in notebooks._install("", "")
