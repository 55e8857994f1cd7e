"""The site: ``pip install -e ".[docs]"``, then ``python -m sphinx -W docs docs/_build``.

It is built without the network. ``JLORA_DOCS_INTERSPHINX=1`` turns names of JAX, Flax, Optax and Orbax into links to
their sites, for which their lists of names are fetched.
"""

import argparse
import base64
import json
import os
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

import jlora
from jlora.cli import parser

HERE = Path(__file__).parent

project = "jlora"
author = "The jlora authors"
copyright = author
version = release = jlora.__version__

extensions = [
    "myst_nb",  # pages in Markdown, notebooks as pages
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute"]  # the second is made by myst-nb beside the output
root_doc = "index"

# Docstrings are in Google's style; a name in single backticks is a link where there is such a name.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # one entry may be of several arguments: ``tree, params:``
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the signature of the source; here they would hide the names
autodoc_preserve_defaults = True
add_module_names = True
python_maximum_signature_line_length = 88

if os.environ.get("JLORA_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "orbax": ("https://orbax.readthedocs.io/en/latest", None),
    }

# Notebooks are shown with the outputs that they were committed with.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = "jlora"
html_static_path = ["_static"]
html_css_files = ["jlora.css"]
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# For the gallery: of each notebook one of its own pictures, counted from 0.
PICTURES = {
    "01_lora_from_scratch": 1,
    "02_movie_sentiment": 0,
    "03_smollm2_writes_hamlet": 0,
    "04_convolutions": 1,
    "05_sharding": 0,
    "06_variants": 0,
    "07_every_framework": 0,
    "08_adapter_is_a_value": 2,
    "09_nnx": 0,
    "10_many_adapters": 0,
    "11_comparison": 0,
}


def copy_notebooks() -> None:
    """Copies the notebooks into the source of the site, and takes a picture out of each for the gallery."""
    pages, pictures = HERE / "notebooks", HERE / "_static" / "gallery"
    pages.mkdir(exist_ok=True)
    pictures.mkdir(exist_ok=True)
    for name, which in PICTURES.items():
        source, page = HERE.parent / "notebooks" / f"{name}.ipynb", pages / f"{name}.ipynb"
        if not page.exists() or page.stat().st_mtime < source.stat().st_mtime:
            shutil.copy2(source, page)
        cells = json.loads(source.read_text())["cells"]
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
        found = [output["image/png"] for output in outputs if "image/png" in output]
        (pictures / f"{name}.png").write_bytes(base64.b64decode("".join(found[which])))


class Help(Directive):
    """``{jlora-help} merge``: what ``jlora merge --help`` prints."""

    required_arguments = 1

    def run(self):
        commands = next(action for action in parser()._actions if action.dest == "command")
        command = commands.choices[self.arguments[0]]
        command.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=88)
        text = command.format_help()
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def apart(found):
    """Parts a name in backticks from a letter behind it."""
    return f"{found[0][:-1]}\\ {found[1]}" if found[1] else found[0]


def starred(text):
    """Escapes the stars of *args and of shapes such as (*axes, r), which would begin an emphasis."""
    return re.sub(r"(?<![\w*\\])\*{1,2}(?=[a-z_]+\b(?!\*))", lambda m: "\\*" * len(m[0]), text)


def plain_to_rst(app, what, name, obj, options, lines):
    """What docstrings may say, and reStructuredText has other signs for: `name`s, *args, shapes of (*axes, r)."""
    is_example = False
    for i, line in enumerate(lines):
        is_example = bool(line.strip()) and (is_example or line.lstrip().startswith(">>>"))
        if not is_example:
            line = re.sub(r"``[^`]*``|`[^`]+`(\w?)", apart, line)
            parts = re.split(r"(``[^`]*``)", line)
            lines[i] = "".join(part if part.startswith("``") else starred(part) for part in parts)


class Links(SphinxTransform):
    """Makes a link of each name of jlora's in the text, such as ``jlora.wrap`` or ``jlora.peft.save(...)``."""

    default_priority = 500

    def apply(self):
        for literal in list(self.document.findall(nodes.literal)):
            found = re.match(r"jlora(?:\.\w+)+", literal.astext())
            if not found or isinstance(literal.parent, pending_xref | nodes.reference | nodes.title):
                continue
            link = pending_xref(
                "", refdomain="py", reftype="obj", reftarget=found[0], refexplicit=True, refdoc=self.env.docname
            )
            literal.replace_self(link)
            link += literal


class Addresses(SphinxTransform):
    """Gives each entry of a list of definitions an address, to link to one word or one message."""

    default_priority = 480

    def apply(self):
        if self.env.docname.startswith("reference/"):
            return
        for term in list(self.document.findall(nodes.term)):
            name = nodes.make_id(term.astext())
            if not name or name in self.document.ids:
                continue
            term["ids"].append(name)
            self.document.ids[name] = term
            term += nodes.reference("", "¶", refid=name, classes=["headerlink"], internal=True)


def setup(app):
    app.add_transform(Links)
    app.add_transform(Addresses)
    app.connect("autodoc-process-docstring", plain_to_rst, priority=400)  # before napoleon
    app.add_directive("jlora-help", Help)


copy_notebooks()
