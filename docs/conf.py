"""Configuration of the documentation: Sphinx reads Markdown, and the docstrings of the library."""

import importlib.metadata

project = "fishleg_func"
author = "the authors of fishleg_func"
release = importlib.metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Without a network only the names of this library can be looked up, and only the public ones have an entry.
_private = r"fishleg_func\.(?!(likelihoods|qmodules|bases|pruning|block_inverse|reference)\b)[a-z_]+\..*"
nitpick_ignore_regex = [(r"py:.*", r"(?!fishleg_func\.).*"), (r"py:.*", _private)]

html_theme = "furo"
html_title = project
