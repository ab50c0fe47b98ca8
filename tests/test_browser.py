"""A real browser: notebook 01 runs in JupyterLab and its slider moves the picture; the built site reads and searches.

Chromium comes from Debian (`apt-get install chromium`), driven by playwright; where one of them is missing the tests
are skipped. Everything stays on the loopback interface: requests to other hosts are refused. Screenshots go to the
folder named by the variable HJEPA_SCREENSHOTS, if it is set.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nbformat
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed")

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
QUIET = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, not the visible ones only
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        launched = engine.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=FLAGS)
        yield launched
        launched.close()


def open_page(browser: Any, width: int = 1280, height: int = 800) -> Any:
    page = browser.new_page(viewport={"width": width, "height": height})
    local = ("http://127.0.0.1:", "data:", "blob:")
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(local) else route.abort())
    return page


def screenshot(page: Any, name: str) -> None:
    folder = os.environ.get("HJEPA_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of notebook 01, outputs cleared, in a JupyterLab of its own."""
    work, settings = tmp_path / "notebooks", tmp_path / "settings"
    work.mkdir()
    shutil.copy(ROOT / "notebooks" / "matplotlibrc", work)
    notebook = nbformat.read(ROOT / "notebooks" / "01_rotation.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, work / "01_rotation.ipynb")
    for name, content in QUIET.items():
        file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={work}",
        f"--IdentityProvider.token={token}", f"--LabApp.user_settings_dir={settings}",
        f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}",
    ]  # fmt: skip
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | places)
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, tmp_path / "lab.log")
            yield f"http://127.0.0.1:{port}/lab/tree/01_rotation.ipynb?token={token}"
        finally:
            server.terminate()
            server.wait(20)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    """Return when `url` answers."""
    for _ in range(int(seconds / 0.25)):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text()[-2000:]}")


FINISHED = """() => {
    const shown = document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)');
    const prompts = [...shown].map(prompt => prompt.textContent.trim());
    return prompts.length > 20 && prompts.every(p => /^\\[\\d+\\]:?$/.test(p));
}"""


def test_notebook_01_runs_in_jupyterlab_and_its_slider_moves_the_picture(browser: Any, lab: str) -> None:
    page = open_page(browser)
    page.set_default_timeout(60_000)
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    # the status bar says Idle once the kernel is connected; a request to run made earlier is lost
    page.wait_for_selector("text=/ipykernel\\) \\| Idle/")
    page.click("text=Run >> nth=0")
    page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
    try:
        page.wait_for_function(FINISHED, timeout=240_000)
    finally:
        screenshot(page, "lab-before")
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    cell = page.locator(".jp-CodeCell:has(.widget-interact)")
    picture, handle = cell.locator("img").first, cell.locator(".noUi-handle").first
    before = picture.get_attribute("src")
    handle.scroll_into_view_if_needed()
    handle.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(80):
        after = cell.locator("img").first.get_attribute("src") if cell.locator("img").count() else before
        if after != before:
            break
        page.wait_for_timeout(250)
    screenshot(page, "lab-after")
    assert after != before, "the slider moved and the picture stayed"
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    page.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built as `make site` builds it."""
    out = tmp_path_factory.mktemp("site")
    folders = ["-d", str(out / "trees"), "docs", str(out / "html")]
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(out / "html")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_site_finds_a_word(browser: Any, site: str) -> None:
    page = open_page(browser)
    page.goto(f"{site}/index.html")
    page.fill("input[name=q]", "extrapolate")
    page.press("input[name=q]", "Enter")
    page.wait_for_selector("#search-results li a[href^='guide.html']", timeout=20_000)  # they appear one by one
    links = page.locator("#search-results li a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert any(link.startswith("guide.html") for link in links), links
    screenshot(page, "site-search")
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["guide", "notebooks/01_rotation"])
def test_a_page_fits_the_screen(browser: Any, site: str, name: str, width: int) -> None:
    page = open_page(browser, width)
    page.goto(f"{site}/{name}.html")
    headings = page.locator("article h1, article h2")
    assert headings.count() > 3 and headings.first.is_visible()
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, f"{overflow} pixels to the right of the screen"
    assert page.locator("article img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth > 0)")
    screenshot(page, f"site-{name.replace('/', '-')}-{width}")
    page.close()
