"""The documentation site: `make docs`, which warns of nothing and loads nothing from elsewhere."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

from gspo_jax import __version__  # noqa: E402

project = "gspo_jax"
version = release = __version__
html_title = f"gspo_jax {version}"

# formulas: pictures made while building; source_files: pages for files outside of docs/;
# docstrings: ours, which are plain text, as reStructuredText.
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "formulas",
    "source_files",
]
exclude_patterns = ["_build", "_ext", "_static"]
source_files_root = HERE.parent
html_math_renderer = "formulas"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 80
highlight_language = "text"
pygments_dark_style = "github-dark"
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
