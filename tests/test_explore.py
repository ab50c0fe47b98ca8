"""The explorable page: its numbers are the package's, it asks nobody for anything, and it works at both widths.

The JavaScript runs in node and in Debian's chromium; a test whose program is missing is skipped.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hjepa.evaluate.plots import COLORS
from hjepa.nn.frequencies import STRATEGIES
from hjepa.nn.rope import VisionRoPE2D, grid_positions, rotate

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHROMIUM = Path("/usr/bin/chromium")
NODE = shutil.which("node")
CASES = [
    {"dim": 64, "theta": theta, "strategy": strategy, "grid": grid, "trained": trained}
    for strategy in STRATEGIES
    for theta, grid, trained in ((100.0, [16, 16], 8), (10000.0, [32, 5], 14), (2.0, [4, 20], 14), (100.0, [8, 8], 8))
]
QUERY = [2.0, 3.0]
PROGRAM = """
const page = require(process.argv[1]), cases = JSON.parse(require("fs").readFileSync(0));
process.stdout.write(JSON.stringify(cases.map(({ query, ...settings }) => ({
  map: page.scoreMap(query, settings), angles: page.angles(query, settings),
  score: page.score(query, [1.25, 0.5], settings), difference: page.differenceFromTraining(query, settings),
  strategies: page.STRATEGIES, speeds: page.speeds(settings.dim, settings.theta),
}))));
"""


def in_float64(case: dict[str, Any]) -> VisionRoPE2D:
    """The package's rotation with speeds in float64: all that follows from them is then in float64."""
    rope = VisionRoPE2D(case["dim"], 16, case["trained"], case["theta"], strategy=case["strategy"])
    n = case["dim"] // 4
    speeds = torch.tensor(case["theta"], dtype=torch.float64) ** -(torch.arange(n, dtype=torch.float64) / n)
    zero = torch.zeros_like(speeds)
    exact = torch.stack((torch.cat((speeds, zero)), torch.cat((zero, speeds))))[:, None]
    torch.testing.assert_close(rope.frequencies().double(), exact, rtol=0, atol=1e-6)
    rope.frequencies = lambda layer=0, device=None: exact  # type: ignore[method-assign]
    return rope


def scores(rope: VisionRoPE2D, query: list[float], keys: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Scores of a query of ones with keys of ones, over the number of channels."""
    ones = torch.ones(rope.dim, dtype=torch.float64)
    q, k = (rope.make_table(p, tuple(grid))[:, 0] for p in (torch.tensor([query]), keys))
    return (rotate(ones.expand(len(keys), -1), k) @ rotate(ones[None], q)[0]) / rope.dim


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    if NODE is None:
        pytest.skip("node is not installed")
    done = subprocess.run(
        [NODE, "-e", PROGRAM, str(DOCS / "explore.js")],
        input=json.dumps([{**case, "query": QUERY} for case in CASES]), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i]['strategy']}-{CASES[i]['theta']:g}")
def test_the_page_computes_what_the_package_computes(answers: list[dict[str, Any]], number: int) -> None:
    case, answer = CASES[number], answers[number]
    rope, grid = in_float64(case), case["grid"]
    wanted = scores(rope, QUERY, grid_positions(*grid), grid)
    assert wanted.dtype == torch.float64 and wanted.std() > 0.01
    got = torch.tensor(answer["map"], dtype=torch.float64)
    torch.testing.assert_close(got, wanted.view(*grid), rtol=0, atol=1e-6)
    single = scores(rope, QUERY, torch.tensor([[1.25, 0.5]]), grid)
    assert abs(answer["score"] - float(single)) < 1e-6
    angles = rope.angles(torch.tensor([QUERY]), tuple(grid))[0, 0]
    torch.testing.assert_close(torch.tensor(answer["angles"], dtype=torch.float64), angles, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i]['strategy']}-{CASES[i]['theta']:g}")
def test_the_page_compares_with_training_at_the_same_place(answers: list[dict[str, Any]], number: int) -> None:
    case = CASES[number]
    grid, home = case["grid"], [case["trained"]] * 2
    stretch = torch.tensor(home) / torch.tensor(grid)
    places, query = (grid_positions(*grid) + 0.5) * stretch - 0.5, (torch.tensor(QUERY) + 0.5) * stretch - 0.5
    trained = scores(in_float64(case | {"strategy": "extrapolate"}), query.tolist(), places, home)
    now = scores(in_float64(case), QUERY, grid_positions(*grid), grid)
    assert abs(answers[number]["difference"] - float((now - trained).abs().mean())) < 1e-6


def test_the_page_offers_the_strategies_of_the_package(answers: list[dict[str, Any]]) -> None:
    offered = re.findall(r'<option value="(\w+)"', (DOCS / "explore.html").read_text(encoding="utf-8"))
    assert tuple(offered) == tuple(answers[0]["strategies"]) == STRATEGIES


def test_rows_and_columns_wear_the_colours_of_the_course() -> None:
    text, script = ((DOCS / name).read_text(encoding="utf-8") for name in ("explore.html", "explore.js"))
    for name in ("row", "column"):
        drawn = re.findall(rf"{name.upper()} = \"(#\w+)\"", script), re.findall(rf"\.{name} {{ color: (#\w+)", text)
        assert drawn == ([COLORS[name]], [COLORS[name]])


def test_the_page_asks_nobody_for_anything() -> None:
    text = (DOCS / "explore.html").read_text(encoding="utf-8")
    assert re.findall(r'\bsrc="([^"]*)"', text) == ["explore.js"]
    assert not re.search(r"<link\b|@import|url\(", text)
    script = (DOCS / "explore.js").read_text(encoding="utf-8")
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\b|https?:|WebSocket", script)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_slider_moves_the_map_and_the_page_fits_the_screen(width: int) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip("Debian's chromium is not installed")
    with playwright.sync_playwright() as engine:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = engine.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=flags)
        page, said = browser.new_page(viewport={"width": width, "height": 900}), []
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto((DOCS / "explore.html").as_uri())

        def seen() -> tuple[str, str, str]:
            picture = page.locator("#map-now").evaluate("canvas => canvas.toDataURL()")
            return picture, page.inner_text("#finding"), page.inner_text("#idle")

        before = seen()
        page.select_option("#strategy", "interpolate")
        interpolated = seen()
        assert interpolated[0] != before[0] and before[1].startswith("On average")
        assert interpolated[1].startswith("Every score is that of training")
        page.fill("#theta", "4")
        slow = seen()
        assert slow[0] != interpolated[0] and re.match(r"8 of 16", slow[2])
        page.locator("#map-now").click(position={"x": 5, "y": 5})
        assert page.input_value("#row") == page.input_value("#column") == "0" and seen()[0] != slow[0]
        page.fill("#height", "64")
        assert page.inner_text("#height-text") == "64 px, 4 rows"
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        folder = os.environ.get("HJEPA_SCREENSHOTS")
        if folder:
            page.screenshot(path=str(Path(folder) / f"explore-{width}.png"), full_page=True)
        browser.close()
    assert overflow <= 0 and said == []
