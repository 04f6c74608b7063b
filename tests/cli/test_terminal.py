"""Closed outputs, terminals without colours, without arrows, and narrow ones."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idap.cli.failure import Terminal, null_console, settle_streams

pty = pytest.importorskip("pty", reason="pseudo-terminals are for Unix")
COMMAND = [sys.executable, "-m", "idap"]


def on_a_terminal(*words, width=80, answers=b"", **environment):
    """Run the command on a terminal, on which somebody types answers; gives what it shows and its exit code."""
    ours, theirs = pty.openpty()
    keep = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    settings = keep | {"COLUMNS": str(width), "TERM": "xterm-256color"} | environment
    process = subprocess.Popen([*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    os.write(ours, answers)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed: Linux says so with an error
            break
        if not part:
            break
        shown += part
    os.close(ours)
    return shown.decode(), process.wait()


def strip_codes(shown):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r", "")


@pytest.mark.parametrize("words", [["list", "models"], ["list", "models", "--json"], ["--help"]])
def test_a_reader_who_goes_away(words):
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["list", "criteria"], ["list", "modles"]])
def test_a_narrow_terminal_with_colours_and_without(words):
    shown, code = on_a_terminal(*words, width=60)
    assert code == (2 if "modles" in words else 0)
    assert max(map(len, strip_codes(shown).splitlines())) <= 60
    assert "\x1b[" in shown
    plain, _ = on_a_terminal(*words, width=60, NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)
    assert strip_codes(plain) == strip_codes(shown)


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("ascii", ["inspect", "idap:digits_vit"]),
        ("ascii", ["list", "models", "idap"]),
        ("latin-1", ["list", "criteria"]),
        ("ascii", ["--help"]),
    ],
)
def test_an_encoding_without_arrows(words, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([*COMMAND, *words], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "?" not in done.stdout.decode(encoding)


def test_letters_that_stand_for_others(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    settle_streams()
    stream.write("accuracy −0.5 → ≤ 0.9 · ä\n")
    assert stream.buffer.getvalue() == b"accuracy -0.5 > < 0.9 | ?\n"


def test_a_console_tells_of_a_closed_pipe():
    with pytest.raises(BrokenPipeError):
        Terminal(file=io.StringIO()).on_broken_pipe()
    null_console().print("nothing")


def test_output_in_a_file_has_no_colours(tmp_path):
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run([*COMMAND, "list", "criteria", "-v"], stdout=file, stderr=file, check=False)
    assert done.returncode == 0
    assert "\x1b" not in (tmp_path / "out").read_text() and "innovation" in (tmp_path / "out").read_text()


@pytest.fixture
def interruptible():
    """Programs that are started heed Ctrl-C, also where the tests run as a background job that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals are those of Unix")
def test_a_real_interruption(tmp_path, interruptible):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom pathlib import Path\ndef build():\n    Path('started').touch()\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [*COMMAND, "inspect", "python:slow.py:build", "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    ) as process:
        for _ in range(600):
            if (tmp_path / "started").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    assert process.returncode == 130
    assert errors.decode() == "\nStopped. Nothing was written.\n"
    assert b"KeyboardInterrupt" in out
