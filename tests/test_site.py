"""The site: every public name has its place, and every figure its script."""

import pathlib
import re

import pytest
from test_package import NAMES, public

import flowdiffrax.testing

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
TESTING = {
    f"testing.{name}": value for name, value in public(flowdiffrax.testing).items()
}
NAMED = {*NAMES, *TESTING}
TOCTREE = re.compile(r"^:::\{toctree\}\n(.*?)^:::", re.MULTILINE | re.DOTALL)
LISTED = re.compile(r"^:::\{api\}\n(.*?)^:::", re.MULTILINE | re.DOTALL)
PLACES: dict[str, list[str]] = {}
for _page in sorted((DOCS / "api").glob("*.md")):
    for _name in " ".join(LISTED.findall(_page.read_text())).split():
        _name = _name.removeprefix("flowdiffrax.")
        PLACES.setdefault(_name, []).append(_page.name)


def test_each_name_is_on_one_page():
    for name in NAMED:
        assert len(PLACES.get(name, [])) == 1, (
            f"`flowdiffrax.{name}` should stand on one page of docs/api/, as a line "
            f"`flowdiffrax.{name}` of a block `{{api}}`; found {PLACES.get(name, [])}."
        )


def test_pages_have_no_other_names():
    assert {*PLACES} <= NAMED


def test_pages_are_in_navigation():
    pages, linked = {*DOCS.rglob("*.md")}, [DOCS / "index.md"]
    pages -= {DOCS / "paper" / "paper.md"}  # for a journal
    for page in pages:
        for line in "\n".join(TOCTREE.findall(page.read_text())).splitlines():
            if name := re.fullmatch(r"(?:.* <)?([\w./-]+)>?", line):
                linked.append((page.parent / f"{name[1]}.md").resolve())
    # Each has one place.
    assert sorted(linked) == sorted(pages)


# Figures that are the outcome of a long run, each of a script that a page names.
SCRIPTS = {
    "burgers.png": "examples/burgers.py",
    "calibration.png": "docs/simulations.md",
    "checkerboard.png": "examples/checkerboard.py",
    "data-to-data.png": "docs/tutorials/data-to-data.md",
    "digits.png": "examples/digits.py",
    "fine-tuning.png": "docs/tutorials/fine-tuning.md",
    "forced.png": "docs/tutorials/forced.md",
    "kinetics.png": "docs/tutorials/kinetics.md",
    "images_digits.png": "benchmarks/images.py",
    "images_fashion.png": "benchmarks/images.py",
    "kuramoto_sivashinsky.png": "examples/kuramoto_sivashinsky.py",
    "learn_solver.png": "docs/tutorials/ode.md",
    "objectives.png": "benchmarks/compare_objectives.py",
    "posterior.png": "examples/posterior.py",
    "predict_and_correct.png": "benchmarks/evaluations.py",
    "pytorch-teacher.png": "docs/tutorials/pytorch-teacher.md",
    "scaling.png": "benchmarks/scaling.py",
    "score_curves.png": "examples/digits.py",
    "snapshots.png": "docs/tutorials/data-to-data.md",
    "steering.png": "examples/steering.py",
}


FIGURES = {*DOCS.rglob("*.png")} - {DOCS / "figures" / "social_card.png"}  # on no page


@pytest.mark.parametrize("path", sorted(FIGURES), ids=lambda path: path.name)
def test_figure_has_script(path):
    pages = [page.read_text() for page in DOCS.rglob("*.md")]
    pages = [
        page for page in pages if f"/{path.name})" in page or f"({path.name})" in page
    ]
    assert pages
    script = path.with_suffix(".py")
    if path.name in SCRIPTS:
        script = ROOT / SCRIPTS[path.name]
    assert script.exists()
    # A page may draw the figure by its own code.
    own = script.read_text() if script.suffix == ".md" else ""
    assert any(script.name in page or page == own for page in pages)
