"""The command starts fast: torch is imported when a command runs, not to show help."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_import_torch(words):
    code = (
        "import sys\nfrom idap.cli.main import run\nsys.argv = ['idap', *sys.argv[1:]]\n"
        "try:\n    run()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "heavy = {'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "idap", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage: idap" in done.stdout
