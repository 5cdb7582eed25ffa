# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser, headless Chromium: no errors, hostile tokens do nothing, search and sorting work."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("jinja2", reason="the report needs fusae[report]")
pytest.importorskip("matplotlib", reason="the report needs fusae[report]")

from fusae.eval.report import write_report  # noqa: E402
from fusae.testing.sample_run import contents, write_run  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("whole") / "run", contents()))


class Elements(HTMLParser):
    """(tag, attributes) of every element, as a parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    folder = tmp_path_factory.mktemp("chromium")

    def load(file: Path, fragment: str = "") -> tuple[str, list[str]]:
        """The page's DOM after its script ran, and what it said on the console (policy violations included)."""
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            file.resolve().as_uri() + fragment,
        ]
        done = subprocess.run(command, capture_output=True, timeout=60, encoding="utf-8", errors="replace")
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    # Some packagings (snap) confine the browser to the home directory: nothing about the page could be learnt there.
    probe = folder / "probe.html"
    probe.write_text("<p>can open files")
    if "<p>can open files" not in load(probe)[0]:
        pytest.skip(f"{CHROMIUM} cannot open a page from {folder}")
    return load


class TestInChromium:
    def visible(self, dom: str) -> list[str]:
        found = [attrs for tag, attrs in Elements(dom).found if tag == "article"]
        return [attrs["data-latent"] for attrs in found if "hidden" not in attrs]

    def test_no_errors_and_hostile_tokens_do_nothing(self, dump, page):
        dom, console = dump(page)
        assert console == []
        assert "<title>tiny-lm" in dom and dom.count("<script") == 1
        assert self.visible(dom) == ["3", "41"] and ">2 latents</output>" in dom

    def test_the_console_check_can_fail(self, dump, page, tmp_path):
        broken = tmp_path / "broken.html"
        broken.write_text(
            page.read_text(encoding="utf-8").replace("</body>", "<script>1</script></body>"), encoding="utf-8"
        )
        _, console = dump(broken)
        assert console and "Content Security Policy" in console[0]

    @pytest.mark.parametrize(
        ("query", "shown"),
        [
            ("RIVER%20rose", ["3"]),  # across tokens, any case
            ("%20owl", ["41"]),
            ("%3Cscript%3E", ["41"]),
            ("water", ["3"]),
            ("%2341", ["41"]),
            ("nowhere", []),
        ],
    )
    def test_search_from_the_address(self, dump, page, query, shown):
        dom, console = dump(page, "#q=" + query)
        assert console == []
        assert self.visible(dom) == shown and f">{len(shown)} of 2 latents</output>" in dom
        if query.startswith("RIVER"):
            assert re.findall(r'class="t[^"]* hit"[^>]*>([^<]*)<', dom) == [" river", " rose"]
            assert dom.count('class="passage dim"') == 2  # the other passage here, and latent 41's

    def order(self, dom: str) -> list[str]:
        return [attrs["data-latent"] for tag, attrs in Elements(dom).found if tag == "article"]

    @pytest.mark.parametrize(
        ("fragment", "order"),
        [
            ("#sort=density", ["7", "3", "41"]),
            ("#q=river&sort=latent", ["3", "7", "41"]),
        ],
    )
    def test_sorting(self, dump, tmp_path, fragment, order):
        files = contents()
        files["features.json"].append({"latent": 7, "density": 0.3, "max_value": 0.5, "passages": []})
        dom, console = dump(write_report(write_run(tmp_path / "run", files)), fragment)
        assert console == [] and self.order(dom) == order
        assert self.visible(dom) == (order if "q=" not in fragment else ["3"])

    def test_a_link_to_a_latent(self, dump, page):
        dom, console = dump(page, "#latent-41")
        assert console == [] and self.visible(dom) == ["3", "41"]
