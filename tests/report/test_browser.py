"""The page in a real browser: it opens without an error or a request, sorts, turns dark, fits a phone, prints."""

import importlib.util
import json
import os
import shutil
import struct

import pytest

from idap.errors import ReportError
from idap.report import printing
from idap.report.comparing import compare_page
from idap.report.page import run_page
from idap.report.printing import print_pdf, print_png
from idap.report.reading import read_run
from tests.report.runs import HOSTILE, settings, write_run

PHONE, DESK = 390, 1200
DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: install chromium to test pages")
needs_driver = pytest.mark.skipif(
    DRIVER is None or BROWSER is None or importlib.util.find_spec("selenium") is None,
    reason="no Chromium with its driver and selenium: install chromium, chromium-driver and selenium to test pages",
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    words = ["--headless", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--no-first-run"]
    if os.geteuid() == 0:
        words.append("--no-sandbox")
    for word in words:
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "net")


def show_page(browser, file, text, *, width=DESK, dark=False):
    """Show a page in a window of the given width."""
    file.write_text(text, encoding="utf-8")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(file.as_uri())
    return browser


def requests(browser):
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def column(browser, place):
    script = "return [...document.querySelectorAll('.decisions tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return browser.execute_script(script, place)


def head(browser, name):
    return next(b for b in browser.find_elements("css selector", ".decisions thead button") if name in b.text)


@needs_driver
@pytest.mark.parametrize("page", [run_page, lambda run: compare_page([run, run])], ids=["run", "two"])
def test_it_opens_without_an_error_and_asks_for_nothing(browser, folder, tmp_path, page):
    show_page(browser, tmp_path / "page.html", page(read_run(folder)))
    assert browser.title.endswith("idap")
    assert browser.get_log("browser") == []
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:"))] == []


@needs_driver
def test_what_a_run_is_called_runs_nothing(browser, tmp_path):
    hostile = settings(prefix=HOSTILE) | {"model": HOSTILE, "recipe": {HOSTILE: {HOSTILE: HOSTILE}}}
    run = read_run(write_run(tmp_path / "net", prefix=HOSTILE, **hostile))
    show_page(browser, tmp_path / "page.html", run_page(run))
    assert browser.execute_script("return window.broken") is None
    assert browser.find_elements("css selector", "img") == []
    assert '"><img src=x onerror=' in browser.find_element("css selector", "h1").text
    assert browser.get_log("browser") == []


@needs_driver
def test_a_script_that_is_not_ours_would_not_run(browser, folder, tmp_path):
    text = run_page(read_run(folder)).replace("</main>", "<script>window.broken = true</script></main>")
    show_page(browser, tmp_path / "page.html", text)
    assert browser.execute_script("return window.broken") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


@needs_driver
def test_the_table_is_sorted_by_click_and_by_keyboard(browser, folder, tmp_path):
    from selenium.webdriver.common.keys import Keys

    show_page(browser, tmp_path / "page.html", run_page(read_run(folder)))
    assert column(browser, 0) == ["0", "1", "2", "3", "4"]
    head(browser, "accuracy").click()
    assert column(browser, 0) == ["1", "3", "2", "4", "0"]
    head(browser, "accuracy").send_keys(Keys.ENTER)
    assert column(browser, 0) == ["0", "4", "2", "3", "1"]
    sorts = "return [...document.querySelectorAll('th[aria-sort]')].map(th => th.getAttribute('aria-sort'))"
    assert sorted(set(browser.execute_script(sorts))) == ["descending", "none"]
    head(browser, "stage").send_keys(Keys.SPACE)
    assert column(browser, 1) == ["filters", "filters", "filters", "final", "layers"]
    heads = browser.find_elements("css selector", ".decisions thead th[aria-sort='ascending']")
    assert [found.text.strip() for found in heads] == ["stage"]


@needs_driver
def test_it_is_dark_by_setting_and_by_its_button(browser, folder, tmp_path):
    def ground():
        colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3

    text = run_page(read_run(folder))
    show_page(browser, tmp_path / "page.html", text, dark=True)
    assert ground() < 40
    browser.find_element("id", "theme").click()
    assert ground() > 240
    show_page(browser, tmp_path / "page.html", text)
    assert ground() > 240
    browser.find_element("id", "theme").click()
    assert ground() < 40
    assert browser.find_element("id", "theme").text == "Light"


@needs_driver
@pytest.mark.parametrize("width", [PHONE, 800, DESK])
def test_it_fits_and_its_labels_do_not_overlap(browser, folder, tmp_path, width):
    show_page(browser, tmp_path / "page.html", run_page(read_run(folder)), width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        """return [...document.querySelectorAll('.plot')].map(plot => [...plot.querySelectorAll('text')]
        .map(text => [text.textContent, text.getBoundingClientRect()])
        .filter(([, box]) => box.width).map(([said, b]) => [said, b.left, b.right, b.top, b.bottom]))"""
    )
    assert len(boxes) >= 5
    for plot in boxes:
        assert plot
        for place, (said, left, right, top, bottom) in enumerate(plot):
            assert left >= 0 and right <= width, said
            for other in plot[place + 1 :]:
                apart = right <= other[1] or other[2] <= left or bottom <= other[3] + 2 or other[4] <= top + 2
                assert apart, (said, other[0])


@needs_driver
def test_text_stands_out_from_its_ground(browser, folder, tmp_path):
    """At least 4.5 to 1 for text, as the guidelines for accessible pages ask."""
    script = """
    const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
      return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
      if (c.startsWith('rgb(')) return c; } return 'rgb(255, 255, 255)'; };
    return [...document.querySelectorAll('p, li, dt, dd, th, td, summary, button, code, span, b, h1, h2, h3')]
      .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.offsetParent
        && getComputedStyle(e).opacity === '1')
      .map(e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40)]; })
      .filter(([ratio]) => ratio < 4.5)"""
    for dark in (False, True):
        show_page(browser, tmp_path / "page.html", run_page(read_run(folder)), dark=dark)
        assert browser.execute_script(script) == []


@needs_browser
def test_it_is_printed(folder, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(run_page(read_run(folder)), encoding="utf-8")
    print_pdf(page, tmp_path / "deep" / "net.pdf")
    assert (tmp_path / "deep" / "net.pdf").read_bytes().startswith(b"%PDF-")
    print_png(page, tmp_path / "net.png")
    data = (tmp_path / "net.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width == 2 * printing.WIDTH and height > 3000


def test_without_a_browser_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(printing.shutil, "which", lambda _: None)
    monkeypatch.setattr(printing, "PLACES", ())
    with pytest.raises(ReportError, match=r"none of chromium, .* was found\. Install Chromium, Chrome or Edge"):
        print_pdf(tmp_path / "page.html", tmp_path / "net.pdf")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("#!/bin/sh\necho 'no display' >&2\nexit 3\n", r"wrote no net\.pdf: it ended with 3; no display"),
        ("not a program", "can't be started: "),
        ("#!/bin/sh\nexec sleep 60\n", "did not print .* within 0.2 seconds"),
    ],
)
def test_a_browser_that_fails_is_an_error(tmp_path, monkeypatch, program, message):
    (tmp_path / "browser").write_text(program)
    (tmp_path / "browser").chmod(0o755)
    monkeypatch.setattr(printing, "find_browser", lambda: str(tmp_path / "browser"))
    monkeypatch.setattr(printing, "SECONDS", 0.2 if "sleep" in program else 60)
    with pytest.raises(ReportError, match=message):
        print_pdf(tmp_path / "page.html", tmp_path / "net.pdf")
    assert not (tmp_path / "net.pdf").exists()
