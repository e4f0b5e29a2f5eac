"""What the pages of this site are made of, beyond Markdown and Sphinx.

- `{api}` lists names whose signatures and docstrings stand there. The sources are read,
  not imported: a site needs no JAX.
- `{names}` is the table of all of these names.
- Every name in code, such as `FlowMapSolver` or `jax.vmap`, is a link to where it stands.
  Our own names are those of the pages in api/. Those of other libraries are listed in
  `links.txt`, with the pages they stand on, so that the site builds without network.
- Docstrings and pages have `!!! info "Title"` and `??? cite "Title"` for admonitions,
  open and closed, and [`flowdiffrax.FlowMap`][] for a link that must have a target.
"""

import html
import pathlib
import re
import textwrap

import griffe
from docutils import nodes
from signatures import ModuleSignatures
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parent
LOG = logging.getLogger(__name__)
# A name, alone or called: `UniformSquare(max_gap)`.
NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)
LISTED = re.compile(r"^:::\{api\}\n(.*?)^:::", re.M | re.S)
# A title, and lines that are indented below it.
ADMONITION = re.compile(
    r"^(!!!|\?\?\?) (\w+)(?: \"(.*)\")?\n((?:\n|    .*\n?)+)", re.MULTILINE
)
# A name that must be known.
LINK = re.compile(r"\[`([^`\]]+)`\]\s?\[([\w.]*)\]")
# Aliases of types stand in one table.
TYPES = ("notation", "types-in-signatures")


def own_names() -> tuple[dict[str, str], dict[str, str]]:
    """How a name may be written, and the name; names, and their pages."""
    known, places = {}, {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for name in " ".join(LISTED.findall(page.read_text())).split():
            places[name] = f"api/{page.stem}"
            inner = name.removeprefix("flowdiffrax.")
            known |= {name: name, inner: name, f"fd.{inner}": name}
            last = inner.rsplit(".", 1)[-1]
            # A short one in lower case could be anything.
            if "_" in last or not last.islower():
                known.setdefault(last, name)
    return known, places


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


def type_names() -> set[str]:
    text = (DOCS / f"{TYPES[0]}.md").read_text().partition("## Types in signatures")[2]
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


(OWN, PLACES), OTHER, TYPE_NAMES = own_names(), other_names(), type_names()
PACKAGE = griffe.load(
    "flowdiffrax",
    search_paths=[DOCS.parent / "src"],
    extensions=griffe.load_extensions(ModuleSignatures),
)


def slug(title: str) -> str:
    """The anchor of a heading: its words, joined by one hyphen each."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def find(name: str):
    """What the sources have under a name, or nothing."""
    try:
        found = PACKAGE[name.removeprefix("flowdiffrax.")]
    except KeyError:
        return None
    return found.final_target if found.is_alias else found


def docstring(member) -> str:
    return member.docstring.value if member.docstring else ""


def markdown(text: str, where: str) -> str:
    """What MyST understands."""

    def directive(match):
        opening, kind, title, body = match.groups()
        title = title or kind.capitalize()
        options = [f":class: {kind}"]
        if opening == "???":
            options.append(":collapsible: closed")
        lines = [f":::{{admonition}} {title}", *options, "", textwrap.dedent(body)]
        return "\n".join(lines).rstrip() + "\n:::\n\n"

    def code(match):
        name = match[2] or match[1]
        # Of a method, its class is enough.
        if not {name, name.rpartition(".")[0]} & (OWN.keys() | OTHER.keys()):
            LOG.warning("%s links to `%s`, which is not there.", where, name)
        return f"{{py:obj}}`{match[1]} <{name}>`" if match[2] else f"`{name}`"

    return LINK.sub(code, ADMONITION.sub(directive, text))


def signature(function, *, skip_first: bool) -> str:
    """The parameters, and what is returned, as Python writes them."""
    written, kinds = [], griffe.ParameterKind
    parameters = list(function.parameters)[1 if skip_first else 0 :]
    for index, parameter in enumerate(parameters):
        before = parameters[index - 1].kind if index else None
        if parameter.kind is kinds.keyword_only and before not in (
            kinds.keyword_only,
            kinds.var_positional,
        ):
            written.append("*")
        if before is kinds.positional_only and parameter.kind is not before:
            written.append("/")
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}
        one = stars.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not None:
            one += f": {parameter.annotation}"
        if parameter.default is not None and parameter.kind not in stars:
            space = " " if parameter.annotation is not None else ""
            one += f"{space}={space}{parameter.default}"
        written.append(one)
    if parameters and parameters[-1].kind is kinds.positional_only:
        written.append("/")
    returned = f" -> {function.returns}" if function.returns is not None else ""
    return " ".join(f"({', '.join(written)}){returned}".split())


def entry(name: str) -> str:
    """The Markdown of one name of the library."""
    what, inner = find(name), []
    text = docstring(what)
    if what.is_class:
        kind, init = "class", what.all_members.get("__init__")
        if init is not None and init.is_function:
            arguments = signature(init, skip_first=True).partition(" -> ")[0]
            text += "\n\n" + docstring(init)
        else:
            arguments = ""
        for member in what.members.values():
            is_public = not member.name.startswith("_") and not member.is_alias
            if is_public and docstring(member):
                inner.append(_member(member))
    elif what.is_function:
        kind, arguments = "function", signature(what, skip_first=False)
    else:
        kind, arguments = "data", ""
    parts = [f"::::::{{py:{kind}}} {name}{arguments}", "", markdown(text, name), *inner]
    return "\n".join([*parts, "::::::", ""])


def _member(member) -> str:
    labels = member.labels & {"classmethod", "staticmethod", "abstractmethod"}
    if member.is_function:
        skip = "staticmethod" not in labels
        head = f"{{py:method}} {member.name}{signature(member, skip_first=skip)}"
    else:
        head = f"{{py:property}} {member.name}"
    options = [f":{label}:" for label in sorted(labels)]
    if not member.is_function and member.annotation is not None:
        options.append(f":type: {member.annotation}")
    lines = [
        f":::::{head}",
        *options,
        "",
        markdown(docstring(member), member.path),
        ":::::",
        "",
    ]
    return "\n".join(lines)


class Api(SphinxDirective):
    """Names, one a line."""

    has_content = True

    def run(self):
        found = []
        for name in self.content:
            if (what := find(name)) is None:
                LOG.warning("there is no %s", name, location=self.get_location())
                continue
            self.env.note_dependency(what.filepath)
            found += self.parse_text_to_nodes(entry(name))
        return found


class Names(SphinxDirective):
    """A table of every name, each with the first sentence of its docstring."""

    def run(self):
        rows = ["| name | what it is |", "| --- | --- |"]
        for name in sorted(PLACES, key=str.lower):
            if (what := find(name)) is None:
                continue  # which {api} refuses
            first = docstring(what).partition("\n\n")[0]
            first = re.split(r"(?<=\.)\s", " ".join(first.split()))[0]
            # A formula follows.
            first = markdown(re.sub(r":$", ".", first), name)
            shown = name.removeprefix("flowdiffrax.")
            rows.append(f"| `{shown}` | {first.replace('|', chr(92) + '|')} |")
        return self.parse_text_to_nodes("\n".join(rows))


def read_source(app, docname, source):
    del app
    source[0] = markdown(source[0], docname)


def link_names(app, doctree):
    """Every name in code becomes a link, unless it is one already."""
    closed = (
        nodes.reference,
        addnodes.pending_xref,
        nodes.title,
        addnodes.desc_signature,
    )
    for literal in list(doctree.findall(nodes.literal)):
        parent = literal.parent
        while parent is not None and not isinstance(parent, closed):
            parent = parent.parent
        if parent is not None:
            continue
        match = NAME.fullmatch(literal.astext())
        if match is None:
            continue
        name = re.sub(r"^eqx\.", "equinox.", match[1])
        # Of a method, the place of its class.
        for known in (name, name.rpartition(".")[0]):
            if known in OWN:
                link = addnodes.pending_xref(
                    "",
                    refdomain="py",
                    reftype="obj",
                    reftarget=OWN[known],
                    refexplicit=True,
                    refdoc=app.env.docname,
                )
            elif known in OTHER:
                link = nodes.reference(refuri=OTHER[known], internal=False)
            else:
                continue
            literal.replace_self(link)
            link += literal
            break


def find_missing(app, env, node, contnode):
    """Annotations in signatures link to our short names and to other libraries too."""
    del env
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    name = re.sub(r"^eqx\.", "equinox.", target)
    last = name.rpartition(".")[2]
    for known in (name, last if name.startswith("flowdiffrax.") else name):
        if known in OWN:
            page, anchor = PLACES[OWN[known]], OWN[known]
        elif last in TYPE_NAMES:
            page, anchor = TYPES
        else:
            continue
        return make_refnode(app.builder, node["refdoc"], page, anchor, contnode)
    name = name if name in OTHER else f"jaxtyping.{name}"
    if name in OTHER:
        return nodes.reference("", "", contnode, refuri=OTHER[name], internal=False)
    return None


def add_card(app, pagename, templatename, context, doctree):
    """What other sites show for a link to ours; it needs the site's address."""
    del templatename
    if doctree is not None and (base := app.config.html_baseurl):
        card = {
            "title": f"{context['title']} - {app.config.project}",
            "description": app.config.description,
            "type": "website",
            "url": f"{base}/{pagename}.html",
            "image": f"{base}/_static/social_card.png",
        }
        for name, value in card.items():
            value = html.escape(value)
            context["metatags"] += f'<meta property="og:{name}" content="{value}">\n'


def setup(app):
    app.add_config_value("description", "", "html")
    app.add_directive("api", Api)
    app.add_directive("names", Names)
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_names)
    app.connect("html-page-context", add_card)
    app.connect("missing-reference", find_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
