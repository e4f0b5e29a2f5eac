"""The code of the pages runs, one script a page, with fewer steps where it trains."""

import contextlib
import io
import pathlib
import re

import jax
import numpy as np
import pytest

import flowdiffrax as fd

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(
    r"^```python\n(.*?)^```\n(?:\n(?:</div>\n\n)?```text\n(.*?)^```\n)?", re.M | re.S
)
# These print the same however long they train, and that is compared with the page.
QUICK = {
    *("README", "index", "flow-maps", "notation", "theory", "interoperability"),
    *("flow-matching", "trajectories", "lagrangian", "eulerian", "progressive"),
    *("self-distillation", "mean-flow", "consistency"),
}


def blocks(path):
    """The blocks of Python that are to run, each with what it prints on the page."""
    return [match.groups() for match in BLOCK.finditer(path.read_text())]


def is_quick(path):
    return path.stem in QUICK and path.parent.name != "tutorials"


PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if blocks(path)
}


def assert_prints(out, page):
    """The same words, and the same numbers up to what CPUs and versions differ by."""
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    assert re.sub(number, "#", " ".join(out.split())) == re.sub(
        number, "#", " ".join(page.split())
    )
    found, expected = (
        np.asarray([float(text) for text in re.findall(number, text)])
        for text in (out, page)
    )
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        name if is_quick(path) else pytest.param(name, marks=pytest.mark.slow)
        for name, path in PAGES.items()
    ],
)
def test_code_of_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Files that nobody has at hand.
    monkeypatch.setattr(fd.data, "imagenet32", lambda path: fd.data.digits())
    monkeypatch.setattr(fd.data, "cifar10", lambda path, split: fd.data.digits())
    inception = lambda path: fd.metrics.RandomFeatures((8, 8, 1), key=jax.random.key(0))
    monkeypatch.setattr(fd.metrics.InceptionFeatures, "load", inception)
    path, names = PAGES[name], {}
    if path.stem == "interoperability":
        pytest.importorskip("distreqx")
        pytest.importorskip("flowjax")
    with contextlib.ExitStack() as stack:
        # Pages are written for JAX's own settings, not for those of the tests.
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(np.printoptions())
        for code, printed in blocks(path):
            code = re.sub(r"(?<!max_)steps( ?= ?)\d+", r"steps\1 2", code)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, f"<{name}>", "exec"), names)
            if is_quick(path):
                assert_prints(out.getvalue(), printed or "")


def test_quick_pages_are_there():
    assert {path.stem for path in PAGES.values() if is_quick(path)} == QUICK


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_no_block_is_missed(path):
    text = path.read_text()
    # An indented one, say, within a list.
    assert text.count("```python") == len(BLOCK.findall(text))
    assert not re.search(
        r"^\s*```\n\s*\S", re.sub(r"```\w+\n.*?```\n", "", text, flags=re.S)
    )
