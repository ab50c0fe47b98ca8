"""The pages of docs/: their code runs, and what they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ROOT / "docs" / "own_pictures.md"  # needs a folder of pictures: tests/evaluate/test_collection.py runs it


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_blocks(page) and page != OWN], ids=lambda page: page.name
)
def test_the_code_blocks_of_a_page_run_in_order(page: Path) -> None:
    scope: dict = {}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), scope)
    assert scope["tokens"].isfinite().all()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_files_that_exist(page: Path) -> None:
    named = re.findall(r"`((?:configs|notebooks|hjepa|tests|benchmarks|results|docs)/[\w./-]*)`", page.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_every_key_of_a_rope_config_is_in_the_guide() -> None:
    from hjepa.config import RopeConfig

    guide = (ROOT / "docs" / "guide.md").read_text()
    names = set(RopeConfig.__dataclass_fields__) - {"theta"}  # the guide calls it rope_theta, as create_encoder does
    assert {name for name in names if f"`{name}`" not in guide} == set()
