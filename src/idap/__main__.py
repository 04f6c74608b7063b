"""`python -m idap`: the same as the `idap` command."""

from idap.cli.main import run

if __name__ == "__main__":
    run()
