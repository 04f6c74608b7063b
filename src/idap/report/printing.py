"""Print a page as a PDF or a picture, with an installed browser of the Chromium family.

The browser prints the page as people see it, with vectors in the PDF. With a plotting library, every chart would have a
second, different implementation.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from idap.errors import ReportError

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
QUIET = (
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
)
WIDTH, TALLEST = 1100, 16000
"""Width and largest height of a picture, in pixels."""
SECONDS = 120
"""The time that a browser may take, in seconds."""


def find_browser() -> str:
    """Find an installed browser that can print.

    Returns:
        The path of its program.

    Raises:
        ReportError: there is none.
    """
    for name in NAMES:
        found = shutil.which(name)
        if found is not None:
            return found
    for place in PLACES:
        if Path(place).is_file():
            return place
    raise ReportError(
        f"printing a page needs a browser, and none of {', '.join(NAMES)} was found. Install Chromium, Chrome or Edge, "
        "or open the page in any browser and print it there."
    )


def print_pdf(page: Path, file: Path) -> None:
    """Print a page as an A4 PDF with vector graphics and searchable text.

    Args:
        page: an HTML file.
        file: the PDF; an existing file is replaced.

    Raises:
        ReportError: there is no browser, it failed, or the file can't be written.
    """
    _print(page, file, ["--no-pdf-header-footer"], "--print-to-pdf")


def print_png(page: Path, file: Path) -> None:
    """Print a whole page as one picture, with twice the usual resolution if it is not too long.

    Args:
        page: an HTML file.
        file: the PNG; an existing file is replaced.

    Raises:
        ReportError: there is no browser, it failed, the file can't be written, or the page is too long.
    """
    html = _run(page, [f"--window-size={WIDTH},1000", "--dump-dom"]).stdout.decode(errors="replace")
    measured = re.search(r'<html[^>]* data-height="(\d+)"', html)
    if measured is None:
        raise ReportError(f"the browser did not measure the height of {page}; print it as a PDF instead.")
    height = int(measured[1])
    if height > TALLEST:
        raise ReportError(f"{page} is {height:,} pixels high, the limit is {TALLEST:,}; print it as a PDF instead.")
    scale = 2 if 2 * height <= TALLEST else 1
    size = [f"--window-size={WIDTH},{height}", f"--force-device-scale-factor={scale}"]
    _print(page, file, size, "--screenshot")


def _print(page: Path, file: Path, options: Sequence[str], what: str) -> None:
    with tempfile.TemporaryDirectory(prefix="idap-print-") as folder:
        made = Path(folder) / file.name
        done = _run(page, [*options, f"{what}={made}"])
        if not made.is_file() or not made.stat().st_size:
            last_line = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise ReportError(
                f"the browser wrote no {file.name}: it ended with {done.returncode}; {' '.join(last_line)}"
            )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, file)
        except OSError as error:
            raise ReportError(f"cannot write {file}: {error}") from error


def _run(page: Path, options: Sequence[str]) -> "subprocess.CompletedProcess[bytes]":
    """Open a page in a browser with a temporary profile."""
    browser = find_browser()
    # As root, the browser does not start with its sandbox. The page is our own and loads nothing.
    root = ["--no-sandbox"] if sys.platform == "linux" and os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="idap-browser-", ignore_cleanup_errors=True) as profile:
        words = [browser, *QUIET, *root, f"--user-data-dir={profile}", *options, f"{page.resolve().as_uri()}#picture"]
        try:
            return subprocess.run(words, capture_output=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise ReportError(f"{browser} did not print {page} within {SECONDS} seconds.") from error
        except OSError as error:
            raise ReportError(f"{browser} can't be started: {error}") from error
