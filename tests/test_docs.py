"""What the pages print is what their code prints: tests/pages.py says how it is compared.

Pages that train are run in short, with two steps, and at full length in the slow tests.
"""

import contextlib
import re
import subprocess
import sys

import jax
import pages
import pytest

PAGES = pages.pages()
# These take longer than a quick test may, in short as well.
SLOW = {
    *("coming-from", "data", "extending", "fid", "getting-started", "networks"),
    *("objectives/in-code", "posteriors", "recipes", "scientific/own-ode", "simulations"),
    *("testing", "training"),
    *("tutorials/data-to-data", "tutorials/density", "tutorials/fine-tuning"),
    "tutorials/forced",
    "tutorials/kinetics",
    *("tutorials/images", "tutorials/likelihoods", "tutorials/ode"),
    *("tutorials/pytorch-teacher", "tutorials/self-distillation"),
}
SLOW = {f"docs/{name}.md" for name in SLOW}


def skip_without_optional(name):
    """Skips a page that imports a package which not every environment has."""
    text = PAGES[name].read_text()
    for package in ("blackjax", "distreqx", "flowjax", "torch"):
        if re.search(rf"^(import|from) {package}\b", text, re.M):
            pytest.importorskip(package)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PAGES],
)
def test_code_of_page(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    skip_without_optional(name)
    with contextlib.ExitStack() as stack:
        # Pages are written for JAX's own settings, not for those of the tests.
        stack.enter_context(jax.enable_x64(False))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        if name.endswith("posteriors.md"):
            # The check takes keys in loops under `vmap` for a second use.
            stack.enter_context(jax.debug_key_reuse(False))
        outputs = pages.run(PAGES[name], short=True)
    compared = zip(pages.blocks(PAGES[name]), outputs, strict=True)
    wrong = [pages.difference(block, out, short=True) for block, out in compared]
    assert not any(wrong), "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page_at_full_length(name):
    skip_without_optional(name)
    # As a reader runs it: without the settings of the tests.
    command = [sys.executable, pages.__file__, str(PAGES[name])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def test_slow_pages_are_there():
    assert SLOW <= PAGES.keys()


@pytest.mark.parametrize("path", PAGES.values(), ids=PAGES)
def test_no_block_is_missed(path):
    text = path.read_text()
    # An indented one, say, within a list.
    assert text.count("```python") == len(pages.BLOCK.findall(text))
    # What is printed has the block that prints it right above.
    assert "```text" not in pages.BLOCK.sub("", text)
    assert "<!-- prints" not in pages.BLOCK.sub("", text)
    assert not re.search(
        r"^\s*```\n\s*\S", re.sub(r"```\w+\n.*?```\n", "", text, flags=re.S)
    )


# How pages are compared


def page(tmp_path, printed, how=None, code="print('2 jumps: 0.50')"):
    comment = f"\n<!-- prints: {how} -->\n" if how else ""
    path = tmp_path / "page.md"
    text = f"```python\n{code}\n```\n{comment}"
    if printed is not None:
        text += f"\n```text\n{printed}\n```\n"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "printed, how, is_right",
    [
        ("2 jumps: 0.50", None, True),
        ("2  jumps:\n0.501", None, True),
        ("2 jumps: 0.52", None, False),
        ("2 jumps: 0.52", "rtol=0.1", True),
        ("2 jumps: 0.40", "atol=0.05", False),
        ("3 jumps: 0.50", "rtol=1.0", False),
        ("2 steps: 0.50", "trained, rtol=1.0", False),
        ("2 jumps: 0.50 0.50", None, False),
        ("2 jumps: nan", "rtol=1.0", False),
        (None, None, False),
        (None, "not shown", True),
        ("2 jumps: 0.50", "not shown", False),
    ],
)
def test_pages_are_compared(tmp_path, printed, how, is_right):
    wrong = pages.check(page(tmp_path, printed, how))
    assert bool(wrong) != is_right


def test_training_in_short_is_compared_by_its_words(tmp_path):
    code = "num_steps = 1000\nprint(f'{num_steps} steps: {1 / num_steps}')"
    check = lambda printed, how: pages.check(
        page(tmp_path, printed, how, code), short=True
    )
    assert not check("1000 steps: 0.001", "trained")
    assert check("1000 steps: 0.001, 2", "trained")
    assert check("1000 jumps: 0.001", "trained")
    # Not marked, it must not depend on training.
    assert check("1000 steps: 0.001", None)


def test_pages_are_written_anew(tmp_path):
    path = page(tmp_path, "2 jumps: 0.70", "rtol=0.1")
    assert pages.check(path, update=True)
    assert path.read_text() == page(tmp_path, "2 jumps: 0.50", "rtol=0.1").read_text()
    assert not pages.check(path)


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rtl"):
        pages.blocks(page(tmp_path, "2 jumps: 0.50", "rtl=0.1"))
