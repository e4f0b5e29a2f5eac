"""Links from names in code, such as `FlowMapSolver` or `jax.vmap`, to where they stand.

Our own names are those of the API pages. Those of other libraries are listed in
`links.txt`, with the pages they stand on, so that the site builds without network.
"""

import html
import pathlib
import re
import tomllib

HERE = pathlib.Path(__file__).parent
# A name, alone or called: `UniformSquare(max_gap)`.
NAME = re.compile(r"(?:<span[^>]*>)?([A-Za-z_][\w.]*)(\(.*\))?(?:</span>)?", re.DOTALL)
PIECES = re.compile(r"(<[^>]*>)")
# Inside of these, code is code, or a link already.
CLOSED = {"a", "autoref", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "summary"}


def own_names() -> dict[str, str]:
    """How a name may be written, and its identifier."""
    found = {}
    for page in sorted((HERE.parent / "api").glob("*.md")):
        for name in re.findall(r"^::: (flowdiffrax\.[\w.]+)", page.read_text(), re.M):
            inner = name.removeprefix("flowdiffrax.")
            found |= {name: name, inner: name, f"fd.{inner}": name}
            last = inner.rsplit(".", 1)[-1]
            # A short one in lower case could be anything.
            if "_" in last or not last.islower():
                found.setdefault(last, name)
    return found


def other_names() -> dict[str, str]:
    """The names of other libraries, and their addresses."""
    found = {}
    for line in (HERE / "links.txt").read_text().splitlines():
        address, *names = line.split()
        for name in names:
            found[name] = address.replace("{}", name)
            # Diffrax's are written without its name too.
            if name.startswith("diffrax."):
                found[name.removeprefix("diffrax.")] = found[name]
    return found


OWN, OTHER = own_names(), other_names()


def on_config(config):
    """The project's addresses, as far as `.ci/release.toml` has them."""
    addresses = tomllib.loads((HERE.parents[1] / ".ci" / "release.toml").read_text())
    config.repo_url = addresses["repository"] or None
    config.site_url = addresses["documentation"] or config.site_url
    return config


def on_env(env, config, files):
    """Annotations in signatures link to other libraries too."""
    del files
    for name, address in OTHER.items():
        config.plugins["autorefs"].register_url(name, address)
    return env


def on_page_content(content, page, config, files):
    """Every name in code becomes a link, unless it is one already."""
    del page, config, files
    pieces = PIECES.split(content)
    depth = 0
    for index, piece in enumerate(pieces):
        tag = re.match(r"</?([a-z0-9]+)", piece)
        if tag and tag[1] in CLOSED:
            depth += -1 if piece.startswith("</") else 1
        is_code = piece == "<code>" and not depth and pieces[index + 2] == "</code>"
        if is_code:
            target = _target(html.unescape(pieces[index + 1]))
            if target:
                pieces[index] = f"{target[0]}<code>"
                pieces[index + 2] = f"</code>{target[1]}"
    return "".join(pieces)


def _target(code: str) -> tuple[str, str] | None:
    match = NAME.fullmatch(code)
    if match is None:
        return None
    name = re.sub(r"^eqx\.", "equinox.", match[1])
    # Of a method, the place of its class.
    for known in (name, name.rpartition(".")[0]):
        if known in OWN:
            return f'<autoref identifier="{OWN[known]}">', "</autoref>"
        if known in OTHER:
            return f'<a href="{OTHER[known]}">', "</a>"
    return None
