"""Turns tutorials into Jupyter notebooks. The Markdown pages are their sources.

    python docs/notebooks.py                                    # every tutorial
    python docs/notebooks.py docs/tutorials/ode.md --out folder # one page
    jupyter execute --inplace out/notebooks/*.ipynb             # run them

Python blocks become cells of code. What they print is left out, and so are HTML comments
and pictures, since cells draw their own. A comment `<!-- notebook: show out/a.png -->`
becomes a cell that shows a file. Links lead to the repository that `.ci/release.toml`
names, and are plain text while it names none. The first cell installs what is missing.
"""

import argparse
import json
import pathlib
import re
import tomllib

DOCS = pathlib.Path(__file__).resolve().parent
ROOT = DOCS.parent
OTHERS = ("posteriors", "simulations", "steering", "testing")
# Packages beside the library and what comes with it, and how to see that one is used.
EXTRAS = {"ott": "OptimalTransportCoupling|couple_snapshots"} | {
    name: rf"^(?:import|from) {name}\b"
    for name in ("blackjax", "hypothesis", "scipy", "torch")
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$\n?", re.M | re.S)
SHOWN = re.compile(r"<!-- notebook: show (\S+) -->")
LINK = re.compile(r"(!?)\[((?:`[^`]*`|[^\]`])*)\]\(([^)\s]+)\)")


def tutorials():
    """The pages of which notebooks are made by default."""
    pages = sorted((DOCS / "tutorials").glob("*.md"))
    pages = [page for page in pages if page.name != "index.md"]
    return pages + [DOCS / f"{name}.md" for name in OTHERS]


def notebook(path):
    """The notebook of a page, as a dictionary."""
    place = tomllib.loads((ROOT / ".ci" / "release.toml").read_text())["repository"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cells, prose, end = [], "", 0
    text = path.read_text()
    blocks = list(FENCE.finditer(text))
    for block in blocks:
        prose += text[end : block.start()]
        end = block.end()
        if block[1] == "python":
            cells += [*_prose_and_shown(prose, path, place, version), ("code", block[2])]
            prose = ""
        elif block[1] != "text":  # which is what the block above prints
            prose += block[0]
    cells += _prose_and_shown(prose + text[end:], path, place, version)
    code = "".join(source for kind, source in cells if kind == "code")
    cells.insert(0, ("code", _install(code, place)))
    return {
        "cells": [_cell(number, *cell) for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(number, kind, source):
    lines = source.strip("\n").splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _prose_and_shown(text, path, place, version):
    """Cells of a stretch of prose, split where it asks for a file to be shown."""
    pieces = SHOWN.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            show = f'from IPython.display import Image\n\nImage("{piece}")'
            yield "code", show
        elif piece := _prose(piece, path, place, version):
            yield "markdown", piece


def _prose(text, path, place, version):
    text = re.sub(r"<!--.*?-->\n?|^</?div.*>\n", "", text, flags=re.M | re.S)

    def link(match):
        is_picture, words, target = match.groups()
        if is_picture:
            return ""
        if re.match(r"https?://|mailto:", target):
            return match[0]
        page, _, anchor = target.partition("#")
        if not place:
            return words
        file = (path.parent / page).resolve() if page else path
        anchor = f"#{anchor}" if anchor else ""
        where = file.relative_to(ROOT).as_posix()
        return f"[{words}]({place}/blob/v{version}/{where}{anchor})"

    def quote(match):
        title = match[1] or match[0].split()[1].capitalize()
        body = re.sub(r"^ {4}", "", match[2], flags=re.M).strip()
        return f"**{title}**\n\n{body}\n".replace("\n", "\n> ").join(["> ", "\n"])

    text = re.sub(
        r'^(?:!!!|\?\?\?\+?) \w+(?: "(.*)")?\n((?:\n| {4}.*\n)+)', quote, text, flags=re.M
    )
    # Links to the site's own index of names.
    text = re.sub(r"\[(`[^`]*`)\]\[[^\]]*\]", r"\1", text)
    text = LINK.sub(link, text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _install(code, place):
    """The first cell."""
    found = sorted(name for name, mark in EXTRAS.items() if re.search(mark, code, re.M))
    packages = " ".join(["ott-jax" if name == "ott" else name for name in found])
    step = f'%pip install --quiet "flowdiffrax[examples]" {packages}'.rstrip()
    if not place:
        step = f"raise ImportError('pip install \".[examples]\" {packages}, in a clone.')"
    return (
        "# Installs what is missing. On Colab, a CPU runtime is enough; for images, a\n"
        "# GPU (Runtime > Change runtime type) is faster.\n"
        "from importlib.util import find_spec\n\n"
        f"if not all(map(find_spec, {['flowdiffrax', *found]})):\n    {step}\n"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=pathlib.Path, help="default: tutorials")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/notebooks"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for page in options.pages or tutorials():
        file = options.out / f"{page.stem}.ipynb"
        file.write_text(json.dumps(notebook(page.resolve()), indent=1) + "\n")
        print(file)


if __name__ == "__main__":
    main()
