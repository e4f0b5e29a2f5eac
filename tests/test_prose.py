"""Phrases that do not read as English, found by readers; say it another way."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
PHRASES = [
    *("what is made of", "that is none", "for what is no", "in the place of"),
    *("there is nobody to", "says? so", "beside it", "of one's own", "a trifle"),
    *("for want of", "dear", "laws? of times", "mend(s|ed|ing)?", "kin"),
]
FOLDERS = ("src", "docs", "examples", "benchmarks", "tests")


def test_no_phrase_of_the_list():
    pattern = re.compile(
        rf"\b({'|'.join(PHRASES)})\b".replace(" ", r"\s+"), re.IGNORECASE
    )
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in (".py", ".md")]
    paths.remove(pathlib.Path(__file__))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in [*paths, *ROOT.glob("*.md")]
        for match in pattern.finditer(path.read_text())
    ]
    assert not found, found
