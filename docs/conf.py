"""Configuration of the documentation site: `make docs` builds it from the Markdown files of this directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_VERSION: Final = re.compile(r'^__version__ = "(.+)"$', flags=re.MULTILINE)

project = "sftx"
# Read and not imported: the site is built without torch and without sftx.
release = version = _VERSION.findall((Path(__file__).parents[1] / "sftx" / "__init__.py").read_text("utf-8"))[0]

extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["_static"]
nitpicky = True

myst_heading_anchors = 4  # links to headings are those that GitHub makes
copybutton_prompt_text = "$ "  # the button copies commands without their prompt and their output
copybutton_line_continuation_character = "\\"

html_theme = "furo"
html_title = f"sftx {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
