"""Which folder a run of the command line gets, claimed before any work is done."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from idap.errors import RunFolderError
from idap.files import numbered
from idap.record import RunFolder


@contextmanager
def claimed_folder(wanted: Path | None, name: str, *, resume: bool) -> Iterator[RunFolder]:
    """Choose and claim the run folder before any work is done; of several processes, process 0 does so for all."""
    from idap.training.processes import on_main  # noqa: PLC0415 - torch is slow to import

    mine: list[RunFolder] = []

    def choose() -> Path:
        mine.append(_chosen(wanted, name, resume=resume))
        return mine[0].path

    try:
        path = on_main(choose)
        yield mine[0] if mine else RunFolder(path)
    finally:
        for folder in mine:
            folder.release()


def _chosen(wanted: Path | None, name: str, *, resume: bool) -> RunFolder:
    """The run folder, claimed; without a wish the first free one of `runs/`.

    To go on with a run, without a wish the last one of `runs/` that has the name.
    """
    first = Path("runs") / name
    if wanted is None and resume:
        wanted = _last(first)
    if wanted is None:
        return RunFolder.claim_free(first)
    folder = RunFolder(wanted)
    if not resume:
        folder.check()  # says what is wrong before anything is made
    folder.claim()
    if not resume and folder.original.exists():
        folder.release()
        raise RunFolderError(
            f"{wanted} holds an original that was trained for a run which was stopped before it began. Go on with it: "
            "--resume; or choose another folder."
        )
    return folder


def _last(first: Path) -> Path | None:
    """The last folder of NAME, NAME-2, NAME-3, ... that is there."""
    last = None
    for each in numbered(first):
        if not each.exists():
            return last
        last = each
    return last
