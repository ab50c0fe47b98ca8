"""Sphinx configuration: the guide, the executed notebooks as they are committed, and the API from docstrings."""

import re
import shutil
from pathlib import Path

HERE = Path(__file__).parent
for source, target in ((HERE.parent / "notebooks", HERE / "notebooks"), (HERE.parent / "results", HERE / "results")):
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))

for notebook in (HERE / "notebooks").rglob("*.ipynb"):  # pages of docs/ are one folder nearer on the site
    text = notebook.read_text(encoding="utf-8")
    notebook.write_text(re.sub(r"\]\(((?:\.\./)+)docs/(\w+\.md)", r"](\1\2", text), encoding="utf-8")

EXTRA = HERE / "_extra"  # the explorable page under its path in the repository, so that one link serves both
shutil.rmtree(EXTRA, ignore_errors=True)
(EXTRA / "docs").mkdir(parents=True)
for page in ("explore.html", "explore.js"):
    shutil.copy(HERE / page, EXTRA / "docs")

project = "hjepa"
author = "hjepa authors"
copyright = "hjepa authors, MIT licence"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "_extra", "**/.ipynb_checkpoints", "results/**"]
nb_execution_mode = "off"  # the outputs are committed, and `make test` compares them
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
html_theme = "furo"
html_title = "hjepa"
html_extra_path = ["_extra"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]


def keep_layout(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented blocks of a module's docstring are drawings and tables: show them as they stand."""
    if what != "module":
        return
    shown: list[str] = []
    for line in lines:
        indented, inside = line.startswith("    "), bool(shown) and shown[-1].startswith("    ")
        if indented and not inside:
            shown += ["", "::", ""]
        elif inside and line and not indented:
            shown.append("")
        shown.append(line)
    lines[:] = shown


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_layout)
