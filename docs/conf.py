"""Sphinx: `make docs` builds the site into docs/_build, without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import lora_lite  # noqa: E402

project, author = "lora-lite", "the lora-lite authors"
version = release = lora_lite.__version__
extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_nb", "sphinx_copybutton"),
    *("method_pages", "docstrings", "plain_files"),  # of _ext
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]

nitpicky = True
nitpick_ignore_regex = [
    # Types of other libraries, whose inventories are on the network.
    (r"py:.*", r"(torch|transformers|jaxtyping|accelerate|lightning)\b.*"),
    # The standard library's.
    (r"py:.*", r"(collections|contextlib|typing|pathlib|os|enum)\b.*|Any|None"),
    # Annotations that stay strings: of jaxtyping's shapes, and a type behind TYPE_CHECKING.
    (r"py:class", r"Tensor|Prompt"),
    # Types of this library's rooms that aren't public; that all public names have a page is a test.
    (r"py:.*", r"lora_lite\.(base|compose|core|families|measure|merging|trainer)\..*"),
]
myst_enable_extensions = ["colon_fence", "deflist", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
smartquotes = False  # a quote in prose is often code
nb_execution_mode = "off"  # the notebooks hold what they gave; a test runs them anew
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = "lora-lite"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = True
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
