"""The first cell of every notebook, and its badge: `notebooks/hosted.py`."""

import builtins
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in ROOT.glob("notebooks/**/*.ipynb") if path.name != "one_run.ipynb")
spec = importlib.util.spec_from_file_location("hosted", ROOT / "notebooks" / "hosted.py")
hosted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hosted)

GITHUB = "https://github.com/somebody/hjepa"


def run_cell(source, monkeypatch, installed):
    """Execute a first cell where hjepa is installed or not; returns the magics that it calls and what it imports."""
    magics, imported = [], []

    def importing(name, *rest):
        imported.append(name)
        return builtins.__import__(name, *rest)

    shell = SimpleNamespace(run_line_magic=lambda name, line: magics.append((name, line)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    names = {"get_ipython": lambda: shell, "__builtins__": vars(builtins) | {"__import__": importing}}
    exec(TransformerManager().transform_cell(source), names)
    return magics, imported


def test_every_notebook_is_as_the_project_file_says(capsys):
    assert hosted.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("address", [None, GITHUB])
def test_the_first_cell_does_nothing_where_the_package_is(address, monkeypatch):
    """Beside the notebooks not even matplotlib is imported."""
    monkeypatch.chdir(ROOT / "notebooks")
    assert run_cell(hosted.install_cell(address), monkeypatch, installed=True) == ([], ["importlib.util", "pathlib"])


def test_in_a_hosted_notebook_it_installs_from_the_one_address_and_brings_the_style(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    with plt.rc_context():
        plt.rcdefaults()
        magics, _ = run_cell(hosted.install_cell(GITHUB), monkeypatch, installed=False)
        assert plt.rcParams["figure.constrained_layout.use"]
    assert magics == [("pip", f'install --quiet "hjepa[test] @ git+{GITHUB}"')]


def test_without_an_address_it_says_how_to_install(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"in a checkout of its repository: pip install \."):
        run_cell(hosted.install_cell(None), monkeypatch, installed=False)


def test_badges_come_and_go_with_the_address_and_nothing_else_changes():
    for path in NOTEBOOKS:
        name, text = str(path.relative_to(ROOT / "notebooks")), path.read_text(encoding="utf-8")
        marked = hosted.hosted(text, GITHUB, name)
        title = "".join(json.loads(marked)["cells"][0]["source"]).splitlines()
        link = f"(https://colab.research.google.com/github/somebody/hjepa/blob/main/notebooks/{name})"
        assert title[0].startswith("# ") and title[2].endswith(link)
        assert marked.count(f"git+{GITHUB}") == 1 and hosted.hosted(marked, GITHUB, name) == marked
        assert hosted.hosted(marked, None, name) == text
    elsewhere = hosted.hosted(text, "https://git.example.org/hjepa", name)
    assert "git+https://git.example.org/hjepa" in elsewhere and "Colab" not in elsewhere


def test_a_new_notebook_gets_the_cell_as_if_it_had_run_first():
    cells = [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["# Title"]}]
    result = {"output_type": "execute_result", "execution_count": 1, "data": {}, "metadata": {}}
    ran = {"cell_type": "code", "execution_count": 1, "id": "b", "metadata": {}, "outputs": [result], "source": ["1"]}
    made = json.loads(hosted.hosted(json.dumps({"cells": [*cells, ran], "nbformat": 4}), None, "new.ipynb"))["cells"]
    assert [cell.get("execution_count") for cell in made] == [None, 1, 2]
    assert made[2]["outputs"][0]["execution_count"] == 2 and made[1]["metadata"]["tags"] == ["install", "remove-cell"]
