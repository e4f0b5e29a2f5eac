"""`sphinx-build -W docs site` makes the site, without network.

Only readers need the network, for formulas; a site without it takes MathJax from a file:
`MATHJAX=/mathjax/tex-svg.js sphinx-build -W docs site`.
"""

import os
import pathlib
import sys
import tomllib

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE / "site"))

_project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
# The project's addresses, as far as they are known.
_places = tomllib.loads((HERE.parent / ".ci" / "release.toml").read_text())

project = _project["name"]
version = release = _project["version"]
description = _project["description"]
author = _project["authors"][0]["name"]
copyright = author
extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.mathjax", "reference"]
exclude_patterns = ["figures", "paper"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_heading_slug_func = "reference.slug"
myst_update_mathjax = False
# `$5` is an amount.
myst_dmath_allow_digits = False
suppress_warnings = ["myst.header"]  # a docstring begins where its author likes

# Signatures
add_module_names = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Formulas are those that the parser found, and nothing else.
mathjax_path = os.environ.get(
    "MATHJAX", "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"
)
mathjax3_config = {"options": {"ignoreHtmlClass": ".*|", "processHtmlClass": "math"}}

# Appearance
html_theme = "pydata_sphinx_theme"
html_title = project
html_logo = html_favicon = "site/logo.svg"
html_baseurl = _places["documentation"]
html_static_path = ["site/style.css", "figures/social_card.png"]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_use_index = html_domain_indices = False  # names.md has all of them
html_theme_options = {
    "logo": {"text": f"{project} {release}"},
    "navbar_persistent": [],
    "navbar_end": ["search-button", "theme-switcher", "navbar-icon-links"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
}
if _places["repository"]:
    _icon = {"name": "Repository", "icon": "fa-solid fa-code-branch"}
    html_theme_options["icon_links"] = [_icon | {"url": _places["repository"]}]
if html_baseurl:
    # `python .ci/release.py site` writes it.
    _list = f"{html_baseurl}/versions.json"
    html_theme_options |= {
        "switcher": {"json_url": _list, "version_match": release},
        "check_switcher": False,
        "logo": {"text": project},
        "navbar_end": ["version-switcher", *html_theme_options["navbar_end"]],
    }
