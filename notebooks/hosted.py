"""What a notebook needs in a hosted service such as Colab: a first cell that installs the package, and a badge.

    python notebooks/hosted.py            write both into every notebook, as pyproject.toml says
    python notebooks/hosted.py --check    exit code 1 where a notebook is otherwise

It installs the extra `test` too, which has the peers that notebook 03 compares with.

The one address is `Repository` in [project.urls] of pyproject.toml. Without it the cell says how to install the
package, and no notebook has a badge. Badges are for addresses at GitHub, which is what Colab opens.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
TAG = "install"
COLAB = "https://colab.research.google.com"
CELL = """\
from importlib.util import find_spec
from pathlib import Path

if find_spec("hjepa") is None:  # in a hosted notebook
    {install}
if not Path("matplotlibrc").exists():  # there, the style of the figures comes with the package
    import matplotlib.pyplot as plt

    from hjepa.experiments.tour import find_file

    plt.style.use(find_file("notebooks/matplotlibrc"))"""
MISSING = 'raise ModuleNotFoundError("hjepa is not installed; in a checkout of its repository: pip install .")'


def repository(pyproject: Path = ROOT / "pyproject.toml") -> str | None:
    """The address of the project, or None where it has none yet."""
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository")


def install_cell(address: str | None) -> str:
    """Source of the first cell. It does nothing beside the notebooks of a checkout where hjepa is importable."""
    return CELL.format(install=f'%pip install --quiet "hjepa[test] @ git+{address}"' if address else MISSING)


def badge(address: str | None, name: str) -> str | None:
    """A link in Markdown that opens notebooks/NAME of the branch main in Colab; None where Colab cannot."""
    parts = urlsplit(address or "")
    if parts.hostname != "github.com":
        return None
    place = parts.path.strip("/").removesuffix(".git")
    return f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{place}/blob/main/notebooks/{name})"


def hosted(text: str, address: str | None, name: str) -> str:
    """The notebook `text` with the cell behind its title, and with its badge or without one."""
    notebook = json.loads(text)
    title, *cells = notebook["cells"]
    if TAG not in cells[0]["metadata"].get("tags", []):
        made = {"cell_type": "code", "execution_count": None, "id": TAG, "outputs": [], "source": []}
        cells.insert(0, made | {"metadata": {"tags": [TAG, "remove-cell"]}})
        if any(cell.get("execution_count") for cell in cells):  # it would have been the first to run, silently
            cells[0]["execution_count"] = 1
            for counted in (part for cell in cells[1:] for part in (cell, *cell.get("outputs", []))):
                if counted.get("execution_count"):
                    counted["execution_count"] += 1
    cells[0]["source"] = install_cell(address).splitlines(keepends=True)
    heading, *lines = "".join(title["source"]).splitlines()
    lines = [line for line in lines if not line.startswith(f"[![Open in Colab]({COLAB}")]
    while lines and not lines[0]:
        lines = lines[1:]
    shown = badge(address, name)
    lines = [heading, "", *([shown, ""] if shown else []), *lines]
    title["source"] = "\n".join(lines).splitlines(keepends=True)
    notebook["cells"] = [title, *(dict(sorted(cell.items())) for cell in cells)]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(description="First cells and badges of the notebooks.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, stale, address, folder = parser.parse_args(arguments).check, [], repository(), ROOT / "notebooks"
    for path in sorted(folder.rglob("*.ipynb")):
        if path.name == "one_run.ipynb" or ".ipynb_checkpoints" in path.parts:  # that one is run by sweeps alone
            continue
        text = path.read_text(encoding="utf-8")
        wanted = hosted(text, address, str(path.relative_to(folder)))
        if wanted != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(wanted, encoding="utf-8")
    for name in stale:
        print(f"{name} is not as pyproject.toml says: run python notebooks/hosted.py" if check else f"written: {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
