"""`idap completion`: print the completion script of a shell, and prepare the parser for its requests."""

import os
from pathlib import Path

import typer

from idap.cli.failure import Outcome
from idap.cli.options import Debug, Json, ShellName
from idap.errors import ConfigError

EXAMPLES = ("idap completion bash", "idap completion zsh")
DOCUMENT = {"shell": "name of the shell", "script": "its completion script"}
SHELLS = ("bash", "zsh", "fish")
BASH = """\
_idap_completion() {
    # Split what was typed up to the cursor at spaces only: bash itself would split idap:digits_vit into three words.
    local IFS=$' \\t\\n' line=${COMP_LINE:0:COMP_POINT} words index reply
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && index=${#words[@]} || index=$((${#words[@]} - 1))
    IFS=$'\\n'
    COMPREPLY=($(COMP_WORDS="$line" COMP_CWORD=$index _IDAP_COMPLETE=complete_bash "$1"))
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/] ]]; then compopt -o nospace; fi
    if [[ $COMP_WORDBREAKS == *:* && ${words[index]} == *:* ]]; then
        reply=${words[index]%:*}:
        COMPREPLY=("${COMPREPLY[@]#"$reply"}")
    fi
}
complete -o default -F _idap_completion idap
"""


def completion_command(shell: ShellName = None, *, as_json: Json = False, debug: Debug = False) -> None:
    """Print the script that completes commands, options and names in a shell.

    For bash, add to ~/.bashrc: eval "$(idap completion bash)". For zsh, add to ~/.zshrc, below compinit:
    eval "$(idap completion zsh)". For fish: idap completion fish > ~/.config/fish/completions/idap.fish. If no shell
    is given, the one in $SHELL is used.
    """
    outcome = Outcome(command="idap completion", where=shell or "$SHELL", as_json=as_json, debug=debug)
    with outcome.report():
        chosen = shell or Path(os.environ.get("SHELL", "")).name
        if chosen not in SHELLS:
            raise ConfigError(
                f"there is no completion script for {chosen or 'no shell'!r}; name one of {', '.join(SHELLS)}."
            )
        outcome.document = {"shell": chosen, "script": script(chosen)}
        if not as_json:
            typer.echo(script(chosen))


def script(shell: str) -> str:
    """The completion script of a shell."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # noqa: PLC0415 - seldom needed

    if shell == "bash":
        return BASH
    return f"{get_completion_script(prog_name='idap', complete_var='_IDAP_COMPLETE', shell=shell)}\n"


def prepare() -> None:
    """Make the parser answer the requests of the completion scripts."""
    from typer.completion import completion_init  # type: ignore[attr-defined]  # noqa: PLC0415 - seldom needed

    completion_init()
