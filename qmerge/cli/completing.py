"""What does a shell offer while a command is typed, and how does it learn to? By click's own mechanism; values are offered, never checked, here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from qmerge.cli.output import QuietCommand, result, say

if TYPE_CHECKING:
    ParamType = click.ParamType[str]
else:  # generic since click 8.5 only
    ParamType = click.ParamType
VARIABLE = "_QMERGE_COMPLETE"
"""the environment variable by which the shell's function asks; click derives it from the command's name"""
SHELLS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/qmerge.fish"}
"""shell -> the file that it reads at its start"""


class Offered(ParamType):
    """Text like any other, with words that are offered; ``files``: or files, where no word begins so."""

    name = "text"

    def __init__(self, words: Callable[[], Iterable[object]] = tuple, files: bool = False) -> None:
        self.words, self.files = words, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        fitting = [CompletionItem(str(word)) for word in self.words() if str(word).startswith(incomplete)]
        return fitting or ([CompletionItem(incomplete, type="file")] if self.files else [])


PLACE = Offered(files=True)


def words_of(setting: str) -> Offered:
    """The values that a setting of recipes may take."""

    def words() -> Iterable[object]:
        from qmerge.pipeline.recipe_values import POLISH, WORDS

        return POLISH if setting == "polish" else WORDS[setting]

    return Offered(words)


BUDGET = Offered(lambda: ("strict", "default", "lenient"), files=True)


@click.command("completion", cls=QuietCommand, short_help="Let bash, zsh or fish complete commands and options.",
               example='echo \'eval "$(qmerge completion bash)"\' >> ~/.bashrc\nqmerge completion fish > ~/.config/fish/completions/qmerge.fish')  # fmt: skip
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(list(SHELLS)))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the lines by which a shell learns to complete commands, options, their values and files."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    root: Any = context.find_root().command
    result(kind(root, {}, "qmerge", VARIABLE).source().rstrip("\n"))
    say(f"Next: put them into {SHELLS[shell]} (see --help), then open a new shell")
