"""Where do results and talk go? Results to stdout, everything else to stderr.

Talk that nobody can hear any more (a closed terminal, a full disk behind ``2>``) ends no work. A result that cannot be given away is an error, and says that the work is done.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
from typing import Any, TextIO

import click

from qmerge.cli.helping import HelpfulCommand
from qmerge.errors import QmergeError, UsageProblem, printable


class Streams:
    """The terminal's own streams, kept for qmerge, while what libraries print on import and on loading goes to ``talk``.

    Their banners and bars would drown the result, and some print to stdout. ``talk`` is shown where a run ends in an error that is not one of ours.
    """

    def __init__(self) -> None:
        self.out, self.err, self.talk = sys.stdout, sys.stderr, io.StringIO()

    def keep(self) -> None:
        sys.stdout = sys.stderr = self.talk

    def mute(self) -> None:
        """Say nothing at all: another process talks for this one."""
        self.out = self.err = self.talk

    def restore(self) -> None:
        sys.stdout, sys.stderr = self.out, self.err


class QuietCommand(HelpfulCommand):
    """A command whose body runs with the libraries' talk kept away; its parsing and its ``--help`` do not."""

    def invoke(self, ctx: click.Context) -> Any:
        _refuse_empty(ctx)
        if kept := ctx.find_object(Streams):
            kept.keep()
        return super().invoke(ctx)


def _refuse_empty(ctx: click.Context) -> None:
    """``--baseline "$ACCEPTED"`` with a variable that is not set must not be a gate without a baseline."""
    for parameter in ctx.command.params:
        given = ctx.params.get(parameter.name)
        if ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE and ("" in given if isinstance(given, tuple) else given == ""):
            name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(ctx)
            raise UsageProblem("an empty value was given", where=name, expected="a value, or no such option", found="''", fix="is a shell variable not set?")


def streams() -> tuple[TextIO, TextIO]:
    """Where results go, and where talk goes."""
    context = click.get_current_context(silent=True)
    kept = context.find_object(Streams) if context else None
    return (kept.out, kept.err) if kept else (sys.stdout, sys.stderr)


def result(text: str) -> None:
    """A line of what was asked for. Names of strangers' files in it reach no terminal as commands, here and below."""
    try:
        click.echo(printable(text), file=streams()[0])
    except OSError as problem:
        if problem.errno == errno.EPIPE:  # the reader went away, as `head` does
            raise
        raise QmergeError("the result cannot be written to standard output", found=problem.strerror, fix="look at where standard output goes; the work is done and need not be done again",
                          written="every file that this command writes") from problem


def result_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    result(text if printable(text) == text else json.dumps(value, indent=2, default=str))


def coloured(word: str, colour: str) -> str:
    """For a terminal; plain where NO_COLOR is set to anything (no-color.org). Off a terminal click takes colours away by itself."""
    return word if os.environ.get("NO_COLOR") else click.style(word, fg=colour)


def say(text: str) -> None:
    talk(printable(text))


def warn(text: str) -> None:
    talk(f"{coloured('warning', 'yellow')}: {printable(text)}")


def talk(text: str, newline: bool = True) -> None:
    """On stderr, if anybody is there."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        click.echo(text, file=streams()[1], nl=newline)
