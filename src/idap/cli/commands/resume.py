"""`idap resume`: go on with a run that was stopped, from what its folder holds."""

import typer

from idap.cli.commands.compress import DOCUMENT, compress_recipe
from idap.cli.failure import GOAL_MISSED, Outcome
from idap.cli.options import Debug, Json, Quiet, RunToResume, TensorBoardDir, Trust, Verbose
from idap.cli.subject import check_code
from idap.errors import ConfigError, RunFolderError
from idap.record import RUN, RunFolder

__all__ = ["DOCUMENT", "EXAMPLES", "resume_command"]

EXAMPLES = ("idap resume runs/digits_resnet",)


def resume_command(
    run: RunToResume,
    *,
    tensorboard: TensorBoardDir = None,
    trust: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped or killed.

    The folder holds the recipe of the run: model, data, goals and settings. Decisions that were taken are read back,
    not taken again, and the result is that of a run that was not stopped. For a finished run, the result is shown
    again. If the run was made elsewhere and its recipe names Python code, the command asks before it runs that code.
    """
    outcome = Outcome(
        command="idap resume", where=str(run), as_json=as_json, quiet=quiet, verbose=verbose, debug=debug, run_dir=run
    )
    with outcome.report():
        if not (run / RUN).is_file():
            trained = RunFolder(run).original.is_file()
            what = "only an original that was trained for it" if trained else "so there is nothing to go on with"
            begin = f"idap compress RECIPE --run-dir {run}{' --resume' if trained else ''}"
            raise RunFolderError(f"{run} holds no run ({RUN}), {what}; begin one with {begin}.")
        from idap.recipes.runs import recipe_of_run, settings_of_run  # noqa: PLC0415 - torch is slow to import
        from idap.training.processes import join_processes, on_main  # noqa: PLC0415 - as above

        if "recipe" not in settings_of_run(run):
            raise ConfigError(
                f"{run} was begun from Python and has no recipe; go on there: idap.compress(model, task, config, "
                f"run_dir={str(run)!r}, resume=True)."
            )
        recipe = recipe_of_run(run)
        with join_processes():
            on_main(lambda: check_code(outcome, run, {}, trust=trust))
            reached = compress_recipe(outcome, recipe, run, resume=True, tensorboard=tensorboard)
    if not reached:
        raise typer.Exit(GOAL_MISSED)
