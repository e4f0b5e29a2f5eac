"""Makes a release: what has to be true of it, its files, and a trial of the wheel.

    python .ci/release.py prepare      # dates the changelog and the citation
    python .ci/release.py check [TAG]  # refuses what must not be released
    python .ci/release.py build        # dist/: sdist, wheel, conda-forge recipe
    python .ci/release.py site         # site/: of this version, and of earlier tags
    python .ci/release.py try          # the wheel in new environments, without sources

`build` works on a copy of what git tracks, in which the README has absolute links and
`pyproject.toml` the project's addresses, both from `.ci/release.toml`. It needs the group
`release`. `try` uses every Python from 3.11 on that it finds.
"""

import argparse
import datetime
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
UNRELEASED = "## Unreleased"
DATE = r"\d{4}-\d{2}-\d{2}"


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def addresses():
    return tomllib.loads((ROOT / ".ci" / "release.toml").read_text())


def prepare(today):
    """Dates what is unreleased, in the changelog and in the citation."""
    version, path = project()["version"], ROOT / "CHANGELOG.md"
    text = path.read_text()
    if UNRELEASED not in text:
        sys.exit(
            f"CHANGELOG.md has no heading {UNRELEASED!r}: nothing is to be released."
        )
    path.write_text(text.replace(UNRELEASED, f"## {version} - {today}", 1))
    path = ROOT / "CITATION.cff"
    kept = re.sub(r"^(version|date-released): .*\n", "", path.read_text(), flags=re.M)
    stamp = f"version: {version}\ndate-released: {today}\n"
    path.write_text(kept.replace("license:", f"{stamp}license:", 1))
    print(f"Commit this, and push the tag v{version}.")


def faults(tag=None):
    """Returns what must not be released, each with its cure."""
    found, version, place = [], project()["version"], addresses()
    if not re.fullmatch(r"https://\S+[^/]", place["repository"]):
        found.append(
            "`repository` in .ci/release.toml must be the project's address, without a "
            f"slash at its end; got {place['repository']!r}."
        )
    if tag is not None and tag != f"v{version}":
        found.append(f"The tag must be v{version}, as in pyproject.toml; got {tag!r}.")
    changes = (ROOT / "CHANGELOG.md").read_text()
    dated = re.search(rf"^## {re.escape(version)} - ({DATE})$", changes, re.M)
    if dated is None or UNRELEASED in changes:
        found.append(
            f"CHANGELOG.md must have a dated heading for {version}, and nothing "
            "unreleased. Run `python .ci/release.py prepare`."
        )
    citation = (ROOT / "CITATION.cff").read_text()
    stated = re.search(rf"^date-released: ({DATE})$", citation, re.M)
    same = dated and stated and dated[1] == stated[1]
    if f"\nversion: {version}\n" not in citation or not same:
        found.append(
            "CITATION.cff must have the version, and the date of the changelog. Run "
            "`python .ci/release.py prepare`."
        )
    if "$" in readme(place, version):
        found.append("README.md has formulas, which the package index shows as dollars.")
    return found


def readme(place, version):
    """The README with links that work from elsewhere."""
    text = (ROOT / "README.md").read_text()
    if not (base := place["repository"]):
        return text

    def absolute(match):
        opening, target = match[1], match[2]
        if re.match(r"https?://|#|mailto:", target):
            return match[0]
        kind = "raw" if opening.startswith("!") else "blob"
        return f"{opening}({base}/{kind}/v{version}/{target})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", absolute, text)


def urls(place):
    """The table of addresses of the package's metadata."""
    base = place["repository"]
    if not base:
        return ""
    known = {
        "Repository": base,
        "Documentation": place["documentation"] or f"{base}/tree/main/docs",
        "Changelog": f"{base}/blob/main/CHANGELOG.md",
        "Issues": f"{base}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{k} = "{v}"\n' for k, v in known.items())


def build():
    """Makes the sdist, the wheel and the recipe in dist/."""
    place, version = addresses(), project()["version"]
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "flowdiffrax"
        names = subprocess.run(
            ["git", "ls-files", "-z"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\0")
        for name in filter(None, names):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        (copy / "README.md").write_text(readme(place, version))
        with (copy / "pyproject.toml").open("a") as file:
            file.write(urls(place))
        run(sys.executable, "-m", "build", "--outdir", DIST, copy)
    run(sys.executable, "-m", "twine", "check", "--strict", *DIST.iterdir())
    if place["repository"]:
        (DIST / "recipe.yaml").write_text(recipe(place))
    print(*sorted(path.name for path in DIST.iterdir()), sep="\n")


def recipe(place):
    """The recipe for conda-forge, which takes the sdist from the project's release."""
    info = project()
    (sdist,) = DIST.glob("*.tar.gz")
    checksum = hashlib.sha256(sdist.read_bytes()).hexdigest()
    needs = "".join(f"    - {conda(need)}\n" for need in sorted(info["dependencies"]))
    least = info["requires-python"].removeprefix(">=")
    return f"""schema_version: 1
context:
  version: "{info["version"]}"
package:
  name: flowdiffrax
  version: ${{{{ version }}}}
source:
  url: {place["repository"]}/releases/download/v{info["version"]}/{sdist.name}
  sha256: {checksum}
build:
  noarch: python
  number: 0
  script: ${{{{ PYTHON }}}} -m pip install . --no-deps --no-build-isolation
requirements:
  host:
    - python ${{{{ python_min }}}}.*
    - pip
    - hatchling
  run:
    - python >={least}
{needs}tests:
  - python:
      imports: [flowdiffrax]
      pip_check: true
about:
  homepage: {place["repository"]}
  summary: {info["description"]}
  license: {info["license"]}
  license_file: LICENSE
extra:
  recipe-maintainers: []
"""


def conda(requirement):
    name, bound, version = re.fullmatch(r"([\w-]+)(>=)?(.*)", requirement).groups()
    return f"{name} {bound or ''}{version}".strip()


TRIAL = """
import time
begin = time.process_time()
import diffrax, jax.numpy as jnp
middle = time.process_time()
import flowdiffrax as fd
end = time.process_time()
assert "site-packages" in fd.__file__, fd.__file__
flow_map = fd.exact.LinearFlowMap([[0.0, 1.0], [-1.0, 0.0]], [0.0, 0.0])
sol = diffrax.diffeqsolve(
    diffrax.ODETerm(flow_map.velocity), fd.FlowMapSolver(flow_map),
    0.0, jnp.pi, jnp.pi, jnp.array([1.0, 0.0]),
)
assert jnp.allclose(sol.ys[0], jnp.array([-1.0, 0.0]), atol=1e-5), sol.ys
share = (end - begin) / (middle - begin)
print(f"flowdiffrax {fd.__version__}, import {share:.2f} times that of Diffrax")
"""


def try_wheel(pythons):
    """Installs the wheel in new environments, and uses it where no source is in reach."""
    (wheel,) = DIST.glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        for python in pythons:
            env = pathlib.Path(folder) / pathlib.Path(python).name
            run(python, "-m", "venv", env)
            inside = next(
                iter([*env.glob("bin/python"), *env.glob("Scripts/python.exe")])
            )
            run(inside, "-m", "pip", "install", "--quiet", wheel)
            run(inside, "-m", "pip", "check")
            for _ in range(2):  # the first import compiles the bytecode
                run(inside, "-c", TRIAL, cwd=folder)


def site():
    """Makes the site of this version, earlier ones in folders, and their list."""
    base, version = addresses()["documentation"], project()["version"]
    shutil.rmtree(ROOT / "site", ignore_errors=True)
    sites = {version: ROOT}
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT)]
        tags = subprocess.run(
            [*git, "tag", "--list", "v*", "--sort=-v:refname"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for tag in tags:
            if tag != f"v{version}":
                sites[tag[1:]] = pathlib.Path(folder) / tag
                run(*git, "worktree", "add", "--detach", sites[tag[1:]], tag)
        for name, root in sites.items():
            place = ROOT / "site" / ("" if root == ROOT else f"v{name}")
            trees = ["-d", pathlib.Path(folder) / "doctrees" / name]
            words = ["-m", "sphinx", "-q", "-W", *trees, root / "docs", place]
            run(sys.executable, *words)
            if root != ROOT:
                run(*git, "worktree", "remove", "--force", root)
    lines = [
        {"version": name, "url": f"{base}/" + ("" if name == version else f"v{name}/")}
        for name in sites
    ]
    (ROOT / "site" / "versions.json").write_text(json.dumps(lines, indent=1))


def found_pythons():
    found = [shutil.which(f"python{version}") for version in PYTHONS]
    works = lambda python: subprocess.run([python, "-c", ""], capture_output=True)
    return [p for p in found if p and works(p).returncode == 0] or [sys.executable]


def run(*command, **kwargs):
    subprocess.run([str(word) for word in command], check=True, **kwargs)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["prepare", "check", "build", "site", "try"])
    parser.add_argument("tag", nargs="?")
    parser.add_argument("--this-python", action="store_true", help="try no other one")
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(datetime.date.today().isoformat())
    elif options.what == "check":
        if found := faults(options.tag):
            sys.exit("This must not be released:\n- " + "\n- ".join(found))
        print("ready")
    elif options.what == "build":
        build()
    elif options.what == "site":
        site()
    else:
        try_wheel([sys.executable] if options.this_python else found_pythons())


if __name__ == "__main__":
    main()
