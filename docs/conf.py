"""Sphinx settings of cupybnn's pages: ``sphinx-build -W -n docs docs/_build``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the checkout's cupybnn, not an installed one
sys.path.insert(0, str(HERE))

import generate

import cupybnn

generate.write_all(HERE / "_generated")

project = "cupybnn"
author = "The cupybnn maintainers"
copyright = author
version = release = cupybnn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "jupyterlite_sphinx",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = [
    "_build",
    "jupyter_execute",
    "_templates",
    "_generated/parts",
    "**.ipynb_checkpoints",
]
templates_path = ["_templates"]

# The notebooks show the outputs that they were committed with: the build needs no GPU, no data.
nb_execution_mode = "off"

# The same notebooks in the browser, by Pyodide, with a wheel of this checkout (see generate.py).
jupyterlite_dir = str(HERE / "_generated" / "lite")
jupyterlite_contents = str(HERE.parent / "notebooks" / "*.ipynb")
jupyterlite_silence = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections give the types, in words
smartquotes_action = "qe"  # dashes of options stay as they are
html_sidebars = {"getting_started": [], "index": []}
nitpick_ignore = [("py:class", "collections.abc.Callable")]  # Python's own pages need a network
numpydoc_show_class_members = False
default_role = "py:obj"  # links where there is something to link to: see below

html_theme = "pydata_sphinx_theme"
html_title = "cupybnn"
html_static_path = ["_static"]
html_css_files = ["cupybnn.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "cupybnn"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def unlinked(app, env, node, text):
    """Leave a word in single backticks unlinked, such as a parameter's name.

    Explicit roles (``{func}``, ``{class}``) must have a target, or the build fails.
    """
    return text if node.get("reftype") == "obj" else None


def setup(app):
    """Register what is particular to these pages."""
    app.connect("missing-reference", unlinked)
