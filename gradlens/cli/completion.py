"""`gradlens completion`: what a shell needs to complete commands, options and run directories."""

from __future__ import annotations

import click

EPILOG = """
\b
Put one of these where your shell starts:
  bash: eval "$(gradlens completion bash)"                                  in ~/.bashrc
  zsh:  eval "$(gradlens completion zsh)"                                   in ~/.zshrc
  fish: gradlens completion fish > ~/.config/fish/completions/gradlens.fish
"""


@click.command("completion", short_help="What a shell needs to complete commands.", epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a SHELL."""
    from click.shell_completion import get_completion_class

    from gradlens.cli.app import app

    found = get_completion_class(shell)
    if found is None:
        raise click.ClickException(f"there is no completion for {shell}")
    click.echo(found(app, {}, "gradlens", "_GRADLENS_COMPLETE").source())
