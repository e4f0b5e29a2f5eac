"""The files around the package: what workflows and instructions name is there."""

import importlib.util
import pathlib
import re
import shlex
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path):
    yaml = pytest.importorskip("yaml")
    # In YAML 1.1, `on` is a truth value.
    content = yaml.safe_load(path.read_text())
    return content[True], content["jobs"]


def commands(path):
    _, found = jobs(path)
    steps = [step for job in found.values() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_of_workflow_name_what_there_is(path):
    markers = {text.partition(":")[0] for text in _pytest_options("markers")}
    groups, extras = PROJECT["dependency-groups"], PROJECT["project"]
    for command in commands(path):
        words = shlex.split(command)
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word.startswith(("tests/", "docs/", "benchmarks/", ".ci/")):
                assert (ROOT / word).exists(), command
            if word == "-m":
                assert {*re.findall(r"\w+", following)} - {"not", "and"} <= markers
            if word == "--group":
                assert following in groups
            if match := re.fullmatch(r"\.\[(\w+)\]", word):
                assert match[1] in extras["optional-dependencies"]
            if word == "-k":
                (name,) = {*re.findall(r"\w+", following)} - {"not"}
                assert f"_{name}(" in (ROOT / "tests" / "test_docs.py").read_text()
            if word.startswith("--hypothesis-profile="):
                profile = word.partition("=")[2]
                assert f'"{profile}"' in (ROOT / "tests" / "conftest.py").read_text()


def test_nightly_is_scheduled_and_documented():
    path = ROOT / ".github" / "workflows" / "nightly.yml"
    triggers, found = jobs(path)
    assert triggers.keys() == {"schedule", "workflow_dispatch"}
    tests = "pytest ", "python benchmarks/", "python tests/", "jupyter execute "
    tested = [command for command in commands(path) if command.startswith(tests)]
    assert len(tested) == len(found)
    for command in [*tested, *(c for c in commands(path) if "--pre " in c)]:
        assert f"\n{command}\n" in (ROOT / "CONTRIBUTING.md").read_text()


def test_no_file_is_in_the_wheel_twice():
    # Hatchling copies these next to the metadata; what is in the package is there anyway.
    files = [ROOT / name for name in PROJECT["project"]["license-files"]]
    assert all(path.exists() for path in files)
    assert not [path for path in files if ROOT / "src" in path.parents]


def test_pip_is_new_enough_for_groups():
    # The pip of Python 3.11 does not know `--group`.
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for line in re.findall(r"^.*pip install .*--group.*$", path.read_text(), re.M):
            block = path.read_text().partition(line)[0].rpartition("```bash")[2] + line
            before = block.partition("--group")[0]
            assert re.search(r"(-U|--upgrade) pip\b", before), line


@pytest.fixture
def release(tmp_path, monkeypatch):
    """`.ci/release.py`, on a copy of the files that it reads."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".ci/release.toml").write_text(
        'repository = "https://code.example/flowdiffrax"\ndocumentation = ""\n'
    )
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_release_needs_an_address_a_date_and_its_own_tag(release, tmp_path):
    assert [fault.split()[0] for fault in release.faults()] == [
        "CHANGELOG.md",
        "CITATION.cff",
    ]
    release.prepare("2031-02-03")
    assert "\n## 0.1.0 - 2031-02-03\n" in (tmp_path / "CHANGELOG.md").read_text()
    assert "\ndate-released: 2031-02-03\n" in (tmp_path / "CITATION.cff").read_text()
    assert release.faults("v0.1.0") == []
    assert "must be v0.1.0" in release.faults("v0.2.0")[0]
    (tmp_path / ".ci/release.toml").write_text((ROOT / ".ci/release.toml").read_text())
    # Until its owner says where the project lives.
    assert release.addresses()["repository"] or "`repository`" in release.faults()[0]


def test_readme_of_a_release_links_to_what_there_is(release):
    text = release.readme(release.addresses(), "0.1.0")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    base = "https://code.example/flowdiffrax/"
    own = [target.removeprefix(base) for target in targets if target.startswith(base)]
    assert len(own) > 10 and all(target.startswith("https://") for target in targets)
    for target in own:
        kind, version, path = target.split("/", 2)
        assert (kind, version) == ("raw" if path.endswith(".png") else "blob", "v0.1.0")
        assert (ROOT / path).exists()


def test_addresses_are_metadata(release):
    table = tomllib.loads(release.urls(release.addresses()))["project"]["urls"]
    assert table["Repository"] == "https://code.example/flowdiffrax"
    assert table["Documentation"].endswith("/tree/main/docs")
    assert release.urls({"repository": "", "documentation": ""}) == ""


def _pytest_options(name):
    return PROJECT["tool"]["pytest"]["ini_options"][name]


def test_paper_names_commands_and_sources_that_exist():
    folder = ROOT / "docs" / "paper"
    text = (folder / "paper.md").read_text()
    cited = set(re.findall(r"@([a-z]+\d{4}[a-z]*)", text))
    listed = set(re.findall(r"^@\w+\{(\w+),", (folder / "paper.bib").read_text(), re.M))
    assert cited == listed and len(cited) > 5
    files = re.findall(r"`(?:python|pytest) (\S+\.py)", text)
    assert len(files) > 4
    for file in files:
        assert (ROOT / file).is_file(), file
