"""The links of notebooks and pages: their form, one target for one name, no file that is missing.

Whether an address answers is asked only where HJEPA_NETWORK=1: the suite itself needs no network.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "LOG.md")),
    *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "explore.html",
    *sorted((ROOT / "notebooks").glob("*.ipynb")), *sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb")),
]  # fmt: skip
MARKDOWN = re.compile(r"(?<!\!)\[([^\]\[]+)\]\(([^()\s]+(?:\([^()]*\))?)\)")
HTML = re.compile(r'<a\s[^>]*href="([^"]*)"[^>]*>(.*?)</a>', flags=re.DOTALL)
BARE = re.compile(r'(?<![("\w])https?://[^\s)>"\']+')
ARXIV = re.compile(r"https://arxiv\.org/abs/\d{4}\.\d{5}")
REQUIRED = {
    "RoFormer": "2104.09864", "rope-vit": "2403.13298", "DINOv3": "2508.10104", "V-JEPA 2": "2506.09985",
    "EVA-02": "2303.11331", "YaRN": "2309.00071", "V-JEPA 2.1": "2603.14482", "I-JEPA": "2301.08243",
    "LeJEPA": "2511.08544", "VICReg": "2105.04906", "MAE": "2111.06377",
}  # fmt: skip
SOURCES = {name: paper for name, paper in REQUIRED.items() if name != "V-JEPA 2.1"}


def links(text: str) -> Iterator[tuple[str, str]]:
    """(name, target) of every link of a text; code blocks and inline code are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`([^`\n]*)`", lambda code: code[1].split("](")[0], text)
    for name, target in MARKDOWN.findall(text):
        yield " ".join(name.split()), target
    for target, name in HTML.findall(text):
        yield " ".join(re.sub("<.*?>", "", name).split()), target
    for target in BARE.findall(text):
        yield target, target.rstrip(".,;:")


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def fault(target: str) -> str | None:
    """What is wrong with the form of an address, or None."""
    parts = urlsplit(target)
    if parts.scheme != "https":
        return "not https"
    if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc):
        return "no host name"
    if parts.netloc.endswith("arxiv.org") and not ARXIV.fullmatch(target):
        return "not of the form https://arxiv.org/abs/YYMM.NNNNN"
    if parts.netloc == "openreview.net" and not re.fullmatch(r"https://openreview\.net/forum\?id=[\w-]{9,}", target):
        return "not of the form https://openreview.net/forum?id=.."
    return None


OUTSIDE = {page: [(n, t) for n, t in links(text_of(page)) if urlsplit(t).scheme] for page in PAGES}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_addresses_are_well_formed(page: Path) -> None:
    assert [(target, fault(target)) for _, target in OUTSIDE[page] if fault(target)] == []


def test_one_name_has_one_target() -> None:
    targets = defaultdict(set)
    for found in OUTSIDE.values():
        for name, target in found:
            targets[name.lower()].add(target)
    assert {name: sorted(all_) for name, all_ in targets.items() if len(all_) > 1} == {}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_link_inside_the_project_leads_to_a_file(page: Path) -> None:
    inside = [target for _, target in links(text_of(page)) if not urlsplit(target).scheme]
    paths = [target.partition("#")[0] for target in inside]
    assert [path for path in paths if path and not reached(page, path).exists()] == []


SITE = [page for page in PAGES if page.parent != ROOT and page.suffix != ".html"]


@pytest.mark.parametrize("page", SITE, ids=named)
def test_a_link_of_a_page_of_the_site_stays_in_the_site(page: Path) -> None:
    inside = [target.partition("#")[0] for _, target in links(text_of(page)) if not urlsplit(target).scheme]
    files = [reached(page, path).resolve().relative_to(ROOT) for path in inside if path]
    assert [str(file) for file in files if file.parts[0] not in ("docs", "notebooks")] == []


def reached(page: Path, path: str) -> Path:
    """The file a relative link means. The site's front page lies above docs/, where its HTML links start."""
    base = ROOT if page.name == "index.md" and path.startswith("docs/") else page.parent
    return base / path


def test_methods_are_linked_where_they_are_taught() -> None:
    course = {(name, target) for page in PAGES if page.suffix == ".ipynb" for name, target in OUTSIDE[page]}
    papers = {(name, f"https://arxiv.org/abs/{number}") for name, number in REQUIRED.items()}
    assert papers - course == set()


def test_the_guide_lists_the_source_of_every_method() -> None:
    guide = set(OUTSIDE[ROOT / "docs" / "guide.md"])
    papers = {(name, f"https://arxiv.org/abs/{number}") for name, number in SOURCES.items()}
    papers.add(("LeCun 2022", "https://openreview.net/forum?id=BZ5a1r-kVsf"))
    assert papers - guide == set()


@pytest.mark.parametrize(
    ("target", "known"),
    [
        ("http://arxiv.org/abs/2104.09864", "not https"), ("https://arxiv.org/pdf/2104.09864", "not of the form"),
        ("https://arxiv.org/abs/2104.9864", "not of the form"), ("https://localhost/a", "no host name"),
        ("https://openreview.net/pdf?id=BZ5a1r-kVsf", "not of the form"),
    ],
)  # fmt: skip
def test_a_malformed_address_is_told_by_its_fault(target: str, known: str) -> None:
    assert str(fault(target)).startswith(known)
    assert list(links(f"see [this]({target}), not `[that](x)`")) == [("this", target)]


@pytest.mark.skipif(os.environ.get("HJEPA_NETWORK") != "1", reason="asks the network only where HJEPA_NETWORK=1")
@pytest.mark.parametrize("target", sorted({target for found in OUTSIDE.values() for _, target in found}))
def test_an_address_answers(target: str) -> None:
    request = urllib.request.Request(target, headers={"User-Agent": "Mozilla/5.0 (a check of links)"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
    except urllib.error.HTTPError as error:
        assert error.code in (403, 429), f"{target}: {error}"  # there, but not for programs
