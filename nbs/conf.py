"""Sphinx settings of `make docs`: the notebooks are the documentation, shown with their saved outputs."""
import json

project = "synthlab"
extensions = ["myst_nb"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath"]
exclude_patterns = ["results", ".hypothesis"]
html_title = "synthlab"
TOC = "```{toctree}\n:hidden:\n:glob:\n\n[0-9]*\n```"


def add_contents(app, docname, source):
    "Append the table of contents to the index page, where README.md does not show it."
    if docname != "index": return
    page = json.loads(source[0])
    page["cells"].append({"cell_type": "markdown", "id": "contents", "metadata": {}, "source": TOC})
    source[0] = json.dumps(page)


def setup(app):
    app.connect("source-read", add_contents)
