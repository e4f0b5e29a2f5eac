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
html_title = f"{project} {release}"
html_baseurl = _places["documentation"]
html_static_path = ["site/style.css"]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "navbar_persistent": [],
    "navbar_end": ["search-button", "theme-switcher", "navbar-icon-links"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "icon_links": [
        {
            "name": "Repository",
            "url": _places["repository"],
            "icon": "fa-solid fa-code-branch",
        }
    ]
    if _places["repository"]
    else [],
}
copybutton_exclude = ".linenos, .gp, .go"
