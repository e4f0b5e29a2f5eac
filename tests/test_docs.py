"""The code of the pages runs, as one script a page, with fewer steps."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["networks", "objectives", "recipes", "training"])
def test_code_of_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    # Those with an ellipsis are there to be read.
    blocks = [block for block in blocks if "..." not in block]
    assert blocks
    code = re.sub(r"steps( ?= ?)\d+", r"steps\1 2", "\n".join(blocks))
    # Pages are written for JAX's own settings, not for those of the tests.
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        exec(compile(code, f"{page}.md", "exec"), {})
