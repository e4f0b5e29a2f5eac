"""Runs the Python of a page, and compares what it prints with what the page says.

    python tests/pages.py                                  # every page, at full length
    python tests/pages.py docs/getting-started.md          # one page
    python tests/pages.py docs/getting-started.md --update # and write its numbers anew
    python tests/pages.py docs/getting-started.md --short  # two steps where it trains

A block of Python with a block of text below it prints that text. Words must be the same,
and so must integers; other numbers agree to 2 %. A comment between the two blocks states
another tolerance, and which blocks depend on training:

    <!-- prints: trained, rtol=0.5, atol=0.01 -->

What a trained block prints after two steps has the same words and as many numbers.
`<!-- prints: not shown -->` is for a block whose text is left out of the page.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

import flowdiffrax as fd

ROOT = pathlib.Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n::::\n)?"
    r"(?:\n<!-- prints: (?P<how>.*?) -->\n)?"
    r"(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.M | re.S,
)
NUMBER = re.compile(r"-?(?:\d+\.?\d*(?:e[+-]?\d+)?|\b(?:nan|inf)\b)")
# A checksum of trained weights is another one on every machine.
FINGERPRINT = re.compile(r"\b(?=\S*\d)[0-9a-f]{16}\b")


class Block(NamedTuple):
    """A block of Python, what the page says that it prints, and how to compare."""

    code: str
    printed: str | None
    is_trained: bool
    is_shown: bool
    tolerance: dict[str, float]
    span: tuple[int, int]  # of the printed text within the page


def blocks(path):
    """The blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer(path.read_text()):
        words = re.split(r", *", match["how"]) if match["how"] else []
        settings = dict(word.split("=") for word in words if "=" in word)
        flags = {word for word in words if "=" not in word}
        unknown = (flags - {"trained", "not shown"}) | (
            settings.keys() - {"rtol", "atol"}
        )
        if unknown:
            raise ValueError(f"{path}: `prints:` does not know {unknown}.")
        found.append(
            Block(
                match["code"],
                match["printed"],
                "trained" in flags,
                "not shown" not in flags,
                {name: float(value) for name, value in settings.items()},
                match.span("printed"),
            )
        )
    return found


def pages():
    """Every page with Python, by its name."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(path.relative_to(ROOT)): path for path in paths if blocks(path)}


def shortened(code):
    """Two steps where it trains."""
    code = re.sub(r"(?<!max_)steps( ?= ?)[\d_]+", r"steps\g<1>2", code)
    return re.sub(r"minutes=[\d_]+", "minutes=9, num_steps=2, pool_size=64", code)


def run(path, *, short):
    """What each block prints, one after the other, in the folder that we are in."""
    names, printed = {"__name__": "page"}, []
    stand_in = fd.images.digits
    features = lambda path: fd.images.RandomFeatures((8, 8, 1), key=jax.random.key(0))
    with contextlib.ExitStack() as stack:
        # Files that nobody has at hand.
        for owner, name, value in [
            (fd.images, "imagenet32", lambda path: stand_in()),
            (fd.images, "cifar10", lambda path, split: stand_in()),
            (fd.images.InceptionFeatures, "load", features),
        ]:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(np.printoptions())
        for block in blocks(path):
            code = shortened(block.code) if short else block.code
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, f"<{path.name}>", "exec"), names)
            printed.append(out.getvalue())
    return printed


def difference(block, out, *, short):
    """What is wrong with a block of a page, or nothing."""
    if not block.is_shown:
        return "" if block.printed is None else "It is shown, and marked `not shown`."
    page = block.printed or ""
    words = [_words(text) for text in (page, out)]
    if words[0] != words[1]:
        return f"The page has\n{page}\nand the code prints\n{out}"
    if short and block.is_trained:
        return ""
    for expected, found in zip(_numbers(page), _numbers(out), strict=True):
        is_integer = expected.lstrip("-").isdigit() and found.lstrip("-").isdigit()
        tolerance = {"rtol": 0.02, "atol": 2e-5} | block.tolerance
        if (is_integer and expected != found) or not np.isclose(
            float(found), float(expected), **tolerance, equal_nan=True
        ):
            return (
                f"The page has {expected} where the code prints {found}; the page:\n"
                f"{page}\nthe code:\n{out}"
            )
    return ""


def _words(text):
    text = NUMBER.sub("#", FINGERPRINT.sub("fingerprint", text))
    # The columns of an array move with its signs and its digits.
    return re.sub(r"(?<=\[) | (?=\])", "", " ".join(text.split()))


def _numbers(text):
    return NUMBER.findall(FINGERPRINT.sub("fingerprint", text))


def check(path, *, short=False, update=False):
    """Runs a page in a folder of its own; returns what is wrong, block by block."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            outputs = run(path, short=short)
        finally:
            os.chdir(here)
    compared = list(zip(blocks(path), outputs, strict=True))
    wrong = [difference(block, out, short=short) for block, out in compared]
    if update:
        text = path.read_text()
        # From the end, so that what lies before stays where it is.
        for (block, out), message in reversed(list(zip(compared, wrong, strict=True))):
            if message and block.printed is not None:
                start, end = block.span
                text = text[:start] + out + text[end:]
        path.write_text(text)
    return [message for message in wrong if message]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="all of them if none is named")
    parser.add_argument("--short", action="store_true", help="two steps of training")
    parser.add_argument("--update", action="store_true", help="rewrite what differs")
    options = parser.parse_args()
    if options.short and options.update:
        parser.error("`--update` writes what a page prints at full length.")
    paths = [pathlib.Path(name).resolve() for name in options.pages]
    if len(paths) == 1:
        wrong = check(paths[0], short=options.short, update=options.update)
        print("\n".join([*wrong, f"{paths[0].name}: {len(wrong)} blocks differ"]))
        return bool(wrong)
    flags = [flag for flag in ("--short", "--update") if flag in sys.argv]
    # Each in a new process, as a reader runs it.
    command = [sys.executable, __file__, *flags]
    paths = paths or pages().values()
    return max([subprocess.run([*command, path]).returncode for path in paths])


if __name__ == "__main__":
    sys.exit(main())
