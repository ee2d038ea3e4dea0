"""What all commands share: help, versions, errors with the nearest word, completion, quick starts."""

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import gradlens
from gradlens.cli.app import COMMANDS, app
from tests.cli.helpers import call


def test_every_command_has_help_with_an_example():
    """`gradlens COMMAND --help` explains it; the list names each with a line."""
    listed = CliRunner().invoke(app, ["--help"]).output
    for name in COMMANDS:
        assert name in listed
        output = CliRunner().invoke(app, [name, "--help"]).output
        assert f"gradlens {name}" in output or f"app {name}" in output
        assert len(output.splitlines()) > 6


def test_the_version_is_the_packages():
    """`gradlens --version` says it."""
    assert call("--version").stdout == f"gradlens {gradlens.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reprot", "x"], ["no command 'reprot'", "did you mean 'report'"]),
        (["report", "x", "--fial-on", "error"], ["--fail-on"]),
        (["report", "x", "--fail-on", "warnings"], ["'warning'"]),
    ],
)
def test_a_wrong_word_suggests_the_right_one(arguments, words):
    """Errors of the call exit with 2 and name the nearest word."""
    done = call(*arguments, code=2)
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout


def test_the_help_says_of_each_command_a_whole_sentence():
    """On a terminal of 80 columns none is cut."""
    text = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    commands = text.partition("Commands:")[2].partition("Examples:")[0].strip().splitlines()
    assert [line.split()[0] for line in commands] == list(COMMANDS)
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell):
    """The script completes with the variable that click listens to."""
    assert "_GRADLENS_COMPLETE" in CliRunner().invoke(app, ["completion", shell]).output


def test_commands_are_completed():
    """What bash asks for `gradlens re<TAB>` is `report`."""
    asked = {"_GRADLENS_COMPLETE": "bash_complete", "COMP_WORDS": "gradlens re", "COMP_CWORD": "1"}
    assert call(env=asked).stdout.split() == ["plain,report"]


def test_no_command_imports_torch_or_pandas_to_start():
    """Every command's module is imported without them: the command line starts at once."""
    code = (
        "import sys; from gradlens.cli.app import app, COMMANDS; import click\n"
        "for name in COMMANDS: app.get_command(click.Context(app), name)\n"
        "heavy = {'torch', 'pandas', 'pyarrow', 'tensorboard', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
